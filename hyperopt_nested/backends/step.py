"""Steps by programs, in place: what is done to one tensor is traced from the engine, and made into programs for many tensors."""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hyperopt_nested.backends.choice import Programs
from hyperopt_nested.backends.program import Program, write_over
from hyperopt_nested.joint_update import Tensors
from hyperopt_nested.kept_state import Ref
from hyperopt_nested.learned import LearnedHyper
from hyperopt_nested.nested import Nested
from hyperopt_nested.ops import State

States = Mapping[str, Mapping[str, Tensor]]
"""By tensor: what is kept with it."""

Batches = dict[Program, list[list[Tensor]]]


@dataclass(frozen=True)
class Plan:
    """What to do for one tensor: programs, where the state that they take and write is kept, and which shared values they contribute to.

    Attributes:
        kept: where the leaves are kept, in the order in which programs take them.
        counts: which of these leaves are counts that tensors share: programs take new ones, which are added then.
        pull: pulls the gradient back onto shared values; None where there are none.
        update: steps the tensor's own values and the tensor.
        reached: the shared values: learned hyper, and key of the value.
    """

    kept: list[Ref]
    counts: list[int]
    pull: Program | None
    update: Program
    reached: list[tuple[str, str]]


class ProgramStep:
    """The step of an engine, with state that is kept elsewhere and changed in place.

    A program pulls each tensor's gradient back onto the learned values that it shares with others; these then step; and another program
    steps the values that only it has, and the tensor itself. Both are traced from `Nested`, so they do for every rule what it does.

    Args:
        nested: the engine; with exact curvature, or rules that need a total over all tensors, there are no such programs.
        refs: of the structure of the engine's state: where each leaf is kept.
        programs: makes, and keeps, programs.
    """

    def __init__(self, nested: Nested, refs: State, programs: Programs) -> None:
        self._nested, self._refs, self._programs = nested, refs, programs
        self._own = [key for key, learned in nested.learned.items() if _is_own(learned)]
        self._plans: dict[Hashable, Plan] = {}

    def plans(
        self, params: Tensors, grads: Tensors, states: States, numbers: Mapping[str, list[Tensor]], *, learn: bool
    ) -> dict[str, Plan]:
        """What to do for each tensor; makes the programs that it is done with, if need be, and changes nothing.

        Args:
            params: the tensors, by name.
            grads: their gradients.
            states: what is kept with each.
            numbers: by tensor, what its group holds for each hyper of its optimizer, in order, shape () each.
            learn: whether to step the learned hypers.
        """
        return {name: self._plan(name, params[name], grad, numbers[name], states, learn) for name, grad in grads.items()}

    def step(self, plans: Mapping[str, Plan], params: Tensors, grads: Tensors, states: States, numbers: Mapping[str, list[Tensor]]) -> None:
        """One step, as `Nested.step`, by these plans; tensors and state are changed in place. Arguments as of `plans`."""
        leaves = {name: [states[ref.name][ref.key] for ref in plan.kept] for name, plan in plans.items()}
        counts: dict[tuple[Ref, torch.device], list[tuple[str, int]]] = {}
        for name, plan in plans.items():
            for i in plan.counts:
                counts.setdefault((plan.kept[i], grads[name].device), []).append((name, i))
        counted = {(ref, device): _kept(states, ref).new_zeros(len(found), device=device) for (ref, device), found in counts.items()}
        for each, found in counts.items():
            for (name, i), count in zip(found, counted[each].unbind(), strict=True):
                leaves[name][i] = count
        self._learn_shared(plans, grads, leaves, states)
        updates: Batches = {}
        for name, plan in plans.items():
            updates.setdefault(plan.update, []).append([grads[name], *leaves[name], params[name], *numbers[name]])
        for program, batch in updates.items():
            program(batch)
        for (ref, _), new in counted.items():
            _kept(states, ref).add_(new.sum().to(_kept(states, ref).device))
        for key, learned in self._nested.learned.items():
            if key not in self._own and any(map(callable, learned.learn.bounds)):
                hypers, rule = (_map_refs(states, self._refs[part]) for part in ("hypers", "rule"))
                _write(hypers[key], self._nested.bounded(key, hypers[key], rule, grads))

    def _learn_shared(self, plans: Mapping[str, Plan], grads: Tensors, leaves: Mapping[str, list[Tensor]], states: States) -> None:
        """Pull gradients back onto the values that tensors share, and step these."""
        reached: dict[tuple[str, str, torch.device], list[str]] = {}
        for name, plan in plans.items():
            for key, value in plan.reached:
                reached.setdefault((key, value, grads[name].device), []).append(name)
        found: dict[str, dict[str, list[Tensor]]] = {}
        contributions: dict[tuple[str, str, str], Tensor] = {}
        for (key, value, device), names in reached.items():
            parts = _kept(states, self._refs["hypers"][key][value]).new_empty(len(names), device=device)
            found.setdefault(key, {}).setdefault(value, []).append(parts)
            for name, part in zip(names, parts.unbind(), strict=True):
                contributions[name, key, value] = part
        pulls: Batches = {}
        for name, plan in plans.items():
            if plan.pull is not None:
                pulls.setdefault(plan.pull, []).append([grads[name], *leaves[name], *(contributions[name, *each] for each in plan.reached)])
        for program, batch in pulls.items():
            program(batch)
        for key, by_value in found.items():
            home = {value: self._refs["hypers"][key][value] for value in by_value}
            self._learn(key, {value: _total(parts, _kept(states, home[value]).device) for value, parts in by_value.items()}, states)

    def _plan(self, name: str, param: Tensor, grad: Tensor, numbers: list[Tensor], states: States, learn: bool) -> Plan:
        """The plan of a tensor, by programs that others of its class have too."""
        form = param.shape, param.stride(), param.dtype, param.device, grad.stride(), grad.dtype, learn
        if (name, form) in self._plans:
            return self._plans[name, form]
        kept, state = _in_order(self._part(name))
        counts = [i for i, ref in enumerate(kept) if ".rejected." in f".{ref.key}"]
        reached = [(each.key, each.key_of(name)) for each in self._nested.learned_of(name).values() if learn and each.key not in self._own]
        reached = list(dict.fromkeys(reached))
        size = len(kept) + 1

        def pull(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            found = self._nested.hypergradients(self._nested.descended({name: grad}), state(rest[: size - 1]))
            return [None] * size + [found[key][value] for key, value in reached]

        def update(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            *leaves, param = rest[:size]
            values = dict(zip(self._nested.optimizer_of(name).settings, rest[size:], strict=True))
            st = state(leaves)
            new, after = self._nested.step({name: param}, {name: grad}, st, {name: values}, learn=self._own if learn else [])
            after["hypers"] = {key: raws if key in self._own else st["hypers"][key] for key, raws in after["hypers"].items()}
            return [None, *_leaves(after, self._part(name)), new[name], *(None for _ in rest[size:])]

        leaves = [_kept(states, ref) for ref in kept]
        made = self._nested.optimizer_of(name).signature, learn, *(ref.key for ref in kept)
        contributions = [torch.empty_like(_kept(states, self._refs["hypers"][key][value])) for key, value in reached]
        pulling = self._programs.make(("pull", *made), pull, [grad, *leaves, *contributions], param) if reached else None
        updating = self._programs.make(("update", *made), update, [grad, *leaves, param, *numbers], param)
        plan = self._plans[name, form] = Plan(kept, counts, pulling, updating, reached)
        return plan

    def _part(self, name: str) -> State:
        """The part of the state's refs that the programs of one tensor need."""
        used = {each.key: each for each in self._nested.learned_of(name).values()}
        return {
            "rule": {name: self._refs["rule"][name]},
            "hypers": {key: {each.key_of(name): self._refs["hypers"][key][each.key_of(name)]} for key, each in used.items()},
            "learners": {key: _only(name, self._refs["learners"][key]) for key in used if key in self._own},
            "memory": {name: self._refs["memory"][name]},
            "rejected": {key: self._refs["rejected"][key] for key in used if key in self._own},
        }

    def _learn(self, key: str, grads: dict[str, Tensor], states: States) -> None:
        """Step a hyper whose values tensors share; by a program where there is one value."""
        learned = self._nested.learned[key]
        parts = {"learner": self._refs["learners"][key], "raws": self._refs["hypers"][key], "rejected": self._refs["rejected"][key]}
        (kept, state), values = _in_order(parts), list(grads)

        def step(*leaves: Tensor) -> list[Tensor | None]:
            st, found = state(leaves[: len(kept)]), dict(zip(values, leaves[len(kept) :], strict=True))
            raws, learner, rejected = learned.step(st["raws"], found, st["learner"], st["rejected"])
            return [*_leaves({"learner": learner, "raws": raws, "rejected": rejected}, parts), *(None for _ in values)]

        leaves = [*(_kept(states, ref) for ref in kept), *grads.values()]
        if len(self._refs["hypers"][key]) > 1:
            write_over(leaves, step(*leaves))
            return
        self._programs.make(learned.learn, step, leaves, leaves[-1])([leaves])


def _in_order(refs: State) -> tuple[list[Ref], Callable[[Sequence[Tensor]], State]]:
    """Refs in the order in which programs take and write leaves, and what makes the state of leaves in that order.

    Memory comes first: it takes copies of what is written later, and inductor may put off copying until then.
    """
    flat, spec = tree_flatten(refs)
    order = sorted(range(len(flat)), key=lambda i: "memory." not in flat[i].key)

    def state(leaves: Sequence[Tensor]) -> State:
        placed = dict(zip(order, leaves, strict=True))
        tree: State = tree_unflatten([placed[i] for i in range(len(flat))], spec)
        return tree

    return [flat[i] for i in order], state


def _leaves(tree: State, refs: State) -> list[Tensor]:
    """Leaves of a tree, in the order of `_in_order(refs)`."""
    found = dict(_both(refs, tree))
    return [found[ref] for ref in _in_order(refs)[0]]


def _is_own(learned: LearnedHyper) -> bool:
    """Whether each tensor has values of its own, at all heights."""
    return learned.learn.per != "model" and all(map(_is_own, learned.learner.learned.values()))


def _only(name: str, refs: State) -> State:
    """The part of a learner's state that belongs to what is called `name`."""
    return {
        "rule": {name: refs["rule"][name]},
        "hypers": {key: {name: raws[name]} for key, raws in refs["hypers"].items()},
        "learners": {key: _only(name, inner) for key, inner in refs["learners"].items()},
        "memory": {name: refs["memory"][name]},
        "rejected": refs["rejected"],
    }


def _total(parts: list[Tensor], device: torch.device) -> Tensor:
    return functools.reduce(torch.add, [part.sum().to(device) for part in parts])


def _write(tree: State, new: State) -> None:
    """Write new leaves over those of a tree, where they are others."""
    for old, leaf in _both(tree, new):
        if leaf is not old:
            old.copy_(leaf)


def _both(tree: State, new: State) -> Iterator[tuple[Any, Tensor]]:
    for key, leaf in tree.items():
        if isinstance(leaf, dict):
            yield from _both(leaf, new[key])
        else:
            yield leaf, new[key]


def _kept(states: States, ref: Ref) -> Tensor:
    return states[ref.name][ref.key]


def _map_refs(states: States, refs: Any) -> Any:
    if isinstance(refs, dict):
        return {key: _map_refs(states, ref) for key, ref in refs.items()}
    return _kept(states, refs)
