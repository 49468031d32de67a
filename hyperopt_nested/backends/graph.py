"""The update of a tensor as a graph of numbers, rows and elements: whatever the tensor's sizes are, the graph is the same."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch

from hyperopt_nested.backends.program import UnsupportedError


class Kind(IntEnum):
    """What a value has one of."""

    NUMBER = 0
    ROW = 1
    ELEMENT = 2


@dataclass(frozen=True, eq=False)
class Value:
    """A node of a graph; equal nodes are one object.

    Attributes:
        op: "input", "constant", "cast", "expand", a reduction, or a pointwise operator by torch's name for it.
        args: values, or the index of an input, or a constant.
        kind: what there is one of.
        dtype: torch's.
        computed: the dtype that a pointwise operator's operands have when it is computed.
    """

    op: str
    args: tuple[Any, ...]
    kind: Kind
    dtype: torch.dtype
    computed: torch.dtype

    @property
    def operands(self) -> tuple["Value", ...]:
        """The values among the arguments."""
        return tuple(arg for arg in self.args if isinstance(arg, Value))

    def is_constant(self, number: float) -> bool:
        """Whether it is a constant that equals a number."""
        return self.op == "constant" and bool(self.args[0] == number)

    @property
    def is_total(self) -> bool:
        """Whether it is one number for a whole tensor, of what there is one a row or element of."""
        return self.op in REDUCTIONS and self.kind == Kind.NUMBER and self.operands[0].kind != Kind.NUMBER


POINTWISE = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "abs",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "pow",
        "exp",
        "expm1",
        "log",
        "log1p",
        "tanh",
        "sigmoid",
        "sign",
        "maximum",
        "minimum",
        "clamp",
        "where",
        "remainder",
        "gt",
        "ge",
        "lt",
        "le",
        "eq",
        "ne",
        "logical_and",
        "logical_or",
        "logical_not",
    ]
)
REDUCTIONS = frozenset(["sum", "mean", "amax"])


class Values:
    """Makes values, equal ones once."""

    def __init__(self) -> None:
        self._made: dict[Any, Value] = {}

    def __call__(self, op: str, args: Sequence[Any], kind: Kind, dtype: torch.dtype, computed: torch.dtype | None = None) -> Value:
        """A value as it is described."""
        key = op, tuple(id(arg) if isinstance(arg, Value) else (type(arg), repr(arg)) for arg in args), kind, dtype, computed or dtype
        if key not in self._made:
            self._made[key] = Value(op, tuple(args), kind, dtype, computed or dtype)
        return self._made[key]


@dataclass(frozen=True, eq=False)
class UpdateGraph:
    """A function of one tensor's numbers, rows and elements.

    Attributes:
        inputs: kind and dtype of each argument.
        outputs: by index of an argument: the value to write to it.
    """

    inputs: tuple[tuple[Kind, torch.dtype], ...]
    outputs: tuple[tuple[int, Value], ...]

    @cached_property
    def values(self) -> list[Value]:
        """All values, each after those that it is made of."""
        return reachable(value for _, value in self.outputs)

    @cached_property
    def description(self) -> tuple[Any, ...]:
        """What equal graphs have equal, and others do not."""
        index = {value: i for i, value in enumerate(self.values)}
        nodes = [
            (
                value.op,
                *(f"%{index[arg]}" if isinstance(arg, Value) else repr(arg) for arg in value.args),
                value.kind,
                value.dtype,
                value.computed,
            )
            for value in index
        ]
        return self.inputs, tuple(nodes), tuple((i, index[value]) for i, value in self.outputs)


def reachable(roots: Iterable[Value], through: Callable[[Value], bool] = lambda _: True) -> list[Value]:
    """Values that some are made of, and these, each after those that it is made of; of some not looked `through`."""
    found: dict[Value, None] = {}

    def visit(value: Value) -> None:
        if value not in found:
            for operand in value.operands if through(value) else ():
                visit(operand)
            found[value] = None

    for root in roots:
        visit(root)
    return list(found)


def uncast(value: Value) -> Value:
    """A number before it is converted to where it is used, if that can be done later, or need not be."""
    exact = value.op == "cast" and value.dtype.is_floating_point and value.args[0].dtype.is_floating_point
    return value.args[0] if exact else value


def kind_of(shape: Sequence[int], full: Sequence[int]) -> Kind:
    """What something of a shape has one of, in a tensor of shape `full`.

    Raises:
        UnsupportedError: it is none of these.
    """
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
