"""Programs of torch's own operators: many small tensors at once, and large ones piece by piece while the cache holds them."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends.graph import POINTWISE, Kind, UpdateGraph, Value
from hyperopt_nested.backends.layout import lying_as, sizes
from hyperopt_nested.backends.program import Batch, Program
from hyperopt_nested.backends.sweeps import Sweep, Sweeps, is_row_total
from hyperopt_nested.learned import number_dtype

PIECE = 1 << 19
"""Elements that one operator works on, on the CPU."""

_OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in POINTWISE - {"div"}},
    "div": torch.true_divide,
    "addcmul": torch.addcmul,
    "subcmul": functools.partial(torch.addcmul, value=-1),
}


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


class _Foreach:
    def __init__(self, graph: UpdateGraph) -> None:
        self._graph, self._sweeps = graph, Sweeps(graph)
        self._elements = [i for i, (kind, _) in enumerate(graph.inputs) if kind == Kind.ELEMENT]
        self._steps = [_Steps(sweep) for sweep in self._sweeps.sweeps]
        self._pieces: dict[Any, list[_Piece]] = {}
        self._memory: dict[tuple[torch.dtype, int], Tensor] = {}
        self._buffers: dict[tuple[torch.dtype, int, tuple[int, int]], Tensor] = {}

    def __call__(self, prepared: Batch) -> None:
        like = self._elements[-1] if self._elements else 0
        shapes = tuple(sizes(given[like]) for given in prepared.rows)
        device = prepared.rows[0][like].device
        batch = [[lying_as(given[0], given[like]) if self._elements else given[0], *given[1:]] for given in prepared.rows]
        if (shapes, device) not in self._pieces:
            self._pieces[shapes, device] = self._cut(shapes, device)
        pieces = self._pieces[shapes, device]
        run = _Run(self._graph, batch, shapes)
        for at, sweep in enumerate(self._sweeps.sweeps):
            run.do_numbers(self._sweeps.numbers[at])
            buffers = functools.partial(self._buffer, self._steps[at].slots, device)
            for piece in pieces:
                run.do(piece, self._steps[at], buffers)
            run.finish(sweep)
        run.do_numbers(self._sweeps.numbers[-1])
        run.write_numbers(self._sweeps.writes)

    def _buffer(self, dtypes: Sequence[torch.dtype], device: torch.device, slot: int, piece: _Piece) -> Tensor:
        """Memory for what an operator computes of a piece."""
        key = dtypes[slot], slot, piece.shape
        if key not in self._buffers:
            size = piece.shape[0] * piece.shape[1]
            whole = self._memory.get((dtypes[slot], slot))
            if whole is None or whole.numel() < size:
                whole = self._memory[dtypes[slot], slot] = torch.empty(max(size, PIECE), dtype=dtypes[slot], device=device)
                self._buffers = {each: view for each, view in self._buffers.items() if each[:2] != key[:2]}
            self._buffers[key] = whole[:size].view(piece.shape)
        return self._buffers[key]

    def _cut(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> list[_Piece]:
        """Tensors of equal columns together, while they are small; large ones, on the CPU, into pieces."""
        pieces: list[_Piece] = []
        order = sorted(range(len(shapes)), key=lambda t: shapes[t][1])
        for columns, group in groupby(order, key=lambda t: shapes[t][1]):
            pack: list[int] = []
            size = 0
            for t in group:
                elements = shapes[t][0] * columns
                if elements > PIECE // 2:
                    pieces += self._split(t, *shapes[t]) if device.type == "cpu" else [_Piece([t], 0, [shapes[t][0]], columns)]
                    continue
                if pack and size + elements > PIECE:
                    pieces.append(self._pack(pack, shapes))
                    pack, size = [], 0
                pack.append(t)
                size += elements
            if pack:
                pieces.append(self._pack(pack, shapes))
        return pieces

    def _pack(self, tensors: list[int], shapes: Sequence[tuple[int, int]]) -> _Piece:
        return _Piece(tensors, 0, [shapes[t][0] for t in tensors], shapes[tensors[0]][1])

    def _split(self, t: int, rows: int, columns: int) -> list[_Piece]:
        step = max(1, PIECE // columns)
        return [_Piece([t], at, [min(step, rows - at)], columns) for at in range(0, rows, step)]


@dataclass
class _Operation:
    """One operator on a piece.

    Attributes:
        value: what it computes.
        name: torch's name.
        operands: its arguments; None is one that is left out.
        slot: which buffer it writes to; -1 is memory of its own.
        index: the argument that it writes to directly, if a piece is of one tensor; -1 is none.
        dead: values that are of no more use.
    """

    value: Value
    name: str
    operands: tuple[Value | None, ...]
    slot: int = -1
    index: int = -1
    dead: list[Value] = field(default_factory=list)


class _Steps:
    """The operators of one sweep, in order, with buffers for what they compute: allocating would cost more than computing."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        ends = [*sweep.writes.values(), *(total.operands[0] for total in sweep.totals)]
        uses = Counter([*(each for value in sweep.computed for each in value.operands), *ends])
        merged = {value: found for value in sweep.computed if (found := _merged(value, uses))}
        self.dots = {total: total.operands[0] for total in sweep.totals if _is_dot(total, uses)}
        gone = {*self.dots.values(), *(value.operands[1] for value in merged)}
        self.operations = [_Operation(value, *merged.get(value, (value.op, value.args))) for value in sweep.computed if value not in gone]
        used = [(each, dtype) for operation in self.operations for each, dtype in zip(operation.operands, _dtypes(operation), strict=True)]
        numbers = [(value, dtype) for value, dtype in used if value is not None and value.kind == Kind.NUMBER and value.op != "constant"]
        self.numbers = list(dict.fromkeys(numbers))
        kept = {*ends, *(each for dot in self.dots.values() for each in dot.operands)}
        last = {each: i for i, operation in enumerate(self.operations) for each in operation.operands if each is not None}
        for value, i in last.items():
            if value not in kept and value.kind != Kind.NUMBER and value.op != "constant":
                self.operations[i].dead.append(value)
        self._place(last)

    def _place(self, last: Mapping[Value, int]) -> None:
        """Give each operation a buffer, or the argument that its value is written to, if that is not read any more."""
        copied = set(self.sweep.writes.values())
        read = {i: len(self.operations) if value in copied else last.get(value, -1) for value, i in self.sweep.sources.items()}
        free: dict[torch.dtype, list[int]] = {}
        slots: dict[Value, int] = {}
        self.slots: list[torch.dtype] = []
        for i, operation in enumerate(self.operations):
            for value in operation.dead:
                if slots.get(value, -1) >= 0:
                    free.setdefault(value.dtype, []).append(slots[value])
            if operation.value.kind != Kind.ELEMENT:
                continue
            if not free.get(operation.value.dtype):
                free.setdefault(operation.value.dtype, []).append(len(self.slots))
                self.slots.append(operation.value.dtype)
            operation.slot = slots[operation.value] = free[operation.value.dtype].pop()
            targets = [index for index, value in self.sweep.writes.items() if value is operation.value and read.get(index, -1) <= i]
            operation.index = targets[0] if targets else -1


def _merged(value: Value, uses: Mapping[Value, int]) -> tuple[str, tuple[Value, ...]] | None:
    """An operator of torch that does two of a graph's at once: a product that is added."""
    if value.kind == Kind.ELEMENT and value.op in ("add", "sub"):
        one, other = value.args
        if other.op == "mul" and uses[other] == 1 and one.kind == other.kind == Kind.ELEMENT and value.dtype == one.dtype == other.dtype:
            return f"{value.op}cmul", (one, *other.args)
    return None


def _is_dot(total: Value, uses: Mapping[Value, int]) -> bool:
    operand = total.operands[0]
    same = operand.op == "mul" and uses[operand] == 1 and len({each.dtype for each in (operand, *operand.args)}) == 1
    return total.op == "sum" and same and all(each.kind == Kind.ELEMENT for each in operand.args)


class _Run:
    """One call: the values of numbers, one a tensor, and what is summed up for each tensor."""

    def __init__(self, graph: UpdateGraph, batch: Sequence[Sequence[Tensor]], shapes: Sequence[tuple[int, int]]) -> None:
        self._graph, self._batch, self._shapes = graph, batch, shapes
        self._device = batch[0][0].device
        self._numbers: dict[Any, Any] = {}
        self._stacked: dict[tuple[_Steps, torch.dtype], Tensor] = {}
        self._sums: dict[Value, list[tuple[Tensor | int, Tensor]]] = {}

    def do_numbers(self, values: Sequence[Value]) -> None:
        for value in values:
            found = _computed(value.op, [arg and self._number(arg) for arg in value.args], value.dtype)
            self._numbers[value] = torch.as_tensor(found, dtype=value.dtype, device=self._device).reshape(-1)

    def do(self, piece: _Piece, steps: _Steps, buffers: Callable[[int, _Piece], Tensor]) -> None:
        """The operators of a sweep for a piece, and its writes."""
        known: dict[Value, Any] = {value: self._load(i, piece) for value, i in steps.sweep.sources.items()}
        columns = self._columns(piece, steps) if piece.is_pack else {}
        written: set[int] = set()

        def find(value: Value, dtype: torch.dtype) -> Any:
            if value.op == "constant":
                return value.args[0]
            if value.kind != Kind.NUMBER:
                return known[value]
            return columns[value, dtype] if (value, dtype) in columns else self._number_in(value, piece, dtype)

        for operation in steps.operations:
            value = operation.value
            args = [each and find(each, dtype) for each, dtype in zip(operation.operands, _dtypes(operation), strict=True)]
            if is_row_total(value):
                whole = torch.as_tensor(args[0], dtype=value.dtype).expand(piece.shape)
                known[value] = getattr(torch, value.op)(whole, -1, keepdim=True)
            elif operation.index >= 0 and not piece.is_pack:
                known[value] = _computed(operation.name, args, value.dtype, self._view(operation.index, piece.tensors[0], piece))
                written.add(operation.index)
            else:
                known[value] = _computed(operation.name, args, value.dtype, buffers(operation.slot, piece) if operation.slot >= 0 else None)
            for each in operation.dead:
                del known[each]
        for total in steps.sweep.totals:
            if total in steps.dots:
                operands = [known[each] for each in steps.dots[total].operands]
                found = torch.linalg.vecdot(*operands) if piece.is_pack else torch.dot(*(each.reshape(-1) for each in operands))
            else:
                operand = total.operands[0]
                found = torch.as_tensor(find(operand, operand.dtype), dtype=operand.dtype)
                found = found.expand(piece.shape if operand.kind == Kind.ELEMENT else (piece.shape[0], 1))
                reduce: Callable[..., Tensor] = torch.amax if total.op == "amax" else torch.sum
                found = reduce(found, -1) if piece.is_pack else reduce(found)
            self._sums.setdefault(total, []).append((piece.owners if piece.is_pack else piece.tensors[0], found))
        for i, value in sorted(steps.sweep.writes.items(), key=lambda write: write[1].op != "input"):  # copies of what is overwritten first
            if i not in written:
                self._store(i, find(value, value.dtype), piece)

    def finish(self, sweep: Sweep) -> None:
        """Put together what pieces have summed up."""
        for total in sweep.totals:
            found = self._sums.pop(total)
            parts = torch.cat([part.reshape(-1) for _, part in found]).to(number_dtype(self._device))
            where = torch.cat([owner if isinstance(owner, Tensor) else torch.tensor([owner]) for owner, _ in found]).to(self._device)
            start = parts.new_full((len(self._batch),), -torch.inf if total.op == "amax" else 0)
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
        if value not in self._numbers:  # an input
            leaves = [given[value.args[0]] for given in self._batch]
            shared = all(leaf is leaves[0] for leaf in leaves)
            self._numbers[value] = leaves[0].reshape(1) if shared else torch.stack([leaf.reshape(()) for leaf in leaves])
        return self._numbers[value]

    def _columns(self, piece: _Piece, steps: _Steps) -> dict[tuple[Value, torch.dtype], Tensor]:
        """The numbers that a pack needs, one for each of its rows, all taken at once."""
        found: dict[tuple[Value, torch.dtype], Tensor] = {}
        for dtype in {dtype for _, dtype in steps.numbers}:
            keys = [(value, each) for value, each in steps.numbers if each == dtype and self._number(value).shape[0] > 1]
            if keys:
                if (steps, dtype) not in self._stacked:
                    self._stacked[steps, dtype] = torch.stack([self._number(value) for value, _ in keys]).to(dtype)
                taken = self._stacked[steps, dtype][:, piece.owners].unsqueeze(2)
                found |= dict(zip(keys, taken.unbind(), strict=True))
        return found

    def _number_in(self, value: Value, piece: _Piece, dtype: torch.dtype) -> Any:
        """A number, or a column of them, one for each row of a piece."""
        key = value, dtype
        if key not in self._numbers:
            self._numbers[key] = self._number(value).to(dtype)
        found = self._numbers[key]
        if found.shape[0] == 1:
            return found[0]
        return found[piece.owners].unsqueeze(1) if piece.is_pack else found[piece.tensors[0]]

    def _load(self, index: int, piece: _Piece) -> Tensor:
        views = [self._view(index, t, piece) for t in piece.tensors]
        return torch.cat(views) if piece.is_pack else views[0]

    def _view(self, index: int, t: int, piece: _Piece) -> Tensor:
        """Rows of an argument, shape (rows, columns), or (rows, 1) where it has one a row."""
        rows, columns = self._shapes[t]
        tensor = self._batch[t][index]
        if self._graph.inputs[index][0] == Kind.ROW:
            columns = 1
        found = tensor.as_strided((rows, columns), (columns, 1), tensor.storage_offset())
        return found if piece.is_pack else found[piece.first : piece.first + piece.rows[0]]

    def _store(self, index: int, value: Any, piece: _Piece) -> None:
        views = [self._view(index, t, piece) for t in piece.tensors]
        if piece.is_pack:
            torch._foreach_copy_(views, [*value.expand(sum(piece.rows), views[0].shape[1]).split(piece.rows)])
        elif isinstance(value, Tensor):
            views[0].copy_(value)
        else:
            views[0].fill_(value)


def _dtypes(operation: _Operation) -> Sequence[torch.dtype]:
    """The dtypes in which an operation takes its operands."""
    value = operation.value
    return [torch.bool if operation.name == "where" and i == 0 else value.computed for i in range(len(operation.operands))]


def _computed(name: str, args: Sequence[Any], dtype: torch.dtype, out: Tensor | None = None) -> Any:
    """What an operator makes of tensors and constants, in a dtype; written to `out`, if that is given."""
    if name in ("cast", "expand"):
        if out is not None:
            return out.copy_(args[0]) if isinstance(args[0], Tensor) else out.fill_(args[0])
        return args[0].to(dtype) if isinstance(args[0], Tensor) else args[0]
    scalars = (
        2 if name == "clamp" else 1 if name in ("add", "sub", "mul", "div", "pow", "gt", "ge", "lt", "le", "eq", "ne", "remainder") else 0
    )
    first = len(args) - scalars  # torch takes constants in the last places only
    given = [torch.tensor(arg, dtype=dtype) if i < first and isinstance(arg, (int, float)) else arg for i, arg in enumerate(args)]
    if name == "clamp" and any(isinstance(end, Tensor) for end in given[1:]):
        given[1:] = [torch.tensor(end, dtype=dtype) if isinstance(end, (int, float)) else end for end in given[1:]]
    if out is not None:
        return _OPERATORS[name](*given, out=out)
    found = _OPERATORS[name](*given)
    return found if found.dtype == dtype else found.to(dtype)
