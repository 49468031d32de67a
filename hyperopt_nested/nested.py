"""The recursion: an optimizer steps the parameters, and the optimizers of its learned hypers step those.

To learn a hyper, the last update is differentiated with respect to it, the new gradient is the cotangent, and the result is the
gradient that the hyper's own optimizer steps with; its hypers may be learned in the same way. Everything here is a pure function of
dicts of tensors, so it works under `torch.func.vmap`, `grad` and `jvp`, and under `torch.compile`.
"""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hyperopt_nested.learned import LearnedHyper, number
from hyperopt_nested.ops import State, evaluated, map_tree, state_dtype
from hyperopt_nested.rule import Coupling, Learn, Optimizer
from hyperopt_nested.sensitivity import Raws, linearize, pull_forward, pull_reverse, unused
from hyperopt_nested.tensor_update import TensorUpdate

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
        ValueError: `memory="forward"` would not be exact for a learned hyper, or its derivative is zero wherever it exists.

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
        self._learned_of: dict[int, _Learned] = {}
        for each in [optimizer] if isinstance(optimizer, Optimizer) else optimizer.values():
            for name, learn in each.learned.items():
                if id(learn) not in self._by_learn:
                    self._declare(each, name, learn)
            if id(each) not in self._learned_of:
                self._learned_of[id(each)] = self._split(each)
        self.learned = {learned.key: learned for learned in self._by_learn.values()}

    def _declare(self, optimizer: Optimizer, name: str, learn: Learn) -> None:
        if name in optimizer.rule.flat:
            raise ValueError(
                f"{name} is learned, but the derivative of {optimizer.rule.name} with respect to it is zero wherever it exists, "
                f"so it would never move: give {name} a plain value"
            )
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
        return self._learned(name).hypers

    def init(self, params: Tensors, start: Mapping[str, float | Tensor] | None = None) -> State:
        """State before the first step.

        Args:
            params: the tensors, by name.
            start: start values of learned hypers, by key, in the place of the declared ones; tensors of shape () may be batched
                by `torch.func.vmap`.

        Raises:
            TypeError: a tensor is not of a real floating-point dtype.
            ValueError: a learned hyper is not used by the update, or enters a total over all tensors in a way that can not be
                differentiated; `start` names no learned hyper, or a number in it is outside its domain.
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
                self._refuse(optimizer, name, param)
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

    def step(
        self, params: Tensors, grads: Tensors, st: State, values: Values | None = None, *, learn: bool = True
    ) -> tuple[dict[str, Tensor], State]:
        """One step: first of the learned hypers, with hypergradients; then of the tensors, with the new hypers.

        Args:
            params: the tensors, by name.
            grads: their gradients. A tensor without one is left alone, and so are the hypers that only it uses.
            st: as `init` or the last step made it.
            values: by tensor and hyper, what a schedule has made of declared values: it replaces a value that is not learned, and
                scales one that is (by its ratio to the declared value).
            learn: whether to step the learned hypers; if not, `hyper_step` does.

        Returns:
            The new tensors and the new state; the inputs stay as they are.
        """
        values = values or {}
        grads = self._descended(grads)
        hypers, learners, rejected = self._learn(grads, st) if learn else (st["hypers"], st["learners"], st["rejected"])
        new, rule, sensitivities, totals = self._update(params, grads, st["rule"], hypers, values)
        memory: State = {}
        for name in grads:
            inputs = params[name], grads[name], st["rule"][name], self._raws(name, hypers), values.get(name, {}), totals
            memory[name] = self._memory(name, 1.0, {key: sensitivities[key][name] for key in self._learned(name).forward}, *inputs)
        rule = {**st["rule"], **rule}
        hypers = {key: self._bounded(key, raws, rule, grads) for key, raws in hypers.items()}
        memory = {**st["memory"], **memory}
        return {**params, **new}, {"rule": rule, "hypers": hypers, "learners": learners, "memory": memory, "rejected": rejected}

    def hyper_step(self, grads: Tensors, st: State) -> State:
        """Step the learned hypers alone, with the gradients of any loss at the tensors that the last step made: of a validation loss, say.

        Args:
            grads: the gradients, by tensor.
            st: as the last step, or hyper step, made it.

        Returns:
            The new state.
        """
        grads = self._descended(grads)
        hypers, learners, rejected = self._learn(grads, st)
        hypers = {key: self._bounded(key, raws, st["rule"], grads) for key, raws in hypers.items()}
        return {**st, "hypers": hypers, "learners": learners, "rejected": rejected}

    def _descended(self, grads: Tensors) -> dict[str, Tensor]:
        """Gradients of what is minimized."""
        return {name: -grad if self.optimizer_of(name).maximize else grad for name, grad in grads.items()}

    def _learn(self, grads: Tensors, st: State) -> tuple[dict[str, Raws], dict[str, State], Raws]:
        """Learned hypers, their learners and counts of what was rejected, after one step with the hypergradients that `grads` give."""
        hypers, learners, rejected = dict(st["hypers"]), dict(st["learners"]), dict(st["rejected"])
        for key, hypergrads in self.hypergradients(grads, st).items():
            learned = self.learned[key]
            hypers[key], learners[key], rejected[key] = learned.step(hypers[key], hypergrads, learners[key], rejected[key])
        return hypers, learners, rejected

    def update(
        self, params: Tensors, grads: Tensors, rule: Mapping[str, State], hypers: Mapping[str, Raws]
    ) -> tuple[dict[str, Tensor], dict[str, State]]:
        """One step of the tensors alone, with given hypers: nothing is learned, and nothing remembered.

        Args:
            params: the tensors, by name.
            grads: the gradient of each.
            rule: the rule states, `st["rule"]`.
            hypers: raw values of the learned hypers, `st["hypers"]`.

        Returns:
            The new tensors, and the new rule states.
        """
        new, (states, _) = self._updated(params, self._descended(grads), rule, hypers, {})
        return _in_dtypes_of(params, rule, new, states)

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
                update = self._tensor_update(name, inputs["param"], inputs["grad"], inputs["state"], inputs["values"])
                through = pull_reverse(grad, functools.partial(update.param, total=inputs.get("total")), inputs["raws"])
                pulled += [(key, torch.where(memory["taken"] > 0, through[key], 0)) for key in self._learned(name).reverse]
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

    def evaluated(self, params: Tensors, st: State) -> dict[str, Tensor]:
        """The weights to evaluate the model with: those that the rules keep for it (averages of some kind), else the tensors."""
        return {name: evaluated(param, st["rule"][name]) for name, param in params.items()}

    def _learned(self, name: str) -> _Learned:
        return self._learned_of[id(self.optimizer_of(name))]

    def _raws(self, name: str, hypers: Mapping[str, Raws]) -> Raws:
        """Raw values that a tensor uses, by learned hyper."""
        return {each.key: hypers[each.key][each.key_of(name)] for each in self.learned_of(name).values()}

    def _tensor_update(self, name: str, param: Tensor, grad: Tensor, state: State, values: Mapping[str, float | Tensor]) -> TensorUpdate:
        return TensorUpdate(self.optimizer_of(name), self.learned_of(name), param, grad, state, values)

    def _update(
        self, params: Tensors, grads: Tensors, rule: Mapping[str, State], hypers: dict[str, Raws], values: Values
    ) -> tuple[dict[str, Tensor], dict[str, State], dict[str, Raws], Raws]:
        """New tensors and rule states of all tensors with a gradient, their forward sensitivities, and the totals of what is measured."""

        def update(raws: dict[str, Raws]) -> tuple[Raws, tuple[dict[str, State], Raws]]:
            return self._updated(params, grads, rule, raws, values)

        forward = {key for name in grads for key in self._learned(name).forward}
        used: dict[str, Raws] = {key: {} for key in self.learned}
        for name in grads:
            for key, raw in self._raws(name, hypers).items():
                used[key][self.learned[key].key_of(name)] = raw
        new, (states, totals), sensitivities = linearize(update, used, [key for key in self.learned if key in forward])
        new, states = _in_dtypes_of(params, rule, new, states)
        return new, states, sensitivities, totals

    def _updated(
        self, params: Tensors, grads: Tensors, rule: Mapping[str, State], raws: Mapping[str, Raws], values: Values
    ) -> tuple[Raws, tuple[dict[str, State], Raws]]:
        """New tensors; and new rule states, and the totals of what is measured."""
        updates = {name: self._tensor_update(name, params[name], grads[name], rule[name], values.get(name, {})) for name in grads}
        used = {name: self._raws(name, raws) for name in grads}
        totals: Raws = {}
        for name, each in updates.items():
            if each.measures:
                measured, before = each.measure(used[name]), totals.get(each.measures)
                totals[each.measures] = measured if before is None else before + measured.to(before.device)
        updated = {name: each(used[name], totals.get(each.measures)) for name, each in updates.items()}
        return {name: pair[0] for name, pair in updated.items()}, ({name: pair[1] for name, pair in updated.items()}, totals)

    def _no_memory(self, name: str, param: Tensor, state: State, hypers: Mapping[str, Raws]) -> State:
        """Memory before the first update: of the structure that later ones have, with no effect."""
        none = {key: torch.zeros_like(param, dtype=state_dtype(param)) for key in self._learned(name).forward}
        totals = {self.optimizer_of(name).rule.measures: torch.zeros((), device=param.device)}
        return self._memory(name, 0.0, none, param, torch.zeros_like(param), state, self._raws(name, hypers), {}, totals)

    def _memory(
        self,
        name: str,
        taken: float,
        sensitivity: Raws,
        param: Tensor,
        grad: Tensor,
        state: State,
        raws: Raws,
        values: Mapping[str, float | Tensor],
        totals: Raws,
    ) -> State:
        """Memory of one tensor's update: sensitivities, and, if a hyper needs them, its inputs.

        They are copies: the caller may overwrite tensors, and torch.compile tells shared ones from others.
        """
        if not self._learned(name).reverse:
            return {"sensitivity": sensitivity}
        optimizer = self.optimizer_of(name)
        numbers = {hyper: number(values.get(hyper, value), param.device) for hyper, value in optimizer.declared.items()}
        inputs: State = {"param": param, "grad": grad, "state": state, "raws": raws, "values": numbers}
        if optimizer.rule.measures:
            inputs["total"] = totals[optimizer.rule.measures].to(param.device, state_dtype(param))
        return {"sensitivity": sensitivity, "inputs": map_tree(torch.clone, inputs), "taken": torch.tensor(taken, device=param.device)}

    def _split(self, optimizer: Optimizer) -> _Learned:
        hypers = {name: self._by_learn[id(learn)] for name, learn in optimizer.learned.items()}
        keys = list(dict.fromkeys(each.key for each in hypers.values()))
        exact = {each.key for each in hypers.values() if self.memory != "reverse" and _forward_is_exact(optimizer, each.learn)}
        return _Learned(hypers, [key for key in keys if key in exact], [key for key in keys if key not in exact])

    def _refuse(self, optimizer: Optimizer, name: str, param: Tensor) -> None:
        """Raise if a learned hyper can not be learned, tried on a tensor of the parameter's shape (a large one has no values)."""
        learned = self._learned_of[id(optimizer)]
        if not learned.hypers:
            return
        device = "cpu" if param.numel() < 4096 else "meta"  # meta tensors cost no memory, but operations on them are slow
        probe = torch.zeros(param.shape, dtype=param.dtype, device=device)
        raws = {each.key: each.start(probe, each.learn.value) for each in learned.hypers.values()}
        update = TensorUpdate(optimizer, learned.hypers, probe, probe, optimizer.rule.init(probe, optimizer.settings), {})
        total = torch.zeros((), device=device) if update.measures else None
        told = {each.key: hyper for hyper, each in learned.hypers.items()}
        measured = set(raws) - set(unused(update.measure, raws)) if update.measures else set()
        for key in unused(functools.partial(update.param, total=total), raws):
            if key not in measured:
                raise ValueError(
                    f"{told[key]} is learned, but {optimizer.rule.name} does not use it in the update of {name!r} (settings: "
                    f"{optimizer!r}), so its hypergradient would always be zero: give {told[key]} a plain value, or switch on what uses it"
                )
        for key in sorted(measured):
            if self.learned[key].learn.per != "model" or key in learned.reverse:
                raise ValueError(
                    f"{told[key]} enters the total over all tensors that {optimizer.rule.name} needs: learn it per 'model', with memory "
                    "'auto' or 'forward', or put what needs the total outermost, where it sees the raw gradients"
                )

    def _bounded(self, key: str, raws: Raws, rule: State, grads: Tensors) -> Raws:
        learned = self.learned[key]
        if not any(map(callable, learned.learn.bounds)):
            return raws
        users: dict[str, list[State]] = {}
        for name in grads:
            if learned in self.learned_of(name).values():
                users.setdefault(learned.key_of(name), []).append(rule[name])
        return {name: learned.bounded(raw, users[name]) if name in users else raw for name, raw in raws.items()}


def _in_dtypes_of(
    params: Tensors, rule: Mapping[str, State], new: Tensors, states: Mapping[str, State]
) -> tuple[dict[str, Tensor], dict[str, State]]:
    """New tensors and states in the dtypes of the old ones: updates are computed in wider ones."""
    kept = {name: map_tree(lambda leaf, old: leaf.to(old.dtype), state, rule[name]) for name, state in states.items()}
    return {name: param.to(params[name].dtype) for name, param in new.items()}, kept


@dataclass(frozen=True)
class _Learned:
    """The learned hypers of an optimizer, by the rule's names; the keys of those remembered forward, and in reverse."""

    hypers: dict[str, LearnedHyper]
    forward: list[str]
    reverse: list[str]


def _forward_is_exact(optimizer: Optimizer, learn: Learn) -> bool:
    if learn.per in ("model", "tensor"):
        return True
    order = get_args(Coupling)
    return order.index(optimizer.rule.coupling) <= order.index(learn.per)
