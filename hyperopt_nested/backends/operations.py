"""Torch's operators that do a sweep, in order, and where each writes what it computes: planned once, before anything runs."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends.graph import POINTWISE, Kind, Value, Values, reachable
from hyperopt_nested.backends.merging import Merged, is_dot, merge
from hyperopt_nested.backends.sweeps import Sweep, is_row_total

Choices = Mapping[Value, bool | None]
"""By condition: whether it is met everywhere; None is in some places."""

Slot = tuple[torch.dtype, int]
"""A buffer: which of those of its dtype."""

Place = Slot | int | None
"""Where a value is: in a buffer, in the argument of an index, or in memory of its own."""

_LAST_MAY_BE_NUMBER = frozenset(("add", "sub", "mul", "div", "pow", "gt", "ge", "lt", "le", "eq", "ne", "remainder"))
"""Operators whose last operand may be a number of Python; torch takes them nowhere else."""


@dataclass(frozen=True)
class Work:
    """What is to be done to a piece.

    Attributes:
        totals: by total: what it sums up.
        writes: by index of an argument: what is written to it.
    """

    totals: dict[Value, Value]
    writes: dict[int, Value]

    @classmethod
    def of(cls, sweep: Sweep) -> "Work":
        work = cls({total: total.operands[0] for total in sweep.totals}, sweep.writes)
        return work.given({}, {value: i for i, value in sweep.written.items()})

    @cached_property
    def ends(self) -> list[Value]:
        return [*self.totals.values(), *self.writes.values()]

    @cached_property
    def values(self) -> list[Value]:
        """Rows and elements, each after those that it is made of."""
        return [value for value in reachable(self.ends, through=_is_large) if _is_large(value)]

    @cached_property
    def numbers(self) -> list[Value]:
        """Numbers that these are made of."""
        found = dict.fromkeys(each for value in self.values for each in value.operands)
        return [each for each in found if each.kind == Kind.NUMBER and each.op != "constant"]

    def conditions(self, kind: Kind) -> list[Value]:
        """Numbers or rows that choose between elements."""
        found = [value.args[0] for value in self.values if value.op == "where" and value.kind == Kind.ELEMENT]
        return list(dict.fromkeys(each for each in found if each.kind == kind and each.op != "constant"))

    @cached_property
    def factors(self) -> list[Value]:
        """Numbers that elements or rows are multiplied with."""
        found = [each for value in self.values if value.op == "mul" for each in value.args]
        return [each for each in dict.fromkeys(found) if each.kind == Kind.NUMBER and each.op != "constant"]

    def given(
        self, choices: Choices, read: Mapping[Value, int] | None = None, factors: Mapping[Value, float | None] | None = None
    ) -> "Work":
        """The same, where it is known what is chosen; operands are converted once, to the dtype that they are computed in.

        What is the same is the same object, and what is not is none that was there before, even if it is made in the same way: an
        argument that it is made of may have been overwritten, or have not.

        Args:
            choices: what is known of conditions.
            read: values that an argument holds already, with its index.
            factors: numbers that are known to be 0 or 1, so that nothing need be multiplied with them, if nothing is infinite or NaN.
        """
        value = Values()
        known = {each: number for each, number in (factors or {}).items() if number is not None}
        new = {each: value("constant", (number,), Kind.NUMBER, each.dtype) for each, number in known.items()}
        units = set(new.values())

        def fit(arg: Value, kind: Kind, dtype: torch.dtype) -> Value:
            if arg.op == "constant":
                arg = value("constant", arg.args, Kind.NUMBER, dtype)
            elif arg.dtype != dtype:
                arg = value("cast", (arg,), arg.kind, dtype)
            return value("expand", (arg,), kind, dtype) if arg.kind < kind else arg

        for old in self.values:
            if read and old in read:
                new[old] = value("input", (read[old],), old.kind, old.dtype)
                continue
            args = [new.get(arg, arg) if isinstance(arg, Value) else arg for arg in old.args]
            if old.op == "where" and (chosen := choices.get(args[0])) is not None:
                new[old] = fit(args[1] if chosen else args[2], old.kind, old.dtype)
                continue
            if old.op == "mul" and (unit := next((each for each in args if each in units), None)) is not None:
                other = args[1 - args.index(unit)]
                new[old] = fit(other if unit.is_constant(1) else unit, old.kind, old.dtype)
                continue
            if old.op == "add" and sum(map(_is_zero, args)) == 1:
                new[old] = fit(args[0] if _is_zero(args[1]) else args[1], old.kind, old.dtype)
                continue
            if old.op in POINTWISE:
                dtypes = [torch.bool if old.op == "where" and i == 0 else old.computed for i in range(len(args))]
                pairs = zip(args, dtypes, strict=True)
                args = [fit(arg, arg.kind, dtype) if isinstance(arg, Value) and arg.op != "constant" else arg for arg, dtype in pairs]
            elif is_row_total(old) and args[0].op == "constant":
                args = [fit(args[0], Kind.ELEMENT, old.args[0].dtype)]
            same = all(arg is before for arg, before in zip(args, old.args, strict=True))
            new[old] = old if same else value(old.op, args, old.kind, old.dtype, old.computed)
        totals = {total: new.get(each, each) for total, each in self.totals.items()}
        return Work(totals, {i: new.get(each, each) for i, each in self.writes.items()})


@dataclass
class Operation:
    """One operator on a piece.

    Attributes:
        value: what it computes.
        operands: of what; None is one that is left out.
        run: the operator.
        place: where the result is written: a buffer, or the argument of an index; None is memory of its own.
        also: what else it computes, in place: by value, the index of the argument.
    """

    value: Value
    operands: tuple[Value | None, ...]
    run: Callable[..., Any]
    place: Place = None
    also: Mapping[Value, int] = field(default_factory=dict)


@dataclass(eq=False)
class Part:
    """Operators up to where what is to be done depends on values of rows, or to the end.

    Attributes:
        work: what is to be done in all.
        places: where values are that were computed before, or are computed here.
        operations: in order.
        conditions: what has to be looked at then; if there are none, all is computed.
        dots: sums of products that are not computed: by total, the factors.
    """

    work: Work
    places: dict[Value, Place] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    conditions: list[Value] = field(default_factory=list)
    dots: dict[Value, tuple[Value, ...]] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> list[Value]:
        """Numbers and constants that are needed."""
        operands = [each for operation in self.operations for each in operation.operands]
        found = [*operands, *self.work.ends]
        return list(dict.fromkeys(each for each in found if each is not None and (each.kind == Kind.NUMBER or each.op == "constant")))

    @cached_property
    def copies(self) -> list[tuple[int, Value]]:
        """What is still to be written, and is not there already; of arguments that are overwritten, first."""
        left = [(i, value) for i, value in self.work.writes.items() if self.places.get(value) != i]
        return sorted(left, key=lambda write: write[1].op != "input")

    @cached_property
    def swapped(self) -> list[Value]:
        """Arguments that are overwritten by copies before they are copied themselves."""
        before = [[i for i, _ in self.copies[:k]] for k in range(len(self.copies))]
        return [value for (_, value), over in zip(self.copies, before, strict=True) if value.op == "input" and value.args[0] in over]


class Plan:
    """What is done to pieces whose numbers choose alike.

    Args:
        work: what is to be done.
        in_place: dtypes of arguments that may be written to while a piece is worked on, by index.
        looking: whether conditions of rows may be looked at, which waits for a device.

    Attributes:
        inputs: arguments that are read.
        arguments: indices of those, and of what is written to.
        first: operators to begin with.
    """

    def __init__(self, work: Work, in_place: Mapping[int, torch.dtype], *, looking: bool) -> None:
        self._in_place = in_place
        self._looking = looking
        self._slots: list[Slot] = []
        self._rest: dict[tuple[bool | None, ...], Part] = {}
        self.inputs = [each for each in work.values if each.op == "input"]
        self.arguments = list(dict.fromkeys([*(each.args[0] for each in self.inputs), *work.writes]))
        self.first = self._part(Part(work, conditions=work.conditions(Kind.ROW) if looking else []))

    @property
    def only_reads(self) -> bool:
        """Whether there is nothing to compute but totals."""
        return not (self.first.operations or self.first.work.writes)

    def rest(self, outcomes: tuple[bool | None, ...]) -> Part:
        """The operators after the first, where the conditions are met in all, no or some rows."""
        if outcomes not in self._rest:
            choices = dict(zip(self.first.conditions, outcomes, strict=True))
            self._rest[outcomes] = self._part(Part(self.first.work.given(choices), dict(self.first.places)))
        return self._rest[outcomes]

    def _part(self, part: Part) -> Part:
        """Add the operators that compute what is not yet computed, up to the conditions."""
        work, done = part.work, part.places
        values = reachable(work.ends, through=lambda value: _is_large(value) and value not in done)
        uses = Counter([*(each for value in values if value not in done for each in value.operands), *work.ends])
        written = {value: i for i, value in work.writes.items() if self._in_place.get(i) == value.dtype} if self._looking else {}
        merged: dict[Value, Merged] = {}
        gone: set[Value] = set()
        for value in reversed(values):  # so that what is merged is not merged into anything else
            if value not in gone and value not in done and (found := merge(value, uses, done, written)):
                merged[value] = found
                gone |= found.gone
        part.dots = {total: each.operands for total, each in work.totals.items() if each not in done and is_dot(total, each, uses)}
        gone |= {work.totals[total] for total in part.dots}
        operations = [
            operation(value, merged.get(value))
            for value in values
            if _is_large(value) and value.op not in ("input", "constant") and value not in gone and value not in done
        ]
        until = len(operations)
        if part.conditions:
            needed = set(reachable(part.conditions, through=_is_large))
            operations.sort(key=lambda each: each.value not in needed)
            until = sum(each.value in needed for each in operations)
        _Places(part, operations, self._slots, self._in_place).find()
        part.operations = operations[:until]
        done |= {value: place for each in part.operations for value, place in ((each.value, each.place), *each.also.items())}
        return part


class _Places:
    """Finds where operators write: to the argument that is to have the value, in place of an operand, or to buffers, as few as can be."""

    def __init__(self, part: Part, operations: list[Operation], slots: list[Slot], in_place: Mapping[int, torch.dtype]) -> None:
        self._operations, self._slots = operations, slots
        end = len(operations)
        self._last = {each: k for k, operation in enumerate(operations) for each in operation.operands if each is not None}
        kept = [*part.work.ends, *(each for factors in part.dots.values() for each in factors)]
        self._last |= dict.fromkeys(kept, end)
        self._live: dict[Place, Value] = {place: value for value, place in part.places.items() if value in self._last and place is not None}
        computed = {operation.value: k for k, operation in enumerate(operations)}
        self._targets = {i: value for i, value in part.work.writes.items() if i in in_place and value in computed}
        self._written = {i: computed[value] for i, value in self._targets.items()}  # from then on, it has to stay
        self._finals = {i: _finals(value) for i, value in part.work.writes.items()}
        self._reads = {value.args[0]: k for value, k in self._last.items() if value.op == "input"}
        self._dtypes = in_place

    def find(self) -> None:
        for k, operation in enumerate(self._operations):
            if operation.value.kind == Kind.ELEMENT:
                others = operation.operands[1:] if operation.also else ()  # it begins with its first operand, and needs the others
                operation.place = next(
                    place
                    for place in self._candidates(operation)
                    if self._is_free(place, operation.value, k) and self._live.get(place, operation.value) not in others
                )
                self._live[operation.place] = operation.value

    def _candidates(self, operation: Operation) -> Iterable[Place]:
        """Places, best first."""
        value = operation.value
        yield from (i for i, target in self._targets.items() if target is value)
        yield from (i for i in self._targets if value in self._finals[i])
        for each in operation.operands:
            if each is not None and each.op == "input" and each.args[0] in self._targets:
                yield each.args[0]
            yield from (place for place, found in self._live.items() if found is each)
        yield from self._targets
        yield from self._slots
        self._slots.append((value.dtype, sum(dtype == value.dtype for dtype, _ in self._slots)))
        yield self._slots[-1]

    def _is_free(self, place: Place, value: Value, k: int) -> bool:
        """Whether an operator may write there: what is there, and the argument, is not read by any later one."""
        occupant = self._live.get(place)
        if occupant is not None and self._last.get(occupant, -1) > k:
            return False
        if not isinstance(place, int):
            return place is not None and place[0] == value.dtype
        if place not in self._targets or self._dtypes[place] != value.dtype or self._reads.get(place, -1) > k:
            return False
        if any(value in finals for i, finals in self._finals.items() if i != place):
            return False
        return value is self._targets[place] or self._last.get(value, k) <= self._written[place]


def operation(value: Value, merged: Merged | None = None) -> Operation:
    """What computes a value, by itself or with others."""
    if merged:
        return Operation(value, merged.operands, merged.run, also=merged.also)
    if is_row_total(value):
        return Operation(value, value.args, partial(getattr(torch, value.op), dim=-1, keepdim=True))
    if value.op in ("cast", "expand"):
        return Operation(value, value.args, copied if value.kind == Kind.ELEMENT else partial(torch.as_tensor, dtype=value.dtype))
    if value.op == "clamp":
        return Operation(value, value.args, _clamped)
    run = torch.true_divide if value.op == "div" else getattr(torch, value.op)
    fixed = value.args[: len(value.args) - (value.op in _LAST_MAY_BE_NUMBER)]
    if any(each.kind == Kind.NUMBER or each.op == "constant" for each in fixed):
        dtypes = [torch.bool if value.op == "where" and i == 0 else value.computed for i in range(len(fixed))]
        run = partial(_with_tensors, run, dtypes)
    return Operation(value, value.args, run)


def _with_tensors(run: Callable[..., Any], dtypes: Sequence[torch.dtype], *args: Any, **out: Tensor) -> Any:
    """What an operator makes of operands the first of which have to be tensors."""
    first = [arg if isinstance(arg, Tensor) else torch.tensor(arg, dtype=dtype) for arg, dtype in zip(args, dtypes, strict=False)]
    return run(*first, *args[len(first) :], **out)


def copied(value: Any, out: Tensor) -> Tensor:
    """A tensor filled with another, or with a number of Python."""
    return out.copy_(value) if isinstance(value, Tensor) else out.fill_(value)


def _clamped(value: Tensor, *ends: Any, **out: Tensor) -> Any:
    if any(isinstance(end, Tensor) for end in ends):  # then both have to be
        ends = tuple(torch.tensor(end, dtype=value.dtype) if isinstance(end, (int, float)) else end for end in ends)
    return torch.clamp(value, *ends, **out)


def _finals(value: Value) -> set[Value]:
    """What may turn out to be the same as a value, when it is known what is chosen."""
    return {value}.union(*map(_finals, value.args[1:])) if value.op == "where" else {value}


def _is_large(value: Value) -> bool:
    return value.kind != Kind.NUMBER


def _is_zero(value: Value | None) -> bool:
    value = value.args[0] if value is not None and value.op == "expand" else value
    return value is not None and value.is_constant(0)
