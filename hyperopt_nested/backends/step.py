"""Steps by programs, in place: what is done to one tensor is traced from the engine, and made into programs for many tensors."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hyperopt_nested.backends.choice import Programs
from hyperopt_nested.backends.program import Batch, Program, write_over
from hyperopt_nested.joint_update import Tensors
from hyperopt_nested.kept_state import Ref, pairs
from hyperopt_nested.learned import COUNTED, LearnedHyper
from hyperopt_nested.nested import Nested
from hyperopt_nested.ops import State, map_tree

States = Mapping[str, Mapping[str, Tensor]]
"""By tensor: what is kept with it."""

Numbers = Mapping[str, list[Tensor]]
"""By tensor: what its group holds for each hyper of its optimizer, in order, shape () each."""


@dataclass(frozen=True)
class _Plan:
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


@dataclass
class PreparedStep:
    """A step of some tensors, ready to be done again and again, as long as they and their state stay where they are.

    Attributes:
        of: what it was prepared for; see `_addresses`.
        rows: arguments of programs, by tensor: the gradient comes first.
        pulls: what pulls gradients back onto shared values.
        contributions: what that writes: by learned hyper and value, one for each tensor, and device.
        learns: by learned hyper, what steps it, given the total of each value.
        updates: what steps tensors.
        counts: counts of what was rejected for single tensors, and where these are added.
        held: keeps what `of` identifies.
    """

    of: list[Any]
    rows: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    pulls: dict[Program, Batch] = field(default_factory=dict)
    contributions: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    learns: dict[str, Callable[[dict[str, Tensor]], None]] = field(default_factory=dict)
    updates: dict[Program, Batch] = field(default_factory=dict)
    counts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    held: Any = None


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
        self._plans: dict[Hashable, _Plan] = {}
        self._last: PreparedStep | None = None

    def prepare(self, params: Tensors, grads: Tensors, states: States, numbers: Numbers, *, learn: bool) -> PreparedStep:
        """What to do; makes the programs that it is done with, if need be, and changes nothing.

        Args:
            params: the tensors, by name.
            grads: their gradients.
            states: what is kept with each.
            numbers: what groups hold.
            learn: whether to step the learned hypers.
        """
        of = _addresses(params, grads, states, numbers, learn)
        if self._last is None or self._last.of != of:
            self._last = self._prepared(of, params, grads, states, numbers, learn)
        return self._last

    def step(self, prepared: PreparedStep, grads: Tensors, states: States) -> None:
        """One step, as `Nested.step`; tensors and state are changed in place. Arguments as of `prepare`."""
        for name, grad in grads.items():
            for row in prepared.rows[name]:
                row[0] = grad
        for program, batch in prepared.pulls.items():
            program(batch)
        for key, by_value in prepared.contributions.items():
            homes = self._refs["hypers"][key]
            prepared.learns[key]({value: _total(parts, _kept(states, homes[value]).device) for value, parts in by_value.items()})
        for program, batch in prepared.updates.items():
            program(batch)
        for counted, home in prepared.counts:
            home.add_(counted.sum().to(home.device))
            counted.zero_()
        for key, learned in self._nested.learned.items():
            if key not in self._own and any(map(callable, learned.learn.bounds)):
                hypers, rule = (_gathered(states, self._refs[part]) for part in ("hypers", "rule"))
                _write(hypers[key], self._nested.bounded(key, hypers[key], rule, grads))

    def _prepared(self, of: list[Any], params: Tensors, grads: Tensors, states: States, numbers: Numbers, learn: bool) -> PreparedStep:
        params = {name: params[name].detach() for name in grads}
        plans = {name: self._plan(name, params[name], grad, numbers[name], states, learn) for name, grad in grads.items()}
        made = PreparedStep(of, held=numbers)
        leaves = {name: [_kept(states, ref) for ref in plan.kept] for name, plan in plans.items()}
        counts: dict[tuple[Ref, torch.device], list[tuple[str, int]]] = {}
        reached: dict[tuple[str, str, torch.device], list[str]] = {}
        for name, plan in plans.items():
            for i in plan.counts:
                counts.setdefault((plan.kept[i], grads[name].device), []).append((name, i))
            for key, value in plan.reached:
                reached.setdefault((key, value, grads[name].device), []).append(name)
        for (ref, device), found in counts.items():
            counted = _kept(states, ref).new_zeros(len(found), device=device)
            made.counts.append((counted, _kept(states, ref)))
            for (name, i), count in zip(found, counted.unbind(), strict=True):
                leaves[name][i] = count
        contributions: dict[tuple[str, str, str], Tensor] = {}
        for (key, value, device), names in reached.items():
            parts = _kept(states, self._refs["hypers"][key][value]).new_empty(len(names), device=device)
            made.contributions.setdefault(key, {}).setdefault(value, []).append(parts)
            for name, part in zip(names, parts.unbind(), strict=True):
                contributions[name, key, value] = part
        for name, plan in plans.items():
            row = [grads[name], *leaves[name], params[name], *numbers[name], *(contributions[name, *each] for each in plan.reached)]
            made.rows[name] = [row]
            if plan.pull is not None:
                made.rows[name].append([*row])
                made.pulls.setdefault(plan.pull, Batch()).rows.append(made.rows[name][1])
            made.updates.setdefault(plan.update, Batch()).rows.append(row)
        # backwards: updates begin with what the cache still holds of pulling back
        made.updates = {program: Batch(batch.rows[::-1]) for program, batch in reversed(made.updates.items())}
        made.learns = {key: self._learn(key, list(by_value), states) for key, by_value in made.contributions.items()}
        return made

    def _plan(self, name: str, param: Tensor, grad: Tensor, numbers: list[Tensor], states: States, learn: bool) -> _Plan:
        """The plan of a tensor, by programs that others of its class have too."""
        form = param.shape, param.stride(), param.dtype, param.device, grad.stride(), grad.dtype, learn
        if (name, form) in self._plans:
            return self._plans[name, form]
        kept, state = _in_order(self._part(name))
        counts = [i for i, ref in enumerate(kept) if any(f".{part}." in f".{ref.key}" for part in COUNTED)]
        reached = [(each.key, each.key_of(name)) for each in self._nested.learned_of(name).values() if learn and each.key not in self._own]
        reached = list(dict.fromkeys(reached))
        size = len(kept) + 1

        def pull(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            *leaves, param = rest[:size]
            found = self._nested.hypergradients({name: param}, self._nested.descended({name: grad}), state(leaves))
            return [*(None for _ in range(1 + size + len(numbers))), *(found[key][value] for key, value in reached)]

        def update(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            *leaves, param = rest[:size]
            values = dict(zip(self._nested.optimizer_of(name).settings, rest[size:], strict=False))
            st = state(leaves)
            new, after = self._nested.step({name: param}, {name: grad}, st, {name: values}, learn=self._own if learn else [])
            after["hypers"] = {key: raws if key in self._own else st["hypers"][key] for key, raws in after["hypers"].items()}
            return [None, *_leaves(after, self._part(name)), new[name], *(None for _ in rest[size:])]

        leaves = [_kept(states, ref) for ref in kept]
        shared = [i for i, ref in enumerate(kept, start=1) if any(ref.key == f"hypers.{key}" for key, _ in reached)]
        contributions = [torch.empty_like(_kept(states, self._refs["hypers"][key][value])) for key, value in reached]
        arguments = [grad, *leaves, param, *numbers, *contributions]
        made = self._nested.optimizer_of(name).signature, learn, *(ref.key for ref in kept)
        *pulling, updating = self._programs.make(made, [pull, update] if reached else [update], arguments, param, shared)
        plan = self._plans[name, form] = _Plan(kept, counts, pulling[0] if pulling else None, updating, reached)
        return plan

    def _part(self, name: str) -> State:
        """The part of the state's refs that the programs of one tensor need."""
        used = {each.key: each for each in self._nested.learned_of(name).values()}
        return {
            "rule": {name: self._refs["rule"][name]},
            "hypers": {key: {each.key_of(name): self._refs["hypers"][key][each.key_of(name)]} for key, each in used.items()},
            "learners": {key: _only(name, self._refs["learners"][key]) for key in used if key in self._own},
            "memory": {name: self._refs["memory"][name]},
            **{part: {key: self._refs[part][key] for key in used if key in self._own} for part in COUNTED},
        }

    def _learn(self, key: str, values: list[str], states: States) -> Callable[[dict[str, Tensor]], None]:
        """What steps a hyper whose values tensors share, given the total of each; a program where there is one value."""
        learned = self._nested.learned[key]
        counts = {part: self._refs[part][key] for part in COUNTED}
        parts = {"learner": self._refs["learners"][key], "raws": self._refs["hypers"][key], "counts": counts}
        kept, state = _in_order(parts)

        def step(*given: Tensor) -> list[Tensor | None]:
            st, found = state(given[len(values) :]), dict(zip(values, given, strict=False))
            raws, learner, counts = learned.step(st["raws"], found, st["learner"], st["counts"])
            return [*(None for _ in values), *_leaves({"learner": learner, "raws": raws, "counts": counts}, parts)]

        leaves = [_kept(states, ref) for ref in kept]
        if len(self._refs["hypers"][key]) > 1:

            def learn(totals: dict[str, Tensor]) -> None:
                given = [*totals.values(), *leaves]
                write_over(given, step(*given))

            return learn
        row = [torch.empty_like(leaf) for leaf in _gathered(states, self._refs["hypers"][key]).values()] + leaves
        (program,) = self._programs.make(learned.learn, [step], row, row[0])
        batch = Batch([row])

        def learn_one(totals: dict[str, Tensor]) -> None:
            row[0] = totals[values[0]]
            program(batch)

        return learn_one


def _addresses(params: Tensors, grads: Tensors, states: States, numbers: Numbers, learn: bool) -> list[Any]:
    """What a prepared step depends on: where all is kept, and how gradients lie."""
    stepped, kept = [params[name] for name in grads], [id(numbers[name]) for name in grads]
    found: list[Any] = [learn, *grads, *kept, *map(Tensor.stride, grads.values())]
    for what in (Tensor.data_ptr, Tensor.size, attrgetter("dtype")):
        found += map(what, stepped)
    for state in states.values():
        found += map(Tensor.data_ptr, state.values())
    return found


def _total(parts: list[Tensor], device: torch.device) -> Tensor:
    return functools.reduce(torch.add, [part.sum().to(device) for part in parts])


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
    found = dict(pairs(refs, tree))
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
        **{part: refs[part] for part in COUNTED},
    }


def _write(tree: State, new: State) -> None:
    """Write new leaves over those of a tree, where they are others."""
    for old, leaf in pairs(tree, new):
        if leaf is not old:
            old.copy_(leaf)


def _kept(states: States, ref: Ref) -> Tensor:
    return states[ref.name][ref.key]


def _gathered(states: States, refs: State) -> State:
    return map_tree(functools.partial(_kept, states), refs)
