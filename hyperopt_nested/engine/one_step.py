"""A horizon of one step: the last update is remembered, and gradients are pulled back through it."""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from hyperopt_nested.checks import check_dtype
from hyperopt_nested.engine.binding import Bindings, Hessian, Key, Kind, Reduce, Tensors, Values
from hyperopt_nested.engine.learned import number
from hyperopt_nested.engine.sensitivity import (
    Named,
    forward_is_exact,
    linearize,
    nothing_transforms,
    pull_forward,
    pull_reverse,
    pullback,
)
from hyperopt_nested.ops import finite, state_dtype
from hyperopt_nested.rule import Learn, Optimizer, Per
from hyperopt_nested.trees import State, map_tree

Memory = Literal["auto", "kept", "forward", "reverse", "none"]
"""How the last update is remembered: "forward" keeps its sensitivity to each learned hyper (one tensor of the parameter's shape a
hyper; exact when an entry of the hyper touches only its own part of the tensor), "reverse" keeps its inputs and pulls the gradient
back through it (always exact). "kept" is forward wherever that is exact, else reverse. "auto" is that too, but for hypers whose effect
can be worked out from the tensor and the state that the update left, as Adam's learning rate and decoupled weight decay, also where
combinators change the gradient: these take no memory; tensors have to be left alone between steps. "none" remembers nothing, and
learns nothing."""


@dataclass(frozen=True)
class OneStep:
    """A horizon of one step: hypers are learned from the last update alone.

    The hypergradient is that of the next loss, which is greedy: effects on later losses are left out (Wu et al. 2018, arXiv 1803.02021).
    It costs least, and is the default.

    Args:
        memory: how the last update is remembered; see `Memory`.
        dtype: of the sensitivities that forward memory keeps, one tensor of the parameter's shape a hyper. torch.bfloat16 rounds them to
            8 bits, for half of the memory of float32. None is the parameter's dtype.

    Raises:
        TypeError: `dtype` is no dtype.
        ValueError: `memory` is none of its choices, or `dtype` is not real and floating-point.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> model = torch.nn.Linear(2, 1)
        >>> adamw = hn.adamw(lr=hn.learn(1e-3, by=hn.sgd()))
        >>> horizon = hn.OneStep(memory="kept", dtype=torch.bfloat16)
        >>> opt = hn.HyperOptimizer(model.parameters(), adamw, horizon=horizon)
    """

    discount: ClassVar[float] = 0.0
    curvature: ClassVar[Literal["none"]] = "none"

    memory: Memory = "auto"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.memory not in get_args(Memory):
            raise ValueError(f"memory={self.memory!r} must be one of {', '.join(map(repr, get_args(Memory)))}")
        check_dtype("dtype", self.dtype)

    def __str__(self) -> str:
        return "one step"

    @property
    def for_learners(self) -> OneStep:
        """The horizon of what learns the hypers: their values may be confined after a step, so each step is remembered."""
        return OneStep("kept" if self.memory == "auto" else self.memory)

    def check(self, optimizer: Optimizer, name: str, learn: Learn) -> None:
        """Refuse to learn a hyper that is declared so, where its hypergradient would be zero or wrong.

        Raises:
            ValueError: the message names the hyper and the remedy.
        """
        rule = optimizer.rule
        if name in rule.nondifferentiable and self.memory != "none":
            raise ValueError(
                f"{name} is learned, but the derivative of {rule.name} with respect to it is zero wherever it exists, "
                f"so it would never move: give {name} a plain value"
            )
        if self.memory == "forward" and not forward_is_exact(optimizer, learn.per):
            raise ValueError(
                f"memory='forward' is not exact for {name} learned per {learn.per}, since {rule.name} is separable by {rule.separable}: "
                "use memory='auto' or 'reverse'"
            )

    def kind_of(self, optimizer: Optimizer, name: str, per: Per) -> Kind | None:
        """How the last update's dependence on a hyper is remembered."""
        if self.memory == "none":
            return None
        if self.memory == "auto" and name in optimizer.rule.late:
            return "late"
        return "forward" if self.memory != "reverse" and forward_is_exact(optimizer, per) else "reverse"

    def remember(self, bindings: Bindings) -> OneStepMemory:
        """The memory of updates."""
        return OneStepMemory(bindings, self.dtype)


class OneStepMemory:
    """The memory of each tensor's last update.

    It is `sensitivity`, by learned hyper; and where hypers need it, its `inputs`, or only its `numbers`, and whether it was `taken`.

    Args:
        bindings: the updates, bound to their learned hypers.
        dtype: what sensitivities are kept in; None is each tensor's own.
    """

    def __init__(self, bindings: Bindings, dtype: torch.dtype | None = None) -> None:
        self._bindings, self._dtype = bindings, dtype

    def init(self, params: Tensors, rule: Mapping[str, State], hypers: Mapping[str, Named]) -> State:
        """Memory before the first update: of the structure that later ones have, with no effect."""
        memory = {}
        for name, param in params.items():
            none = {key: torch.zeros_like(param, dtype=self._dtype) for key in self._bindings[name].memory["forward"]}
            binding, zero = self._bindings[name], torch.zeros_like(param)
            raws, reduction = binding.unconstrained(name, hypers), binding.optimizer.rule.reduction
            part = binding.update(param, zero, rule[name], {}).reduced(raws) if reduction else zero
            totals = {reduction: torch.zeros_like(part)}
            memory[name] = self._remembered(name, 0.0, none, param, zero, rule[name], raws, {}, totals)
        return memory

    def step(
        self,
        params: Tensors,
        grads: Tensors,
        st: State,
        hypers: dict[str, Named],
        values: Values,
        hessian: Hessian | None = None,
        reduce: Reduce | None = None,
    ) -> tuple[Named, dict[str, State], State]:
        """New tensors, states and memory of what has a gradient; arguments as of `Nested.step`, with learned hypers as they are now."""
        del hessian  # one step looks through no gradient
        rule = st["rule"]
        forward = {key for name in grads for key in self._bindings[name].memory["forward"]}
        used = self._bindings.used(grads, hypers)

        def update(raws: dict[str, Named]) -> tuple[Named, tuple[dict[str, State], Named]]:
            return self._bindings(params, grads, rule, raws, values, reduce)

        new, (states, totals), sensitivities = linearize(update, used, [key for key in hypers if key in forward])
        memory: State = {}
        for name in grads:
            dtype = self._dtype or params[name].dtype
            sensitivity = {key: finite(sensitivities[key][name].to(dtype)) for key in self._bindings[name].memory["forward"]}
            inputs = params[name], grads[name], rule[name], self._bindings[name].unconstrained(name, hypers), values.get(name, {}), totals
            memory[name] = self._remembered(name, 1.0, sensitivity, *inputs)
        return new, states, memory

    def pull(
        self, params: Tensors, grads: Tensors, rule: Mapping[str, State], memory: Mapping[str, State], hypers: Mapping[str, Named]
    ) -> Iterator[tuple[Key, Tensor]]:
        """What the gradient of each tensor adds to hypergradients: by tensor, by learned hyper, and by value.

        Elements in which the last update came out not finite add nothing, unless the gradient is not finite there.

        Args:
            params: the tensors that the last update made.
            grads: their gradients.
            rule: the states of rules that the last update made.
            memory: as the last step made it.
            hypers: unconstrained values now.
        """
        remembered = {name: grad for name, grad in grads.items() if not _is_empty(memory[name])}
        reverse = self._pull_reverse(remembered, memory)
        late = self._pull_late(params, remembered, rule, memory)
        for name, grad in grads.items():
            value = {each.key: each.key_of(name) for each in self._bindings[name].learned.values()}
            for key, sensitivity in memory[name]["sensitivity"].items():
                yield (name, key, value[key]), pull_forward(grad, sensitivity.to(state_dtype(grad)), hypers[key][value[key]])
            others = {
                **dict.fromkeys(self._bindings[name].memory["reverse"], reverse),
                **dict.fromkeys(self._bindings[name].memory["late"], late),
            }
            for key, hypergrads in others.items():
                if name in hypergrads:
                    yield (name, key, value[key]), torch.where(memory[name]["taken"] > 0, hypergrads[name][key], 0)
                else:
                    yield (name, key, value[key]), torch.zeros_like(hypers[key][value[key]])

    def _pull_reverse(self, grads: Tensors, memory: Mapping[str, State]) -> dict[str, Named]:
        """Pull gradients back through the remembered updates."""
        inputs = {name: memory[name]["inputs"] for name in grads if "inputs" in memory[name]}
        if not inputs:
            return {}
        params, used, states, values = (
            {name: each[part] for name, each in inputs.items()} for part in ("param", "grad", "state", "values")
        )
        updates = self._bindings.updates(params, used, states, values)
        along = {name: update.cleaned(grads[name]) for name, update in updates.items()}
        totals = {name: finite(each["total"]) if "total" in each else None for name, each in inputs.items()}

        def new(raws: dict[str, Named]) -> Named:
            return {name: update.param(raws[name], totals[name]) for name, update in updates.items()}

        return pull_reverse(along, new, {name: each["unconstrained"] for name, each in inputs.items()})

    def _pull_late(self, params: Tensors, grads: Tensors, rule: Mapping[str, State], memory: Mapping[str, State]) -> dict[str, Named]:
        """Pull gradients back through the last part of each update, `Rule.finish`, given the tensors and the states that they left.

        The tensors before it are worked out: `finish` is affine in them.
        """
        numbers = {name: memory[name]["numbers"] for name in grads if "numbers" in memory[name]}
        if not numbers:
            return {}
        states = {name: map_tree(_stepped(memory[name]["taken"] > 0), rule[name]) for name in numbers}
        updates = self._bindings.updates(params, grads, states, {name: each["values"] for name, each in numbers.items()})
        after, along = {}, {}
        for name, update in updates.items():
            after[name], along[name] = update.left(grads[name])
        raws = {name: each["unconstrained"] for name, each in numbers.items()}

        def finish(params: Named, raws: dict[str, Named]) -> Named:
            return {name: update.finish(params[name], raws[name]) for name, update in updates.items()}

        at_zero, _, pull = pullback(lambda params: (finish(params, raws), ()), map_tree(torch.zeros_like, after))
        (slopes,) = pull(map_tree(torch.ones_like, after))
        before = map_tree(lambda after, at_zero, slope: (after - at_zero) / slope, after, at_zero, slopes)
        return pull_reverse(along, functools.partial(finish, before), raws)

    def _remembered(
        self,
        name: str,
        taken: float,
        sensitivity: Named,
        param: Tensor,
        grad: Tensor,
        state: State,
        raws: Named,
        values: Mapping[str, float | Tensor],
        totals: Named,
    ) -> State:
        """Memory of one tensor's update: sensitivities, and what hypers need of its inputs.

        They are copies: the caller may overwrite tensors, and torch.compile tells shared ones from others.
        """
        memory: State = {"sensitivity": sensitivity}
        late, reverse = self._bindings[name].memory["late"], self._bindings[name].memory["reverse"]
        optimizer = self._bindings[name].optimizer
        if not late and not reverse:
            return memory
        scheduled = {hyper: number(values.get(hyper, value), param.device) for hyper, value in optimizer.declared.items()}
        numbers: State = {"unconstrained": raws, "values": scheduled}
        if late:
            memory["numbers"] = map_tree(torch.clone, numbers)
        if reverse:
            inputs = {"param": param, "grad": grad, "state": state, **numbers}
            if optimizer.rule.reduction:
                inputs["total"] = totals[optimizer.rule.reduction].to(param.device, state_dtype(param))
            memory["inputs"] = map_tree(torch.clone, inputs)
        return {**memory, "taken": torch.full((), taken, dtype=torch.float32, device=param.device)}


def _is_empty(memory: State) -> bool:
    """Whether a tensor was not updated yet, if that is known: where memory is no plain number on the CPU, it is not."""
    taken = memory.get("taken")
    return taken is not None and taken.device.type == "cpu" and nothing_transforms() and not bool(taken)


def _stepped(taken: Tensor) -> Callable[[Tensor], Tensor]:
    """Leaf by leaf: as it is, but before the first update numbers are 1, since no step is number 0."""
    return lambda leaf: torch.where(taken, leaf, 1) if leaf.ndim == 0 else leaf
