"""Which programs run a step."""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, Literal, get_args
from warnings import warn

import torch
from torch import Tensor

from hyperopt_nested.backends.early import with_early_writes
from hyperopt_nested.backends.foreach import foreach
from hyperopt_nested.backends.fused import fused
from hyperopt_nested.backends.graph import UpdateGraph, kind_of, trace
from hyperopt_nested.backends.inductor import as_traced, compiled, compiler_for
from hyperopt_nested.backends.layout import check_layout
from hyperopt_nested.backends.program import Batch, Function, Program, UnsupportedError
from hyperopt_nested.backends.simplify import simplified
from hyperopt_nested.joint_update import Tensors
from hyperopt_nested.nested import Nested

Backend = Literal["auto", "reference", "foreach", "compile", "fused"]
"""What runs a step, always in the same way up to rounding. Programs are made from the engine when tensors of their kind are first stepped,
work in place, and are kept for the tensors that are alike.

* "reference": the engine itself.
* "foreach": torch's own operators, on many small tensors at once, and on large ones piece by piece; needs no compiler.
* "compile": inductor's programs, for CPUs with a C++ compiler and GPUs with Triton.
* "fused": native kernels for the CPU, which pass over memory as seldom as can be; for rules that go row by row or element by element.
* "auto": the engine for fewer than a million numbers; else the first of "fused", "compile" and "foreach" that can be had, tensor by tensor.
"""

_MANY = 1_000_000


def chosen(backend: Backend, nested: Nested, params: Tensors) -> Backend:
    """What runs the steps, if not for some tensors that it can not step.

    Raises:
        ValueError: `backend` is none of its choices, or there are no such programs here.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} must be one of {', '.join(map(repr, get_args(Backend)))}")
    if backend == "reference" or (backend == "auto" and sum(param.numel() for param in params.values()) < _MANY):
        return "reference"
    devices = {param.device for param in params.values()}
    summed = [rule.name for rule in (nested.optimizer_of(name).rule for name in params) if rule.measures]
    if nested.curvature == "exact" or summed:
        if backend == "auto":
            return "reference"
        why = f"{summed[0]} needs a total over all tensors" if summed else "curvature='exact' differentiates the model in each step"
        raise ValueError(f"backend={backend!r} can not be had: {why}. Use backend='auto' or 'reference'")
    without = "" if backend == "foreach" else _without_compiler(devices)
    elsewhere = sorted({device.type for device in devices} - {"cpu"})
    if backend != "auto":
        why = f"it is for the CPU, and there are tensors on {elsewhere[0]}" if backend == "fused" and elsewhere else without
        if why:
            raise ValueError(f"backend={backend!r} can not be had: {why}. Use backend='auto' or 'foreach'")
        return backend
    if without:
        return "foreach"
    return "compile" if elsewhere else "fused"


def _without_compiler(devices: Iterable[torch.device]) -> str:
    missing = sorted({device.type for device in devices if not compiler_for(device)})
    return f"there is no compiler for {missing[0]} here; install one, such as g++ for the CPU" if missing else ""


class Programs:
    """Makes programs, one for all tensors that it serves, of the first sort that can be had.

    Args:
        backend: "foreach", "compile" or "fused".
        strict: whether no other sort will do.
    """

    def __init__(self, backend: Backend, *, strict: bool) -> None:
        sorts: dict[str, list[str]] = {"fused": ["fused", "compile"], "compile": ["compile"], "foreach": []}
        self._sorts = [backend] if strict and backend != "foreach" else [*sorts[backend], "foreach", "traced"]
        self._made: dict[Hashable, list[Program] | UnsupportedError] = {}
        self._of_graphs: dict[Hashable, list[Program]] = {}

    def make(
        self, of: Hashable, functions: Sequence[Function], arguments: Sequence[Tensor], param: Tensor, changing: Collection[int] = ()
    ) -> list[Program]:
        """Programs that are run one after the other.

        Args:
            of: what they depend on beside the arguments.
            functions: what each does.
            arguments: of all, the gradient first; examples, which are not changed.
            param: the tensor.
            changing: indices of arguments that are written to between them.

        Raises:
            ValueError: there are none of the sort that was asked for.
        """
        for sort in self._sorts:
            try:
                return self._programs(sort, of, functions, arguments, param, changing)
            except Exception as error:
                if len(self._sorts) == 1:
                    raise ValueError(f"backend={sort!r} can not be had: {error}. Use backend='auto'") from error
                if sort == self._sorts[-1]:
                    raise
                if not isinstance(error, UnsupportedError):
                    warn(f"backend={sort!r} fails here, and is not used: {error}", stacklevel=2)
                    self._sorts = [each for each in self._sorts if each != sort]
                    return self.make(of, functions, arguments, param, changing)
        raise AssertionError

    def _programs(
        self, sort: str, of: Hashable, functions: Sequence[Function], arguments: Sequence[Tensor], param: Tensor, changing: Collection[int]
    ) -> list[Program]:
        dtypes = tuple(argument.dtype for argument in arguments)
        key: Hashable
        if sort in _BY_GRAPH:
            check_layout(arguments, param)
            key = sort, of, dtypes, tuple(kind_of(argument.shape, param.shape) for argument in arguments), param.ndim
        else:
            key = sort, of, dtypes, tuple((argument.shape, argument.stride(), argument.device) for argument in arguments)
        if key not in self._made:
            try:
                if sort in _BY_GRAPH:
                    graphs = with_early_writes([simplified(trace(function, arguments, param)) for function in functions], changing)
                    same = sort, tuple(graph.description() for graph in graphs)  # as of tensors with another number of dimensions
                    if same not in self._of_graphs:
                        self._of_graphs[same] = [_BY_GRAPH[sort](graph) for graph in graphs]
                    self._made[key] = self._of_graphs[same]
                else:
                    self._made[key] = [_each(_COMPILED[sort](function, arguments)) for function in functions]
            except UnsupportedError as error:
                self._made[key] = error
        found = self._made[key]
        if isinstance(found, UnsupportedError):
            raise found
        return found


def _each(function: Callable[..., Any]) -> Program:
    def program(batch: Batch) -> None:
        for row in batch.rows:
            function(*row)

    return program


_BY_GRAPH: dict[str, Callable[[UpdateGraph], Program]] = {"fused": fused, "foreach": foreach}
_COMPILED: dict[str, Callable[[Function, Sequence[Tensor]], Callable[..., Any]]] = {"compile": compiled, "traced": as_traced}
