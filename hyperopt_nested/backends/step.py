"""Steps by programs, in place: what is done to one tensor is traced from the engine, and made into programs for many tensors."""

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hyperopt_nested.backends.choice import MANY, WARM_UP, Programs
from hyperopt_nested.backends.program import Batch, Engine, Function, Program, Request, capturing, write_over
from hyperopt_nested.backends.verify import examples
from hyperopt_nested.engine.binding import SUMS, Key, Reduce, Tensors
from hyperopt_nested.engine.learned import COUNTED, LearnedHyper
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.trees import State, filled, flatten, map_tree

Numbers = Mapping[str, list[Tensor]]
"""By tensor: what its group holds for each hyper of its optimizer, in order, shape () each."""

Path = tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """What to do for one tensor."""

    paths: list[Path]  # of the leaves of the engine's state that programs take and write
    functions: Sequence[Function]  # pull the gradient back onto shared values; step the tensor's own values and the tensor; or both at once
    reached: list[tuple[str, str]]  # the shared values: learned hyper, and key of the value
    of: tuple[Any, ...]  # equal for tensors whose programs are the same


@dataclass
class PreparedStep:
    """A step of some tensors, ready to be done again and again, as long as they and their state stay where they are."""

    of: list[Any]  # what it was prepared for
    st: State  # the engine's; the leaves are written to
    params: list[Tensor]
    tensors: list[Tensor] = field(default_factory=list)  # all that programs take, but gradients
    addresses: list[Any] = field(default_factory=list)  # where these are, and in which form
    requests: dict[str, Request] = field(default_factory=dict)
    backends: set[str] = field(default_factory=set)  # the sorts of programs that step tensors, but empty ones
    rows: dict[str, list[list[Tensor]]] = field(default_factory=dict)  # arguments of programs, by tensor: the gradient comes first
    pulls: dict[Program, Batch] = field(default_factory=dict)  # write `contributions` to totals
    contributions: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)  # by learned hyper and value: a tensor for each device
    learns: dict[str, tuple[Program, Batch]] = field(default_factory=dict)  # by learned hyper: steps it, given the total of each value
    updates: dict[Program, Batch] = field(default_factory=dict)
    counts: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of single tensors, and what these are added to
    parts: dict[Key, Tensor] = field(default_factory=dict)  # contributions, by tensor, learned hyper and value
    maxima: dict[Key, Tensor] = field(default_factory=dict)  # of single tensors, in the states of rules
    sums: dict[Key, Tensor] = field(default_factory=dict)  # of parts of tensors, which updates need
    summing: dict[Program, Batch] = field(default_factory=dict)  # write `sums`


class ProgramStep:
    """The step of an engine, with state that is changed in place.

    A program pulls each tensor's gradient back onto the learned values that it shares with others; these then step; and another program
    steps the values that only it has, and the tensor itself. Where all shared values are delayed, which step after the tensors, one program
    does both. They are traced from `Nested`, so they do for every rule what it does. With exact curvature, or rules that need a total over
    all tensors, there are no such programs.

    Args:
        nested: the engine.
        programs: makes programs.
        reduce: where tensors are parts of larger ones; see `Nested.step`. Then no learned value is a tensor's own.
    """

    def __init__(self, nested: Nested, programs: Programs, reduce: Reduce | None = None) -> None:
        self._nested, self._programs, self._reduce = nested, programs, reduce
        self._own = [key for key, learned in nested.learned.items() if learned.is_own and reduce is None]
        # whether gradients are pulled back, and tensors stepped, by one program: no update waits for a shared value
        self._at_once = all(learned.learn.delayed for key, learned in nested.learned.items() if key not in self._own)
        self._plans: dict[tuple[str, bool], _Plan] = {}
        self._last: PreparedStep | None = None

    @property
    def backend(self) -> str:
        """What runs the steps: of the last step, or what is meant to; several sorts are joined by "+"."""
        return "+".join(sorted(self._last.backends)) if self._last and self._last.backends else self._programs.backend

    def waits(self, taken: int, params: Tensors, grads: Tensors, st: State, numbers: Numbers, *, learn: bool) -> bool:
        """Whether the engine does this step, the one after `taken`, while kernels of a small model are compiled in the background."""
        waits = taken < WARM_UP and not self._programs.strict and self._programs.backend == "fused"
        waits = waits and sum(map(Tensor.numel, params.values())) < MANY
        if waits and taken:  # the first step, in which much is done for the first time, has the processor for itself
            self._programs.begin(lambda: self._requests(params, grads, st, numbers, learn))
        return waits

    def _requests(self, params: Tensors, grads: Tensors, st: State, numbers: Numbers, learn: bool) -> list[Request]:
        """What programs are needed for: of tensors that are alike, the first asks."""
        signatures = {name: self._nested.bindings[name].optimizer.signature for name in grads}
        first = {(signatures[name], *_each((params[name], grads[name]), *_FORM)): name for name in reversed([*grads])}
        return [*self._arranged([], params, {name: grads[name] for name in first.values()}, st, numbers, learn).requests.values()]

    def prepare(self, params: Tensors, grads: Tensors, st: State, numbers: Numbers, *, learn: bool) -> PreparedStep:
        """What to do for the tensors that have gradients; makes the programs that it is done with, if need be, and changes nothing."""
        objects = (id(each[name]) for each in (params, numbers) for name in grads)
        of, last = [learn, *grads, *objects, *_each(grads.values(), type, *_FORM)], self._last
        if last and last.st is st and last.of == of and last.addresses == _each(last.tensors, Tensor.data_ptr, *_FORM):
            return last
        if capturing():
            raise RuntimeError("a step is captured in a CUDA graph before any other was taken in this form: take some steps first")
        made = self._arranged(of, params, grads, st, numbers, learn)
        programs = dict(zip(made.requests, self._programs.make(list(made.requests.values())), strict=True))
        made.requests = {}  # which have gradients in them
        for name, rows in made.rows.items():
            *before, updating = zip(programs[name], rows, strict=True)
            pulling = before[: len(before) - (name in self._nested.bindings.in_parts)]
            for pull, row in pulling:
                made.pulls.setdefault(pull, Batch()).rows.append(row)
            for summing, row in before[len(pulling) :]:
                made.summing.setdefault(summing, Batch()).rows.append(row)
            made.updates.setdefault(updating[0], Batch()).rows.append(updating[1])
            made.backends |= {updating[0].backend} if updating[1][0].numel() else set()
        # backwards: updates begin with what the cache still holds of pulling back
        made.updates = {program: Batch(batch.rows[::-1]) for program, batch in reversed(made.updates.items())}
        for key, (_, batch) in made.learns.items():
            if f"{_LEARNER}{key}" in programs:
                made.learns[key] = programs[f"{_LEARNER}{key}"][0], batch
        self._last = made
        return made

    def step(self, prepared: PreparedStep, grads: Tensors) -> None:
        """One step, as `Nested.step`; tensors and state are changed in place. Arguments as of `prepare`."""
        for name, grad in grads.items():
            for row in prepared.rows[name]:
                row[0] = grad
        for program, batch in prepared.pulls.items():
            program(batch)
        self._learn(prepared, delayed=False)
        for program, batch in prepared.summing.items():
            program(batch)
        self._combine(prepared.sums, "sum")
        for program, batch in prepared.updates.items():
            program(batch)
        self._learn(prepared, delayed=True)
        self._combine(prepared.maxima, "max")
        for counted, total in prepared.counts:
            total.add_(counted.sum().to(total.device))
            counted.zero_()
        for key, learned in self._nested.learned.items():
            if key not in self._own and any(map(callable, learned.learn.bounds)):
                raws = prepared.st["hypers"][key]
                new = self._nested.bounded(key, raws, prepared.st["rule"], grads)
                write_over(list(raws.values()), [new[value] for value in raws])
        for name in grads:
            for row in prepared.rows[name]:
                row[0] = _NO_GRAD  # not to keep the memory of gradients that are set to None
        torch.autograd.graph.increment_version(prepared.params)  # kernels write without telling autograd

    def _learn(self, prepared: PreparedStep, *, delayed: bool) -> None:
        """Step shared values, those that are delayed or the others; contributions are complete after pulls, or, at once, after updates."""
        if delayed == self._at_once:
            self._combine(prepared.parts, "sum")
        for key, by_value in prepared.contributions.items():
            if bool(self._nested.learned[key].learn.delayed) == delayed:
                raws, (program, batch) = prepared.st["hypers"][key], prepared.learns[key]
                batch.rows[0][: len(by_value)] = [_total(parts, raws[value].device) for value, parts in by_value.items()]
                program(batch)

    def _combine(self, parts: dict[Key, Tensor], operation: Literal["sum", "max"]) -> None:
        """Write to numbers, which were computed for parts of tensors, what they are for the whole tensors."""
        if self._reduce and parts:
            new = self._reduce(parts, operation)
            write_over([*parts.values()], [new[key] for key in parts])

    def _arranged(self, of: list[Any], params: Tensors, grads: Tensors, st: State, numbers: Numbers, learn: bool) -> PreparedStep:
        """A step with arguments, and what programs are needed for these: by tensor, and by shared hyper that has one value."""
        made, plans = PreparedStep(of, st, [params[name] for name in grads]), {name: self._plan(name, st, learn) for name in grads}
        shared: dict[tuple[Path, torch.device], list[str]] = {}  # what several tensors write to, with their names
        for name, plan in plans.items():
            counted = [path for path in plan.paths if path[-2] in COUNTED and {*path[:-2:2]} <= {"learners"}]
            for path in [*counted, *(("hypers", *each) for each in plan.reached)]:
                shared.setdefault((path, grads[name].device), []).append(name)
        own: dict[tuple[str, Path], Tensor] = {}  # what each of them writes to instead
        for (path, device), names in shared.items():
            total: Tensor = functools.reduce(operator.getitem, path, st)  # type: ignore[assignment]
            parts = total.new_zeros(len(names), *total.shape, device=device)
            own |= {(name, path): part for name, part in zip(names, parts.unbind(), strict=True)}
            if path[0] == "hypers":
                made.parts |= {(name, *path[1:]): own[name, path] for name in names}
                made.contributions.setdefault(path[1], {}).setdefault(path[2], []).append(parts)
            else:
                made.counts.append((parts, total))
        for name, plan in plans.items():
            param, rule = params[name].detach(), self._nested.bindings[name].optimizer.rule.name
            leaves = flatten(self._part(self._nested.bindings[name].learned.values(), name, st))
            held = [leaf if path[0] == "hypers" else own.get((name, path), leaf) for path, leaf in leaves.items()]
            row = [grads[name], *held, param, *numbers[name], *(own[name, ("hypers", *each)] for each in plan.reached)]
            if name in self._nested.bindings.in_parts:
                row.append(cast(Tensor, plan.functions[-2](*row, _NO_GRAD)[-1]).clone())
                made.sums[name, SUMS] = row[-1]
            made.tensors += [params[name], *row[1:]]
            made.rows[name] = [[*row] for _ in plan.functions]
            hypers = {i: self._nested.learned[path[1]] for i, path in enumerate(plan.paths, start=1) if path[0] == "hypers"}
            changing = [i for i, each in hypers.items() if each.key in dict(plan.reached) and not each.learn.delayed]
            trials = functools.partial(examples, row, param, hypers, 1 + len(leaves))
            made.requests[name] = Request(plan.of, rule, plan.functions, row, param, changing, trials)
        for key, by_value in made.contributions.items():
            learn_by, raws = self._nested.learned[key].learn, st["hypers"][key]
            held, step = self._learner(key, list(by_value), st)
            row = [*(torch.empty_like(raws[value]) for value in by_value), *held]
            made.tensors += held
            made.learns[key] = Engine(step), Batch([row])
            if len(raws) == 1:
                trials = functools.partial(examples, row, row[0], {}, None)
                made.requests[f"{_LEARNER}{key}"] = Request((_LEARNER, learn_by), learn_by.by.rule.name, [step], row, row[0], (), trials)
        for name in grads if self._reduce else ():
            state = flatten(st["rule"][name])
            made.maxima |= {(name, *path): state[path] for path in self._nested.bindings[name].optimizer.rule.maxima or ()}
        made.addresses = _each(made.tensors, Tensor.data_ptr, *_FORM)
        return made

    def _plan(self, name: str, st: State, learn: bool) -> _Plan:
        if (name, learn) in self._plans:
            return self._plans[name, learn]
        learned = self._nested.bindings[name].learned.values()
        part = self._part(learned, name, st)
        paths, structure = list(flatten(part)), map_tree(lambda _: None, part)
        reached = list(dict.fromkeys((each.key, each.key_of(name)) for each in learned if learn and each.key not in self._own))
        size, optimizer = len(paths) + 1, self._nested.bindings[name].optimizer
        in_parts = name in self._nested.bindings.in_parts

        def pulled(grad: Tensor, rest: Sequence[Tensor]) -> list[Tensor]:
            *leaves, param = rest[:size]
            found = self._nested.hypergradients({name: param}, self._nested.descended({name: grad}), filled(structure, leaves))
            return [found[key][value] for key, value in reached]

        def ending(contributions: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [*(None for _ in optimizer.settings), *contributions, *([None] if in_parts else [])]

        def pull(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            return [*(None for _ in range(1 + size)), *ending(pulled(grad, rest))]

        def stepped(grad: Tensor, rest: Sequence[Tensor], reduce: Reduce | None) -> tuple[Tensors, State, State]:
            *leaves, param = rest[:size]
            values, st = dict(zip(optimizer.settings, rest[size:], strict=False)), filled(structure, leaves)
            own = self._own if learn else []
            return *self._nested.step({name: param}, {name: grad}, st, {name: values}, learn=own, reduce=reduce), st

        def sums(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            found: dict[Key, Tensor] = {}

            def caught(parts: Mapping[Key, Tensor], _: str) -> dict[Key, Tensor]:
                found.update(parts)
                return dict(parts)

            stepped(grad, rest, caught)
            return [*(None for _ in rest), found[name, SUMS]]

        def update(grad: Tensor, *rest: Tensor) -> list[Tensor | None]:
            def known(parts: Mapping[Key, Tensor], _: str) -> dict[Key, Tensor]:
                return {key: rest[-1] if key == (name, SUMS) else part for key, part in parts.items()}

            new, after, st = stepped(grad, rest, known if in_parts else None)
            after["hypers"] = {key: raws if key in self._own else st["hypers"][key] for key, raws in after["hypers"].items()}
            found = flatten(self._part(learned, name, after))
            contributions = pulled(grad, rest) if reached and self._at_once else [None for _ in reached]
            return [None, *(found[path] for path in paths), new[name], *ending(contributions)]

        keys = (tuple("" if key == name else key for key in path) for path in paths)
        of = optimizer.signature, learn, self._nested.shards.get(name, 0), in_parts, *keys
        functions = [*([pull] if reached and not self._at_once else []), *([sums] if in_parts else []), update]
        plan = self._plans[name, learn] = _Plan(paths, functions, reached, of)
        return plan

    def _part(self, used: Collection[LearnedHyper], name: str, st: State) -> State:
        return _part(used, {each.key: each for each in used if each.key in self._own}, name, st)

    def _learner(self, key: str, reached: list[str], st: State) -> tuple[list[Tensor], Function]:
        """The state of a shared hyper's learner, and what steps it, given the totals of the values that were reached, and this state."""
        learned = self._nested.learned[key]
        tree = {"learner": st["learners"][key], "raws": st["hypers"][key], "counts": {part: st[part][key] for part in COUNTED}}
        leaves, structure = flatten(tree), map_tree(lambda _: None, tree)

        def step(*given: Tensor) -> list[Tensor | None]:
            now = filled(structure, given[len(reached) :])
            raws, learner, counts = learned.step(now["raws"], dict(zip(reached, given, strict=False)), now["learner"], now["counts"], {})
            after = flatten({"learner": learner, "raws": raws, "counts": counts})
            return [*(None for _ in reached), *(after[path] for path in leaves)]

        return list(leaves.values()), step


_LEARNER = "learner of "
_NO_GRAD = torch.empty(0)
_FORM = Tensor.stride, operator.attrgetter("shape"), operator.attrgetter("dtype"), operator.attrgetter("device")


def _each(tensors: Collection[Tensor], *whats: Callable[[Tensor], Any]) -> list[Any]:
    return list(itertools.chain.from_iterable(map(what, tensors) for what in whats))


def _total(parts: list[Tensor], device: torch.device) -> Tensor:
    """The sum of contributions, one along the first dimension each."""
    return functools.reduce(torch.add, [(part[0] if len(part) == 1 else part.sum(0)).to(device) for part in parts])


def _part(used: Collection[LearnedHyper], own: Mapping[str, LearnedHyper], name: str, st: State) -> State:
    """The part of an engine's state that the programs of one tensor need, which learn some hypers of their own."""
    return {
        "memory": {name: st["memory"][name]},  # first, since it takes copies of what is written later
        "rule": {name: st["rule"][name]},
        "rounding": {name: st["rounding"][name]} if name in st["rounding"] else {},
        "hypers": {each.key: {each.key_of(name): st["hypers"][each.key][each.key_of(name)]} for each in used},
        "learners": {
            key: _part(each.learner.learned.values(), each.learner.learned, name, st["learners"][key]) for key, each in own.items()
        },
        **{part: {key: st[part][key] for key in own} for part in COUNTED},
    }
