"""Learned values that stand at an end of what they may be: the user is told, once of each hyper."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends.program import capturing
from hyperopt_nested.checks import caller_level
from hyperopt_nested.engine.learned import LearnedHyper, Learner
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.engine.sensitivity import Named
from hyperopt_nested.recipes import FACTOR
from hyperopt_nested.trees import State

_EVERY = 100
"""Steps from one look at a device to the next, since each look waits for it; the CPU's are looked at in every step."""

_SHOWN = 3
"""Values that a warning names at most."""


class PinnedValues:
    """Watches the counts of values that were stopped at an end, and warns of each hyper once.

    Args:
        expected: hypers that come to stand at an end in the nature of things, of which nothing is told.
    """

    def __init__(self, expected: Collection[str] = ()) -> None:
        self._reported = set(expected)
        self._steps = 0

    def look(self, nested: Nested, st: State) -> None:
        """Look, after a step, whether there is something new to tell.

        Args:
            nested: the engine.
            st: its state.
        """
        if not nested.learned or torch.compiler.is_compiling():
            return
        self._steps += 1
        for path, count in nested.pinned(st).items():
            if path in self._reported or (count.device.type != "cpu" and (self._steps % _EVERY or capturing())):
                continue
            if count.item() > 0:
                self._reported.add(path)
                warnings.warn(_message(path, *_found(nested, st, path)), UserWarning, stacklevel=caller_level())


def _found(nested: Learner, st: State, path: str) -> tuple[LearnedHyper, Named]:
    """The learned hyper at a path, and its unconstrained values."""
    for key, learned in nested.learned.items():
        if path == key:
            return learned, st["hypers"][key]
        if path.startswith(f"{key}."):
            return _found(learned.learner, st["learners"][key], path.removeprefix(f"{key}."))
    raise KeyError(path)


def _message(path: str, learned: LearnedHyper, raws: Mapping[str, Tensor]) -> str:
    """What is told of a hyper."""
    there = [f"{name!r}: {value:.4g}" for name, raw in raws.items() for value in _at_an_end(learned, raw)[:1]]
    now = f" (now {', '.join(there[:_SHOWN])}{', ...' if len(there) > _SHOWN else ''})" if there else ""
    low, high = learned.learn.bounds
    bounds = [f"bounds=({_shown(low)}, {_shown(high)})"] if learned.has_bounds else []
    ends = " with ".join([str(learned.hyper), *bounds])
    remedy = (
        f"These bounds are the default, a factor of {FACTOR:g} about its start: start it nearer to where it goes, or give "
        "learn(value, bounds=(low, high)); (0, None) has no upper one"
        if learned.learn.bounds_by_default
        else "Give learn(..., bounds=(low, high)) around the values that make sense, or its learner (by=...) a smaller rate"
    )
    return (
        f"the learned value {path} was stopped at an end of its range, {ends}{now}: it may stay there, and training with it. {remedy}. "
        "This is told once; pinned() counts such steps"
    )


def _at_an_end(learned: LearnedHyper, raw: Tensor) -> list[float]:
    """The entries at an end."""
    value, (low, high) = learned.value(raw), learned.ends(raw)
    entries: list[float] = value[(value <= low) | (value >= high)].flatten().tolist()
    return entries


def _shown(end: Any) -> str:
    return getattr(end, "__name__", "a function") if callable(end) else f"{end:g}"
