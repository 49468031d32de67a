"""Level and shape: the default learner of a learning rate learns the level early, under a schedule of fixed shape that multiplies it."""

from collections.abc import Iterable

from hyperopt_nested.combinators.window import window
from hyperopt_nested.recipes import LEVEL_RATE, RATE
from hyperopt_nested.rule import Optimizer

WARM_UP = 0.05
"""The part of all steps in which the shape rises."""

WINDOW = 0.15
"""The part of all steps in which the level is learned."""


def shape(step: int, total: int) -> float:
    """The factor of the level: it rises linearly to 1 in the first steps, then falls linearly, to 0 after the last one.

    Args:
        step: how many steps were taken before, >= 0. From `total` on, the factor stays what it was in the last of these.
        total: how many steps there are, >= 1.

    Example:
        >>> [round(shape(step, 21), 2) for step in (0, 1, 11, 20, 30)]
        [1.0, 1.0, 0.5, 0.05, 0.05]
    """
    step, rising = min(step, total - 1), max(1, round(WARM_UP * total))
    return min((step + 1) / rising, (total - step) / max(total - rising, 1))


def window_of(total: int) -> int:
    """How many of the steps a level is learned in."""
    return max(1, round(WINDOW * total))


def has_level(optimizer: Optimizer) -> bool:
    """Whether there is an `lr` that the default learner learns."""
    return "lr" in optimizer.learned and optimizer.learned["lr"].by_default


def is_settled(optimizers: Iterable[Optimizer], step: int, total: int) -> bool:
    """Whether nothing is learned any more in a step of these optimizers: they learn levels alone, and the window is over."""
    return step >= window_of(total) and all(has_level(each) and len(each.learned) == 1 for each in optimizers if each.learned)


def with_level(optimizer: Optimizer, total: int) -> Optimizer:
    """The same optimizer, but its `lr`, if the default learner learns it, is learned in the first of all steps."""

    def make(by: Optimizer) -> Optimizer:
        return window(by.replace(lr=by.declared["lr"] * LEVEL_RATE / RATE), steps=window_of(total))

    return optimizer.replace(lr=optimizer.learned["lr"].learned_by(total, make)) if has_level(optimizer) else optimizer
