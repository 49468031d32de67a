"""Tasks of fine-tuning, and the test sets of each: in distribution, under shifts, under corruptions."""

import functools
from dataclasses import dataclass

import torch
from torch import Generator

from benchmarks.reproduce import data
from benchmarks.reproduce.data import Examples
from benchmarks.reproduce.shifts import SHIFTS
from ftp.finetuning.corruptions import CORRUPTIONS, SEVERITIES

ID = "test"
"""The name of the test set in distribution."""

OOD = (*SHIFTS, "uci")
"""The names of the shifted test sets; accuracy under shifts is the mean over them."""

SHIFT_SEED = 7
"""Seed of what is random in shifts and corruptions, so that all runs meet the same images."""


@dataclass(frozen=True)
class Task:
    """Digits that pre-training knows, and digits to learn.

    Attributes:
        known: digits of pre-training.
        digits: classes of fine-tuning.
        per_class: labels of each.
        steps: of fine-tuning, with batches of `BATCH`.
    """

    known: tuple[int, ...]
    digits: tuple[int, ...]
    per_class: int
    steps: int


BATCH = 20
NEW = (5, 6, 7, 8, 9)
TASKS = {"near": Task((0, 1, 2, 3, 4), NEW, per_class=20, steps=300), "far": Task((0, 1), NEW, per_class=200, steps=500)}
"""By name: one for which the features of pre-training are nearly enough, and one for which they must change."""

VALIDATION_PER_CLASS = 200


@functools.cache
def pool(digits: tuple[int, ...]) -> tuple[Examples, Examples]:
    """Validation images, always the same, and those that fine-tuning draws from: both from MNIST's training images."""
    return data.draw(data.select(data.mnist("train"), digits), VALIDATION_PER_CLASS, data.SPLIT_SEED)


def validation(digits: tuple[int, ...], limit: int | None) -> Examples:
    """Validation images, the same for all runs; the first `limit`, if that is a number."""
    examples, _ = pool(digits)
    return examples[torch.arange(len(examples))[:limit]]


def training(digits: tuple[int, ...], per_class: int | None, seed: int) -> Examples:
    """The labels of a run.

    Args:
        digits: classes.
        per_class: images of each; None is all.
        seed: of the draw.
    """
    _, rest = pool(digits)
    return rest if per_class is None else data.draw(rest, per_class, seed)[0]


@functools.cache
def tests(digits: tuple[int, ...], limit: int | None) -> dict[str, Examples]:
    """MNIST's test images of some digits, in random order, as they are and under each shift; and UCI's digits.

    Args:
        digits: classes.
        limit: images of each set at most; None is all.
    """
    clean = _shuffled(data.select(data.mnist("t10k"), digits), limit)
    shifted = {name: Examples(shift(clean.images, _generator()), clean.labels) for name, shift in SHIFTS.items()}
    return {ID: clean, **shifted, "uci": _shuffled(data.select(data.uci(), digits), limit)}


@functools.cache
def corrupted(digits: tuple[int, ...], limit: int | None) -> dict[str, Examples]:
    """MNIST's test images of some digits, as they are and under each corruption at each severity: "fog/3".

    Args:
        digits: classes.
        limit: images of each set at most; None is all.
    """
    clean = _shuffled(data.select(data.mnist("t10k"), digits), limit)
    changed = {
        f"{name}/{severity}": Examples(corrupt(clean.images, severity, _generator()), clean.labels)
        for name, corrupt in CORRUPTIONS.items()
        for severity in SEVERITIES
    }
    return {ID: clean, **changed}


def _shuffled(examples: Examples, limit: int | None) -> Examples:
    return examples[torch.randperm(len(examples), generator=_generator())[:limit]]


def _generator() -> Generator:
    return Generator().manual_seed(SHIFT_SEED)
