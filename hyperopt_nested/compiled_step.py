"""Steps by compiled programs, in place: one program for each class of tensors that are of one shape and under one optimizer."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hyperopt_nested.joint_update import Tensors
from hyperopt_nested.kept_state import Ref
from hyperopt_nested.learned import LearnedHyper
from hyperopt_nested.nested import Nested
from hyperopt_nested.ops import State
from hyperopt_nested.program import Function, compiled, compiler_for

Backend = Literal["auto", "reference", "compile"]
"""What runs a step: "reference", the engine itself; "compile", programs that are compiled from it when tensors of their kind are first
stepped, and work in place; "auto", programs where they pay (a million numbers or more) and can be had, else the engine."""

Look = Callable[[Ref], Tensor]

_MANY = 1_000_000


def compiles(backend: Backend, nested: Nested, params: Tensors) -> bool:
    """Whether to step by programs.

    Raises:
        ValueError: `backend` is none of its choices, or "compile" where there are no programs or no compiler.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} must be one of {', '.join(map(repr, get_args(Backend)))}")
    if backend == "reference" or (backend == "auto" and sum(param.numel() for param in params.values()) < _MANY):
        return False
    summed = [rule.name for rule in (nested.optimizer_of(name).rule for name in params) if rule.measures]
    without = sorted({param.device.type for param in params.values() if not compiler_for(param.device)})
    refusal = ""
    if nested.curvature == "exact":
        refusal = "curvature='exact' differentiates the model in each step"
    elif summed:
        refusal = f"{summed[0]} needs a total over all tensors"
    elif without:
        refusal = f"there is no compiler for {without[0]} here; install one, such as g++ for the CPU"
    if refusal and backend == "compile":
        raise ValueError(f"backend='compile' can not be had: {refusal}. Use backend='auto' or 'reference'")
    return not refusal


@dataclass(frozen=True)
class Plan:
    """What to do for one tensor: programs, where the state that they take and write is kept, and which shared values they contribute to."""

    kept: list[Ref]
    pull: Function | None
    update: Function
    reached: list[tuple[str, str]]


class CompiledStep:
    """The step of an engine, with state that is kept elsewhere and changed in place.

    For each tensor, one program pulls its gradient back onto the learned values that it shares with others; these then step; and another
    steps the values that only it has, and the tensor itself. Both are traced from `Nested`, so they do for every rule what it does.

    Args:
        nested: the engine; with exact curvature, or rules that need a total over all tensors, there are no such programs.
        refs: of the structure of the engine's state: where each leaf is kept.
        programs: those made before, by what they depend on; new ones are added.
    """

    def __init__(self, nested: Nested, refs: State, programs: dict[Hashable, Any]) -> None:
        self._nested, self._refs, self._programs = nested, refs, programs
        self._own = [key for key, learned in nested.learned.items() if _is_own(learned)]
        self._plans: dict[Hashable, Plan] = {}

    def plans(self, params: Tensors, grads: Tensors, look: Look, numbers: Mapping[str, list[Tensor]], *, learn: bool) -> dict[str, Plan]:
        """What to do for each tensor; compiles what it is done with, if need be, and changes nothing.

        Args:
            params: the tensors, by name.
            grads: their gradients.
            look: gives what is kept somewhere.
            numbers: by tensor, what its group holds for each hyper of its optimizer, in order, shape () each.
            learn: whether to step the learned hypers.
        """
        return {name: self._plan(name, params[name], grad, numbers[name], look, learn) for name, grad in grads.items()}

    def step(self, plans: Mapping[str, Plan], params: Tensors, grads: Tensors, look: Look, numbers: Mapping[str, list[Tensor]]) -> None:
        """One step, as `Nested.step`, by these plans; tensors and state are changed in place. Arguments as of `plans`."""
        leaves = {name: [look(ref) for ref in plan.kept] for name, plan in plans.items()}
        contributions: dict[str, dict[str, list[Tensor]]] = {}
        for name, plan in plans.items():
            if plan.pull is not None:
                for (key, value), found in zip(plan.reached, plan.pull(grads[name], *leaves[name]), strict=True):
                    contributions.setdefault(key, {}).setdefault(value, []).append(found)
        for key, found_by_value in contributions.items():
            self._learn(key, {value: _total(found) for value, found in found_by_value.items()}, look)
        for name, plan in plans.items():
            plan.update(grads[name], *leaves[name], params[name], *numbers[name])
        for key, learned in self._nested.learned.items():
            if key not in self._own and any(map(callable, learned.learn.bounds)):
                hypers, rule = (_map_refs(look, self._refs[part]) for part in ("hypers", "rule"))
                _write(hypers[key], self._nested.bounded(key, hypers[key], rule, grads))

    def _plan(self, name: str, param: Tensor, grad: Tensor, numbers: list[Tensor], look: Look, learn: bool) -> Plan:
        """The plan of a tensor, by programs that others of its class have too."""
        form = param.shape, param.stride(), param.dtype, param.device, grad.stride(), grad.dtype, learn
        if (name, form) in self._plans:
            return self._plans[name, form]
        kept, state = _in_order(self._part(name))
        reached = [(each.key, each.key_of(name)) for each in self._nested.learned_of(name).values() if learn and each.key not in self._own]
        reached = list(dict.fromkeys(reached))
        made = self._nested.optimizer_of(name).signature, form, *(ref.key for ref in kept)
        if made not in self._programs:
            leaves = [look(ref) for ref in kept]

            def pull(grad: Tensor, *leaves: Tensor) -> list[Tensor]:
                found = self._nested.hypergradients(self._nested.descended({name: grad}), state(leaves))
                return [found[key][value] for key, value in reached]

            def update(grad: Tensor, *rest: Tensor) -> list[Tensor]:
                *leaves, param = rest[: len(kept) + 1]
                values = dict(zip(self._nested.optimizer_of(name).settings, rest[len(kept) + 1 :], strict=True))
                st = state(leaves)
                new, after = self._nested.step({name: param}, {name: grad}, st, {name: values}, learn=self._own if learn else [])
                after["hypers"] = {key: raws for key, raws in after["hypers"].items() if key in self._own}
                _write(st, after)
                param.copy_(new[name])
                return []

            self._programs[made] = (
                compiled(pull, [grad, *leaves]) if reached else None,
                compiled(update, [grad, *leaves, param, *numbers]),
            )
        programs = self._programs[made]
        plan = self._plans[name, form] = Plan(kept, programs[0], programs[1], reached)
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

    def _learn(self, key: str, grads: dict[str, Tensor], look: Look) -> None:
        """Step a hyper whose values tensors share; by a program where there is one value."""
        learned = self._nested.learned[key]
        parts = {"learner": self._refs["learners"][key], "raws": self._refs["hypers"][key], "rejected": self._refs["rejected"][key]}
        (kept, state), values = _in_order(parts), list(grads)

        def step(*leaves: Tensor) -> list[Tensor]:
            st, found = state(leaves[: len(kept)]), dict(zip(values, leaves[len(kept) :], strict=True))
            raws, learner, rejected = learned.step(st["raws"], found, st["learner"], st["rejected"])
            _write(st, {"learner": learner, "raws": raws, "rejected": rejected})
            return []

        leaves = [*map(look, kept), *grads.values()]
        if len(self._refs["hypers"][key]) > 1:
            step(*leaves)
            return
        if learned.learn not in self._programs:
            self._programs[learned.learn] = compiled(step, leaves)
        self._programs[learned.learn](*leaves)


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


def _total(contributions: list[Tensor]) -> Tensor:
    if len(contributions) == 1:
        return contributions[0]
    return torch.stack([each.to(contributions[0].device) for each in contributions]).sum(0)


def _write(tree: State, new: State) -> None:
    """Write new leaves over those of a tree, where they are others."""
    for old, leaf in _both(tree, new):
        if leaf is not old:
            old.copy_(leaf)


def _both(tree: State, new: State) -> Iterator[tuple[Tensor, Tensor]]:
    for key, leaf in new.items():
        if isinstance(leaf, dict):
            yield from _both(tree[key], leaf)
        else:
            yield tree[key], leaf


def _map_refs(look: Look, refs: Any) -> Any:
    if isinstance(refs, dict):
        return {key: _map_refs(look, ref) for key, ref in refs.items()}
    return look(refs)
