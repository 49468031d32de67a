"""Steps by programs, in place: what is done to one tensor is traced from the engine, and made into programs for many tensors."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends.choice import MANY, WARM_UP, Programs
from hyperopt_nested.backends.program import Batch, Function, Program, Request, write_over
from hyperopt_nested.backends.verify import examples
from hyperopt_nested.joint_update import Tensors
from hyperopt_nested.learned import COUNTED, LearnedHyper
from hyperopt_nested.nested import Nested
from hyperopt_nested.ops import State, filled, flatten, map_tree

Numbers = Mapping[str, list[Tensor]]
"""By tensor: what its group holds for each hyper of its optimizer, in order, shape () each."""

Path = tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """What to do for one tensor.

    Attributes:
        paths: of the leaves of the engine's state that programs take and write.
        functions: what pulls the gradient back onto shared values, if there are any; and what steps the tensor's own values and the tensor.
        reached: the shared values: learned hyper, and key of the value.
        of: equal for tensors whose programs are the same.
    """

    paths: list[Path]
    functions: list[Function]
    reached: list[tuple[str, str]]
    of: tuple[Any, ...]


@dataclass
class PreparedStep:
    """A step of some tensors, ready to be done again and again, as long as they and their state stay where they are.

    Attributes:
        of: what it was prepared for.
        st: the engine's state; the leaves are written to.
        tensors: all that programs take, but gradients.
        addresses: where these are, and in which form; see `_addresses`.
        params: the tensors that are stepped.
        backends: the sorts of programs that step tensors, but empty ones.
        rows: arguments of programs, by tensor: the gradient comes first.
        pulls: what pulls gradients back onto shared values.
        contributions: what that writes: by learned hyper and value, a tensor for each device, one contribution along its first dimension.
        learns: by learned hyper, what steps it, given the total of each value.
        updates: what steps tensors.
        counts: counts of single tensors, and what these are added to.
    """

    of: list[Any]
    st: State
    tensors: list[Tensor] = field(default_factory=list)
    addresses: list[Any] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    backends: set[str] = field(default_factory=set)
    rows: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    pulls: dict[Program, Batch] = field(default_factory=dict)
    contributions: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    learns: dict[str, Callable[[dict[str, Tensor]], None]] = field(default_factory=dict)
    updates: dict[Program, Batch] = field(default_factory=dict)
    counts: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class ProgramStep:
    """The step of an engine, with state that is changed in place.

    A program pulls each tensor's gradient back onto the learned values that it shares with others; these then step; and another program
    steps the values that only it has, and the tensor itself. Both are traced from `Nested`, so they do for every rule what it does.

    Args:
        nested: the engine; with exact curvature, or rules that need a total over all tensors, there are no such programs.
        programs: makes, and keeps, programs.
    """

    def __init__(self, nested: Nested, programs: Programs) -> None:
        self._nested, self._programs = nested, programs
        self._own = [key for key, learned in nested.learned.items() if _is_own(learned)]
        self._plans: dict[tuple[str, bool], _Plan] = {}
        self._last: PreparedStep | None = None

    @property
    def backend(self) -> str:
        """What runs the steps: of the last step, or what is meant to; several sorts are joined by "+"."""
        return "+".join(sorted(self._last.backends)) if self._last and self._last.backends else self._programs.backend

    def waits(self, taken: int, params: Tensors, grads: Tensors, st: State, numbers: Numbers, *, learn: bool) -> bool:
        """Whether the engine does this step, the one after `taken`, while kernels of a small model are compiled in the background.

        The other arguments are those of `prepare`.
        """
        if taken >= WARM_UP or self._programs.strict or self._programs.backend != "fused":
            return False
        if sum(param.numel() for param in params.values()) >= MANY:
            return False
        self._programs.begin(lambda: list(self._requests(params, grads, st, numbers, learn).values()))
        return True

    def prepare(self, params: Tensors, grads: Tensors, st: State, numbers: Numbers, *, learn: bool) -> PreparedStep:
        """What to do; makes the programs that it is done with, if need be, and changes nothing.

        Args:
            params: the tensors, by name.
            grads: the gradients of those that are stepped.
            st: the engine's state.
            numbers: what groups hold.
            learn: whether to step the learned hypers.
        """
        given = list(grads.values())
        of: list[Any] = [learn, *grads, *(id(params[name]) for name in grads), *(id(numbers[name]) for name in grads)]
        for what in (type, Tensor.stride, *_FORM):
            of += map(what, given)
        last = self._last
        if last is None or last.st is not st or last.of != of or last.addresses != _addresses(last.tensors):
            last = self._last = self._prepared(PreparedStep(of, st), params, grads, numbers, learn)
        return last

    def step(self, prepared: PreparedStep, grads: Tensors) -> None:
        """One step, as `Nested.step`; tensors and state are changed in place. Arguments as of `prepare`."""
        for name, grad in grads.items():
            for row in prepared.rows[name]:
                row[0] = grad
        for program, batch in prepared.pulls.items():
            program(batch)
        for key, by_value in prepared.contributions.items():
            raws = prepared.st["hypers"][key]
            prepared.learns[key]({value: _total(parts, raws[value].device) for value, parts in by_value.items()})
        for program, batch in prepared.updates.items():
            program(batch)
        for counted, total in prepared.counts:
            total.add_(counted.sum().to(total.device))
            counted.zero_()
        for key, learned in self._nested.learned.items():
            if key not in self._own and any(map(callable, learned.learn.bounds)):
                raws = prepared.st["hypers"][key]
                new = self._nested.bounded(key, raws, prepared.st["rule"], grads)
                write_over(list(raws.values()), [new[value] for value in raws])
        torch.autograd.graph.increment_version(prepared.params)  # kernels write without telling autograd

    def _requests(self, params: Tensors, grads: Tensors, st: State, numbers: Numbers, learn: bool) -> dict[str, Request]:
        """What programs are needed for: by tensor, and by shared hyper that has one value."""
        requests, reached = {}, dict[str, None]()
        for name, grad in grads.items():
            plan, leaves = self._plan(name, st, learn), flatten(self._part(name, st))
            reached |= dict.fromkeys(key for key, _ in plan.reached)
            param, optimizer = params[name].detach(), self._nested.optimizer_of(name)
            contributions = [torch.empty_like(st["hypers"][key][value]) for key, value in plan.reached]
            arguments = [grad, *leaves.values(), param, *numbers[name], *contributions]
            hypers = {i: self._nested.learned[path[1]] for i, path in enumerate(plan.paths, start=1) if path[0] == "hypers"}
            shared = [i for i, learned in hypers.items() if learned.key in dict(plan.reached)]
            trials = functools.partial(examples, arguments, param, hypers, 1 + len(leaves), plan.functions[-1])
            requests[name] = Request(plan.of, optimizer.rule.name, plan.functions, arguments, param, shared, trials)
        for key in reached:
            if len(st["hypers"][key]) == 1:
                learned = self._nested.learned[key]
                leaves, step = self._learner(key, st)
                (raw,) = st["hypers"][key].values()
                arguments = [torch.empty_like(raw), *leaves.values()]
                trials = functools.partial(examples, arguments, raw, {}, None, step)
                requests[f"{_LEARNER}{key}"] = Request(
                    (_LEARNER, learned.learn), learned.learn.by.rule.name, [step], arguments, raw, (), trials
                )
        return requests

    def _prepared(self, made: PreparedStep, params: Tensors, grads: Tensors, numbers: Numbers, learn: bool) -> PreparedStep:
        requests = self._requests(params, grads, made.st, numbers, learn)
        programs = dict(zip(requests, self._programs.make(list(requests.values())), strict=True))
        made.params = [params[name] for name in grads]
        plans = {name: self._plan(name, made.st, learn) for name in grads}
        counts: dict[tuple[Path, torch.device], list[str]] = {}
        reached: dict[tuple[str, str, torch.device], list[str]] = {}
        for name, plan in plans.items():
            for path in plan.paths:
                if any(part in COUNTED for part in path[:-1]):
                    counts.setdefault((path, grads[name].device), []).append(name)
            for key, value in plan.reached:
                reached.setdefault((key, value, grads[name].device), []).append(name)
        own: dict[tuple[str, Any], Tensor] = {}  # what stands for something that tensors share, by tensor
        for (path, device), names in counts.items():
            total: Tensor = functools.reduce(operator.getitem, path, made.st)  # type: ignore[assignment]
            counted = total.new_zeros(len(names), device=device)
            made.counts.append((counted, total))
            own |= {(name, path): count for name, count in zip(names, counted.unbind(), strict=True)}
        for (key, value, device), names in reached.items():
            raw = made.st["hypers"][key][value]
            parts = raw.new_empty(len(names), *raw.shape, device=device)
            made.contributions.setdefault(key, {}).setdefault(value, []).append(parts)
            own |= {(name, (key, value)): part for name, part in zip(names, parts.unbind(), strict=True)}
        for name, plan in plans.items():
            param = params[name].detach()
            leaves = [own.get((name, path), leaf) for path, leaf in flatten(self._part(name, made.st)).items()]
            row = [grads[name], *leaves, param, *numbers[name], *(own[name, each] for each in plan.reached)]
            made.tensors += [params[name], *row[1:]]
            made.rows[name] = [row]
            *pulling, updating = programs[name]
            for pull in pulling:
                made.rows[name].append([*row])
                made.pulls.setdefault(pull, Batch()).rows.append(made.rows[name][1])
            made.updates.setdefault(updating, Batch()).rows.append(row)
            made.backends |= {updating.backend} if param.numel() else set()
        # backwards: updates begin with what the cache still holds of pulling back
        made.updates = {program: Batch(batch.rows[::-1]) for program, batch in reversed(made.updates.items())}
        for key, by_value in made.contributions.items():
            made.learns[key] = self._learn(key, list(by_value), made, programs.get(f"{_LEARNER}{key}"))
        made.addresses = _addresses(made.tensors)
        return made

    def _plan(self, name: str, st: State, learn: bool) -> _Plan:
        if (name, learn) in self._plans:
            return self._plans[name, learn]
        paths, structure = list(flatten(self._part(name, st))), map_tree(lambda _: None, self._part(name, st))
        learned = self._nested.learned_of(name).values()
        reached = list(dict.fromkeys((each.key, each.key_of(name)) for each in learned if learn and each.key not in self._own))
        size, optimizer = len(paths) + 1, self._nested.optimizer_of(name)

        def pull(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            *leaves, param = rest[:size]
            found = self._nested.hypergradients({name: param}, self._nested.descended({name: grad}), filled(structure, leaves))
            return [*(None for _ in range(1 + size + len(optimizer.settings))), *(found[key][value] for key, value in reached)]

        def update(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            *leaves, param = rest[:size]
            values, st = dict(zip(optimizer.settings, rest[size:], strict=False)), filled(structure, leaves)
            new, after = self._nested.step({name: param}, {name: grad}, st, {name: values}, learn=self._own if learn else [])
            after["hypers"] = {key: raws if key in self._own else st["hypers"][key] for key, raws in after["hypers"].items()}
            found = flatten(self._part(name, after))
            return [None, *(found[path] for path in paths), new[name], *(None for _ in rest[size:])]

        of = optimizer.signature, learn, *(tuple("" if key == name else key for key in path) for path in paths)
        plan = self._plans[name, learn] = _Plan(paths, [pull, update] if reached else [update], reached, of)
        return plan

    def _part(self, name: str, st: State) -> State:
        """The part of the engine's state that the programs of one tensor need."""
        used = {each.key: each for each in self._nested.learned_of(name).values()}
        own = [key for key in used if key in self._own]
        return {
            "memory": {name: st["memory"][name]},  # first, since it takes copies of what is written later
            "rule": {name: st["rule"][name]},
            "hypers": {key: {each.key_of(name): st["hypers"][key][each.key_of(name)]} for key, each in used.items()},
            "learners": {key: _only(name, st["learners"][key]) for key in own},
            **{part: {key: st[part][key] for key in own} for part in COUNTED},
        }

    def _learner(self, key: str, st: State) -> tuple[dict[Path, Tensor], Function]:
        """The state of a shared hyper's learner, and what steps it, given the totals of its values and this state."""
        learned = self._nested.learned[key]
        tree = {"learner": st["learners"][key], "raws": st["hypers"][key], "counts": {part: st[part][key] for part in COUNTED}}
        leaves, structure, values = flatten(tree), map_tree(lambda _: None, tree), list(st["hypers"][key])
        paths = list(leaves)

        def step(*given: Tensor) -> list[Tensor | None]:
            now = filled(structure, given[len(values) :])
            raws, learner, counts = learned.step(now["raws"], dict(zip(values, given, strict=False)), now["learner"], now["counts"])
            after = flatten({"learner": learner, "raws": raws, "counts": counts})
            return [*(None for _ in values), *(after[path] for path in paths)]

        return leaves, step

    def _learn(
        self, key: str, reached: list[str], made: PreparedStep, programs: list[Program] | None
    ) -> Callable[[dict[str, Tensor]], None]:
        """What steps a hyper that tensors share, given the total of each value that was reached; by a program where there is one value."""
        leaves, _ = self._learner(key, made.st)
        made.tensors += leaves.values()
        if programs is None:
            learned = self._nested.learned[key]

            def learn(totals: dict[str, Tensor]) -> None:
                st, counts = made.st, {part: made.st[part][key] for part in COUNTED}
                raws, learner, counts = learned.step(st["hypers"][key], totals, st["learners"][key], counts)
                after = flatten({"learner": learner, "raws": raws, "counts": counts})
                write_over(list(leaves.values()), [after[path] for path in leaves])

            return learn
        (raw,) = made.st["hypers"][key].values()
        row = [torch.empty_like(raw), *leaves.values()]
        batch = Batch([row])

        def learn_one(totals: dict[str, Tensor]) -> None:
            row[0] = totals[reached[0]]
            programs[0](batch)

        return learn_one


_LEARNER = "learner of "
_FORM = operator.attrgetter("shape"), operator.attrgetter("dtype"), operator.attrgetter("device")


def _addresses(tensors: Sequence[Tensor]) -> list[Any]:
    """Where tensors are, and in which form."""
    found: list[Any] = []
    for what in (Tensor.data_ptr, Tensor.stride, *_FORM):
        found += map(what, tensors)
    return found


def _total(parts: list[Tensor], device: torch.device) -> Tensor:
    """The sum of contributions, one along the first dimension each."""
    return functools.reduce(torch.add, [(part[0] if len(part) == 1 else part.sum(0)).to(device) for part in parts])


def _is_own(learned: LearnedHyper) -> bool:
    """Whether each tensor has values of its own, at all heights."""
    return learned.learn.per != "model" and all(map(_is_own, learned.learner.learned.values()))


def _only(name: str, st: State) -> State:
    """The part of a learner's state that belongs to what is called `name`."""
    return {
        "rule": {name: st["rule"][name]},
        "hypers": {key: {name: raws[name]} for key, raws in st["hypers"].items()},
        "learners": {key: _only(name, inner) for key, inner in st["learners"].items()},
        "memory": {name: st["memory"][name]},
        **{part: st[part] for part in COUNTED},
    }
