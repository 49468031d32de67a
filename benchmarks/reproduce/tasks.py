"""Tasks of fine-tuning, and the test sets of each: in distribution, under shifts, under corruptions."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator

from benchmarks.reproduce import data
from benchmarks.reproduce.data import Examples
from benchmarks.reproduce.emoji import Emoji
from benchmarks.reproduce.shifts import SHIFTS, augment
from ftp.finetuning.corruptions import CORRUPTIONS, SEVERITIES

ID = "test"
"""The name of the test set in distribution."""

SHIFT_SEED = 7
"""Seed of what is random in shifts and corruptions, so that all runs meet the same images."""

BATCH = 20
"""Examples of a step of fine-tuning."""

VALIDATION_PER_CLASS = 200


class Task(Protocol):
    """What is pre-trained on, fine-tuned on and tested on.

    Attributes:
        knows: what pre-training learns, as a name.
        dense: every pixel has a class, and intersection over union of class 1 is what counts, in the place of accuracy.
        classes: of fine-tuning.
        per_class: labels of each.
        steps: of fine-tuning, with batches of `BATCH`.
        shifts: names of shifted test sets; the result under shifts is the mean over them.
    """

    @property
    def knows(self) -> str: ...
    @property
    def dense(self) -> bool: ...
    @property
    def classes(self) -> int: ...
    @property
    def per_class(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def shifts(self) -> tuple[str, ...]: ...

    def pretraining(self) -> tuple[Callable[[Generator], Examples], int]:
        """What draws a batch of pre-training, and the number of classes there."""

    def training(self, per_class: int | None, seed: int) -> Examples:
        """The labels of a run: so many of each class, all of None, drawn from the seed."""

    def validation(self, limit: int | None) -> Examples:
        """Validation images, the same for all runs; `limit` at most."""

    def tests(self, limit: int | None) -> dict[str, Examples]:
        """Test images as they are, `ID`, and under each shift; `limit` of each set at most."""


@dataclass(frozen=True)
class Digits:
    """Learn some digits after others: see `Task`.

    Attributes:
        known: digits of pre-training, in MNIST's training images.
        digits: classes of fine-tuning.
    """

    known: tuple[int, ...]
    digits: tuple[int, ...]
    per_class: int
    steps: int
    dense: bool = False
    shifts: tuple[str, ...] = (*SHIFTS, "uci")

    @property
    def knows(self) -> str:
        return "".join(map(str, self.known))

    @property
    def classes(self) -> int:
        return len(self.digits)

    def pretraining(self) -> tuple[Callable[[Generator], Examples], int]:
        examples = data.select(data.mnist("train"), self.known)

        def batch(generator: Generator) -> Examples:
            drawn = examples[torch.randint(len(examples), (128,), generator=generator)]
            return Examples(augment(drawn.images, generator), drawn.labels)

        return batch, len(self.known)

    def training(self, per_class: int | None, seed: int) -> Examples:
        _, rest = _pool(self.digits)
        return rest if per_class is None else data.draw(rest, per_class, seed)[0]

    def validation(self, limit: int | None) -> Examples:
        examples, _ = _pool(self.digits)
        return examples[torch.arange(len(examples))[:limit]]

    def tests(self, limit: int | None) -> dict[str, Examples]:
        return _tests(self.digits, limit)

    def corrupted(self, limit: int | None) -> dict[str, Examples]:
        """Test images as they are and under each corruption at each severity: "fog/3"; `limit` of each set at most."""
        return _corrupted(self.digits, limit)


NEW = (5, 6, 7, 8, 9)
DIGITS: dict[str, Digits] = {
    "near": Digits((0, 1, 2, 3, 4), NEW, per_class=20, steps=300),
    "far": Digits((0, 1), NEW, per_class=200, steps=500),
}
"""By name: a task for which the features of pre-training are nearly enough, and one for which they must change."""

TASKS: Mapping[str, Task] = {
    **DIGITS,
    "emoji": Emoji(dense=False, per_class=20, steps=150, classes=5),
    "outlines": Emoji(dense=True, per_class=6, steps=200, classes=2),
}
"""By name."""


@functools.cache
def _pool(digits: tuple[int, ...]) -> tuple[Examples, Examples]:
    """Validation images, and those that fine-tuning draws from: both from MNIST's training images."""
    return data.draw(data.select(data.mnist("train"), digits), VALIDATION_PER_CLASS, data.SPLIT_SEED)


@functools.cache
def _tests(digits: tuple[int, ...], limit: int | None) -> dict[str, Examples]:
    clean = _shuffled(data.select(data.mnist("t10k"), digits), limit)
    shifted = {name: Examples(shift(clean.images, _generator()), clean.labels) for name, shift in SHIFTS.items()}
    return {ID: clean, **shifted, "uci": _shuffled(data.select(data.uci(), digits), limit)}


@functools.cache
def _corrupted(digits: tuple[int, ...], limit: int | None) -> dict[str, Examples]:
    clean = _shuffled(data.select(data.mnist("t10k"), digits), limit)
    changed = {
        f"{name}/{severity}": Examples(corrupt(clean.images, severity, _generator()), clean.labels)
        for name, corrupt in CORRUPTIONS.items()
        for severity in SEVERITIES
    }
    return {ID: clean, **changed}


def clear() -> None:
    """Forget the images that are kept from call to call."""
    for cached in (_pool, _tests, _corrupted):
        cached.cache_clear()


def _shuffled(examples: Examples, limit: int | None) -> Examples:
    return examples[torch.randperm(len(examples), generator=_generator())[:limit]]


def _generator() -> Generator:
    return Generator().manual_seed(SHIFT_SEED)
