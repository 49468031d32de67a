"""Programs of torch's own operators: many small tensors at once, and large ones piece by piece while the cache holds them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends.graph import Kind, UpdateGraph, Value, uncast
from hyperopt_nested.backends.layout import lying_as, sizes
from hyperopt_nested.backends.operations import Operation, Part, Plan, Slot, Work, copied, operation
from hyperopt_nested.backends.program import Batch, Program
from hyperopt_nested.backends.sweeps import Sweeps
from hyperopt_nested.learned import number_dtype

PIECE = 1 << 19
"""Elements that one operator works on, on the CPU."""

SMALL = 1 << 16
"""Elements of the largest tensors that are put together, on the CPU: that takes copies."""


def foreach(graph: UpdateGraph) -> Program:
    """A program that does a graph, for tensors of all sizes that pass `check_layout`."""
    return _Foreach(graph)


@dataclass(eq=False)
class _Pack:
    """Tensors of equal columns that are put together, or one that is cut into pieces.

    Attributes:
        tensors: which tensors of the batch.
        rows: of each.
        columns: of all of them.
        step: rows that one operator works on at once.
    """

    tensors: list[int]
    rows: list[int]
    columns: int
    step: int

    @property
    def is_one(self) -> bool:
        return len(self.tensors) == 1

    @cached_property
    def pieces(self) -> list[int]:
        """Rows of each piece."""
        rows = sum(self.rows)
        return [min(self.step, rows - at) for at in range(0, rows, self.step)]

    @cached_property
    def owners(self) -> Tensor:
        """Which tensor each row is of."""
        return torch.repeat_interleave(torch.tensor(self.tensors), torch.tensor(self.rows))


@dataclass
class _Cut:
    """All tensors of a batch.

    Attributes:
        packs: of them.
    """

    packs: list[_Pack]

    @cached_property
    def owners(self) -> Tensor:
        """Which tensor each part of a total is of: one a piece of a tensor, and one a row of tensors that are together."""
        return torch.cat([torch.tensor(pack.tensors * len(pack.pieces)) if pack.is_one else pack.owners for pack in self.packs])


class _Foreach:
    def __init__(self, graph: UpdateGraph) -> None:
        self._graph, self._sweeps = graph, Sweeps(graph)
        self._elements = [i for i, (kind, _) in enumerate(graph.inputs) if kind == Kind.ELEMENT]
        self._numbers = [[operation(value) for value in values] for values in self._sweeps.numbers]
        self._steps = [_Steps(graph, Work.of(sweep)) for sweep in self._sweeps.sweeps]
        self._cuts: dict[Any, _Cut] = {}
        self._memory: dict[Slot, Tensor] = {}
        self._buffers: dict[tuple[Slot, tuple[int, int]], Tensor] = {}

    def __call__(self, batch: Batch) -> None:
        like = self._elements[-1] if self._elements else 0
        if batch.prepared is None:
            batch.prepared = _Arguments(self._graph, batch.rows, like)
        given: _Arguments = batch.prepared
        given.first = [lying_as(row[0], row[like]) if self._elements else row[0] for row in batch.rows]
        run = _Run(given, self._buffer)
        for at, (sweep, steps) in enumerate(zip(self._sweeps.sweeps, self._steps, strict=True)):
            run.do_numbers(self._numbers[at])
            run.read(steps.numbers)
            cut = self._cut(given.shapes, given.device, whole=steps.only_reads)
            for pack in cut.packs:
                run.do(pack, steps)
            run.finish(sweep.totals, cut.owners)
        run.do_numbers(self._numbers[-1])
        run.write_numbers(self._sweeps.writes)
        given.first = []  # copies of gradients that lie otherwise need not stay

    def _buffer(self, slot: Slot, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Memory for what an operator computes of a piece."""
        key = slot, shape
        if key not in self._buffers:
            size = shape[0] * shape[1]
            memory = self._memory.get(slot)
            if memory is None or memory.numel() < size:
                memory = self._memory[slot] = torch.empty(size, dtype=slot[0], device=device)
                self._buffers = {each: view for each, view in self._buffers.items() if each[0] != slot}
            self._buffers[key] = memory[:size].view(shape)
        return self._buffers[key]

    def _cut(self, shapes: tuple[tuple[int, int], ...], device: torch.device, *, whole: bool) -> _Cut:
        key = shapes, device, whole
        if key not in self._cuts:
            cpu = device.type == "cpu"
            self._cuts[key] = _Cut(_cut(shapes, min(SMALL, PIECE) if cpu else PIECE // 2, None if whole or not cpu else PIECE))
        return self._cuts[key]


def _cut(shapes: Sequence[tuple[int, int]], small: int, large: int | None) -> list[_Pack]:
    """Tensors of equal columns together, if they have no more elements than `small`; others in pieces of about `large`, if given."""
    packs: list[_Pack] = []
    order = sorted(range(len(shapes)), key=lambda t: shapes[t][1])
    for columns, group in groupby(order, key=lambda t: shapes[t][1]):
        together: list[int] = []
        for t in group:
            rows = shapes[t][0]
            if rows * columns > small:
                packs.append(_Pack([t], [rows], columns, max(1, large // columns) if large else rows))
                continue
            if together and (sum(shapes[each][0] for each in together) + rows) * columns > PIECE:
                packs.append(_together(together, shapes))
                together = []
            together.append(t)
        if together:
            packs.append(_together(together, shapes))
    return packs


def _together(tensors: list[int], shapes: Sequence[tuple[int, int]]) -> _Pack:
    rows = [shapes[t][0] for t in tensors]
    return _Pack(tensors, rows, shapes[tensors[0]][1], sum(rows))


class _Steps:
    """Plans for one sweep, by what its numbers choose."""

    def __init__(self, graph: UpdateGraph, work: Work) -> None:
        self._work = work
        self._in_place = {i: graph.inputs[i][1] for i in work.writes if graph.inputs[i][0] == Kind.ELEMENT}
        self._plans: dict[Any, Plan] = {}
        self.numbers = self._work.numbers
        self.conditions, self.factors = self._work.conditions(Kind.NUMBER), self._work.factors
        self.only_reads = Plan(self._work, {}, looking=False).only_reads

    def plan(self, outcomes: tuple[bool | None, ...], factors: tuple[float | None, ...], *, alone: bool, looking: bool) -> Plan:
        """The plan where conditions that are numbers are met for all, none or some tensors, and some factors are 0 or 1 for all."""
        key = outcomes, factors, alone, looking
        if key not in self._plans:
            choices = dict(zip(self.conditions, outcomes, strict=True))
            work = self._work.given(choices, factors=dict(zip(self.factors, factors, strict=True)))
            self._plans[key] = Plan(work, self._in_place if alone else {}, looking=looking)
        return self._plans[key]


class _Arguments:
    """What a program is given, and views of it, which are made once.

    Args:
        graph: what is done with it.
        rows: by tensor, all arguments.
        like: index of an argument that is as large as the tensor.

    Attributes:
        shapes: rows and columns of each tensor.
        first: the first argument of each tensor, during a call.
        device: where all is.
    """

    def __init__(self, graph: UpdateGraph, rows: Sequence[Sequence[Tensor]], like: int) -> None:
        self._graph, self._rows = graph, rows
        self.shapes = tuple(sizes(row[like]) for row in rows)
        self.device = rows[0][like].device
        self.first: list[Tensor] = []
        self._leaves: dict[int, list[Tensor]] = {}
        self._pieces: dict[tuple[int, _Pack], list[Tensor]] = {}

    def leaves(self, index: int) -> list[Tensor]:
        """Numbers, shape (), one for each tensor; or one, if all tensors have the same."""
        if index == 0:
            return _leaves(self.first)
        if index not in self._leaves:
            self._leaves[index] = _leaves([row[index] for row in self._rows])
        return self._leaves[index]

    def pieces(self, index: int, pack: _Pack) -> list[Tensor]:
        """Rows of an argument, for each tensor, or each piece of one, shape (rows, columns), or (rows, 1) where it has one a row."""
        columns = pack.columns if self._graph.inputs[index][0] == Kind.ELEMENT else 1
        if index == 0:
            return _pieces([self.first[t] for t in pack.tensors], pack, columns)
        if (index, pack) not in self._pieces:
            self._pieces[index, pack] = _pieces([self._rows[t][index] for t in pack.tensors], pack, columns)
        return self._pieces[index, pack]


def _leaves(given: Sequence[Tensor]) -> list[Tensor]:
    shared = all(leaf is given[0] for leaf in given)
    return [leaf.reshape(()) for leaf in (given[:1] if shared else given)]


def _pieces(tensors: Sequence[Tensor], pack: _Pack, columns: int) -> list[Tensor]:
    found = [each.as_strided((rows, columns), (columns, 1)) for each, rows in zip(tensors, pack.rows, strict=True)]
    return [*torch.split_with_sizes(found[0], pack.pieces)] if pack.is_one else found


class _Run:
    """One call: the values of numbers, one a tensor, and what is summed up for each tensor."""

    def __init__(self, given: _Arguments, buffer: Callable[[Slot, tuple[int, int], torch.device], Tensor]) -> None:
        self._given, self._buffer = given, buffer
        self._device, self._count = given.device, len(given.shapes)
        self._on_cpu = self._device.type == "cpu"
        self._numbers: dict[Value, Tensor] = {}
        self._lists: dict[Value, list[Any]] = {}
        self._stacked: dict[tuple[Part, torch.dtype], Tensor] = {}
        self._sums: dict[Value, list[Tensor]] = {}

    def do_numbers(self, operations: Sequence[Operation]) -> None:
        for each in operations:
            found = each.run(*(None if arg is None else self._number(arg) for arg in each.operands))
            if not isinstance(found, Tensor) or found.dtype != each.value.dtype or found.ndim != 1:
                found = torch.as_tensor(found, dtype=each.value.dtype, device=self._device).reshape(-1)
            self._numbers[each.value] = found

    def do(self, pack: _Pack, steps: _Steps) -> None:
        """The operators of a sweep for tensors, piece by piece, and its writes."""
        outcomes = tuple(self._common(condition, pack) for condition in steps.conditions)
        factors = tuple(number if (number := self._common(factor, pack)) in (0, 1) else None for factor in steps.factors)
        plan = steps.plan(outcomes, factors, alone=pack.is_one, looking=self._on_cpu and pack.is_one)
        views = {i: self._given.pieces(i, pack) for i in plan.arguments}
        numbers: dict[Part, dict[Value | None, Any]] = {}
        for k, rows in enumerate(pack.pieces):
            shape = rows, pack.columns
            if pack.is_one:
                arguments = {i: pieces[k] for i, pieces in views.items()}
            else:
                arguments = {value.args[0]: torch.cat(views[value.args[0]]) for value in plan.inputs}
            known: dict[Value | None, Any] = {None: None, **{value: arguments[value.args[0]] for value in plan.inputs}}
            part = plan.first
            for last in (not part.conditions, True):
                if part not in numbers:
                    numbers[part] = self._numbers_in(part, pack)
                known |= numbers[part]
                self._compute(part, known, arguments, shape)
                if last:
                    break
                met = [(int(torch.count_nonzero(known[each])), known[each].numel()) for each in part.conditions]
                part = plan.rest(tuple(count == every if count in (0, every) else None for count, every in met))
            self._sum(part, known, shape, each_row=not pack.is_one)
            if pack.is_one:
                known |= {value: known[value].clone() for value in part.swapped}
                for i, value in part.copies:
                    copied(known[value], arguments[i])
                continue
            for i, value in part.copies:
                whole = _expanded(known[value], value.dtype, (rows, views[i][0].shape[1]), self._device)
                torch._foreach_copy_(views[i], torch.split_with_sizes(whole, pack.rows))

    def _compute(self, part: Part, known: dict[Value | None, Any], arguments: Mapping[int, Tensor], shape: tuple[int, int]) -> None:
        for each in part.operations:
            args = [known[operand] for operand in each.operands]
            place = each.place
            if place is None:
                found = each.run(*args)
                known[each.value] = found if found.dtype == each.value.dtype else found.to(each.value.dtype)
            else:
                out = arguments[place] if isinstance(place, int) else self._buffer(place, shape, self._device)
                known[each.value] = each.run(*args, out=out)
                known |= {value: arguments[i] for value, i in each.also.items()}

    def _sum(self, part: Part, known: Mapping[Value | None, Any], shape: tuple[int, int], *, each_row: bool) -> None:
        """The totals of a piece, or of each of its rows."""
        for total, operand in part.work.totals.items():
            if total in part.dots:
                factors = [known[each] for each in part.dots[total]]
                found = torch.linalg.vecdot(*factors) if each_row else torch.dot(*(each.reshape(-1) for each in factors))
            else:
                whole = _expanded(known[operand], operand.dtype, shape if operand.kind == Kind.ELEMENT else (shape[0], 1), self._device)
                reduce: Callable[..., Tensor] = torch.amax if total.op == "amax" else torch.sum
                found = reduce(whole, -1) if each_row else reduce(whole)
            self._sums.setdefault(total, []).append(found)

    def finish(self, totals: Sequence[Value], owners: Tensor) -> None:
        """Put together what pieces have summed up."""
        for total in totals:
            parts = torch.cat([part.reshape(-1) for part in self._sums.pop(total)]).to(number_dtype(self._device))
            start = parts.new_full((self._count,), -torch.inf if total.op == "amax" else 0)
            where = owners.to(self._device)
            whole = start.scatter_reduce(0, where, parts, "amax") if total.op == "amax" else start.index_add(0, where, parts)
            if total.op == "mean":
                whole = whole / torch.tensor([rows * columns for rows, columns in self._given.shapes], device=self._device)
            self._numbers[total] = whole.to(total.dtype)

    def write_numbers(self, writes: dict[int, Value]) -> None:
        new = {i: self._number(value) for i, value in writes.items()}
        for i, value in new.items():
            leaves = self._given.leaves(i)
            filled = value if isinstance(value, Tensor) else torch.full((1,), value, dtype=leaves[0].dtype)
            torch._foreach_copy_(leaves, filled[-len(leaves) :].expand(len(leaves)).unbind())

    def _number(self, value: Value) -> Any:
        """A number for each tensor, shape (tensors,); or one for all, shape (1,); or a constant."""
        if value.op == "constant":
            return value.args[0]
        if value not in self._numbers:  # an input, or one that a plan needs in another dtype
            if value.op == "cast":
                self._numbers[value] = self._number(value.args[0]).to(value.dtype)
            else:
                self._numbers[value] = torch.stack(self._given.leaves(value.args[0]))
        return self._numbers[value]

    def read(self, values: Sequence[Value]) -> None:
        """Take numbers as Python's, most of them at once, unless that waits for a device."""
        if not self._on_cpu:
            return
        new = [value for value in dict.fromkeys(map(uncast, values)) if value not in self._lists]
        exact = [value for value in new if value.dtype.is_floating_point or value.dtype == torch.bool]  # are the same in a wide dtype
        for together in (exact, *([value] for value in new if value not in exact)):
            if together:
                numbers = torch.stack([self._number(value).expand(self._count) for value in together])
                self._lists |= dict(zip(together, numbers.tolist(), strict=True))

    def _list(self, value: Value) -> list[Any]:
        """A number as Python's, for each tensor."""
        value = uncast(value)
        if value not in self._lists:
            self.read([value])
        return self._lists[value]

    def _common(self, value: Value, pack: _Pack) -> Any:
        """A number that is the same for all of some tensors, as Python's; None if it is not, or that waits for a device."""
        if not self._on_cpu:
            return None
        found = {self._list(value)[t] for t in pack.tensors}
        return found.pop() if len(found) == 1 else None

    def _numbers_in(self, part: Part, pack: _Pack) -> dict[Value | None, Any]:
        """The numbers that a part needs, as Python's, tensors of shape (), or columns, one for each row of several tensors."""
        found: dict[Value | None, Any] = {}
        columns: dict[torch.dtype, list[Value]] = {}
        for value in part.numbers:
            if value.op == "constant":
                found[value] = value.args[0]
            elif not pack.is_one and self._number(uncast(value)).shape[0] > 1:
                columns.setdefault(value.dtype, []).append(value)
            elif self._on_cpu:
                found[value] = self._list(value)[pack.tensors[0]]
            else:
                found[value] = self._number(value)[pack.tensors[0] if self._number(value).shape[0] > 1 else 0]
        for dtype, values in columns.items():
            if (part, dtype) not in self._stacked:
                self._stacked[part, dtype] = torch.stack([self._number(uncast(value)) for value in values]).to(dtype)
            taken = self._stacked[part, dtype][:, pack.owners].unsqueeze(2)
            found |= dict(zip(values, taken.unbind(), strict=True))
        return found


def _expanded(value: Any, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=dtype, device=device).expand(shape)
