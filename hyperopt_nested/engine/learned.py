"""One learned hyper-parameter: where its unconstrained values start, what they mean, and how its learner moves them."""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hyperopt_nested.domains import Bijection, Hyper
from hyperopt_nested.engine.sensitivity import Named
from hyperopt_nested.ops import finite, number_dtype, row_shape, state_dtype
from hyperopt_nested.rule import Bound, Learn
from hyperopt_nested.trees import State, leaves, map_tree

MODEL = "model"
"""Key of a learned value that all tensors share."""

Factors = Mapping[str, float | Tensor]
"""By value of a hyper: what a schedule multiplies the rate of its learner by."""

Counts = dict[str, Tensor]
"""What is counted of a learned hyper, shape () each: hypergradient entries that were `nonfinite`, and values that were `pinned`."""

COUNTED = ("nonfinite", "pinned")
"""The names of these counts, which are parts of an engine's state."""


class Learner(Protocol):
    """The engine of an optimizer that learns a hyper: `Nested`, which see."""

    learned: dict[str, LearnedHyper]

    def init(self, params: Mapping[str, Tensor]) -> State:
        """State before the first step."""

    def step(
        self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], st: State, values: Mapping[str, Mapping[str, float | Tensor]]
    ) -> tuple[dict[str, Tensor], State]:
        """New values and state."""

    def hypers(self, st: State) -> dict[str, dict[str, Tensor]]:
        """Learned values of the learner itself."""

    def counted(self, part: str, st: State) -> dict[str, Any]:
        """Counts of one kind, for the hypers of the learner itself."""


class LearnedHyper:
    """One learned hyper: its declaration, and the learner that steps it.

    Attributes:
        key: its name in the state and in reports.
        learn: the declaration.
        hyper: the domain.
        via: the bijection in whose coordinates it is learned, or None.
        learner: the engine of `learn.by`.
        declared: what numbers of schedules are taken relative to: the declared value, or that of the run whose state was loaded.
    """

    def __init__(self, key: str, learn: Learn, hyper: Hyper, via: Bijection | None, learner: Learner) -> None:
        self.key, self.learn, self.hyper, self.via, self.learner = key, learn, hyper, via, learner
        self.declared = learn.value
        self._acts_by_element = not learner.learned and learn.by.rule.separable == "element" and not learn.by.rule.reduction
        low, high = (None if callable(end) or math.isinf(end) else end for end in learn.bounds)
        self._bounds = low, high
        self._below = learn.value > max(hyper.lower, -math.inf if low is None else low)  # else it was declared to start at that end
        self._above = learn.value < min(hyper.upper, math.inf if high is None else high)

    @property
    def has_bounds(self) -> bool:
        """Whether there are bounds besides the domain."""
        return self.learn.bounds != (-math.inf, math.inf)

    def key_of(self, tensor_name: str) -> str:
        """Key of the value that a tensor uses."""
        return MODEL if self.learn.per == "model" else tensor_name

    def start(self, param: Tensor, value: float | Tensor) -> Tensor:
        """Unconstrained coordinates at the start: shape () for per model and tensor, else broadcastable against the parameter.

        Single numbers are kept in float64 (float32 where the device has no float64), others in `state_dtype(param)`.
        """
        single = self.learn.per in ("model", "tensor")
        shape = row_shape(param) if self.learn.per == "row" else () if single else tuple(param.shape)
        dtype = number_dtype(param.device) if single else state_dtype(param)
        full = torch.as_tensor(value, dtype=dtype, device=param.device).expand(shape).clone(memory_format=torch.contiguous_format)
        return self.hyper.to_unconstrained(full, self.via)

    def value(self, raw: Tensor, scheduled: float | Tensor | None = None) -> Tensor:
        """Effective value: the learned value times what a schedule has made of the declared one, over the declared one."""
        value = self.hyper.to_value(raw, self.via)
        declared = self.declared
        if scheduled is None or (not isinstance(scheduled, Tensor) and scheduled == declared):
            return value
        if declared == 0:  # of a tensor we cannot ask, without a sync, whether it is zero too
            if not isinstance(scheduled, Tensor):
                self.check_scheduled(scheduled)
            return value
        return (value / declared * scheduled).clamp(*self.hyper.bounds(raw.dtype))  # `scheduled`, bit by bit, where nothing has moved

    def check_scheduled(self, scheduled: float) -> None:
        """Refuse to scale a value that was declared as zero.

        Raises:
            ValueError: that is asked for.
        """
        if self.declared == 0 and scheduled != 0:
            raise ValueError(
                f"{self.key} was declared as learn(0.0, ...), which cannot be scaled to {scheduled!r}: "
                "declare a value that is not zero, or do not schedule it"
            )

    @property
    def is_own(self) -> bool:
        """Whether each tensor has values of its own, at all heights."""
        return self.learn.per != "model" and all(each.is_own for each in self.learner.learned.values())

    def step(self, raws: Named, grads: Named, st: State, counts: Counts, factors: Factors) -> tuple[Named, State, Counts]:
        """Step the unconstrained values with their hypergradients; `factors` multiply the learner's rate, by value.

        Entries that are not finite, or that would make the value or the state of the learner so, are skipped, and counted as nonfinite.
        Entries that the learner would take beyond a fixed end (of the domain, of what the dtype holds, or a bound that is a number) are
        counted as pinned, but for an end where they start.
        """
        if self.learn.grad is not None:
            grads = {key: self._transformed(grad) for key, grad in grads.items()}
        alike = len(grads) > 1 and len({(grad.shape, grad.device) for grad in grads.values()}) == 1
        if not (alike and self._acts_by_element and next(iter(grads.values())).ndim == 0):
            return self._step(raws, grads, st, counts, factors)
        many = [{"raw": raws[key], "grad": grad, "rule": st["rule"][key]} for key, grad in grads.items()]
        one = map_tree(lambda *leaves: torch.stack(leaves), *many)  # a vector of single values, for operators that act on each element
        memory = st["memory"][next(iter(grads))]  # of nothing, since the learner learns nothing
        part = {**st, "rule": {MODEL: one["rule"]}, "memory": {MODEL: memory}}
        stacked = {MODEL: torch.stack([number(factors[key], one["raw"].device).to(one["raw"].dtype) for key in grads])} if factors else {}
        new_raws, new, counts = self._step({MODEL: one["raw"]}, {MODEL: one["grad"]}, part, counts, stacked)
        rule = {key: map_tree(operator.itemgetter(i), new["rule"][MODEL]) for i, key in enumerate(grads)}
        return {**raws, **dict(zip(grads, new_raws[MODEL].unbind(), strict=True))}, {**st, "rule": {**st["rule"], **rule}}, counts

    def _step(self, raws: Named, grads: Named, st: State, counts: Counts, factors: Factors) -> tuple[Named, State, Counts]:
        is_finite = {key: torch.isfinite(grad) for key, grad in grads.items()}
        usable = {key: torch.where(is_finite[key], grad, 0) for key, grad in grads.items()}
        values = {key: {"lr": self.learn.by.declared["lr"] * factor} for key, factor in factors.items()}
        stepped, new = self.learner.step(raws, usable, st, values)
        new = {part: dict(tree) if part in ("rule", "memory") else tree for part, tree in new.items()}
        stepped = dict(stepped)
        nonfinite, pinned = counts["nonfinite"], counts["pinned"]
        for key, fine in is_finite.items():
            wanted = stepped[key]
            left = [leaf for leaf in leaves(new["rule"][key]) if leaf.shape == fine.shape and leaf.is_floating_point()]
            ok = fine & torch.isfinite(functools.reduce(torch.add, left, wanted))
            confined = self.bounded(self.hyper.confine(wanted, self.via))
            stepped[key] = torch.where(ok, confined, raws[key])
            for part in ("rule", "memory"):
                new[part][key] = map_tree(_keep_where(ok), new[part][key], st[part][key])
            nonfinite = nonfinite + (~ok).sum(dtype=nonfinite.dtype)
            if self._below or self._above:
                pinned = pinned + (ok & self._stopped(wanted, confined)).sum(dtype=pinned.dtype)
        return stepped, new, {"nonfinite": nonfinite, "pinned": pinned}

    def _transformed(self, grad: Tensor) -> Tensor:
        """What the declared transform makes of a hypergradient."""
        result = cast(Callable[[Tensor], Any], self.learn.grad)(grad)
        if not isinstance(result, Tensor) or result.shape != grad.shape:
            shown = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise ValueError(
                f"learn(grad=...) of {self.key} made {shown} of a hypergradient of shape {tuple(grad.shape)}: it must return a tensor of "
                "that shape"
            )
        return result

    def _stopped(self, wanted: Tensor, confined: Tensor) -> Tensor:
        """Which entries were stopped at a fixed end that they do not start at."""
        if self._below and self._above:
            return ~(confined == wanted)  # DTensor has no != of tensors before torch 2.12
        if self.via is not None and self.via.even:
            wanted, confined = wanted.abs(), confined.abs()
        return confined > wanted if self._below else confined < wanted

    def ends(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The fixed ends of the value, of the shape of `raw`: of the domain, of what the dtype holds, and bounds that are numbers."""
        least = torch.zeros_like(raw) if self.via is not None and self.via.even else torch.full_like(raw, -math.inf)
        low, high = (self.bounded(self.hyper.confine(end, self.via)) for end in (least, torch.full_like(raw, math.inf)))
        return self.hyper.to_value(low, self.via), self.hyper.to_value(high, self.via)

    def bounded(self, raw: Tensor, states: list[State] | None = None) -> Tensor:
        """Unconstrained value after the declared bounds: numbers, or, given the new rule states of its tensors, those that read the state.

        Of a value that several tensors share, the widest of their bounds. A bound that is not finite is none.
        """
        if states is None:
            return self.hyper.within(raw, self.via, *self._bounds)
        low, high = self.learn.bounds
        return self.hyper.within(
            raw, self.via, _widest(low, torch.minimum, -math.inf, states, raw), _widest(high, torch.maximum, math.inf, states, raw)
        )


def _widest(end: Bound, wider: Callable[[Tensor, Tensor], Tensor], none: float, states: list[State], raw: Tensor) -> Tensor | None:
    if not callable(end):
        return None
    ends = [end(state).to(raw) for state in states]
    return functools.reduce(wider, [finite(each, none) for each in ends])


def number(value: float | Tensor, device: torch.device) -> Tensor:
    """A single number as a tensor of shape (); one of Python is filled in there, since a copy to a device would wait for it."""
    dtype = number_dtype(device)
    return value.to(device, dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


def _keep_where(ok: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Leaf by leaf: the new one where `ok`, else the old one; leaves of another shape than `ok` are new."""

    def keep(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(ok, new, old) if new.shape == ok.shape else new

    return keep
