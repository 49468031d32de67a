"""Programs of torch's own operators: a graph, interpreted for many tensors at once. It needs no compiler."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends.graph import REDUCTIONS, Kind, UpdateGraph, Value
from hyperopt_nested.backends.program import Batch

_AT_ONCE = 1 << 24
"""Elements that are stepped at once, which bounds the memory of what is computed on the way; a tensor is not split."""

_FOREACH: dict[str, Callable[..., list[Tensor]]] = {
    name: getattr(torch, f"_foreach_{name}")
    for name in [
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "abs",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "exp",
        "expm1",
        "log",
        "log1p",
        "tanh",
        "sigmoid",
        "sign",
        "maximum",
        "minimum",
    ]
}


def foreach(graph: UpdateGraph) -> "Interpreter":
    """Return an interpreter of a graph, for tensors of all sizes and layouts."""
    return Interpreter(graph)


class Interpreter:
    """A graph, done operator by operator.

    What there is one of a tensor is kept as one vector for all tensors; rows and elements as a list, a tensor each.
    """

    backend = "foreach"

    def __init__(self, graph: UpdateGraph) -> None:
        self._graph = graph
        self._last = {each: value for value in graph.values for each in value.operands}
        written = {i for i, _ in graph.outputs}
        self._copied = {value for _, value in graph.outputs if _source(value) in written}
        elements = [i for i, (kind, _) in enumerate(graph.inputs) if kind == Kind.ELEMENT]
        self._like = elements[-1] if elements else 0

    def __call__(self, batch: Batch) -> None:
        for rows in _chunks(batch.rows, self._like):
            self._step([[_apart(row), *row[1:]] for row in rows])

    def _step(self, rows: list[list[Tensor]]) -> None:
        shapes = [row[self._like].shape for row in rows]
        device = rows[0][self._like].device
        found: dict[Value, Any] = {}
        kept = {value for _, value in self._graph.outputs}
        for value in self._graph.values:
            found[value] = self._value(value, found, rows, shapes, device)
            for each in value.operands:
                if self._last[each] is value and each not in kept:
                    found.pop(each, None)
        for value in self._copied:
            found[value] = found[value].clone() if isinstance(found[value], Tensor) else [each.clone() for each in found[value]]
        for i, value in self._graph.outputs:
            targets = [row[i] for row in rows]
            new = found[value] if isinstance(found[value], list) else list(torch.as_tensor(found[value]).expand(len(rows)).unbind())
            shaped = zip(new, targets, strict=True)
            new = [each.expand(target.shape) if each.ndim == 0 else each.reshape(target.shape) for each, target in shaped]
            torch._foreach_copy_(targets, new)

    def _value(
        self, value: Value, found: dict[Value, Any], rows: list[list[Tensor]], shapes: list[torch.Size], device: torch.device
    ) -> Any:
        if value.op == "constant":
            return torch.tensor(value.args[0], dtype=value.dtype)
        if value.op == "input":
            given = [row[value.args[0]].to(device) for row in rows]
            if value.kind == Kind.NUMBER:
                return torch.stack([each.reshape(()) for each in given])
            return [_shaped(each, shape, value.kind) for each, shape in zip(given, shapes, strict=True)]
        operands: list[Any] = [None if each is None else found[each] for each in value.args]
        if value.op == "cast":
            operand = operands[0]
            return [each.to(value.dtype) for each in operand] if isinstance(operand, list) else operand.to(value.dtype)
        if value.op == "expand":
            small = operands[0] if isinstance(operands[0], list) else operands[0].expand(len(rows)).unbind()
            wide = [shape if value.kind == Kind.ELEMENT else torch.Size([*shape[:1], *(1 for _ in shape[1:])]) for shape in shapes]
            return [each.expand(shape) for each, shape in zip(small, wide, strict=True)]
        if value.op in REDUCTIONS:
            return self._reduced(value, operands[0], shapes)
        return self._pointwise(value, operands, len(rows))

    def _reduced(self, value: Value, operand: Any, shapes: list[torch.Size]) -> Any:
        """A sum, mean or maximum: a number of a tensor, or one of each row."""
        how = {"dtype": value.dtype} if value.op != "amax" else {}
        of = value.args[0]
        if not isinstance(operand, list):  # a constant, which has been expanded
            wide = [shape if of.kind == Kind.ELEMENT else torch.Size([*shape[:1], *(1 for _ in shape[1:])]) for shape in shapes]
            operand = [operand.expand(shape) for shape in wide]
        reduce = getattr(torch, value.op)
        if value.kind == Kind.ROW:
            return [reduce(each, dim=tuple(range(1, each.ndim)), keepdim=True, **how) for each in operand]
        return torch.stack([reduce(each, **how) for each in operand])

    def _pointwise(self, value: Value, operands: list[Any], count: int) -> Any:
        """An operator whose operands have the dtype that it is computed in; single numbers take that of what they meet."""
        first = 1 if value.op == "where" else 0
        for i, (arg, operand) in enumerate(zip(value.args, operands, strict=True)):
            if arg is None or i < first or arg.dtype == value.computed:
                continue
            if isinstance(operand, list):
                operands[i] = [each.to(value.computed) for each in operand]
            elif value.kind == Kind.NUMBER or operand.ndim == 0:
                operands[i] = operand.to(value.computed)
        if value.kind == Kind.NUMBER:
            return self._operator(value.op, operands)
        many = [
            operand if operand is None or isinstance(operand, list) or operand.ndim == 0 else list(operand.unbind()) for operand in operands
        ]
        others = [arg.args[0] if arg and arg.op == "constant" else each for arg, each in zip(value.args[1:], many[1:], strict=True)]
        if value.op in _FOREACH and value.dtype.is_floating_point and not any(isinstance(each, Tensor) for each in [many[0], *others]):
            return list(_FOREACH[value.op](many[0], *others))
        each_row = ([each[i] if isinstance(each, list) else each for each in many] for i in range(count))
        return [self._operator(value.op, row) for row in each_row]

    @staticmethod
    def _operator(name: str, operands: Sequence[Any]) -> Tensor:
        found: Tensor = getattr(torch, name)(*operands)
        return found


def _chunks(rows: Sequence[list[Tensor]], like: int) -> Iterator[list[list[Tensor]]]:
    """Rows, so many at once that their tensors have `_AT_ONCE` elements together, or one."""
    chunk: list[list[Tensor]] = []
    size = 0
    for row in rows:
        if chunk and size + row[like].numel() > _AT_ONCE:
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += row[like].numel()
    if chunk:
        yield chunk


def _apart(row: Sequence[Tensor]) -> Tensor:
    """The gradient; a copy where it shares memory with what is written."""
    storage = row[0].untyped_storage().data_ptr()
    return row[0].clone() if any(each.untyped_storage().data_ptr() == storage for each in row[1:]) else row[0]


def _shaped(tensor: Tensor, shape: torch.Size, kind: Kind) -> Tensor:
    """Rows and elements in the shape in which they meet."""
    wide = shape if kind == Kind.ELEMENT else torch.Size([*shape[:1], *(1 for _ in shape[1:])])
    return tensor if tensor.shape == wide else tensor.reshape(wide)


def _source(value: Value) -> int | None:
    """Index of the argument whose memory a value may share, if there is one."""
    while value.op in ("cast", "expand"):
        value = value.args[0]
    index: int | None = value.args[0] if value.op == "input" else None
    return index
