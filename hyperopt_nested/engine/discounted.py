"""Horizons beyond one step, online: sensitivities of tensors and states to learned hypers are carried from step to step."""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hyperopt_nested.checks import check_number
from hyperopt_nested.engine.binding import Bindings, Hessian, Key, Reduce, Tensors, Values
from hyperopt_nested.engine.sensitivity import Named, forward_is_exact, pull_forward, pushforward
from hyperopt_nested.ops import finite, state_dtype
from hyperopt_nested.rule import Learn, Optimizer, Per
from hyperopt_nested.trees import State, map_tree

Curvature = Literal["none", "exact"]
"""What becomes of the gradient's own dependence on the tensors when sensitivities are carried on: "none" leaves it out, so that no more
than the gradient is needed; "exact" takes products with the Hessian of the loss. Where a learning rate is so high that training is chaotic,
exact sensitivities grow with every step: keep the discount well below 1 then."""


@dataclass(frozen=True)
class Discounted:
    """A horizon of all past updates, discounted: about 1 / (1 - discount) of them count.

    Each step carries the sensitivities of tensors and states to learned hypers on, times the discount. With 1 and exact curvature that is
    real-time hypergradient descent (Franceschi et al. 2017, arXiv 1703.01785); below 1 it is a discounted horizon, as in MetaOptimize
    (Sharifnassab et al. 2024, arXiv 2402.02342). It takes memory of the size of tensors and states for each learned hyper.

    Args:
        discount: in (0, 1]: how much of what earlier updates contributed a hypergradient keeps from step to step.
        curvature: whether the model's curvature is part of it; see `Curvature`. With "exact", `HyperOptimizer.step` takes a closure that
            returns the loss, and `Nested.step` takes products with the Hessian.

    Raises:
        TypeError: `discount` is no number.
        ValueError: `discount` is outside (0, 1], or `curvature` is none of its choices.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> model = torch.nn.Linear(2, 1)
        >>> adamw = hn.adamw(lr=hn.learn(1e-3, by=hn.sgd()))
        >>> horizon = hn.Discounted(0.9)
        >>> opt = hn.HyperOptimizer(model.parameters(), adamw, horizon=horizon)
    """

    discount: float
    curvature: Curvature = "none"

    def __post_init__(self) -> None:
        check_number("discount", self.discount)
        if not 0 < self.discount <= 1:
            raise ValueError(
                f"discount={self.discount!r} must be in (0, 1], where 1 looks through all past updates: use hn.OneStep() for the last alone"
            )
        if self.curvature not in get_args(Curvature):
            raise ValueError(f"curvature={self.curvature!r} must be one of {', '.join(map(repr, get_args(Curvature)))}")

    def __str__(self) -> str:
        return f"discount {self.discount:g}" + (", exact curvature" if self.curvature == "exact" else "")

    @property
    def for_learners(self) -> Discounted:
        """The horizon of what learns the hypers."""
        return Discounted(self.discount)

    def check(self, optimizer: Optimizer, name: str, learn: Learn) -> None:
        """Refuse to learn a hyper that is declared so, where its hypergradient would be wrong, or its memory too large.

        Raises:
            ValueError: the message names the hyper and the remedy.
        """
        rule, per = optimizer.rule, learn.per
        if rule.loss_names:
            raise ValueError(f"discount={self.discount:g} is not exact for {rule.name}, which reads the loss: use horizon=hn.OneStep()")
        if self.curvature == "exact":
            if per not in ("model", "tensor"):
                raise ValueError(
                    f"{name} is learned per {per}, but curvature='exact' keeps a copy of all tensors for each of its entries: "
                    "learn it per 'model' or 'tensor', or use curvature='none'"
                )
        elif not forward_is_exact(optimizer, per):
            raise ValueError(
                f"discount={self.discount:g} is not exact for {name} learned per {per}, since {rule.name} is separable by "
                f"{rule.separable}: learn it per 'tensor' or 'model', or use horizon=hn.OneStep()"
            )
        elif rule.reduction and per != "model":
            raise ValueError(
                f"discount={self.discount:g} is not exact for {name} learned per {per}, since {rule.name} needs a sum over all "
                "tensors: learn it per 'model', or use horizon=hn.OneStep()"
            )

    def kind_of(self, optimizer: Optimizer, name: str, per: Per) -> None:
        """How the last update alone is remembered: it is not."""

    def remember(self, bindings: Bindings) -> DiscountedMemory:
        """The memory of updates."""
        return DiscountedMemory(bindings, self.discount, self.curvature)


class DiscountedMemory:
    """The memory of each tensor's past updates: sensitivities of it and of its rule's state, by learned hyper and by value (`carried`).

    With the update (p', s') = U(p, s, g, h) of tensors and states, sensitivities S to a hyper h become
    S' = dU/d(p, s) z S + dU/dg H z S + dU/dh, where z is the discount, and H the Hessian of the loss, or zero (Franceschi et al. 2017,
    arXiv 1703.01785, equation 15, with z = 1).

    Args:
        bindings: the updates, bound to their learned hypers.
        discount: in (0, 1].
        curvature: see `Curvature`.
    """

    def __init__(self, bindings: Bindings, discount: float, curvature: Curvature) -> None:
        self._bindings, self._discount, self._exact = bindings, discount, curvature == "exact"

    def init(self, params: Tensors, rule: Mapping[str, State], hypers: Mapping[str, Named]) -> State:
        """Memory before the first update: zero. With exact curvature every value moves all tensors, else those that use it."""
        memory = {}
        for name, param in params.items():
            values = hypers if self._exact else self._bindings.used([name], hypers)
            zero = {"param": torch.zeros_like(_widened(param)), "state": map_tree(_zeros, _real(rule[name]))}
            carried = {key: {value: map_tree(torch.clone, zero) for value in raws} for key, raws in values.items() if raws}
            memory[name] = {"carried": carried}
        return memory

    def step(
        self,
        params: Tensors,
        grads: Tensors,
        st: State,
        hypers: dict[str, Named],
        values: Values,
        hessian: Hessian | None,
        reduce: Reduce | None = None,
    ) -> tuple[Named, dict[str, State], State]:
        """New tensors, states and memory of what has a gradient; arguments as of `Nested.step`, with learned hypers as they are now."""
        here, rule = {name: params[name] for name in grads}, {name: st["rule"][name] for name in grads}
        memory = {name: st["memory"][name]["carried"] for name in grads}

        if not hypers:
            new, (states, _) = self._bindings(params, grads, rule, hypers, values, reduce)
            return new, states, {name: {"carried": {}} for name in grads}

        def update(params: Named, grads: Named, real: State, hypers: dict[str, Named]) -> tuple[Any, State]:
            new, (states, _) = self._bindings(params, grads, _joined(real, rule), hypers, values, reduce)
            return (new, _real(states)), states

        at = map_tree(_widened, here), map_tree(_widened, dict(grads)), map_tree(_widened, _real(rule)), hypers
        (new, real), states, push = pushforward(update, *at)
        states = _joined(real, states)
        after: dict[str, State] = {name: {"carried": {key: {} for key in carried}} for name, carried in memory.items()}
        for key, moved in self._directions(hypers):
            before = {name: self._before(carried.get(key, {}), moved, here[name], rule[name]) for name, carried in memory.items()}
            along = {name: each["param"] for name, each in before.items()}
            grad_tangents = hessian(map_tree(lambda s, p: s.to(p.dtype), along, here)) if hessian else map_tree(torch.zeros_like, along)
            ones = {
                other: {value: torch.full_like(raw, float(other == key and value in moved)) for value, raw in raws.items()}
                for other, raws in hypers.items()
            }
            moved_states = {name: each["state"] for name, each in before.items()}
            pushed = push(along, {name: _widened(grad_tangents[name]) for name in grads}, moved_states, ones)
            for name, carried in memory.items():
                for value in moved & carried.get(key, {}).keys():
                    moved_by = {"param": pushed[0][name], "state": pushed[1][name]}
                    after[name]["carried"][key][value] = map_tree(_sensitivity, moved_by, before[name])
        return new, states, after

    def pull(
        self, _: Tensors, grads: Tensors, __: Mapping[str, State], memory: Mapping[str, State], hypers: Mapping[str, Named]
    ) -> Iterator[tuple[Key, Tensor]]:
        """What the gradient of each tensor adds to hypergradients: by tensor, hyper and value. Arguments as of `OneStepMemory.pull`."""
        for name, grad in grads.items():
            for key, by_value in memory[name]["carried"].items():
                for value, each in by_value.items():
                    yield (name, key, value), pull_forward(grad, each["param"], hypers[key][value])

    def _directions(self, hypers: Mapping[str, Named]) -> Iterator[tuple[str, set[str]]]:
        """Values that are moved at a time: all of a hyper, since each acts on its own part; with exact curvature, one."""
        for key, raws in hypers.items():
            yield from ((key, {value}) for value in raws) if self._exact else [(key, set(raws))]

    def _before(self, sensitivities: Mapping[str, State], moved: set[str], param: Tensor, state: State) -> State:
        """Discounted sensitivities to what is moved."""
        for value in moved & sensitivities.keys():
            return map_tree(lambda s: self._discount * s, sensitivities[value])
        return {"param": torch.zeros_like(_widened(param)), "state": map_tree(_zeros, _real(state))}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(state_dtype(tensor))


def _real(tree: State) -> State:
    """The part of a tree that has derivatives: without integers and masks."""
    parts = {key: _real(leaf) if isinstance(leaf, dict) else leaf for key, leaf in tree.items()}
    return {key: part for key, part in parts.items() if isinstance(part, dict) or part.is_floating_point()}


def _joined(real: State, tree: State) -> State:
    """A tree with its real part replaced."""
    return {key: _joined(real[key], leaf) if isinstance(leaf, dict) else real.get(key, leaf) for key, leaf in tree.items()}


def _sensitivity(new: Tensor, old: Tensor) -> Tensor:
    """A new sensitivity, in the dtype of the old one; where it is not finite, a new horizon begins."""
    return finite(new.to(old.dtype))


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(_widened(tensor))
