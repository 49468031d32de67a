"""Programs of torch's own operators: a graph, interpreted for many tensors at once. It needs no compiler."""

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends.graph import POINTWISE, REDUCTIONS, Kind, UpdateGraph, Value
from hyperopt_nested.backends.program import Batch

_AT_ONCE = 1 << 24
"""Elements that are stepped at once, up to a tensor, which is not split: a bound of the memory of what is computed on the way."""

_FOREACH = {name: getattr(torch, f"_foreach_{name}") for name in POINTWISE - {"pow"} if hasattr(torch, f"_foreach_{name}")}


class Interpreter:
    """A graph, done operator by operator, for tensors of all sizes and layouts.

    What there is one of a tensor is kept as one vector for all tensors; rows and elements as a list, a tensor each.
    """

    backend = "foreach"

    def __init__(self, graph: UpdateGraph) -> None:
        self._graph = graph
        self._kept = {value for _, value in graph.outputs}
        self._last = {each: value for value in graph.values for each in value.operands}
        self._copied = {value for value in self._kept if _source(value) in dict(graph.outputs)}
        self._like = max((i for i, (kind, _) in enumerate(graph.inputs) if kind == Kind.ELEMENT), default=0)

    def __call__(self, batch: Batch) -> None:
        ends = accumulate(row[self._like].numel() for row in batch.rows)
        for _, chunk in groupby(zip(ends, batch.rows, strict=True), key=lambda each: each[0] // _AT_ONCE):
            self._step([[_apart(row), *row[1:]] for _, row in chunk])

    def _step(self, rows: list[list[Tensor]]) -> None:
        likes, found = [row[self._like] for row in rows], dict[Value, Any]()
        for value in self._graph.values:
            found[value] = self._value(value, found, rows, likes)
            for each in value.operands:
                if self._last[each] is value and each not in self._kept:
                    found.pop(each, None)
        for value in self._copied:
            found[value] = found[value].clone() if isinstance(found[value], Tensor) else [each.clone() for each in found[value]]
        for i, value in self._graph.outputs:
            targets, new = [row[i] for row in rows], _each(found[value], len(rows))
            shaped = zip(new, targets, strict=True)
            new = [each.expand(target.shape) if each.ndim == 0 else each.reshape(target.shape) for each, target in shaped]
            torch._foreach_copy_(targets, new)

    def _value(self, value: Value, found: dict[Value, Any], rows: list[list[Tensor]], likes: list[Tensor]) -> Any:
        if value.op == "constant":
            return torch.tensor(value.args[0], dtype=value.dtype)
        if value.op == "input":
            given = [row[value.args[0]].to(likes[0].device) for row in rows]
            if value.kind == Kind.NUMBER:
                return torch.stack([each.reshape(()) for each in given])
            wide = [_shape(like, value.kind) for like in likes]
            return [each if each.shape == shape else each.reshape(shape) for each, shape in zip(given, wide, strict=True)]
        operands: list[Any] = [None if each is None else found[each] for each in value.args]
        if value.op == "cast":
            return _to(operands[0], value.dtype)
        if value.op == "expand":
            small = _each(operands[0], len(rows))
            return [each.expand(_shape(like, value.kind)) for each, like in zip(small, likes, strict=True)]
        if value.op not in REDUCTIONS:
            return self._pointwise(value, operands, len(rows))
        many = operands[0]
        if not isinstance(many, list):  # a constant, which has been expanded
            many = [many.expand(_shape(like, value.args[0].kind)) for like in likes]
        reduce, how = getattr(torch, value.op), {"dtype": value.dtype} if value.op != "amax" else {}
        if value.kind == Kind.ROW:
            return [reduce(each, dim=tuple(range(1, each.ndim)), keepdim=True, **how) for each in many]
        return torch.stack([reduce(each, **how) for each in many])

    def _pointwise(self, value: Value, operands: list[Any], count: int) -> Any:
        """An operator whose operands have the dtype that it is computed in; single numbers take that of what they meet."""
        for i, (arg, operand) in enumerate(zip(value.args, operands, strict=True)):
            if arg is None or arg.dtype == value.computed or (value.op == "where" and i == 0):
                continue
            if value.kind == Kind.NUMBER or isinstance(operand, list) or operand.ndim == 0:
                operands[i] = _to(operand, value.computed)
        operator = getattr(torch, value.op)
        if value.kind == Kind.NUMBER:
            return operator(*operands)
        many = [list(each.unbind()) if isinstance(each, Tensor) and each.ndim else each for each in operands]
        others = [arg.args[0] if arg and arg.op == "constant" else each for arg, each in zip(value.args[1:], many[1:], strict=True)]
        if value.op in _FOREACH and value.dtype.is_floating_point and not any(isinstance(each, Tensor) for each in [many[0], *others]):
            return list(_FOREACH[value.op](many[0], *others))
        return [operator(*(each[i] if isinstance(each, list) else each for each in many)) for i in range(count)]


def _apart(row: Sequence[Tensor]) -> Tensor:
    """The gradient; a copy where it shares memory with what is written."""
    storage = row[0].untyped_storage().data_ptr()
    return row[0].clone() if any(each.untyped_storage().data_ptr() == storage for each in row[1:]) else row[0]


def _to(value: Any, dtype: torch.dtype) -> Any:
    return [each.to(dtype) for each in value] if isinstance(value, list) else value.to(dtype)


def _each(value: Any, count: int) -> Sequence[Tensor]:
    """A value tensor by tensor."""
    return value if isinstance(value, list) else value.expand(count).unbind()


def _shape(like: Tensor, kind: Kind) -> torch.Size:
    """The shape in which rows or elements of a tensor meet."""
    return like.shape if kind == Kind.ELEMENT else torch.Size([*like.shape[:1], *(1 for _ in like.shape[1:])])


def _source(value: Value) -> int | None:
    """Index of the argument whose memory a value may share, if there is one."""
    while value.op in ("cast", "expand"):
        value = value.args[0]
    index: int | None = value.args[0] if value.op == "input" else None
    return index
