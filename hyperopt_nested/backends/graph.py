"""The update of a tensor as a graph of numbers, rows and elements: whatever the tensor's sizes are, the graph is the same."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from hyperopt_nested.backends.program import Function, UnsupportedError


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
_SAME = frozenset(["alias", "detach", "clone", "lift_fresh_copy", "lift_fresh", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze"])
_FILLED: dict[str, float] = {"zeros_like": 0, "zeros": 0, "new_zeros": 0, "ones_like": 1, "ones": 1, "new_ones": 1}
_FILLS = {"scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}
_OTHER_NAMES = {"sgn": "sign", "bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_not": "logical_not"}
_SIZES = (3, 5, 7, 11, 13), (5, 3, 11, 7, 2)
_KEPT = torch.ops.aten.rsub.Scalar, torch.ops.aten.sum.default
_DECOMPOSED = {op: how for op, how in dict[Any, Any](core_aten_decompositions()).items() if op not in _KEPT}
"""What is traced as operators of a smaller set."""


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

    def values(self) -> list[Value]:
        """All values, each after those that it is made of."""
        return reachable(value for _, value in self.outputs)

    def description(self) -> tuple[Any, ...]:
        """What equal graphs have equal, and others do not."""
        index = {value: i for i, value in enumerate(self.values())}
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


def trace(function: Function, arguments: Sequence[Tensor], param: Tensor) -> UpdateGraph:
    """The graph of a function of one tensor's gradient, state and numbers.

    It is traced with small tensors of two other shapes: a function that depends on sizes in a way that graphs do not have gives two
    graphs, and is refused.

    Args:
        function: of as many tensors as there are arguments, to what is to be written to each of them; None where nothing is.
        arguments: examples; they are not changed, and their values are not looked at.
        param: the tensor; what has its shape has one an element.

    Raises:
        UnsupportedError: the function does something that can not be done row by row.
    """
    if param.ndim > len(_SIZES[0]):
        raise UnsupportedError(f"a tensor has {param.ndim} dimensions")
    found = [_trace(function, arguments, param, sizes[: param.ndim]) for sizes in _SIZES]
    if found[0].description() != found[1].description():
        raise UnsupportedError("an update depends on sizes")
    return found[0]


def _trace(function: Function, arguments: Sequence[Tensor], param: Tensor, shape: tuple[int, ...]) -> UpdateGraph:
    kinds = [kind_of(argument.shape, param.shape) for argument in arguments]
    row = (*shape[:1], *(1 for _ in shape[1:]))
    examples = [
        torch.ones(shape if kind == Kind.ELEMENT else row if kind == Kind.ROW else argument.shape, dtype=argument.dtype)
        for kind, argument in zip(kinds, arguments, strict=True)
    ]
    written: list[int] = []

    def changed(*given: Tensor) -> list[Tensor]:
        new = {i: value for i, value in enumerate(function(*given)) if value is not None and value is not given[i]}
        written[:] = new
        return list(new.values())

    with torch.no_grad():
        traced = make_fx(changed, decomposition_table=_DECOMPOSED)(*examples)
    made = _Translation(traced, shape, kinds)
    inputs = tuple((kind, argument.dtype) for kind, argument in zip(kinds, arguments, strict=True))
    outputs = zip(written, made.outputs, strict=True)
    return UpdateGraph(inputs, tuple((i, value) for i, value in outputs if not (value.op == "input" and value.args[0] == i)))


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


class _Translation:
    """A traced graph's values."""

    def __init__(self, traced: fx.GraphModule, shape: tuple[int, ...], kinds: Sequence[Kind]) -> None:
        self._shape, self._value = shape, Values()
        self._of: dict[fx.Node, Value] = {}
        self.outputs: list[Value] = []
        given = iter(enumerate(kinds))
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                index, kind = next(given)
                dtype = node.meta["val"].dtype
                self._of[node] = self._value("input", (index,), kind, dtype)
            elif node.op == "output":
                self.outputs = [self._of[each] for each in node.args[0]]
            elif node.op == "get_attr":
                constant = getattr(traced, node.target)
                if constant.numel() != 1:
                    raise UnsupportedError("an update has a tensor in it that is not in its state")
                self._of[node] = self._value("constant", (constant.item(),), Kind.NUMBER, constant.dtype)
            elif node.users or str(node.target.__name__).split(".")[0].endswith("_"):
                self._call(node)

    def _call(self, node: fx.Node) -> None:
        name = str(node.target._schema.name).split("::")[1]  # type: ignore[union-attr]
        args = [self._of[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
        in_place = name.endswith("_")
        name = name.rstrip("_")
        meta = node.meta["val"]
        if not isinstance(meta, Tensor):
            raise UnsupportedError(f"an update calls {node.target}")
        found = self._made(name, args, node, meta)
        self._of[node] = found
        if in_place:
            target = node.args[0]
            if not isinstance(target, fx.Node) or target.op == "placeholder" or _is_view(target):
                raise UnsupportedError(f"an update calls {node.target} on what may be seen elsewhere")
            self._of[target] = found

    def _made(self, name: str, args: list[Any], node: fx.Node, meta: Tensor) -> Value:
        kind, dtype = kind_of(meta.shape, self._shape), meta.dtype
        name = _OTHER_NAMES.get(name, name) if dtype == torch.bool or name == "sgn" else name
        if name in _SAME:
            return self._cast(args[0], kind, dtype)
        if name in ("expand", "_to_copy", "copy"):
            return self._cast(args[1] if name == "copy" else args[0], kind, dtype)
        if name in _FILLED or name in _FILLS:
            fill = _FILLED[name] if name in _FILLED else args[_FILLS[name]]
            if isinstance(fill, Value):
                return self._cast(fill, kind, dtype)
            return self._value("constant", (fill,), kind, dtype)
        if name in REDUCTIONS:
            equal = args[0].op == "constant" and (name != "sum" or args[0].is_constant(0))
            if equal or args[0].kind == kind:
                return self._cast(args[0], kind, dtype)
            if name != "amax" or args[0].dtype != dtype:
                args[0] = self._cast(args[0], args[0].kind, dtype)
            return self._value(name, (args[0],), kind, dtype)
        args = [None if arg is None else self._operand(arg) for arg in args]
        alpha = node.kwargs.get("alpha", args.pop(2).args[0] if name in ("add", "sub", "rsub") and len(args) > 2 else 1)
        if name == "rsub":
            name, args = "sub", [args[1], args[0]]
            if alpha != 1:
                raise UnsupportedError(f"an update calls {node.target} with alpha={alpha!r}")
        elif alpha != 1:
            args[1] = self._value("mul", (args[1], self._operand(alpha)), args[1].kind, dtype)
        if name in ("clamp_min", "clamp_max"):
            name, args = "clamp", [args[0], args[1], None] if name == "clamp_min" else [args[0], None, args[1]]
        if name not in POINTWISE or node.kwargs.get("rounding_mode"):
            raise UnsupportedError(f"an update calls {node.target}")
        if name == "mul" and dtype == torch.bool:
            name = "logical_and"
        if name == "clamp":
            args = [*args, None, None][:3]
        computed = dtype if dtype != torch.bool or name.startswith("logical") else _compared(node)
        args = [None if arg is None else self._unexpanded(arg) for arg in args]
        return self._cast(self._simplified(name, args, dtype, computed), kind, dtype)

    def _simplified(self, name: str, args: list[Any], dtype: torch.dtype, computed: torch.dtype) -> Value:
        """A pointwise operator, of what its operands have one of; or what is the same number, if no operand is infinite or NaN."""
        kind = max(arg.kind for arg in args if arg is not None)
        zero, one = ([arg is not None and arg.is_constant(number) for arg in args] for number in (0, 1))
        same = None
        if name == "where" and (args[1] is args[2] or (zero[1] and zero[2])):
            same = args[1]
        elif name == "sub" and args[0] is args[1]:
            return self._value("constant", (0.0,), kind, dtype)
        elif name == "sub" and zero[0]:
            name, args = "neg", [args[1]]
        elif (name in ("add", "sub") and zero[1]) or (name in ("mul", "div", "neg") and zero[0]) or (name == "mul" and one[1]):
            same = args[0]
        elif (name == "add" and zero[0]) or (name == "mul" and (zero[1] or one[0])):
            same = args[1]
        if same is not None:
            return self._cast(same, kind, dtype)
        return self._value(name, tuple(args), kind, dtype, computed)

    def _unexpanded(self, value: Value) -> Value:
        if value.op == "constant":
            return self._value("constant", value.args, Kind.NUMBER, value.dtype)
        found: Value = value.args[0] if value.op == "expand" else value
        return found

    def _operand(self, arg: Any) -> Value:
        if isinstance(arg, Value):
            return arg
        dtype = torch.bool if isinstance(arg, bool) else torch.int64 if isinstance(arg, int) else torch.float64
        return self._value("constant", (arg,), Kind.NUMBER, dtype)

    def _cast(self, value: Value, kind: Kind, dtype: torch.dtype) -> Value:
        if value.op == "constant":
            return self._value("constant", value.args, kind, dtype) if _fits(value, dtype) else self._value("cast", (value,), kind, dtype)
        if value.op == "cast" and value.args[0].dtype == dtype and torch.promote_types(dtype, value.dtype) == value.dtype:
            value = value.args[0]  # there and back
        elif value.dtype != dtype:
            value = self._value("cast", (value,), value.kind, dtype)
        return value if value.kind == kind else self._value("expand", (value,), kind, dtype)


def _fits(value: Value, dtype: torch.dtype) -> bool:
    """Whether a constant is the same number in another dtype, or there is only one way to write it."""
    return float(torch.tensor(value.args[0], dtype=dtype)) == float(torch.tensor(value.args[0], dtype=value.dtype))


def _compared(node: fx.Node) -> torch.dtype:
    """The dtype in which two operands are compared."""
    given: list[Any] = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args[:2]]
    found: torch.dtype = torch.result_type(*given) if len(given) == 2 else given[0].dtype
    return found


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target._schema.name).split("::")[1] in _SAME | {"expand"}  # type: ignore[union-attr]
