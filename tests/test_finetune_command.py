"""`python -m ftp finetune` on a folder of generated images: its files, its errors, and that it goes on after it was killed."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ftp.cli import app
from ftp.finetuning import Result

ROOT = Path(__file__).parent.parent
SHADES = {"bright": 200, "dark": 60, "middle": 130}
MODULE = """
import torch

def net():
    torch.manual_seed(0)
    stem = torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    model = torch.nn.Sequential(*stem, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 10))
    model.input_size = 8
    return model
"""


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None) -> None:
    torch.set_default_dtype(torch.float32)


def images(folder: Path, count: int, classes: Any = tuple(SHADES)) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = Image.effect_noise((12, 12), 40).point(lambda value, name=name: value + SHADES[name] - 128)
            noise.convert("RGB").save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("command")
    for part, count in (("train", 8), ("val", 4), ("test", 4), ("test_far", 3)):
        images(base / "data" / part, count)
    images(base / "more", 3, ("bright", "dark"))
    (base / "mine.py").write_text(MODULE)
    return base


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return folder


def run(*arguments: str, data: str = "data", out: str | Path = "out") -> tuple[int, str]:
    settings = ["--epochs", "3", "--batch-size", "6", "--lr", "1e-2", "--corruptions", "fog,contrast", "--out", str(out)]
    result = CliRunner().invoke(app, ["finetune", data, "--model", "mine:net", *settings, *arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_one_command_leads_from_a_folder_to_a_report(here: Path, tmp_path: Path) -> None:
    arguments = "--compare", "full,ftp", "--test", "more=more"
    code, output = run(*arguments, out=tmp_path)
    assert code == 0, output
    for word in (
        "3 classes; images: train 24, validation 12, test 12, test_far 9, more 6",
        "full",
        "ftp",
        "test (ID)",
        "mean of corruptions",
    ):
        assert word in output
    results = [Result.load(tmp_path / method) for method in ("full", "ftp")]
    assert [result.method for result in results] == ["full", "ftp"]
    corruptions = [
        f"{test}/{name}/{severity}" for test in ("test", "test_far", "more") for name in ("fog", "contrast") for severity in range(1, 6)
    ]
    for result in results:
        assert list(result.classes) == sorted(SHADES)
        assert list(result.evaluations) == ["validation", "test", "test_far", "more", *corruptions]
        assert len(result.epochs) == 4
        assert result.evaluations["more"].labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert result.command.startswith("python -m ftp")
    assert max(entry.validation_accuracy for entry in results[1].epochs) > 0.5
    assert load_file(tmp_path / "ftp" / "model.safetensors")["6.weight"].shape == (3, 8)
    assert len((tmp_path / "ftp" / "epochs.csv").read_text().splitlines()) == 5
    assert "<html" in (tmp_path / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert run(*arguments, out=tmp_path)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == before


def test_several_seeds_have_folders_of_their_own(here: Path, tmp_path: Path) -> None:
    code, _ = run("--seeds", "2", "--seed", "3", "--epochs", "1", "--corruptions", "none", out=tmp_path)
    assert code == 0
    assert [Result.load(tmp_path / f"seed-{seed}").seed for seed in (3, 4)] == [3, 4]
    first, second = (json.loads((tmp_path / f"seed-{seed}" / "result.json").read_text())["arguments"] for seed in (3, 4))
    assert {name for name in first if first[name] != second[name]} == {"seed"}


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ([], "none", "none: there is no such folder"),
        ([], "data/train/dark", "data/train/dark has images, but no folder of images for each class"),
        ([], "one", "one has images of one class, 'dark'"),
        ([], "corrupt", "images cannot be read: corrupt/train/dark/0.png (cannot identify image file)"),
        (["--test", "far=unknown"], "data", "unknown has classes that training lacks: 'other'"),
        (["--test", "far"], "data", "--test 'far' must be NAME=DIR"),
        (["--out", "mine.py/out"], "data", "out='mine.py/out' cannot be written to: Not a directory"),
        (["--checkpoint", "other.safetensors"], "data", "checkpoint='other.safetensors' is of another model: it has no '0.bias'"),
        (["--exclude", "stem.*"], "data", "exclude: 'stem.*' matches none of the 6 parameters"),
        (["--corruptions", "rain"], "data", "corruption 'rain' is unknown"),
        (["--method", "magic"], "data", "method='magic' must be one of full"),
        (["--compare", "full,magic"], "data", "method='magic' must be one of full"),
        (["--compare", "full,ftp", "--strength", "1"], "data", "strength=1.0: the method 'full' has none"),
        (["--device", "abacus"], "data", "device='abacus' cannot be used"),
        (["--model", "resnet18"], "data", "model='resnet18' needs timm or torchvision"),
    ],
)
def test_bad_input_is_refused_before_training(arguments: list[str], data: str, message: str, here: Path, tmp_path: Path) -> None:
    if not (here / "one").exists():
        images(here / "one", 3, ("dark",))
        images(here / "unknown" / "other", 1, ("dark",))
        for part in ("train", "val"):
            images(here / "corrupt" / part, 3)
        (here / "corrupt" / "train" / "dark" / "0.png").write_bytes(b"no image")
        save_file({"0.weight": torch.zeros(8, 3, 3, 3)}, here / "other.safetensors")
    code, output = run(*arguments, data=data, out=tmp_path / "out")
    assert code == 1
    assert f"Error: {message}" in output
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_run_with_other_arguments_is_refused(here: Path, tmp_path: Path) -> None:
    assert run("--epochs", "1", out=tmp_path)[0] == 0
    for arguments, message in ((["--epochs", "2"], "epochs=1, and not 2"), (["--size", "10"], "train='24 images of train"), ([], "epochs")):
        code, output = run(*arguments, out=tmp_path)
        assert code == 1
        assert message in output


def test_a_loss_that_is_not_finite_keeps_the_weights_before(here: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not finite"):
        code, output = run("--lr", "1e30", "--optimizer", "sgd", "--method", "full", out=tmp_path)
    assert code == 0
    assert "full, seed 0: the loss is not finite in epoch 1" in output
    assert all(value.isfinite().all() for value in load_file(tmp_path / "model.safetensors").values())


def test_a_full_disk_is_told_and_the_run_goes_on_later(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        code, output = run(out=tmp_path)
    assert code == 1
    assert "cannot be written: No space left on device. What was there before is whole: start again with the same arguments" in output
    assert (tmp_path / "checkpoint" / "state.pt").exists()
    assert run(out=tmp_path)[0] == 0
    assert run(out=tmp_path.parent / "whole")[0] == 0
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path.parent / "whole" / "model.safetensors").read_bytes()


def test_a_command_that_is_killed_at_random_moments_goes_on_bitwise(folder: Path, tmp_path: Path) -> None:
    def start(out: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "ftp",
            "finetune",
            "data",
            "--model",
            "mine:net",
            "--epochs",
            "40",
            "--batch-size",
            "6",
            "--lr",
            "1e-2",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, "--corruptions", "fog", "--out", str(tmp_path / out)], cwd=folder, env=environment)

    whole = start("whole")
    state, moments, killed = tmp_path / "killed" / "checkpoint" / "state.pt", random.Random(), 0
    while killed < 5:
        process, changes, last = start("killed"), moments.randrange(1, 7), -1
        while changes and process.poll() is None:
            now = state.stat().st_mtime_ns if state.exists() else -1
            changes, last = changes - (now != last), now
            time.sleep(0.001)
        time.sleep(moments.random() / 50)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed += 1
    assert (start("killed").wait(), whole.wait()) == (0, 0)
    for name in ("model.safetensors", "predictions.pt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_help_names_every_setting() -> None:
    text = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for option in (
        "--model",
        "--method",
        "--compare",
        "--test",
        "--corruptions",
        "--checkpoint",
        "--freeze-norm",
        "--precision",
        "--seeds",
    ):
        assert option in text


@pytest.mark.parametrize("module", ["PIL", "matplotlib", "rich", "safetensors", "typer"])
def test_a_missing_package_is_named_with_its_extra(module: str, here: Path, tmp_path: Path) -> None:
    arguments = ["ftp", "finetune", "data", "--model", "mine:net", "--out", str(tmp_path / "out")]
    hidden = f"import sys; sys.modules[{module!r}] = None; sys.argv = {arguments}; from ftp.__main__ import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 1
    name = {"PIL": "pillow"}.get(module, module)
    assert f'{name} is not installed: pip install "hyperopt-nested[finetune]"' in found.stdout + found.stderr
