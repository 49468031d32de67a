"""Tracing: a function of one tensor's gradient, state and numbers, run once on small tensors, becomes an `UpdateGraph`.

Operators are recorded as they are dispatched, below `torch.func`: a model may run in another thread.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyperopt_nested.backends.graph import POINTWISE, REDUCTIONS, Inputs, Kind, UnsupportedError, UpdateGraph, Value, Values, kind_of
from hyperopt_nested.backends.program import Function

_VIEWS = ["alias", "detach", "lift_fresh", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand"]
_TAKEN = dict.fromkeys([*_VIEWS, "clone", "lift_fresh_copy", "_to_copy", "scalar_tensor"], 0)
_TAKEN |= {"copy": 1, "full": 1, "full_like": 1, "new_full": 2}
"""Operators that give back one of their arguments, in another form, with its position."""
_FILLED = {"zeros_like": 0, "zeros": 0, "new_zeros": 0, "ones_like": 1, "ones": 1, "new_ones": 1}
_LOGICAL = {"mul": "logical_and", "bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_not": "logical_not"}
_KNOWN = {*_TAKEN, *_FILLED, *_LOGICAL, *POINTWISE, *REDUCTIONS, "arange", "sgn", "rsub", "clamp_min", "clamp_max"}
_SIZES = (3, 5, 7, 11, 13), (5, 3, 11, 7, 2)


@cache
def _decompositions() -> dict[Any, Any]:
    from torch._decomp import core_aten_decompositions  # a second; most rules need none

    return dict(core_aten_decompositions())


def trace(function: Function, arguments: Sequence[Tensor], param: Tensor) -> UpdateGraph:
    """Return the graph of a function of one tensor's gradient, state and numbers; only shapes and dtypes of arguments are read.

    It is traced on small tensors of two other shapes: a function that depends on sizes in a way that graphs do not have gives two
    graphs, and is refused, as is what does not go row by row, or writes a value of another shape than its argument.
    """
    if param.ndim > len(_SIZES[0]):
        raise UnsupportedError(f"a tensor has {param.ndim} dimensions")
    inputs = tuple((kind_of(argument.shape, param.shape), argument.dtype) for argument in arguments)
    found = [_traced(function, arguments, inputs, param, sizes[: param.ndim]) for sizes in _SIZES]
    if found[0].description != found[1].description:
        raise UnsupportedError("an update depends on sizes")
    return found[0]


def _traced(function: Function, arguments: Sequence[Tensor], inputs: Inputs, param: Tensor, sizes: tuple[int, ...]) -> UpdateGraph:
    shape = tuple(1 if size == 1 else small for size, small in zip(param.shape, sizes, strict=True))
    shapes = {Kind.ELEMENT: shape, Kind.ROW: (*shape[:1], *(1 for _ in shape[1:]))}
    shaped = zip(arguments, inputs, strict=True)
    examples = [torch.ones(shapes.get(kind, argument.shape), dtype=dtype) for argument, (kind, dtype) in shaped]
    recorder = _Recorder(shape, examples, inputs)
    with torch.no_grad(), recorder:
        new = function(*examples)
    outputs = []
    for i, (value, (kind, dtype)) in enumerate(zip(new, inputs, strict=True)):
        if value is None or value is examples[i]:
            continue
        made = recorder.value_of(value)
        if made.kind != kind:
            of, shape = {Kind.NUMBER: "one value", Kind.ROW: "one value a row", Kind.ELEMENT: "one value an element"}, arguments[i].shape
            raise UnsupportedError(f"an update writes {of[made.kind]} to a tensor of shape {tuple(shape)}, which has {of[kind]}")
        made = recorder.cast(made, kind, dtype)
        if not (made.op == "input" and made.args[0] == i):
            outputs.append((i, made))
    return UpdateGraph(inputs, tuple(outputs))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what operators do to tensors, as values of a graph."""

    def __init__(self, shape: tuple[int, ...], examples: Sequence[Tensor], inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shape, self._value = shape, Values()
        self._of = dict[int, tuple[Value, Tensor]]()  # by id, which stays a tensor's own as long as this is held
        self._fixed = set(map(id, examples))  # inputs, views and what is viewed: not to be changed in place
        for i, (tensor, (kind, dtype)) in enumerate(zip(examples, inputs, strict=True)):
            self._of[id(tensor)] = self._value("input", (i,), kind, dtype), tensor

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to import torch.compile's machinery: a step is never traced by it."""
        return False

    def value_of(self, tensor: Tensor) -> Value:
        """The value that a tensor holds; of one that was not made here, a constant."""
        if id(tensor) not in self._of:
            if tensor.numel() != 1 or type(tensor) not in (Tensor, torch.nn.Parameter):
                raise UnsupportedError("an update has a tensor in it that is not in its state")
            self._of[id(tensor)] = self._value("constant", (tensor.item(),), Kind.NUMBER, tensor.dtype), tensor
        return self._of[id(tensor)][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func._schema.name).split("::")[1], kwargs or {}
        name, in_place = name.rstrip("_"), name.endswith("_")
        if name == "promote_types":  # of dtypes, not of tensors
            return func(*args, **kwargs)
        if name == "nan_to_num" and len({*args[1:]}) == 1 == len(args) - 3:
            with self:
                return torch.where(torch.isfinite(args[0]), args[0], args[1])
        for known in () if name in _KNOWN else (lambda: {func: func.decompose}, _decompositions):
            if decompose := known().get(func):  # type: ignore[no-untyped-call]
                with self:
                    found = decompose(*args, **kwargs)
                if found is not NotImplemented:
                    return found
        made = func(*args, **kwargs) if name in _KNOWN and "out" not in kwargs else None
        if not isinstance(made, Tensor):
            raise UnsupportedError(f"an update calls {func}")
        value = self._called(func, name, args, kwargs, made)
        if in_place and id(args[0]) in self._fixed:
            raise UnsupportedError(f"an update calls {func} on what is seen elsewhere")
        if name in _VIEWS:
            self._fixed |= {id(made), *(id(arg) for arg in args if isinstance(arg, Tensor))}
        changed = args[0] if in_place else made
        self._of[id(changed)] = value, changed
        return made

    def _called(self, func: Any, name: str, given: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> Value:
        """The value of one operator's result."""
        args: list[Any] = [self.value_of(arg) if isinstance(arg, Tensor) else arg for arg in given]
        kind, dtype = kind_of(made.shape, self._shape), made.dtype
        if name == "arange" and len(given) == 1 and made.numel() == torch.Size(self._shape).numel():  # where each element lies
            return self._value("constant", (0,), kind, dtype) if made.numel() == 1 else self._value("index", (), Kind.ELEMENT, dtype)
        if name == "view" and made.dtype != given[0].dtype:
            if {dtype, given[0].dtype} != {torch.float32, torch.int32}:
                raise UnsupportedError(f"an update reads {given[0].dtype} as {dtype}")
            return self._value("bitcast", (args[0],), kind, dtype, given[0].dtype)
        if name in _TAKEN or name in _FILLED:
            taken = args[_TAKEN[name]] if name in _TAKEN else _FILLED[name]
            if isinstance(taken, Value):
                return self.cast(taken, max(kind, taken.kind), dtype)  # a column that was made flat has elements
            return self._value("constant", (taken,), kind, dtype)
        if name in REDUCTIONS:
            equal = args[0].op == "constant" and (name != "sum" or args[0].is_constant(0))
            if equal or args[0].kind == kind:
                return self.cast(args[0], kind, dtype)
            return self._value(name, (self.cast(args[0], args[0].kind, dtype),), kind, dtype)
        name = "sign" if name == "sgn" else _LOGICAL.get(name, name) if dtype == torch.bool else name
        args = [None if arg is None else self._operand(arg) for arg in args]
        if name in ("add", "sub", "rsub"):
            alpha = kwargs.get("alpha", args.pop(2).args[0] if len(args) > 2 else 1)
            if name == "rsub":
                name, args = "sub", args[::-1]
            if alpha != 1:
                args[1] = self._value("mul", (args[1], self._operand(alpha)), args[1].kind, dtype)
        if name.startswith("clamp"):
            name, args = "clamp", [args[0], None, args[1]] if name == "clamp_max" else [*args, None][:3]
        if name not in POINTWISE or kwargs.get("rounding_mode"):
            raise UnsupportedError(f"an update calls {func}")
        if all(arg is None or arg.op == "constant" for arg in args):
            return self._value("constant", (made.view(-1)[0].item(),), kind, dtype)
        compared = dtype == torch.bool and not name.startswith("logical")
        computed = torch.result_type(given[0], given[1]) if compared and len(given) > 1 else given[0].dtype if compared else dtype
        return self.cast(self._simplified(name, args, dtype, computed), kind, dtype)

    def _simplified(self, name: str, args: list[Any], dtype: torch.dtype, computed: torch.dtype) -> Value:
        """A pointwise operator; or an operand that is the same number, also where it is infinite or NaN."""
        match name, *args:  # torch.isfinite
            case "logical_and", Value(op="eq", args=(x, y)), Value(op="ne", args=(Value(op="abs", args=(z,)) as size, end)):
                if x is y is z and end.is_constant(torch.inf):
                    name, args, computed = "lt", [size, end], args[1].computed
            case "where", Value(op="gt", args=(x, end)) as positive, Value(op="sqrt", args=(inside,)) as root, zero:
                of_itself = inside.op == "where" and inside.args[:2] == (positive, x)
                if of_itself and end.is_constant(0) and zero.is_constant(0):  # a root that is zero up to zero
                    return self._value("sqrt", (self._value("where", (positive, x, zero), x.kind, dtype),), root.kind, dtype)
        kind = max(arg.kind for arg in args if arg is not None)
        zero, one = ([arg is not None and arg.is_constant(number) for arg in args] for number in (0, 1))
        same = None
        if name == "where" and (args[1] is args[2] or (zero[1] and zero[2])):
            same = args[1]
        elif name == "sub" and zero[0]:
            name, args = "neg", [args[1]]
        elif (name == "mul" and one[0]) or (name == "add" and zero[0]):
            same = args[1]
        elif (name in ("mul", "div") and one[1]) or (name in ("add", "sub") and zero[1]) or (name in ("neg", "mul") and all(zero)):
            same = args[0]
        if same is not None:
            return self.cast(same, kind, dtype)
        return self._value(name, tuple(args), kind, dtype, computed)

    def _operand(self, arg: Any) -> Value:
        """What a pointwise operator takes of a value, or a number."""
        if not isinstance(arg, Value):
            dtype = torch.bool if isinstance(arg, bool) else torch.int64 if isinstance(arg, int) else torch.float64
            return self._value("constant", (arg,), Kind.NUMBER, dtype)
        if arg.op == "constant":
            return self._value("constant", arg.args, Kind.NUMBER, arg.dtype)
        found: Value = arg.args[0] if arg.op == "expand" else arg
        return found

    def cast(self, value: Value, kind: Kind, dtype: torch.dtype) -> Value:
        """A value in another dtype, or as what there is more of."""
        if value.op == "constant":  # it stays one if it is the same number
            old, new = (float(torch.tensor(value.args[0], dtype=each)) for each in (value.dtype, dtype))
            return self._value("constant", value.args, kind, dtype) if new == old else self._value("cast", (value,), kind, dtype)
        if value.op == "cast" and value.args[0].dtype == dtype and torch.promote_types(dtype, value.dtype) == value.dtype:
            value = value.args[0]  # there and back
        elif value.dtype != dtype:
            value = self._value("cast", (value,), value.kind, dtype)
        return value if value.kind == kind else self._value("expand", (value,), kind, dtype)
