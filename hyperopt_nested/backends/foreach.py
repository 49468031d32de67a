"""Programs of torch's own operators: a graph, evaluated operator by operator for many tensors at once. It needs no compiler."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, groupby, repeat
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends.fused import sizes
from hyperopt_nested.backends.graph import POINTWISE, REDUCTIONS, Kind, UpdateGraph, Value, Values
from hyperopt_nested.backends.program import Batch
from hyperopt_nested.ops import positions

_AT_ONCE = 1 << 16  # elements that a CPU, by its caches, steps at once, or one larger tensor; GPUs step 256 times as many: fewer launches


class Interpreter:
    """A graph, evaluated for tensors of all sizes and layouts. Small tensors are concatenated: each operator runs once for all of them."""

    backend = "foreach"

    def __init__(self, graph: UpdateGraph) -> None:
        self._source, self._constants = _source(_with_casts(graph))
        self._steps: dict[torch.device, Callable[[_Tensors], None]] = {}
        self._like = max((i for i, (kind, _) in enumerate(graph.inputs) if kind == Kind.ELEMENT), default=0)

    def __call__(self, batch: Batch) -> None:
        if batch.prepared is None:
            batch.prepared = [
                _Tensors([batch.rows[i] for i in chunk], self._like) for chunk in _chunks([row[self._like] for row in batch.rows])
            ]
        for tensors in batch.prepared:
            if tensors.device not in self._steps:
                self._steps[tensors.device] = self._on(tensors.device)
            self._steps[tensors.device](tensors)
            tensors.owners.clear()  # as large as the tensors

    def _on(self, device: torch.device) -> Callable[["_Tensors"], None]:
        """The step of tensors on a device, with constants that are there: some operators wait for the device to copy one to it."""
        constants = {name: constant.to(device) for name, constant in self._constants.items()}
        namespace: dict[str, Any] = {"torch": torch, "inf": math.inf, "nan": math.nan, **constants}
        exec(self._source, namespace)
        step: Callable[[_Tensors], None] = namespace["step"]
        return step


def _chunks(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of tensors that are stepped at once: on one device, with few elements; a large tensor alone, since it is not concatenated."""
    keys, ends = [], accumulate(map(Tensor.numel, tensors))
    for i, (tensor, end) in enumerate(zip(tensors, ends, strict=True)):
        limit = _AT_ONCE if tensor.device.type == "cpu" else _AT_ONCE << 8
        keys.append((tensor.device, end // limit, i if tensor.numel() >= limit else -1))
    return [list(chunk) for _, chunk in groupby(range(len(keys)), key=keys.__getitem__)]


def _with_casts(graph: UpdateGraph) -> UpdateGraph:
    """The graph in which pointwise operators take operands of one kind, in the dtype that they are computed in.

    Numbers beside rows or elements of lower precision are not rounded, as in torch's operators of a tensor and a number.
    """
    make, new = Values(), dict[Value, Value]()

    def operand(arg: Value, value: Value, *, condition: bool) -> Value:
        if arg.op == "constant":
            return arg
        dtype = arg.dtype if condition else value.computed
        if arg.kind == Kind.NUMBER < value.kind:
            return make("expand", (arg,), value.kind, torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype)
        if arg.dtype != dtype:
            arg = make("cast", (arg,), arg.kind, dtype)
        return arg if arg.kind == value.kind else make("expand", (arg,), value.kind, arg.dtype)

    for value in graph.values:
        op, args = value.op, [new[arg] if isinstance(arg, Value) else arg for arg in value.args]
        match value:  # one operator in the place of three
            case Value(op="where", args=(Value(op="lt", args=(Value(op="abs", args=(x,)), end)), y, Value(op="constant") as other)):
                if x is y and end.is_constant(math.inf) and x.dtype == value.dtype and x.kind == value.kind:
                    op, args = "nan_to_num", [new[x], other]
        if op in POINTWISE:
            args = [arg and operand(arg, value, condition=op == "where" and i == 0) for i, arg in enumerate(args)]
        for bounded, bound in zip(("maximum", "minimum"), args[1:], strict=True) if op == "clamp" else ():
            args[0] = args[0] if bound is None else make(bounded, (args[0], bound), value.kind, value.dtype, value.computed)
        new[value] = args[0] if op == "clamp" else make(op, args, value.kind, value.dtype, value.computed)
    return UpdateGraph(graph.inputs, tuple((i, new[value]) for i, value in graph.outputs))


def _source(graph: UpdateGraph) -> tuple[str, dict[str, Tensor]]:
    """Python's source of a function `step` of `_Tensors`, and constants by the names that it has for them."""
    name = {value: f"v{i}" for i, value in enumerate(graph.values)}
    constants = {name[value]: torch.tensor(value.args[0], dtype=value.dtype) for value in name if value.op == "constant"}
    written = dict(graph.outputs)
    last = {operand: value for value in graph.values for operand in value.operands}
    lines = []
    for value in name:
        if name[value] not in constants:
            lines.append(f"{name[value]} = {_expression(value, [name[each] for each in value.operands])}")
            unused = {name[each] for each in value.operands if last[each] is value and each not in written.values()}
            lines += [f"del {each}" for each in sorted(unused - constants.keys())]
    aliases = {value for value in written.values() if value.source.op == "input" and value.source.args[0] in written}
    lines += [f"{name[value]} = {name[value]}.clone()" for value in name if value in aliases]
    lines += [f"tensors.write({i}, {name[value]}, {value.kind:d})" for i, value in graph.outputs]
    return "\n    ".join(["def step(tensors):", *lines, "return"]), constants


def _expression(value: Value, operands: list[str]) -> str:
    """What computes a value, given the names of its operands."""
    op, kind, dtype = value.op, value.kind, value.dtype
    if op == "input":
        return f"tensors.read({value.args[0]}, {kind:d})"
    if op == "index":
        return "tensors.index()"
    if op == "bitcast":
        return f"{operands[0]}.view({dtype})"
    if op == "cast":
        return f"{operands[0]}.to({dtype})"
    if op == "nan_to_num":
        return f"torch.nan_to_num({operands[0]}, *3 * ({value.args[1].args[0]!r},))"
    if op == "expand":
        return f"tensors.expand({operands[0]}, {value.operands[0].kind:d}, {kind:d}, {dtype})"
    if op in REDUCTIONS:
        how = "" if op == "amax" else f", dtype={dtype}"
        return f"tensors.reduce(torch.{op}, {operands[0]}, {value.operands[0].kind:d}, {kind:d}{how})"
    if op == "pow" and value.args[1].op == "constant":
        operands[1] = repr(value.args[1].args[0])
    sources = value.operands[1:] if op == "where" else value.operands
    cast = "" if dtype == torch.bool or all(each.dtype == dtype for each in sources) else f".to({dtype})"
    return f"torch.{op}({', '.join(operands)}){cast}"


class _Tensors:
    """Tensors that are stepped at once, and how values of each kind lie.

    Values of equal tensors have the shapes (tensors, 1, 1), (tensors, rows, 1) and (tensors, rows, columns), which broadcast. Of others,
    values of a kind are one vector. A value that is the same everywhere has the shape ().
    """

    def __init__(self, rows: Sequence[list[Tensor]], like: int) -> None:
        self._rows, self._like, likes = rows, like, [row[like] for row in rows]
        self.device = likes[0].device
        columns = [[*one] for one in zip(*rows, strict=True)]
        columns[0] = []  # gradients are others in each step
        self._inputs = [[each.view(-1) if each.is_contiguous() else each for each in one] for one in columns]
        self._same = [len(rows) == 1 or (bool(one) and all(each is one[0] for each in one)) for one in columns]
        self._written = [{each.untyped_storage().data_ptr() for each in row[1:]} for row in rows]
        counts, self._columns = map(list, zip(*map(sizes, likes), strict=True))
        elements = [like.numel() for like in likes]
        self._lengths = {Kind.NUMBER: [1 for _ in likes], Kind.ROW: counts, Kind.ELEMENT: elements}
        self._equal = len({*zip(counts, elements, strict=True)}) == 1
        widths = list(chain.from_iterable(map(repeat, self._columns, counts)))
        repeats = {(Kind.NUMBER, Kind.ROW): counts, (Kind.NUMBER, Kind.ELEMENT): elements, (Kind.ROW, Kind.ELEMENT): widths}
        counted = {} if self._equal else repeats
        self._repeats = {kinds: torch.tensor(each, dtype=torch.int32, device=self.device) for kinds, each in counted.items()}
        self.owners: dict[tuple[Kind, Kind], Tensor] = {}  # of each row or element: the index of the number or row that belongs to it
        whole = {Kind.NUMBER: (1, 1), Kind.ROW: (counts[0], 1), Kind.ELEMENT: (counts[0], self._columns[0])}
        self._shapes = {kind: (len(likes), *each) if self._equal else (-1,) for kind, each in whole.items()}

    def read(self, index: int, kind: Kind) -> Tensor:
        """An argument of all tensors."""
        parts: list[Tensor] = self._inputs[index]
        if index == 0:  # copied where it shares memory with what is written
            grads = ((row[0], written) for row, written in zip(self._rows, self._written, strict=True))
            parts = [grad.clone() if grad.untyped_storage().data_ptr() in written else grad for grad, written in grads]
        if kind == Kind.NUMBER and self._same[index]:
            return parts[0].to(self.device).reshape(())
        if len(parts) == 1:
            return parts[0].to(self.device).reshape(self._shapes[kind])
        joined = torch.cat([part if part.ndim == 1 else part.reshape(-1) for part in parts]).to(self.device)
        return joined.view(self._shapes[kind]) if self._equal else joined

    def index(self) -> Tensor:
        """Where each element of all tensors lies in its memory."""
        joined = torch.cat([positions(row[self._like]).reshape(-1) for row in self._rows])
        return joined.view(self._shapes[Kind.ELEMENT])

    def write(self, index: int, value: Tensor, kind: Kind) -> None:
        """Write a value to an argument of all tensors."""
        targets, lengths = self._inputs[index], self._lengths[kind]
        full = value.expand(self._shapes[kind] if self._equal else sum(lengths))
        parts = zip(full.unbind() if self._equal else torch.split_with_sizes(full, lengths), targets, strict=True)
        new = [part if part.shape == target.shape else part.reshape(target.shape) for part, target in parts]
        torch._foreach_copy_(targets, new)

    def expand(self, value: Tensor, old: Kind, new: Kind, dtype: torch.dtype) -> Tensor:
        """Repeat each number or row for what belongs to it, where broadcasting does not; operators take single numbers as they are."""
        if value.ndim == 0:
            return value
        if self._equal:
            return value.to(dtype)
        if (old, new) not in self.owners:  # with the size, nothing waits for the device
            repeats = self._repeats[old, new]
            self.owners[old, new] = torch.repeat_interleave(repeats, output_size=sum(self._lengths[new]))
        return value.to(dtype).index_select(0, self.owners[old, new])

    def reduce(self, reduction: Callable[..., Tensor], value: Tensor, old: Kind, new: Kind, **how: Any) -> Tensor:
        """Reduce each row, or each tensor, to one value."""
        if self._equal:
            return reduction(value.expand(self._shapes[old]), dim=2 if new == Kind.ROW else (1, 2), keepdim=True, **how)
        parts: Sequence[Tensor] = torch.split_with_sizes(value.expand(sum(self._lengths[old])), self._lengths[old])
        parts = [part.view(-1, width) for part, width in zip(parts, self._columns, strict=True)] if new == Kind.ROW else parts
        return torch.cat([reduction(part, dim=-1, keepdim=new == Kind.NUMBER, **how) for part in parts])
