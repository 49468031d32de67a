"""examples/domainnet on a small tree of images with image lists: its runs, their continuation, errors, and the conversion of weights."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from ftp.finetuning import Result
from ftp.finetuning.models import load_weights

FOLDER = Path(__file__).parent.parent / "examples" / "domainnet"
CLASSES = {"aircraft_carrier": (200, 40, 40), "dog": (40, 200, 40), "t-shirt": (40, 40, 200)}
FACTORY = """
import torch

def network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5)
    )
    model.input_size = 12
    return model
"""


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None) -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def domainnet(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("domainnet")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data, below the present folder, which has a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "domainnet_network.py").write_text(FACTORY)
    folder = tmp_path / "data"
    for domain, part, count in [("real", "train", 10), ("real", "test", 2), ("sketch", "test", 3), ("clipart", "test", 1)]:
        lines = []
        for label, (name, color) in enumerate(CLASSES.items()):
            for number in range(count):
                path = f"{domain}/{name}/{domain}_{label + 1:03}_{part}{number}.jpg"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                image = Image.new("RGB", (20 + number, 24), color)
                (image.convert("L") if domain == "clipart" else image).save(folder / path)
                lines.append(f"{path} {label}\n")
        (folder / f"{domain}_{part}.txt").write_text("".join(lines))
    return folder


def run(domainnet: Any, *arguments: str) -> tuple[int, str]:
    own = ["data", "--model", "domainnet_network:network", "--shifts", "sketch,clipart", "--workers", "0", "--device", "cpu"]
    done = CliRunner().invoke(domainnet.app, [*own, "--epochs", "8", "--batch-size", "9", *arguments])
    return done.exit_code, done.output


def test_methods_are_compared_with_the_settings_of_the_paper(domainnet: Any, data: Path) -> None:
    code, output = run(domainnet, "--methods", "linear-probe,full,ftp", "--lr", "0.1", "--out", "results")
    assert code == 0, output
    assert "3 classes; images: train 27, validation 3, test 6, sketch 9, clipart 3" in output
    assert re.search(
        r"method .*validation .*test \(ID\) .*sketch .*clipart .*mean of shifts(.*\n)+.*linear-probe.*\n.*full.*\n.*ftp", output
    )
    assert "Report: results/report.html" in output
    assert Path("results/report.html").exists()
    result = Result.load(Path("results/ftp"))
    expected = {"optimizer": "sgd", "lr": 0.1, "head_lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "warmup": 0.0, "freeze_norm": False}
    assert result.settings.items() >= expected.items()
    assert list(result.classes) == list(CLASSES)
    assert list(result.evaluations) == ["validation", "test", "sketch", "clipart"]
    assert result.epochs[-1].radii["radius/0.weight"] > 1e-3
    assert max(entry.validation_accuracy for entry in result.epochs) > 0.9


def test_a_run_goes_on_after_a_broken_image_is_replaced(domainnet: Any, data: Path) -> None:
    whole, broken = data / "sketch/dog/sketch_002_test1.jpg", b"no image"
    content = whole.read_bytes()
    whole.write_bytes(broken)
    code, output = run(domainnet, "--out", "stopped")
    assert code == 1
    assert re.search(r"Error: data/sketch/dog/sketch_002_test1.jpg cannot be read \(.*\): replace it, or remove its line", output)
    whole.write_bytes(content)
    code, output = run(domainnet, "--out", "stopped")
    assert code == 0
    assert "epoch 1" not in output  # they are behind it
    assert run(domainnet, "--out", "whole")[0] == 0
    assert Path("stopped/ftp/model.safetensors").read_bytes() == Path("whole/ftp/model.safetensors").read_bytes()
    code, output = run(domainnet, "--out", "whole", "--percent", "50")
    assert (code, "holds a run with train=" in output) == (1, True)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda data: (data / "sketch_test.txt").unlink(), (), r"data/sketch_test.txt: there is no such image list; README.md says where"),
        (
            lambda data: (data / "real/dog/real_002_train3.jpg").unlink(),
            (),
            r"data/real_train.txt names real/dog/real_002_train3.jpg, which is not there \(1 of 30 are missing\): unpack real.zip in data",
        ),
        (lambda data: (data / "clipart_test.txt").write_text(""), (), r"data/clipart_test.txt names no images"),
        (
            lambda data: (data / "real_test.txt").write_text("real/dog/real_002_test0.jpg 1\nreal/dog/real_002_test1.jpg\n"),
            (),
            r"real_test.txt, line 2: 'real/dog/real_002_test1.jpg' is not a path and a label",
        ),
        (
            lambda data: (data / "sketch_test.txt").write_text("sketch/dog/sketch_002_test0.jpg 7\n"),
            (),
            r"sketch/dog/sketch_002_test0.jpg has the label 7; training has 3 classes",
        ),
        (
            lambda data: (data / "real_train.txt").write_text("real/dog/real_002_train0.jpg 0\nreal/t-shirt/real_003_train0.jpg 0\n"),
            (),
            r"label 0 is 'dog' and 't-shirt'",
        ),
        (
            lambda data: (data / "real_train.txt").write_text("real/dog/real_002_train0.jpg 1\nreal/dog/real_002_train1.jpg 1\n"),
            (),
            r"no training image has the label 0, though there is a label 1",
        ),
        (
            lambda data: (data / "real_train.txt").write_text("real/dog/real_002_train0.jpg 0\n"),
            (),
            r"the class 'dog' has one training image",
        ),
        (None, ("--percent", "0"), r"percent=0.0 must be above 0, and at most 100"),
        (None, ("--percent", "10", "--validation-list", "real_test.txt"), r"percent=10 with a list for validation"),
        (None, ("--methods", "full,best"), r"method='best' must be one of full, "),
        (None, ("--model", "clip-resnet50"), r"clip-resnet50 needs --checkpoint, the file of its weights"),
        (None, ("--model", "moco-v3-resnet50", "--checkpoint", "none.tar"), r"checkpoint='none.tar': there is no such file"),
        (None, ("--model", "moco-v3-resnet50", "--checkpoint", "data/real_test.txt"), r"is no file of moco-v3-resnet50: "),
    ],
)
def test_bad_input_is_named_before_training(domainnet: Any, data: Path, change: Any, arguments: tuple[str, ...], message: str) -> None:
    if change is not None:
        change(data)
    code, output = run(domainnet, *arguments)
    assert code == 1
    assert re.search(f"Error: .*{message}", output), output
    assert "epoch" not in output


def test_a_share_of_each_class_is_split_for_training_and_validation(domainnet: Any) -> None:
    entries = [
        domainnet.Entry(f"real/{name}/{i}.jpg", label)
        for label, (name, count) in enumerate({"a": 40, "b": 4}.items())
        for i in range(count)
    ]
    for percent, expected in ((100, [36, 3, 4, 1]), (50, [18, 1, 2, 1]), (1, [1, 1, 1, 1])):
        parts = domainnet.split(entries, percent, 0)
        assert [sum(entry.label == label for entry in part) for part in parts for label in (0, 1)] == expected
        assert not {*parts[0]} & {*parts[1]}
    assert domainnet.split(entries, 50, 0) == domainnet.split(entries, 50, 0) != domainnet.split(entries, 50, 1)


def test_random_boxes_lie_in_the_image(domainnet: Any) -> None:
    for width, height in [(30, 20), (20, 300), (7, 7)]:
        for _ in range(50):
            left, top, right, bottom = domainnet.random_box(width, height)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            if width == 30:
                assert 0.079 < (right - left) * (bottom - top) / (width * height) <= 1
                assert 0.749 < (right - left) / (bottom - top) < 1.334
    assert domainnet.center_box(30, 20, 0.8) == (7, 2, 23, 18)


class Clip(nn.Module):
    """As in CLIP's file: an image encoder next to what is for text."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual, self.text_projection = visual, nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x) * self.text_projection.sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_of_clip_and_moco_are_converted(domainnet: Any, tmp_path: Path) -> None:
    network = importlib.import_module("clip_resnet").ClipResNet
    with torch.device("meta"):
        counts = {name: p.numel() for name, p in network().named_parameters()}
    assert sum(counts.values()) - counts["head.weight"] - counts["head.bias"] == 38_316_896  # as CLIP's image encoder has
    small = {"layers": (1, 2), "width": 8, "heads": 2, "features": 6, "size": 16, "classes": 3}
    theirs, own = network(**small).eval(), network(**small).eval()
    theirs.head, x = nn.Identity(), torch.randn(2, 3, 16, 16)
    torch.jit.trace(Clip(theirs), x).save(tmp_path / "RN50.pt")
    load_weights(own, domainnet.convert("clip-resnet50", tmp_path / "RN50.pt", tmp_path / "out"), "head")
    torch.testing.assert_close(own(x), own.head(theirs(x)))
    state = {"module.base_encoder.conv1.weight": x.half(), "module.base_encoder.fc.0.weight": x, "module.momentum_encoder.conv1.weight": x}
    torch.save({"state_dict": state, "arch": "resnet50", "epoch": 1000}, tmp_path / "moco.tar")
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, 2, 16, bias=False))
    model.add_module("fc", nn.Linear(2, 3))
    load_weights(model, domainnet.convert("moco-v3-resnet50", tmp_path / "moco.tar", tmp_path / "out"), "fc")
    torch.testing.assert_close(model[0].weight.data, x.half().float())
    with pytest.raises(ValueError, match=r"is no file of clip-resnet50: "):
        domainnet.convert("clip-resnet50", tmp_path / "moco.tar", tmp_path)


def test_the_readme_names_options_that_there_are(domainnet: Any) -> None:
    named = {*re.findall(r"--[a-z][a-z-]+", (FOLDER / "README.md").read_text())}
    listed = {*re.findall(r"--[a-z][a-z-]+", CliRunner().invoke(domainnet.app, ["--help"], terminal_width=200).output)}
    assert named
    assert named <= listed
