"""Phases of training, and learning rates of their steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ftp.finetuning import methods


@dataclass(frozen=True)
class Phase:
    """Steps that train the same tensors: from `first` to before `end`."""

    trains: methods.Part
    first: int
    end: int


def phases(parts: Sequence[methods.Part], steps: int) -> list[Phase]:
    """Phases of equal length that make up all steps."""
    ends = [steps * i // len(parts) for i in range(len(parts) + 1)]
    return [Phase(part, first, end) for part, (first, end) in zip(parts, pairwise(ends), strict=True)]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Learning rate of a step, as a share of the highest: a linear rise over the first `warmup` of the steps, then a cosine towards 0.

    Args:
        step: from 0.
        steps: all.
        warmup: share of the steps, in [0, 1].

    Example:
        >>> [round(schedule(step, 5, 0.4), 2) for step in range(5)]
        [0.5, 1.0, 1.0, 0.75, 0.25]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
