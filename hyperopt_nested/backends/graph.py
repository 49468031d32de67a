"""The update of a tensor as a graph of numbers, rows and elements: whatever the tensor's sizes are, the graph is the same."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch


class UnsupportedError(Exception):
    """A function cannot be made into a program of some sort; the message says why."""


class Kind(IntEnum):
    """What a value has one of."""

    NUMBER = 0
    ROW = 1
    ELEMENT = 2


@dataclass(frozen=True, eq=False)
class Value:
    """A node of a graph; equal nodes are one object."""

    op: str  # "input", "constant", "index", "cast", "bitcast", "expand", a reduction, or a pointwise operator by torch's name for it
    args: tuple[Any, ...]  # values, or the index of an input, or a constant
    kind: Kind  # what there is one of
    dtype: torch.dtype
    computed: torch.dtype  # that a pointwise operator's operands have when it is computed

    @property
    def operands(self) -> tuple["Value", ...]:
        return tuple(arg for arg in self.args if isinstance(arg, Value))

    @property
    def source(self) -> "Value":
        """What this is, cast and expanded."""
        return self.args[0].source if self.op in ("cast", "expand") else self

    def is_constant(self, number: float) -> bool:
        return self.op == "constant" and bool(self.args[0] == number)

    @property
    def is_total(self) -> bool:
        """Whether it is one number for a whole tensor, of what there is one a row or element of."""
        return self.op in REDUCTIONS and self.kind == Kind.NUMBER and self.operands[0].kind != Kind.NUMBER


_ARITHMETIC = ["add", "sub", "mul", "div", "neg", "abs", "sign", "reciprocal", "remainder", "maximum", "minimum", "clamp", "where"]
_FUNCTIONS = ["sqrt", "rsqrt", "pow", "exp", "expm1", "log", "log1p", "tanh", "sigmoid"]
_CONDITIONS = ["gt", "ge", "lt", "le", "eq", "ne", "logical_and", "logical_or", "logical_not"]
_BITS = ["bitwise_and", "bitwise_xor", "bitwise_not", "bitwise_right_shift"]
POINTWISE = frozenset([*_ARITHMETIC, *_FUNCTIONS, *_CONDITIONS, *_BITS])
REDUCTIONS = frozenset(["sum", "mean", "amax"])


class Values:
    """Makes values, equal ones once."""

    def __init__(self) -> None:
        self._made: dict[Any, Value] = {}

    def __call__(self, op: str, args: Sequence[Any], kind: Kind, dtype: torch.dtype, computed: torch.dtype | None = None) -> Value:
        key = op, tuple(id(arg) if isinstance(arg, Value) else (type(arg), repr(arg)) for arg in args), kind, dtype, computed or dtype
        if key not in self._made:
            self._made[key] = Value(op, tuple(args), kind, dtype, computed or dtype)
        return self._made[key]


Inputs = tuple[tuple[Kind, torch.dtype], ...]


@dataclass(frozen=True, eq=False)
class UpdateGraph:
    """A function of one tensor's numbers, rows and elements."""

    inputs: Inputs  # of each argument
    outputs: tuple[tuple[int, Value], ...]  # what to write to the argument of this index

    @cached_property
    def values(self) -> list[Value]:
        """All values, each after those that it is made of."""
        return reachable(value for _, value in self.outputs)

    @cached_property
    def description(self) -> tuple[Any, ...]:
        """What equal graphs have equal, and others do not."""
        index = {value: i for i, value in enumerate(self.values)}
        nodes = []
        for value in index:
            args = [f"%{index[arg]}" if isinstance(arg, Value) else repr(arg) for arg in value.args]
            nodes.append((value.op, *args, value.kind, value.dtype, value.computed))
        return self.inputs, tuple(nodes), tuple((i, index[value]) for i, value in self.outputs)


def reachable(roots: Iterable[Value], operands: Callable[[Value], Iterable[Value]] = lambda value: value.operands) -> list[Value]:
    """Values that some are made of, and these, each after those that it is made of, which `operands` tells."""
    found: dict[Value, None] = {}

    def visit(value: Value) -> None:
        if value not in found:
            for operand in operands(value):
                visit(operand)
            found[value] = None

    for root in roots:
        visit(root)
    return list(found)


def kind_of(shape: Sequence[int], full: Sequence[int]) -> Kind:
    """What something of a shape has one of, in a tensor of shape `full`; raises UnsupportedError if it is none of these."""
    shape, full = tuple(shape), tuple(full)
    if shape == full and full:
        return Kind.ELEMENT
    if all(size == 1 for size in shape):
        return Kind.NUMBER
    if len(full) > 1 and shape in ((full[0], *(1 for _ in full[1:])), full[:1]):
        return Kind.ROW
    if len(full) > 1 and torch.Size(shape).numel() == torch.Size(full).numel():  # rows that were made flat
        return Kind.ELEMENT
    raise UnsupportedError(f"an update makes a tensor of shape {shape} of one of shape {full}")
