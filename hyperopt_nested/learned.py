"""One learned hyper-parameter: where its raw values start, what they mean, and how its learner moves them."""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperopt_nested.hyper import Bijection, Hyper
from hyperopt_nested.ops import State, map_tree, state_dtype
from hyperopt_nested.rule import Learn
from hyperopt_nested.sensitivity import Raws

MODEL = "model"
"""Key of a learned value that all tensors share."""


class Learner(Protocol):
    """The engine of an optimizer that learns a hyper: `Nested`, which see."""

    learned: dict[str, LearnedHyper]

    def init(self, params: Mapping[str, Tensor]) -> State:
        """State before the first step."""

    def step(self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], st: State) -> tuple[dict[str, Tensor], State]:
        """New values and state."""

    def hypers(self, st: State) -> dict[str, dict[str, Tensor]]:
        """Learned values of the learner itself."""

    def rejected(self, st: State) -> dict[str, Tensor]:
        """Counts of what the learner rejected for its own hypers."""


class LearnedHyper:
    """One learned hyper: its declaration, and the learner that steps it.

    Attributes:
        key: its name in the state and in reports.
        learn: the declaration.
        hyper: the domain.
        via: the bijection in whose coordinates it is learned, or None.
        learner: the engine of `learn.by`.
    """

    def __init__(self, key: str, learn: Learn, hyper: Hyper, via: Bijection | None, learner: Learner) -> None:
        self.key, self.learn, self.hyper, self.via, self.learner = key, learn, hyper, via, learner

    def key_of(self, tensor_name: str) -> str:
        """Key of the value that a tensor uses."""
        return MODEL if self.learn.per == "model" else tensor_name

    def start(self, param: Tensor, value: float | Tensor) -> Tensor:
        """Raw coordinates at the start: shape () for per model and tensor, else broadcastable against the parameter.

        Single numbers are kept in float64 (float32 where the device has no float64), others in `state_dtype(param)`.
        """
        single = self.learn.per in ("model", "tensor")
        if self.learn.per == "row":
            shape = (*param.shape[:1], *(1 for _ in param.shape[1:])) if param.ndim > 1 else (1,) * param.ndim
        else:
            shape = () if single else tuple(param.shape)
        dtype = number_dtype(param.device) if single else state_dtype(param)
        full = torch.as_tensor(value, dtype=dtype, device=param.device).expand(shape).clone()
        return self.hyper.to_raw(full, self.via)

    def value(self, raw: Tensor, scheduled: float | Tensor | None = None) -> Tensor:
        """Effective value: the learned value times what a schedule has made of the declared one, over the declared one."""
        value = self.hyper.to_value(raw, self.via)
        declared = self.learn.value
        if scheduled is None or (not isinstance(scheduled, Tensor) and scheduled == declared):
            return value
        if declared == 0:  # of a tensor we can not ask, without a sync, whether it is zero too
            if not isinstance(scheduled, Tensor):
                self.check_scheduled(scheduled)
            return value
        return (value * (scheduled / declared)).clamp(*self.hyper.bounds(raw.dtype))

    def check_scheduled(self, scheduled: float) -> None:
        """Refuse to scale a value that was declared as zero.

        Raises:
            ValueError: that is asked for.
        """
        if self.learn.value == 0 and scheduled != 0:
            raise ValueError(
                f"{self.key} was declared as learn(0.0, ...), which can not be scaled to {scheduled!r}: "
                "declare a value that is not zero, or do not schedule it"
            )

    def step(self, raws: Raws, grads: Raws, st: State, rejected: Tensor) -> tuple[Raws, State, Tensor]:
        """Step the raw values with their hypergradients; entries that are not finite are skipped, and counted."""
        if self.learn.grad is not None:
            grads = {key: self.learn.grad(grad) for key, grad in grads.items()}
        finite = {key: torch.isfinite(grad) for key, grad in grads.items()}
        usable = {key: torch.where(finite[key], grad, 0) for key, grad in grads.items()}
        stepped, new = self.learner.step(raws, usable, st)
        new = {part: dict(tree) if part in ("rule", "memory") else tree for part, tree in new.items()}
        stepped = dict(stepped)
        for key, fine in finite.items():
            ok = fine & torch.isfinite(stepped[key])
            stepped[key] = torch.where(ok, self.bounded(self.hyper.confine(stepped[key], self.via)), raws[key])
            for part in ("rule", "memory"):
                new[part][key] = map_tree(_keep_where(ok), new[part][key], st[part][key])
            rejected = rejected + (~ok).sum()
        return stepped, new, rejected

    def bounded(self, raw: Tensor, states: list[State] | None = None) -> Tensor:
        """Raw value after the declared bounds: numbers, or, given the new rule states of its tensors, those that read the state.

        Of a value that several tensors share, the widest of their bounds.
        """
        low, high = self.learn.bounds
        if states is None:
            given = [None if callable(end) or math.isinf(end) else end for end in (low, high)]
            ends = [None if end is None else torch.as_tensor(end, dtype=raw.dtype, device=raw.device) for end in given]
        else:
            ends = [self._widest(low, torch.minimum, states, raw), self._widest(high, torch.maximum, states, raw)]
        return self.hyper.within(raw, self.via, *ends)

    @staticmethod
    def _widest(end: Any, wider: Callable[[Tensor, Tensor], Tensor], states: list[State], raw: Tensor) -> Tensor | None:
        return functools.reduce(wider, [end(state).to(raw) for state in states]) if callable(end) else None


def number_dtype(device: torch.device) -> torch.dtype:
    """The dtype of single numbers: float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def number(value: float | Tensor, device: torch.device) -> Tensor:
    """A single number as a tensor of shape ()."""
    return torch.as_tensor(value, dtype=number_dtype(device), device=device)


def _keep_where(ok: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Leaf by leaf: the new one where `ok`, else the old one; leaves of another shape than `ok` are new."""

    def keep(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(ok, new, old) if new.shape == ok.shape else new

    return keep
