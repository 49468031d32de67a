"""Steps by programs, in place: what is done to one tensor is traced from the engine, and made into programs for many tensors."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hyperopt_nested.backends.choice import _MANY, WARM_UP, Programs
from hyperopt_nested.backends.program import Batch, Function, Program, Request, write_over
from hyperopt_nested.joint_update import Tensors
from hyperopt_nested.kept_state import Ref, pairs
from hyperopt_nested.learned import COUNTED, LearnedHyper
from hyperopt_nested.nested import Nested
from hyperopt_nested.ops import State, map_tree

States = Mapping[str, Mapping[str, Tensor]]
"""By tensor: what is kept with it."""

Numbers = Mapping[str, list[Tensor]]
"""By tensor: what its group holds for each hyper of its optimizer, in order, shape () each."""

_EXAMPLE_SIZES = {0: (), 1: (37,), 2: (5, 19), 3: (4, 3, 7), 4: (3, 4, 3, 2)}
_EXAMPLE_SCALES = (1.0, 0.03, 30.0, 1.0, 0.1, 1.0, 3.0, 1.0)
"""Of the gradients of successive examples."""


@dataclass(frozen=True)
class _Plan:
    """What to do for one tensor: programs, where the state that they take and write is kept, and which shared values they contribute to.

    Attributes:
        kept: where the leaves are kept, in the order in which programs take them.
        counts: which of these leaves are counts that tensors share: programs take new ones, which are added then.
        functions: what pulls the gradient back onto shared values, if there are any; and what steps the tensor's own values and the tensor.
        reached: the shared values: learned hyper, and key of the value.
        shared: indices of the arguments that hold them.
    """

    kept: list[Ref]
    counts: list[int]
    functions: list[Function]
    reached: list[tuple[str, str]]
    shared: list[int]


@dataclass
class PreparedStep:
    """A step of some tensors, ready to be done again and again, as long as they and their state stay where they are.

    Attributes:
        of: what it was prepared for; see `_addresses`.
        rows: arguments of programs, by tensor: the gradient comes first.
        pulls: what pulls gradients back onto shared values.
        contributions: what that writes: by learned hyper and value, a tensor for each device, and whether it has one number a tensor.
        learns: by learned hyper, what steps it, given the total of each value.
        updates: what steps tensors.
        counts: counts of what was rejected for single tensors, and where these are added.
        params: the tensors.
        backends: the sorts of programs that step tensors, but empty ones.
        held: keeps what `of` identifies.
    """

    of: list[Any]
    rows: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    pulls: dict[Program, Batch] = field(default_factory=dict)
    contributions: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    learns: dict[str, Callable[[dict[str, Tensor]], None]] = field(default_factory=dict)
    updates: dict[Program, Batch] = field(default_factory=dict)
    counts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    backends: set[str] = field(default_factory=set)
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
        self._plans: dict[tuple[str, bool], _Plan] = {}
        self._last: PreparedStep | None = None

    @property
    def backend(self) -> str:
        """What runs the steps: of the last step, or what is meant to; several sorts are joined by "+"."""
        return "+".join(sorted(self._last.backends)) if self._last and self._last.backends else self._programs.backend

    def waits(self, taken: int, params: Tensors, grads: Tensors, states: States, numbers: Numbers, *, learn: bool) -> bool:
        """Whether the engine does this step, while kernels of a small model are compiled in the background.

        Args:
            taken: steps that have been taken.
            params: as of `prepare`, as are the others.
            grads: the gradients.
            states: what is kept with each tensor.
            numbers: what groups hold.
            learn: whether to step the learned hypers.
        """
        if taken >= WARM_UP or self._programs.strict or self._programs.backend != "fused":
            return False
        if sum(param.numel() for param in params.values()) >= _MANY:
            return False
        if grads:
            self._programs.begin(lambda: list(self._requests(params, grads, states, numbers, learn).values()))
        return True

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
            prepared.learns[key]({value: _total(parts, _kept(states, homes[value])) for value, parts in by_value.items()})
        for program, batch in prepared.updates.items():
            program(batch)
        for counted, home in prepared.counts:
            home.add_(counted.sum().to(home.device))
            counted.zero_()
        for key, learned in self._nested.learned.items():
            if key not in self._own and any(map(callable, learned.learn.bounds)):
                hypers, rule = (_gathered(states, self._refs[part]) for part in ("hypers", "rule"))
                _write(hypers[key], self._nested.bounded(key, hypers[key], rule, grads))
        if prepared.params:  # kernels write without telling autograd
            torch.autograd.graph.increment_version(prepared.params)

    def _requests(self, params: Tensors, grads: Tensors, states: States, numbers: Numbers, learn: bool) -> dict[str, Request]:
        """What programs are needed for: by tensor, and by learned hyper that tensors share."""
        params = {name: params[name].detach() for name in grads}
        requests = {name: self._request(name, params[name], grad, numbers[name], states, learn) for name, grad in grads.items()}
        reached: dict[str, None] = {}
        for name in grads:
            reached |= dict.fromkeys(key for key, _ in self._plan(name, learn).reached)
        for key in reached:
            if len(self._refs["hypers"][key]) == 1:
                requests[f"{_LEARNER}{key}"] = self._learner_request(key, states)
        return requests

    def _prepared(self, of: list[Any], params: Tensors, grads: Tensors, states: States, numbers: Numbers, learn: bool) -> PreparedStep:
        requests = self._requests(params, grads, states, numbers, learn)
        programs = dict(zip(requests, self._programs.make(list(requests.values())), strict=True))
        made = PreparedStep(of, held=numbers, params=[params[name] for name in grads])
        params = {name: params[name].detach() for name in grads}
        plans = {name: self._plan(name, learn) for name in grads}
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
            raw = _kept(states, self._refs["hypers"][key][value])
            parts = raw.new_empty(len(names), *raw.shape, device=device)
            made.contributions.setdefault(key, {}).setdefault(value, []).append(parts)
            for name, part in zip(names, parts.unbind(), strict=True):
                contributions[name, key, value] = part
        for name, plan in plans.items():
            row = [grads[name], *leaves[name], params[name], *numbers[name], *(contributions[name, *each] for each in plan.reached)]
            made.rows[name] = [row]
            *pulling, updating = programs[name]
            for pull in pulling:
                made.rows[name].append([*row])
                made.pulls.setdefault(pull, Batch()).rows.append(made.rows[name][1])
            made.updates.setdefault(updating, Batch()).rows.append(row)
            if params[name].numel():
                made.backends.add(updating.backend)
        # backwards: updates begin with what the cache still holds of pulling back
        made.updates = {program: Batch(batch.rows[::-1]) for program, batch in reversed(made.updates.items())}
        for key, by_value in made.contributions.items():
            own = programs.get(f"{_LEARNER}{key}")
            made.learns[key] = self._learn(key, list(by_value), states, own[0] if own else None)
        return made

    def _plan(self, name: str, learn: bool) -> _Plan:
        """The plan of a tensor."""
        if (name, learn) in self._plans:
            return self._plans[name, learn]
        kept, state = _in_order(self._part(name))
        counts = [i for i, ref in enumerate(kept) if any(f".{part}." in f".{ref.key}" for part in COUNTED)]
        reached = [(each.key, each.key_of(name)) for each in self._nested.learned_of(name).values() if learn and each.key not in self._own]
        reached = list(dict.fromkeys(reached))
        size = len(kept) + 1
        settings = self._nested.optimizer_of(name).settings

        def pull(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            *leaves, param = rest[:size]
            found = self._nested.hypergradients({name: param}, self._nested.descended({name: grad}), state(leaves))
            return [*(None for _ in range(1 + size + len(settings))), *(found[key][value] for key, value in reached)]

        def update(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            *leaves, param = rest[:size]
            values = dict(zip(settings, rest[size:], strict=False))
            st = state(leaves)
            new, after = self._nested.step({name: param}, {name: grad}, st, {name: values}, learn=self._own if learn else [])
            after["hypers"] = {key: raws if key in self._own else st["hypers"][key] for key, raws in after["hypers"].items()}
            return [None, *_leaves(after, self._part(name)), new[name], *(None for _ in rest[size:])]

        shared = [i for i, ref in enumerate(kept, start=1) if any(ref.key == f"hypers.{key}" for key, _ in reached)]
        functions: list[Function] = [pull, update] if reached else [update]
        plan = self._plans[name, learn] = _Plan(kept, counts, functions, reached, shared)
        return plan

    def _request(self, name: str, param: Tensor, grad: Tensor, numbers: list[Tensor], states: States, learn: bool) -> Request:
        """What programs of a tensor are needed for."""
        plan = self._plan(name, learn)
        contributions = [torch.empty_like(_kept(states, self._refs["hypers"][key][value])) for key, value in plan.reached]
        arguments = [grad, *(_kept(states, ref) for ref in plan.kept), param, *numbers, *contributions]
        optimizer = self._nested.optimizer_of(name)
        of = optimizer.signature, learn, *(ref.key for ref in plan.kept)
        hypers = {i: self._nested.learned[ref.key.removeprefix("hypers.")] for i, ref in enumerate(plan.kept, start=1) if _is_value(ref)}
        examples = functools.partial(_examples, arguments, param, hypers, range(1 + len(plan.kept), 2 + len(plan.kept)), plan.functions[-1])
        return Request(of, optimizer.rule.name, plan.functions, arguments, param, plan.shared, examples)

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

    def _learn(self, key: str, values: list[str], states: States, program: Program | None) -> Callable[[dict[str, Tensor]], None]:
        """What steps a hyper whose values tensors share, given the total of each; by a program where there is one value."""
        kept, step = self._learner(key, values)
        leaves = [_kept(states, ref) for ref in kept]
        if program is None:

            def learn(totals: dict[str, Tensor]) -> None:
                given = [*totals.values(), *leaves]
                write_over(given, step(*given))

            return learn
        row = [torch.empty_like(leaf) for leaf in _gathered(states, self._refs["hypers"][key]).values()] + leaves
        batch = Batch([row])

        def learn_one(totals: dict[str, Tensor]) -> None:
            row[0] = totals[values[0]]
            program(batch)

        return learn_one

    def _learner(self, key: str, values: list[str]) -> tuple[list[Ref], Function]:
        """Where the state of a shared hyper's learner is kept, and what steps it, given the totals of its values and this state."""
        learned = self._nested.learned[key]
        counts = {part: self._refs[part][key] for part in COUNTED}
        parts = {"learner": self._refs["learners"][key], "raws": self._refs["hypers"][key], "counts": counts}
        kept, state = _in_order(parts)

        def step(*given: Tensor) -> list[Tensor | None]:
            st, found = state(given[len(values) :]), dict(zip(values, given, strict=False))
            raws, learner, counts = learned.step(st["raws"], found, st["learner"], st["counts"])
            return [*(None for _ in values), *_leaves({"learner": learner, "raws": raws, "counts": counts}, parts)]

        return kept, step

    def _learner_request(self, key: str, states: States) -> Request:
        """What the program of a learner is needed for, that steps one value."""
        learned = self._nested.learned[key]
        (value,) = self._refs["hypers"][key]
        kept, step = self._learner(key, [value])
        raw = _kept(states, self._refs["hypers"][key][value])
        arguments = [torch.empty_like(raw), *(_kept(states, ref) for ref in kept)]
        hypers = {i: learned for i, ref in enumerate(kept, start=1) if ref == self._refs["hypers"][key][value]}
        examples = functools.partial(_examples, arguments, raw, hypers, range(0), step)
        return Request((_LEARNER, learned.learn), learned.learn.by.rule.name, [step], arguments, raw, (), examples)


_LEARNER = "learner of "


def _examples(
    arguments: Sequence[Tensor],
    param: Tensor,
    hypers: Mapping[int, LearnedHyper],
    points: Sequence[int],
    update: Function,
    *,
    whole: bool,
) -> Iterator[list[Tensor]]:
    """Small examples of the arguments of an update: cut from these, with random gradients, on a trajectory of the engine.

    Learned values are moved on some of them, so that conditions that depend on them flip. The last has gradients that are not finite.

    Args:
        arguments: what an update takes, the gradient first.
        param: the tensor.
        hypers: learned hypers, by index of the argument that holds their raw values.
        points: index of the tensor among the arguments, if it is one.
        update: the update, by the engine.
        whole: whether they have the sizes and strides of these arguments instead.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = _EXAMPLE_SIZES.get(param.ndim, (2,) * param.ndim)
    shape = tuple(1 if size == 1 else small for size, small in zip(param.shape, sizes, strict=True))
    row = (*shape[:1], *(1 for _ in shape[1:]))

    def small(tensor: Tensor) -> Tensor:
        """A tensor of this kind for the small shape, with values of this one, where these are finite."""
        if whole:
            found = tensor.detach().clone()
            return torch.where(torch.isfinite(found), found, 1) if found.is_floating_point() else found
        if tensor.shape == param.shape and param.ndim:
            wanted: tuple[int, ...] = shape
        elif tensor.numel() == 1:
            return tensor.detach().clone()
        else:
            wanted = row if tensor.ndim == param.ndim else shape[: tensor.ndim]
        count = torch.Size(wanted).numel()
        flat = tensor.detach().reshape(-1)[:count]
        values = flat.repeat(-(-count // flat.numel()))[:count].reshape(wanted)
        return torch.where(torch.isfinite(values), values, torch.ones_like(values)) if values.is_floating_point() else values.clone()

    now = [small(argument) for argument in arguments]
    for i in points:
        now[i] = now[i] + _drawn(now[i], generator)
    for at, scale in enumerate(_EXAMPLE_SCALES):
        grad = _drawn(now[0], generator) * scale
        if at == 3 and grad.ndim:
            grad[0] = 0
        if at == len(_EXAMPLE_SCALES) - 1:
            grad.view(-1)[:: max(grad.numel() // 2, 1)] = torch.inf
            grad.view(-1)[-1:] = torch.nan
        now[0] = grad
        if at > 3:
            for i, learned in hypers.items():
                factor = 0.25 + torch.rand(now[i].shape, generator=generator, dtype=torch.float64).to(now[i].device)
                now[i] = learned.hyper.confine((now[i] * factor).to(now[i].dtype), learned.via)
        yield now
        after = [argument.clone() for argument in now]
        write_over(after, update(*after))
        now = after


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device, tensor.dtype)


def _is_value(ref: Ref) -> bool:
    """Whether a leaf of the state holds raw values of a hyper that is learned."""
    return ref.key.startswith("hypers.")


def _addresses(params: Tensors, grads: Tensors, states: States, numbers: Numbers, learn: bool) -> list[Any]:
    """What a prepared step depends on: where all is kept, and in which form."""
    given = [*grads.values()]
    kept = [params[name] for name in grads]
    for state in states.values():
        kept += state.values()
    found: list[Any] = [learn, *grads, *(id(numbers[name]) for name in grads), *map(type, given), *map(_device, given)]
    for what in (Tensor.stride, _shape, _dtype):
        found += map(what, given)
    for what in (Tensor.data_ptr, Tensor.stride, _shape, _dtype):
        found += map(what, kept)
    return found


_shape, _dtype, _device = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")


def _total(parts: list[Tensor], like: Tensor) -> Tensor:
    """The sum of contributions, one along the first dimension each."""
    return functools.reduce(torch.add, [(part[0] if len(part) == 1 else part.sum(0)).to(like.device) for part in parts])


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
