"""Folders of images: classes, training, validation and test sets."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VALIDATION = ("val", "valid", "validation")
SHARE = 0.15
"""Of each class, for validation and for testing, where a folder does not say what is for what."""


@dataclass(frozen=True)
class Labeled:
    """Files of images with their classes.

    Attributes:
        folder: where they are.
        files: one an image.
        labels: index of each one's class.
    """

    folder: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Splits:
    """What a folder holds.

    Attributes:
        classes: their names, sorted.
        train: training images.
        validation: validation images.
        tests: by name; "test" is in distribution.
    """

    classes: tuple[str, ...]
    train: Labeled
    validation: Labeled
    tests: Mapping[str, Labeled]


def read(folder: Path, tests: Mapping[str, Path] | None = None, seed: int = 0) -> Splits:
    """Read a folder of images.

    It has the folders `train`, `val` and perhaps `test`, `test_...`, each with one folder a class; or it has the folders of classes, and
    then each class is split at random: 70 % for training, 15 % for validation, 15 % for testing. Without `val`, 15 % of `train` are for
    validation. A folder of a class may have folders.

    Args:
        folder: to read.
        tests: further folders of classes, by name.
        seed: of the split.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a folder has no images, fewer than two classes, a class that training lacks, or too few images to split. The message
            names it.
    """
    _check_folder(folder)
    if (folder / "train").is_dir():
        train, classes = _train(folder / "train")
        named = next((folder / name for name in VALIDATION if (folder / name).is_dir()), None)
        if named is None:
            train, validation = _split(train, classes, (1 - SHARE, SHARE), seed)
        else:
            validation = _labeled(named, classes)
        found = {path.name: _labeled(path, classes) for path in _folders(folder) if path.name.startswith("test")}
    else:
        whole, classes = _train(folder)
        train, validation, test = _split(whole, classes, (1 - 2 * SHARE, SHARE, SHARE), seed)
        found = {"test": test}
    for name, path in (tests or {}).items():
        if name in (*found, "validation") or "/" in name or not name:
            raise ValueError(f"test {name!r}: {'the name is taken' if name in (*found, 'validation') else 'that is no name'}; give another")
        found[name] = _labeled(path, classes)
    return Splits(tuple(classes), train, validation, found)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder of images")


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def _train(folder: Path) -> tuple[Labeled, list[str]]:
    by_class = {path.name: _images(path) for path in _folders(folder)}
    if not any(by_class.values()):
        if any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
            raise ValueError(f"{folder} has images, but no folder of images for each class")
        raise ValueError(f"{folder} has no images ({', '.join(suffix[1:] for suffix in SUFFIXES)}) in folders of classes")
    if empty := [name for name, files in by_class.items() if not files]:
        raise ValueError(f"{folder / empty[0]} has no images: remove the folder, or add images of the class")
    if len(by_class) < 2:
        raise ValueError(f"{folder} has images of one class, {next(iter(by_class))!r}: two are the least")
    return _labeled(folder, list(by_class)), list(by_class)


def _labeled(folder: Path, classes: Sequence[str]) -> Labeled:
    """The images of a folder with one folder a class."""
    _check_folder(folder)
    found = _folders(folder)
    if unknown := [path.name for path in found if path.name not in classes and _images(path)]:
        raise ValueError(f"{folder} has classes that training lacks: {', '.join(map(repr, unknown[:5]))}")
    pairs = [(file, classes.index(path.name)) for path in found if path.name in classes for file in _images(path)]
    if not pairs:
        raise ValueError(f"{folder} has no images in folders of the classes {', '.join(map(repr, classes[:5]))}")
    return Labeled(folder, tuple(file for file, _ in pairs), tuple(label for _, label in pairs))


def _split(whole: Labeled, classes: Sequence[str], shares: Sequence[float], seed: int) -> list[Labeled]:
    """Parts with these shares of each class, and at least one image of it."""
    parts: list[list[int]] = [[] for _ in shares]
    for label, name in enumerate(classes):
        own = [index for index, other in enumerate(whole.labels) if other == label]
        if len(own) < len(shares):
            raise ValueError(
                f"{whole.folder / name} has {len(own)} images; {len(shares)} are the least to split: add some, or the folders train and val"
            )
        random.Random(f"{seed} {name}").shuffle(own)
        for part, share in zip(parts[1:], shares[1:], strict=True):
            count = max(1, round(share * len([other for other in whole.labels if other == label])))
            part += own[:count]
            own = own[count:]
        parts[0] += own
    return [_chosen(whole, sorted(part)) for part in parts]


def _chosen(whole: Labeled, indices: Iterable[int]) -> Labeled:
    listed = list(indices)
    return Labeled(whole.folder, tuple(whole.files[i] for i in listed), tuple(whole.labels[i] for i in listed))
