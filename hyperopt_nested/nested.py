"""The recursion: an optimizer steps the parameters, and the optimizers of its learned hypers step those.

To learn a hyper, the last update is differentiated with respect to it, the new gradient is the cotangent, and the result is the
gradient that the hyper's own optimizer steps with; its hypers may be learned in the same way. Everything here is a pure function of
dicts of tensors, so it works under `torch.func.vmap`, `grad` and `jvp`, and under `torch.compile`.
"""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from hyperopt_nested.learned import LearnedHyper, number
from hyperopt_nested.ops import State, map_tree, state_dtype
from hyperopt_nested.rule import Coupling, Learn, Optimizer
from hyperopt_nested.sensitivity import Apply, Raws, linearize, pull_forward, pull_reverse, unused

Tensors = Mapping[str, Tensor]
Values = Mapping[str, Mapping[str, float | Tensor]]
Memory = Literal["auto", "forward", "reverse"]
"""How the last update is remembered: "forward" keeps its sensitivity to each learned hyper (one tensor of the parameter's shape a
hyper; exact when an entry of the hyper touches only its own part of the tensor), "reverse" keeps its inputs and pulls the gradient
back through it (always exact). "auto" is forward wherever that is exact."""


class Nested:
    """An optimizer, its learners, their learners, and so on: one pure `step`.

    The state is a dict of nested dicts of tensors, of constant structure: `rule` (each tensor's rule state), `hypers` (learned values
    in raw coordinates), `learners` (the state of the optimizers that learn them: the same structure again), `memory` (each tensor's
    last update) and `rejected` (how many hypergradient entries were not finite, and so not used).

    A learned hyper goes by its name; where several `learn(...)` declarations have one name, the second is `name#2`, and so on.

    Args:
        optimizer: one optimizer for all tensors, or a mapping from each tensor's name to its optimizer.
        memory: how the last update is remembered.

    Raises:
        ValueError: `memory="forward"` would not be exact for a learned hyper.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> nested = hn.Nested(hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.01))))
        >>> params = {"w": torch.ones(2)}
        >>> st = nested.init(params)
        >>> for _ in range(2):  # the loss is w.sum(), so the hypergradient is -(1 + 1)
        ...     params, st = nested.step(params, {"w": torch.ones(2)}, st)
        >>> nested.hypers(st)
        {'lr': {'model': tensor(0.1200, dtype=torch.float64)}}
    """

    def __init__(self, optimizer: Optimizer | Mapping[str, Optimizer], *, memory: Memory = "auto") -> None:
        if memory not in get_args(Memory):
            raise ValueError(f"memory={memory!r} must be one of {', '.join(map(repr, get_args(Memory)))}")
        self.memory = memory
        self._optimizer = optimizer
        self._by_learn: dict[int, LearnedHyper] = {}
        for each in [optimizer] if isinstance(optimizer, Optimizer) else optimizer.values():
            for name, learn in each.learned.items():
                if id(learn) not in self._by_learn:
                    self._declare(each, name, learn)
        self.learned = {learned.key: learned for learned in self._by_learn.values()}

    def _declare(self, optimizer: Optimizer, name: str, learn: Learn) -> None:
        same = sum(learned.key.split("#")[0] == name for learned in self._by_learn.values())
        key = f"{name}#{same + 1}" if same else name
        self._by_learn[id(learn)] = LearnedHyper(
            key, learn, optimizer.rule.hypers[name], optimizer.via(name), Nested(learn.by, memory=self.memory)
        )
        if self.memory == "forward" and not _forward_is_exact(optimizer, learn):
            raise ValueError(
                f"memory='forward' is not exact for {name} learned per {learn.per}, since {optimizer.rule.name} couples each "
                f"{optimizer.rule.coupling}: use memory='auto' or 'reverse'"
            )

    def optimizer_of(self, name: str) -> Optimizer:
        """The optimizer of the tensor called `name`."""
        return self._optimizer if isinstance(self._optimizer, Optimizer) else self._optimizer[name]

    def learned_of(self, name: str) -> dict[str, LearnedHyper]:
        """The learned hypers of the tensor called `name`, by the names that its rule gives them."""
        return {hyper: self._by_learn[id(learn)] for hyper, learn in self.optimizer_of(name).learned.items()}

    def init(self, params: Tensors, start: Mapping[str, float | Tensor] | None = None) -> State:
        """State before the first step.

        Args:
            params: the tensors, by name.
            start: start values of learned hypers, by key, in the place of the declared ones; tensors of shape () may be batched
                by `torch.func.vmap`.

        Raises:
            TypeError: a tensor is not of a real floating-point dtype.
            ValueError: a learned hyper is not used by the update, `start` names no learned hyper, or a number in it is outside its domain.
        """
        start = start or {}
        for key, value in start.items():
            if key not in self.learned:
                raise ValueError(f"start names {key!r}, which is not learned; learned are: {', '.join(self.learned) or 'none'}")
            if not isinstance(value, Tensor):
                self.learned[key].hyper.check(f"start: {key}", value, self.learned[key].via)
        hypers: dict[str, Raws] = {key: {} for key in self.learned}
        rule: State = {}
        checked: set[tuple[int, int]] = set()
        for name, param in params.items():
            if not param.is_floating_point():
                raise TypeError(f"params[{name!r}] has dtype {param.dtype}; only real floating-point tensors can be optimized")
            optimizer = self.optimizer_of(name)
            if (id(optimizer), param.ndim) not in checked:
                checked.add((id(optimizer), param.ndim))
                _refuse_unused(optimizer, self.learned_of(name), name, param)
            rule[name] = optimizer.rule.init(param, optimizer.settings)
            for learned in self.learned_of(name).values():
                raws = hypers[learned.key]
                if learned.key_of(name) not in raws:
                    raws[learned.key_of(name)] = learned.start(param, start.get(learned.key, learned.learn.value))
        zero = {key: torch.zeros((), device=next(iter(raws.values())).device) for key, raws in hypers.items() if raws}
        return {
            "rule": rule,
            "hypers": hypers,
            "learners": {key: learned.learner.init(hypers[key]) for key, learned in self.learned.items()},
            "memory": {name: self._no_memory(name, param, rule[name], hypers) for name, param in params.items()},
            "rejected": zero,
        }

    def step(self, params: Tensors, grads: Tensors, st: State, values: Values | None = None) -> tuple[dict[str, Tensor], State]:
        """One step: first of the learned hypers, with hypergradients; then of the tensors, with the new hypers.

        Args:
            params: the tensors, by name.
            grads: their gradients. A tensor without one is left alone, and so are the hypers that only it uses.
            st: as `init` or the last step made it.
            values: by tensor and hyper, what a schedule has made of declared values: it replaces a value that is not learned, and
                scales one that is (by its ratio to the declared value).

        Returns:
            The new tensors and the new state; the inputs stay as they are.
        """
        values = values or {}
        grads = {name: -grad if self.optimizer_of(name).maximize else grad for name, grad in grads.items()}
        hypers, learners, rejected = dict(st["hypers"]), dict(st["learners"]), dict(st["rejected"])
        for key, hypergrads in self.hypergradients(grads, st).items():
            learned = self.learned[key]
            hypers[key], learners[key], rejected[key] = learned.step(hypers[key], hypergrads, learners[key], rejected[key])
        new, rule, sensitivities = self._update(params, grads, st["rule"], hypers, values)
        memory = {name: self._remember(name, params[name], grads[name], st["rule"][name], hypers, values, sensitivities) for name in grads}
        rule = {**st["rule"], **rule}
        hypers = {key: self._bounded(key, raws, rule, grads) for key, raws in hypers.items()}
        memory = {**st["memory"], **memory}
        return {**params, **new}, {"rule": rule, "hypers": hypers, "learners": learners, "memory": memory, "rejected": rejected}

    def hypergradients(self, grads: Tensors, st: State) -> dict[str, Raws]:
        """Gradients pulled back through the last update onto the learned hypers, in raw coordinates; zero before the first update.

        Args:
            grads: gradients after the last update, by tensor (of what is minimized).
            st: the state that the last update made.

        Returns:
            By learned hyper, by key of its values; only values that some gradient reaches are there.
        """
        found: dict[str, Raws] = {key: {} for key in self.learned}
        for name, grad in grads.items():
            memory = st["memory"][name]
            raws = self._raws(name, st["hypers"])
            pulled = [(key, pull_forward(grad, sensitivity, raws[key])) for key, sensitivity in memory["sensitivity"].items()]
            if "inputs" in memory:
                inputs = memory["inputs"]
                apply = self._apply(name, inputs["param"], inputs["grad"], inputs["state"], inputs["values"])
                through = pull_reverse(grad, apply, inputs["raws"])
                pulled += [(key, torch.where(memory["taken"] > 0, through[key], 0)) for key in self._split(name)[1]]
            for key, contribution in pulled:
                value = self.learned[key].key_of(name)
                before = found[key].get(value)
                found[key][value] = contribution if before is None else before + contribution.to(before.device)
        return {key: raws for key, raws in found.items() if raws}

    def hypers(self, st: State) -> dict[str, dict[str, Tensor]]:
        """Learned values at every height of the tower: `{"lr": {"model": ...}, "lr.lr": {"model": ...}}`, schedules apart."""
        found = {}
        for key, learned in self.learned.items():
            found[key] = {name: learned.value(raw) for name, raw in st["hypers"][key].items()}
            inner = learned.learner.hypers(st["learners"][key])
            found |= {f"{key}.{below}": values for below, values in inner.items()}
        return found

    def rejected(self, st: State) -> dict[str, Tensor]:
        """How many hypergradient entries were NaN or infinite, and so not used, at every height of the tower: shape () each."""
        found = dict(st["rejected"])
        for key, learned in self.learned.items():
            found |= {f"{key}.{below}": count for below, count in learned.learner.rejected(st["learners"][key]).items()}
        return found

    def _raws(self, name: str, hypers: Mapping[str, Raws]) -> Raws:
        """Raw values that a tensor uses, by learned hyper."""
        return {each.key: hypers[each.key][each.key_of(name)] for each in self.learned_of(name).values()}

    def _apply(self, name: str, param: Tensor, grad: Tensor, state: State, values: Mapping[str, float | Tensor]) -> Apply:
        """The update of one tensor as a function of the raw values that it uses."""
        return _apply(self.optimizer_of(name), self.learned_of(name), param, grad, state, values)

    def _update(
        self, params: Tensors, grads: Tensors, rule: Mapping[str, State], hypers: dict[str, Raws], values: Values
    ) -> tuple[dict[str, Tensor], dict[str, State], dict[str, Raws]]:
        """New tensors and rule states of all tensors with a gradient, and their forward sensitivities."""

        def update(raws: dict[str, Raws]) -> tuple[Raws, dict[str, State]]:
            updated = {}
            for name, grad in grads.items():
                apply = self._apply(name, params[name], grad, rule[name], values.get(name, {}))
                updated[name] = apply(self._raws(name, raws))
            return {name: pair[0] for name, pair in updated.items()}, {name: pair[1] for name, pair in updated.items()}

        forward = {key for name in grads for key in self._split(name)[0]}
        used: dict[str, Raws] = {key: {} for key in self.learned}
        for name in grads:
            for key, raw in self._raws(name, hypers).items():
                used[key][self.learned[key].key_of(name)] = raw
        new, states, sensitivities = linearize(update, used, [key for key in self.learned if key in forward])
        kept = {name: map_tree(lambda leaf, old: leaf.to(old.dtype), state, rule[name]) for name, state in states.items()}
        return {name: param.to(params[name].dtype) for name, param in new.items()}, kept, sensitivities

    def _remember(
        self,
        name: str,
        param: Tensor,
        grad: Tensor,
        state: State,
        hypers: Mapping[str, Raws],
        values: Values,
        sensitivities: Mapping[str, Raws],
    ) -> State:
        """Memory of one tensor's update."""
        forward, reverse = self._split(name)
        memory: State = {"sensitivity": {key: sensitivities[key][name] for key in forward}}
        if reverse:
            memory |= self._inputs(name, param, grad, state, self._raws(name, hypers), values.get(name, {}))
            memory["taken"] = torch.ones((), device=param.device)
        return memory

    def _no_memory(self, name: str, param: Tensor, state: State, hypers: Mapping[str, Raws]) -> State:
        """Memory before the first update: of the same structure, with no effect."""
        forward, reverse = self._split(name)
        memory: State = {"sensitivity": {key: torch.zeros_like(param, dtype=state_dtype(param)) for key in forward}}
        if reverse:
            memory |= self._inputs(name, param, torch.zeros_like(param), state, self._raws(name, hypers), {})
            memory["taken"] = torch.zeros((), device=param.device)
        return memory

    def _inputs(
        self, name: str, param: Tensor, grad: Tensor, state: State, raws: Raws, values: Mapping[str, float | Tensor]
    ) -> dict[str, State]:
        """Inputs of an update: copies, for the caller may overwrite tensors, and torch.compile tells shared ones from others."""
        values = {hyper: number(values.get(hyper, value), param.device) for hyper, value in self.optimizer_of(name).declared.items()}
        return {"inputs": map_tree(torch.clone, {"param": param, "grad": grad, "state": state, "raws": raws, "values": values})}

    def _split(self, name: str) -> tuple[list[str], list[str]]:
        """Learned hypers of a tensor that are remembered forward, and those in reverse."""
        optimizer, learned = self.optimizer_of(name), self.learned_of(name)
        exact = [each.key for each in learned.values() if self.memory != "reverse" and _forward_is_exact(optimizer, each.learn)]
        return list(dict.fromkeys(exact)), [key for key in dict.fromkeys(each.key for each in learned.values()) if key not in exact]

    def _bounded(self, key: str, raws: Raws, rule: State, grads: Tensors) -> Raws:
        learned = self.learned[key]
        if not any(map(callable, learned.learn.bounds)):
            return raws
        users: dict[str, list[State]] = {}
        for name in grads:
            if learned in self.learned_of(name).values():
                users.setdefault(learned.key_of(name), []).append(rule[name])
        return {name: learned.bounded(raw, users[name]) if name in users else raw for name, raw in raws.items()}


def _apply(
    optimizer: Optimizer,
    learned: Mapping[str, LearnedHyper],
    param: Tensor,
    grad: Tensor,
    state: State,
    values: Mapping[str, float | Tensor],
) -> Apply:
    dtype = state_dtype(param)

    def widened(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, dtype)) if tensor.is_floating_point() else tensor

    def apply(raws: Raws) -> tuple[Tensor, State]:
        hypers = {}
        for name, setting in optimizer.declared.items():
            given = values.get(name, setting)
            if name in learned:
                hypers[name] = learned[name].value(raws[learned[name].key].to(param.device), given)
            else:
                hypers[name] = number(given, param.device)
        new, new_state = optimizer.rule.update(widened(param), widened(grad), map_tree(widened, state), hypers)
        return new.to(dtype), new_state

    return apply


def _refuse_unused(optimizer: Optimizer, learned: Mapping[str, LearnedHyper], name: str, param: Tensor) -> None:
    """Raise if a learned hyper has no path to the updated parameter, tried on a tensor of its shape that has no values."""
    if not learned:
        return
    probe = torch.empty(param.shape, dtype=param.dtype, device="meta")
    raws = {each.key: each.start(probe, each.learn.value) for each in learned.values()}
    apply = _apply(optimizer, learned, probe, probe, optimizer.rule.init(probe, optimizer.settings), {})
    for key in unused(apply, raws):
        hyper = next(hyper for hyper, each in learned.items() if each.key == key)
        raise ValueError(
            f"{hyper} is learned, but {optimizer.rule.name} does not use it in the update of {name!r} "
            f"(settings: {optimizer!r}), so its hypergradient would always be zero: give {hyper} a plain value, or switch on what uses it"
        )


def _forward_is_exact(optimizer: Optimizer, learn: Learn) -> bool:
    if learn.per in ("model", "tensor"):
        return True
    order = get_args(Coupling)
    return order.index(optimizer.rule.coupling) <= order.index(learn.per)
