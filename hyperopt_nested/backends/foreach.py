"""Programs of torch's own operators: many small tensors at once, and large ones piece by piece while the cache holds them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends.graph import Kind, UpdateGraph, Value, Values
from hyperopt_nested.backends.layout import lying_as, sizes
from hyperopt_nested.backends.operations import Operation, Part, Plan, Slot, Work, operation
from hyperopt_nested.backends.program import Program
from hyperopt_nested.backends.sweeps import Sweeps
from hyperopt_nested.learned import number_dtype

PIECE = 1 << 19
"""Elements that one operator works on, on the CPU."""

SMALL = 1 << 16
"""Elements of the largest tensors that are put together, on the CPU: that takes copies."""


def foreach(graph: UpdateGraph) -> Program:
    """A program that does a graph, for tensors of all sizes that pass `check_layout`."""
    return _Foreach(graph)


@dataclass
class _Piece:
    """Rows of tensors that one operator works on at once.

    Attributes:
        tensors: which tensors of the batch; several only if all of each is here.
        first: the first row of a single tensor.
        rows: rows of each tensor that are here.
        columns: of all of them.
    """

    tensors: list[int]
    first: int
    rows: list[int]
    columns: int

    @property
    def is_pack(self) -> bool:
        return len(self.tensors) > 1

    @cached_property
    def shape(self) -> tuple[int, int]:
        return sum(self.rows), self.columns

    @cached_property
    def owners(self) -> Tensor:
        """Which tensor each row is of."""
        return torch.repeat_interleave(torch.tensor(self.tensors), torch.tensor(self.rows))


@dataclass
class _Cut:
    """All tensors of a batch, cut into pieces.

    Attributes:
        pieces: of them.
    """

    pieces: list[_Piece]

    @cached_property
    def owners(self) -> Tensor:
        """Which tensor each part of a total is of: one a row of a pack, and one for any other piece."""
        return torch.cat([piece.owners if piece.is_pack else torch.tensor(piece.tensors) for piece in self.pieces])


class _Foreach:
    def __init__(self, graph: UpdateGraph) -> None:
        self._graph, self._sweeps = graph, Sweeps(graph)
        self._elements = [i for i, (kind, _) in enumerate(graph.inputs) if kind == Kind.ELEMENT]
        self._numbers = [[operation(value) for value in values] for values in self._sweeps.numbers]
        self._steps = [_Steps(graph, Work.of(sweep)) for sweep in self._sweeps.sweeps]
        self._cuts: dict[Any, _Cut] = {}
        self._memory: dict[Slot, Tensor] = {}
        self._buffers: dict[tuple[Slot, tuple[int, int]], Tensor] = {}

    def __call__(self, batch: Sequence[Sequence[Tensor]]) -> None:
        like = self._elements[-1] if self._elements else 0
        shapes = tuple(sizes(given[like]) for given in batch)
        device = batch[0][like].device
        batch = [[lying_as(given[0], given[like]) if self._elements else given[0], *given[1:]] for given in batch]
        run = _Run(self._graph, batch, shapes, self._buffer)
        for at, (sweep, steps) in enumerate(zip(self._sweeps.sweeps, self._steps, strict=True)):
            run.do_numbers(self._numbers[at])
            cut = self._cut(shapes, device, whole=steps.only_reads)
            for piece in cut.pieces:
                run.do(piece, steps)
            run.finish(sweep.totals, cut.owners)
        run.do_numbers(self._numbers[-1])
        run.write_numbers(self._sweeps.writes)

    def _buffer(self, slot: Slot, piece: _Piece, device: torch.device) -> Tensor:
        """Memory for what an operator computes of a piece."""
        key = slot, piece.shape
        if key not in self._buffers:
            size = piece.shape[0] * piece.shape[1]
            memory = self._memory.get(slot)
            if memory is None or memory.numel() < size:
                memory = self._memory[slot] = torch.empty(size, dtype=slot[0], device=device)
                self._buffers = {each: view for each, view in self._buffers.items() if each[0] != slot}
            self._buffers[key] = memory[:size].view(piece.shape)
        return self._buffers[key]

    def _cut(self, shapes: tuple[tuple[int, int], ...], device: torch.device, *, whole: bool) -> _Cut:
        key = shapes, device, whole
        if key not in self._cuts:
            cpu = device.type == "cpu"
            self._cuts[key] = _Cut(_cut(shapes, min(SMALL, PIECE) if cpu else PIECE // 2, None if whole or not cpu else PIECE))
        return self._cuts[key]


def _cut(shapes: Sequence[tuple[int, int]], small: int, large: int | None) -> list[_Piece]:
    """Tensors of equal columns together, if they have no more elements than `small`; others into pieces of about `large`, if given."""
    pieces: list[_Piece] = []
    order = sorted(range(len(shapes)), key=lambda t: shapes[t][1])
    for columns, group in groupby(order, key=lambda t: shapes[t][1]):
        pack: list[int] = []
        size = 0
        for t in group:
            rows = shapes[t][0]
            if rows * columns > small:
                step = max(1, large // columns) if large else rows
                pieces += [_Piece([t], at, [min(step, rows - at)], columns) for at in range(0, rows, step)]
                continue
            if pack and size + rows * columns > PIECE:
                pieces.append(_Piece(pack, 0, [shapes[each][0] for each in pack], columns))
                pack, size = [], 0
            pack.append(t)
            size += rows * columns
        if pack:
            pieces.append(_Piece(pack, 0, [shapes[each][0] for each in pack], columns))
    return pieces


class _Steps:
    """Plans for one sweep, by what its numbers choose."""

    def __init__(self, graph: UpdateGraph, work: Work) -> None:
        self._value = Values()
        self._work = work.given({}, self._value)
        self._in_place = {i: graph.inputs[i][1] for i in work.writes if graph.inputs[i][0] == Kind.ELEMENT}
        self._plans: dict[Any, Plan] = {}
        self.conditions = self._work.conditions(Kind.NUMBER)
        self.only_reads = Plan(self._work, self._value, {}, looking=False).only_reads

    def plan(self, outcomes: tuple[bool | None, ...], *, in_place: bool, looking: bool) -> Plan:
        """The plan where conditions that are numbers are met for all, none or some tensors."""
        key = outcomes, in_place, looking
        if key not in self._plans:
            work = self._work.given(dict(zip(self.conditions, outcomes, strict=True)), self._value)
            self._plans[key] = Plan(work, self._value, self._in_place if in_place else {}, looking=looking)
        return self._plans[key]


class _Run:
    """One call: the values of numbers, one a tensor, and what is summed up for each tensor."""

    def __init__(
        self,
        graph: UpdateGraph,
        batch: Sequence[Sequence[Tensor]],
        shapes: Sequence[tuple[int, int]],
        buffer: Callable[[Slot, _Piece, torch.device], Tensor],
    ) -> None:
        self._graph, self._batch, self._shapes, self._buffer = graph, batch, shapes, buffer
        self._device = batch[0][0].device
        self._on_cpu = self._device.type == "cpu"
        self._numbers: dict[Value, Tensor] = {}
        self._lists: dict[Value, list[Any]] = {}
        self._stacked: dict[tuple[Part, torch.dtype], Tensor] = {}
        self._sums: dict[Value, list[Tensor]] = {}

    def do_numbers(self, operations: Sequence[Operation]) -> None:
        for each in operations:
            found = each.run(*(None if arg is None else self._number(arg) for arg in each.operands))
            self._numbers[each.value] = torch.as_tensor(found, dtype=each.value.dtype, device=self._device).reshape(-1)

    def do(self, piece: _Piece, steps: _Steps) -> None:
        """The operators of a sweep for a piece, and its writes."""
        outcomes = tuple(self._outcome(condition, piece) for condition in steps.conditions)
        plan = steps.plan(outcomes, in_place=not piece.is_pack, looking=self._on_cpu)
        views = {value.args[0]: self._views(value.args[0], piece) for value in plan.inputs}
        known: dict[Value | None, Any] = {None: None}
        for value in plan.inputs:
            known[value] = torch.cat(views[value.args[0]]) if piece.is_pack else views[value.args[0]][0]
        part = plan.first
        self._compute(part, piece, known, views)
        if part.conditions:
            met = [(int(torch.count_nonzero(known[each])), known[each].numel()) for each in part.conditions]
            part = plan.rest(tuple(count == rows if count in (0, rows) else None for count, rows in met))
            self._compute(part, piece, known, views)
        for total, operand in part.work.totals.items():
            if total in part.dots:
                factors = [known[each] for each in part.dots[total]]
                found = torch.linalg.vecdot(*factors) if piece.is_pack else torch.dot(*(each.reshape(-1) for each in factors))
            else:
                shape = piece.shape if operand.kind == Kind.ELEMENT else (piece.shape[0], 1)
                whole = torch.as_tensor(known[operand], dtype=operand.dtype, device=self._device).expand(shape)
                reduce: Callable[..., Tensor] = torch.amax if total.op == "amax" else torch.sum
                found = reduce(whole, -1) if piece.is_pack else reduce(whole)
            self._sums.setdefault(total, []).append(found)
        for i, value in part.copies:
            _store(views.get(i) or self._views(i, piece), known[value], piece)

    def _compute(self, part: Part, piece: _Piece, known: dict[Value | None, Any], views: dict[int, list[Tensor]]) -> None:
        known |= self._numbers_in(part, piece)
        for each in part.operations:
            args = [known[operand] for operand in each.operands]
            place = each.place
            if place is None:
                found = each.run(*args)
                known[each.value] = found if found.dtype == each.value.dtype else found.to(each.value.dtype)
                continue
            if isinstance(place, int):
                if place not in views:
                    views[place] = self._views(place, piece)
                out = views[place][0]
            else:
                out = self._buffer(place, piece, self._device)
            known[each.value] = each.run(*args, out=out)

    def finish(self, totals: Sequence[Value], owners: Tensor) -> None:
        """Put together what pieces have summed up."""
        for total in totals:
            parts = torch.cat([part.reshape(-1) for part in self._sums.pop(total)]).to(number_dtype(self._device))
            start = parts.new_full((len(self._batch),), -torch.inf if total.op == "amax" else 0)
            where = owners.to(self._device)
            whole = start.scatter_reduce(0, where, parts, "amax") if total.op == "amax" else start.index_add(0, where, parts)
            if total.op == "mean":
                whole = whole / torch.tensor([rows * columns for rows, columns in self._shapes], device=self._device)
            self._numbers[total] = whole.to(total.dtype)

    def write_numbers(self, writes: dict[int, Value]) -> None:
        if writes:
            new = {i: self._number(value) for i, value in writes.items()}
            for i, value in new.items():
                leaves = [given[i] for given in self._batch]
                filled = value if isinstance(value, Tensor) else torch.full((1,), value, dtype=leaves[0].dtype)
                torch._foreach_copy_(leaves, [each.reshape(leaves[0].shape) for each in filled.expand(len(leaves)).unbind()])

    def _number(self, value: Value) -> Any:
        """A number for each tensor, shape (tensors,); or one for all, shape (1,); or a constant."""
        if value.op == "constant":
            return value.args[0]
        if value not in self._numbers:  # an input, or one that a plan needs in another dtype
            if value.op == "cast":
                self._numbers[value] = self._number(value.args[0]).to(value.dtype)
            else:
                leaves = [given[value.args[0]] for given in self._batch]
                shared = all(leaf is leaves[0] for leaf in leaves)
                self._numbers[value] = leaves[0].reshape(1) if shared else torch.stack([leaf.reshape(()) for leaf in leaves])
        return self._numbers[value]

    def _list(self, value: Value) -> list[Any]:
        """A number as Python's, for each tensor."""
        if value not in self._lists:
            exact = value.op == "cast" and value.dtype.is_floating_point and value.args[0].dtype.is_floating_point
            found = self._number(value.args[0] if exact else value).tolist()  # in float64, whatever it is needed in
            self._lists[value] = found if len(found) == len(self._batch) else found * len(self._batch)
        return self._lists[value]

    def _outcome(self, condition: Value, piece: _Piece) -> bool | None:
        """Whether a condition is met for all tensors of a piece; None is for some."""
        if not self._on_cpu:
            return None
        met = {bool(self._list(condition)[t]) for t in piece.tensors}
        return met.pop() if len(met) == 1 else None

    def _numbers_in(self, part: Part, piece: _Piece) -> dict[Value | None, Any]:
        """The numbers that a part needs, as Python's, tensors of shape (), or columns, one for each row of a pack."""
        found: dict[Value | None, Any] = {}
        columns: dict[torch.dtype, list[Value]] = {}
        for value in part.numbers:
            if value.op == "constant":
                found[value] = value.args[0]
            elif piece.is_pack and self._number(value).shape[0] > 1:
                columns.setdefault(value.dtype, []).append(value)
            elif self._on_cpu:
                found[value] = self._list(value)[piece.tensors[0]]
            else:
                found[value] = self._number(value)[piece.tensors[0] if self._number(value).shape[0] > 1 else 0]
        for dtype, values in columns.items():
            if (part, dtype) not in self._stacked:
                self._stacked[part, dtype] = torch.stack([self._number(value) for value in values])
            taken = self._stacked[part, dtype][:, piece.owners].unsqueeze(2)
            found |= dict(zip(values, taken.unbind(), strict=True))
        return found

    def _views(self, index: int, piece: _Piece) -> list[Tensor]:
        """Rows of an argument, for each tensor of a piece, shape (rows, columns), or (rows, 1) where it has one a row."""
        columns = piece.columns if self._graph.inputs[index][0] == Kind.ELEMENT else 1
        tensors = [self._batch[t][index] for t in piece.tensors]
        first = piece.first * columns
        return [
            tensor.as_strided((rows, columns), (columns, 1), tensor.storage_offset() + first)
            for tensor, rows in zip(tensors, piece.rows, strict=True)
        ]


def _store(views: list[Tensor], value: Any, piece: _Piece) -> None:
    """Write a value to rows of an argument."""
    if piece.is_pack:
        whole = torch.as_tensor(value, dtype=views[0].dtype, device=views[0].device).expand(piece.shape[0], views[0].shape[1])
        torch._foreach_copy_(views, torch.split_with_sizes(whole, piece.rows))
    elif isinstance(value, Tensor):
        views[0].copy_(value)
    else:
        views[0].fill_(value)
