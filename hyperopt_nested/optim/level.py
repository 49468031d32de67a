"""Level and shape: the default learner of a learning rate learns the level early, under a schedule of fixed shape that multiplies it."""

from collections.abc import Iterable

from hyperopt_nested.combinators.window import window
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.recipes import LEVEL_RATE, RATE, begin
from hyperopt_nested.rule import Optimizer

WINDOW = 0.2
"""The part of all steps in which the level is learned."""


def shape(step: int, total: int) -> float:
    """The factor of the level, which falls linearly: 1 in the first step, 0 after the last one.

    Args:
        step: how many steps were taken before, >= 0. From `total` on, the factor stays what it was in the last of these.
        total: how many steps there are, >= 1.

    Example:
        >>> [shape(step, 20) for step in (0, 5, 10, 19, 30)]
        [1.0, 0.75, 0.5, 0.05, 0.05]
    """
    return (total - min(step, total - 1)) / total


def window_of(total: int) -> int:
    """How many of the steps a level is learned in."""
    return max(1, round(WINDOW * total))


def has_level(optimizer: Optimizer) -> bool:
    """Whether there is an `lr` that the default learner learns."""
    return "lr" in optimizer.learned and optimizer.learned["lr"].by_default


def first_values(nested: Nested) -> dict[str, float]:
    """Where learning rates of the default learner begin, by key."""
    rates = {key: each for key, each in nested.learned.items() if each.learn.by_default and key.split("#")[0] == "lr"}
    return {key: begin(each.hyper, each.learn.value) for key, each in rates.items()}


def is_settled(optimizers: Iterable[Optimizer], step: int, total: int) -> bool:
    """Whether nothing is learned any more in a step of these optimizers: they learn levels alone, and the window is over."""
    return step >= window_of(total) and all(has_level(each) and len(each.learned) == 1 for each in optimizers if each.learned)


def with_level(optimizer: Optimizer, total: int) -> Optimizer:
    """The same optimizer, but its `lr`, if the default learner learns it, is learned in the first of all steps."""

    def make(by: Optimizer) -> Optimizer:
        return window(by.replace(lr=by.declared["lr"] * LEVEL_RATE / RATE), steps=window_of(total))

    return optimizer.replace(lr=optimizer.learned["lr"].learned_by(total, make)) if has_level(optimizer) else optimizer
