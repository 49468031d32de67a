"""Folders of images, and models by name: what is read, and what is refused with which message."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from ftp.finetuning import folders, models
from ftp.finetuning.batches import Batches
from ftp.finetuning.heads import Preprocessing
from ftp.finetuning.images import Corrupted, Images, decode


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None) -> None:
    torch.set_default_dtype(torch.float32)


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(labeled: folders.Labeled) -> list[str]:
    return [f"{file.relative_to(labeled.folder)} {label}" for file, label in zip(labeled.files, labeled.labels, strict=True)]


def test_folders_of_sets_are_read(tmp_path: Path) -> None:
    files(tmp_path, "train/cat/a.png", "train/cat/more/b.JPG", "train/dog/c.png", "train/dog/.hidden.png", "train/dog/notes.txt")
    files(tmp_path, "valid/cat/d.png", "test/dog/e.png", "test_sketch/cat/f.webp", "other/cat/g.png", "../extra/dog/h.png")
    splits = folders.read(tmp_path, {"far": tmp_path.parent / "extra"})
    assert splits.classes == ("cat", "dog")
    assert names(splits.train) == ["cat/a.png 0", "cat/more/b.JPG 0", "dog/c.png 1"]
    assert names(splits.validation) == ["cat/d.png 0"]
    assert {name: names(labeled) for name, labeled in splits.tests.items()} == {
        "test": ["dog/e.png 1"],
        "test_sketch": ["cat/f.webp 0"],
        "far": ["dog/h.png 1"],
    }


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_other_folders_are_split_by_class(prefix: str, tmp_path: Path) -> None:
    files(tmp_path, *(f"{prefix}{kind}/{i}.png" for kind, count in (("a", 20), ("b", 40), ("c", 3)) for i in range(count)))
    splits = folders.read(tmp_path, seed=1)
    parts = [splits.train, splits.validation, *splits.tests.values()]
    counts = [[part.labels.count(label) for label in range(3)] for part in parts]
    assert counts == ([[17, 34, 2], [3, 6, 1]] if prefix else [[14, 28, 1], [3, 6, 1], [3, 6, 1]])
    assert len({name for part in parts for name in names(part)}) == 63
    assert folders.read(tmp_path, seed=1) == splits != folders.read(tmp_path, seed=2)


@pytest.mark.parametrize(
    ("present", "error", "message"),
    [
        (None, FileNotFoundError, "data: there is no such folder"),
        ([], ValueError, "data has no images .* in folders of classes"),
        (["cat/notes.txt", "dog/notes.txt"], ValueError, "data has no images"),
        (["a.png"], ValueError, "data has images, but no folder of images for each class"),
        (["cat/a.png"], ValueError, "data has images of one class, 'cat': two are the least"),
        (["cat/a.png", "dog/notes.txt"], ValueError, "data/dog has no images"),
        ([f"{kind}/{i}.png" for kind in "ab" for i in range(2)], ValueError, "data/a has 2 images; 3 are the least to split"),
        (["train/a/1.png", "train/b/1.png", "val/c/1.png"], ValueError, "data/val has classes that training lacks: 'c'"),
        (["train/a/1.png", "train/b/1.png", "val/1.png"], ValueError, "data/val has no images in folders of the classes 'a', 'b'"),
        (
            ["train/a/1.png", "train/b/1.png", "val/a/1.png", "test_x/d/1.png", "test_x/e/1.png"],
            ValueError,
            "data/test_x has classes that training lacks: 'd', 'e'",
        ),
    ],
)
def test_bad_folders_are_refused(present: list[str] | None, error: type[Exception], message: str, tmp_path: Path) -> None:
    if present is not None:
        (tmp_path / "data").mkdir()
        files(tmp_path / "data", *present)
    with pytest.raises(error, match=message):
        folders.read(tmp_path / "data")


def test_bad_names_of_tests_are_refused(tmp_path: Path) -> None:
    files(tmp_path, *(f"{part}/{kind}/1.png" for part in ("train", "val", "test") for kind in "ab"))
    for name, message in (("test", "the name is taken"), ("validation", "the name is taken"), ("a/b", "that is no name")):
        with pytest.raises(ValueError, match=message):
            folders.read(tmp_path, {name: tmp_path / "test"})
    with pytest.raises(FileNotFoundError, match="none: there is no such folder"):
        folders.read(tmp_path, {"far": tmp_path / "none"})
    with pytest.raises(ValueError, match=r"1\.png is a file; give a folder of images"):
        folders.read(tmp_path / "train" / "a" / "1.png")


def picture(path: Path, size: tuple[int, int] = (20, 12), mode: str = "RGB", fill: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, fill) if fill is not None else Image.effect_noise(size, 80).convert(mode)
    image.save(path)
    return path


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg"), ("1", "bmp")])
def test_images_of_all_modes_are_decoded(mode: str, suffix: str, tmp_path: Path) -> None:
    path = picture(tmp_path / f"a.{suffix}", mode=mode)
    for channels in (1, 3):
        pixels = decode(path, 8, channels)
        assert pixels.shape == (channels, 8, 8)
        assert pixels.dtype == torch.uint8


def test_transparent_images_are_put_on_white_and_the_center_is_taken(tmp_path: Path) -> None:
    assert decode(picture(tmp_path / "a.png", mode="RGBA", fill=(0, 0, 0, 0)), 4, 3).float().mean() == 255
    wide = Image.new("RGB", (12, 4), (255, 0, 0))
    wide.paste((0, 255, 0), (4, 0, 8, 4))
    wide.save(tmp_path / "b.png")
    assert decode(tmp_path / "b.png", 4, 3).flatten(1).float().mean(1).tolist() == [0, 255, 0]


def labeled(folder: Path, count: int = 6) -> folders.Labeled:
    paths = [picture(folder / f"{'ab'[i % 2]}/{i}.png") for i in range(count)]
    return folders.Labeled(folder, tuple(paths), tuple(i % 2 for i in range(count)))


def test_images_are_the_same_decoded_once_or_when_needed(tmp_path: Path) -> None:
    data, how = labeled(tmp_path), Preprocessing(size=8)
    for augment in (False, True):
        sets = [Images(data, how, augment=augment, memory=memory) for memory in (0, 1 << 20)]
        assert sets[0].identity == sets[1].identity
        for (x, y), (again, labels) in zip(*(Batches(each, 4).in_order() for each in sets), strict=True):
            assert x.shape == (len(y), 3, 8, 8)
            assert torch.equal(x, again)
            assert torch.equal(y, labels)
    whole, _ = sets[1].batch(torch.arange(6))
    assert not torch.equal(whole, sets[1].batch(torch.arange(6))[0])


def test_augmentation_crops_and_mirrors(tmp_path: Path) -> None:
    path = picture(tmp_path / "a" / "1.png", (9, 9))
    data = folders.Labeled(tmp_path, (path,), (0,))
    whole = decode(path, 9, 1)[0].float() / 255
    crops = {whole[i : i + 8, j : j + 8].flatten().tolist()[0] for i in range(2) for j in range(2)}
    for flip in (False, True):
        images = Images(data, Preprocessing(8, (0.0,), (1.0,), crop=8 / 9), augment=True, flip=flip)
        firsts = {images.batch(torch.tensor([0]))[0].flatten().tolist()[0] for _ in range(60)}
        assert crops <= firsts
        assert (len(firsts) > 4) == flip


def test_bad_images_are_named_before_training(tmp_path: Path) -> None:
    data = labeled(tmp_path)
    data.files[1].write_bytes(b"no image")
    data.files[4].write_bytes(data.files[4].read_bytes()[:-40])
    with pytest.raises(
        ValueError, match=r"cannot be read: .*b/1\.png \(cannot identify.*, .*a/4\.png \(.*truncated.*Replace or remove them"
    ):
        Images(data, Preprocessing(size=8), memory=0)


def test_corruptions_change_images_the_same_way_each_time(tmp_path: Path) -> None:
    images = Images(labeled(tmp_path), Preprocessing(size=8))
    corrupted = Corrupted(images, "gaussian_noise", 3)
    (x, y), (again, _) = (next(Batches(corrupted, 6).in_order()) for _ in range(2))
    clean, labels = images.batch(torch.arange(6))
    assert torch.equal(x, again)
    assert torch.equal(y, labels)
    assert (x - clean).abs().mean() > 0.1
    with pytest.raises(ValueError, match="corruption 'rain' is unknown"):
        Corrupted(images, "rain", 1)


class Net(nn.Module):
    """A network with the head in the middle of its definition."""

    input_size, mean, std = 8, (0.5,), (0.25,)

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.head, self.extra = nn.Conv2d(1, width, 3), nn.Linear(width, 10), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.extra(self.stem(x).mean((2, 3))))
        return logits


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("mine")
    module.net, module.convolutional, module.number = Net, Convolutional, lambda: 3
    module.feature = lambda: nn.Conv2d(3, 4, 3)
    module.nothing = lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setitem(sys.modules, "mine", module)


@pytest.mark.usefixtures("mine")
def test_a_head_is_found_and_replaced() -> None:
    loaded = models.load("mine:net", 3, seed=5)
    assert (loaded.head, loaded.model.head.out_features) == ("head", 3)
    assert loaded.preprocessing == Preprocessing(8, (0.5,), (0.25,))
    assert torch.equal(loaded.model.head.weight, models.load("mine:net", 3, seed=5).model.head.weight)
    kept = models.load("mine:net", 10, size=16)
    assert (kept.model.head.out_features, kept.preprocessing.size) == (10, 16)
    loaded = models.load("mine:convolutional", 3)
    assert (loaded.head, loaded.preprocessing.size, loaded.preprocessing.channels) == ("1", 224, 3)
    assert loaded.model(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("none:net", {}, "there is no module 'none' in this folder"),
        ("mine:other", {}, "mine defines no function 'other'"),
        ("mine:number", {}, r"number\(\) returned a int; it must return a torch.nn.Module"),
        ("mine:feature", {}, r"the model returns shape \(2, 4, 222, 222\); it must return logits"),
        ("mine:nothing", {}, "no linear layer that makes its logits"),
        ("mine:net", {"head": "tail"}, "head='tail' is no module of the model; its last ones are stem, head, extra"),
        ("mine:net", {"head": "stem"}, "head='stem' is a Conv2d; it must be a linear layer or a 1x1"),
        ("mine:net", {"head": "extra"}, r"does not take images|has 10 outputs with a head 'extra' for 3 classes"),
        ("mine:net", {"size": 1}, r"does not take images of shape \(2, 1, 1, 1\)"),
    ],
)
def test_bad_models_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.load(name, 3, **settings)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_checkpoints_are_loaded(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    state, path = Net().state_dict(), tmp_path / f"weights.{suffix}"
    for wrapped in (state, {name: value for name, value in state.items() if not name.startswith("head.")}):
        if suffix == "safetensors":
            save_file(wrapped, path)
        else:
            torch.save({"state_dict": {f"module.{name}": value for name, value in wrapped.items()}, "epoch": 3}, path)
        loaded = models.load("mine:net", 3, checkpoint=path).model.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items() if not name.startswith("head."))
        kept = models.load("mine:net", 10, checkpoint=path).model.state_dict()
        assert torch.equal(kept["head.weight"], state["head.weight"]) == ("head.weight" in wrapped)


@pytest.mark.usefixtures("mine")
def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        models.load("mine:net", 3, checkpoint=path)
    path.write_bytes(b"none")
    with pytest.raises(ValueError, match="cannot be read"):
        models.load("mine:net", 3, checkpoint=path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="holds no weights by name"):
        models.load("mine:net", 3, checkpoint=path)
    torch.save(Convolutional().state_dict(), path)
    with pytest.raises(
        ValueError, match=r"of another model: it has no 'extra\.bias' \(4 missing\), has '0\.bias', which the model has not"
    ):
        models.load("mine:net", 3, checkpoint=path)
    torch.save(Net(5).state_dict(), path)
    with pytest.raises(ValueError, match=r"of another model: it has 'stem\.weight' of shape \(5, 1, 3, 3\), the model \(4, 1, 3, 3\)"):
        models.load("mine:net", 3, checkpoint=path)


def test_names_need_a_library_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftp.finetuning.models.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs timm or torchvision, and neither is installed: pip install timm"):
        models.load("resnet18", 3)
    timm: Any = ModuleType("timm")
    timm.is_model, timm.list_models = (lambda name: name == "net"), lambda: ["net", "resnet18"]
    timm.create_model = lambda name, pretrained: Net() if not pretrained else (_ for _ in ()).throw(OSError("no network"))
    timm.data = ModuleType("timm.data")
    timm.data.resolve_model_data_config = lambda model: {"input_size": (1, 8, 8), "mean": (0.1,), "std": (0.2,), "crop_pct": 0.9}
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setattr("ftp.finetuning.models.find_spec", lambda name: name == "timm" or None)
    with pytest.raises(ValueError, match="is none of timm or torchvision; there is resnet18"):
        models.load("resnet19", 3)
    with pytest.raises(OSError, match=r"its weights cannot be downloaded \(no network\)\. Give a file of them, with --checkpoint"):
        models.load("net", 3)
