"""Which programs run a step."""

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal, get_args
from warnings import warn

import torch
from torch import Tensor

from hyperopt_nested.backends import compiler
from hyperopt_nested.backends.cpp import code
from hyperopt_nested.backends.early import with_early_writes
from hyperopt_nested.backends.foreach import foreach
from hyperopt_nested.backends.fused import fused
from hyperopt_nested.backends.graph import UpdateGraph, kind_of
from hyperopt_nested.backends.inductor import compiler_for, inductor
from hyperopt_nested.backends.layout import PLAIN, check_layout, is_dense
from hyperopt_nested.backends.program import LayoutError, Program, Request, UnsupportedError, engine
from hyperopt_nested.backends.simplify import simplified
from hyperopt_nested.backends.trace import trace
from hyperopt_nested.backends.verify import deviation
from hyperopt_nested.joint_update import Tensors
from hyperopt_nested.nested import Nested

Backend = Literal["auto", "reference", "foreach", "compile", "fused"]
"""What runs a step. All do what the engine does, up to rounding. Programs are made from the engine when tensors of their kind are first
stepped. They are used after they have reproduced the engine's results on small examples; what deviates, or does not compile, is left to the
next sort, tensor by tensor, with a warning.

* "reference": the engine itself.
* "foreach": torch's own operators, on many tensors at once; needs no compiler.
* "compile": inductor's programs, for CPUs with a C++ compiler and GPUs with Triton.
* "fused": native kernels for the CPU, which pass over memory as seldom as can be; for rules that go row by row or element by element.
* "auto": on the CPU "fused", or "foreach" without a C++ compiler; on GPUs "compile" for models of a million numbers and more, else
  "foreach". Small models take their first 16 steps by the engine while kernels are compiled in the background.
"""

WARM_UP = 16
"""Steps that the engine does for a small model while its kernels are compiled. The number is fixed, so runs are reproducible."""

MANY = 1_000_000
"""Numbers of a model that does not wait: its kernels are compiled before its first step."""


def chosen(backend: Backend, nested: Nested, params: Tensors) -> Backend:
    """What runs the steps, if not for some tensors that it does not serve.

    Raises:
        ValueError: `backend` is none of its choices, or there are no such programs here.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} must be one of {', '.join(map(repr, get_args(Backend)))}")
    if backend == "reference":
        return backend
    devices = {param.device for param in params.values()}
    why = _only_by_engine(nested, params)
    if backend == "auto":
        if why:
            return "reference"
        if devices <= {torch.device("cpu")}:
            return "foreach" if compiler.compiler() is None or compiler.folder() is None else "fused"
        return "compile" if sum(param.numel() for param in params.values()) >= MANY and not _without_compiler(devices) else "foreach"
    if backend == "fused":
        elsewhere = sorted({device.type for device in devices} - {"cpu"})
        why = why or (f"it is for the CPU, and there are tensors on {elsewhere[0]}" if elsewhere else "")
        why = why or ("there is no C++ compiler here; install one, such as g++" if compiler.compiler() is None else "")
        why = why or ("" if compiler.folder() else f"there is no folder for compiled kernels; name one in {compiler.CACHE_VARIABLE}")
    elif backend == "compile":
        why = why or _without_compiler(devices)
    if why:
        raise ValueError(f"backend={backend!r} can not be had: {why}. Use backend='auto' or 'foreach'")
    return backend


def _only_by_engine(nested: Nested, params: Tensors) -> str:
    """Why only the engine can step these tensors; nothing if others can."""
    summed = [rule.name for rule in (nested.optimizer_of(name).rule for name in params) if rule.measures]
    if summed:
        return f"{summed[0]} needs a total over all tensors"
    if nested.curvature == "exact":
        return "curvature='exact' differentiates the model in each step"
    special = [type(param).__name__ for param in params.values() if type(param) not in PLAIN]
    return f"a parameter is a {special[0]}, whose data the engine alone can reach" if special else ""


def _without_compiler(devices: Iterable[torch.device]) -> str:
    missing = sorted({device.type for device in devices if not compiler_for(device)})
    return f"there is no compiler for {missing[0]} here; install one, such as g++ for the CPU" if missing else ""


class Programs:
    """Makes programs, one for all tensors that it serves, of the first sort that does what the engine does.

    Args:
        backend: "foreach", "compile" or "fused".
        strict: whether no other sort will do for a rule. Tensors whose layout programs do not take are left to the engine all the same.

    Attributes:
        backend: the first sort that has not failed as a whole.
    """

    def __init__(self, backend: Backend, *, strict: bool) -> None:
        sorts: dict[str, list[str]] = {"fused": ["fused", "foreach"], "compile": ["compile", "foreach"], "foreach": ["foreach"]}
        self.strict = strict
        self._sorts = [backend] if strict else sorts[backend]
        self._made: dict[Hashable, list[Program]] = {}
        self._graphs: dict[Hashable, list[UpdateGraph] | UnsupportedError] = {}
        self._of_graphs: dict[Hashable, list[Program]] = {}
        self._deviations: dict[Hashable, str] = {}
        self._said: set[str] = set()
        self._ahead: tuple[int, threading.Thread] | None = None

    @property
    def backend(self) -> str:
        return self._sorts[0] if self._sorts else "reference"

    def begin(self, requests: Callable[[], Sequence[Request]]) -> None:
        """Compile what is needed for requests in the background; what fails then fails again, and is told, when it is asked for."""
        if self._ahead is None:
            needed = requests()
            self._ahead = os.getpid(), compiler.in_background(lambda: self._compile(needed))

    def make(self, requests: Sequence[Request]) -> list[list[Program]]:
        """Programs for each request.

        Raises:
            ValueError: there are none of the sort that was asked for.
        """
        if self._ahead is not None:
            process, thread = self._ahead
            if process == os.getpid():  # a forked child has no such thread
                thread.join()
            self._ahead = None
        new = {key: request for request in requests if (key := _key(request)) not in self._made}
        if len(new) > 1:
            self._compile(list(new.values()))
        for key, request in new.items():
            self._made[key] = self._programs(request)
        return [self._made[_key(request)] for request in requests]

    def _compile(self, requests: Sequence[Request]) -> None:
        """Compile native kernels of all requests at once."""
        if "fused" not in self._sorts:
            return
        graphs: dict[UpdateGraph, str] = {}
        for request in requests:
            if compiler.is_stopping():
                return
            try:
                check_layout(request.arguments, _kinds(request), request.param)
                graphs |= {graph: code(graph) for graph in self._traced("fused", request) if graph not in graphs}
            except UnsupportedError:
                continue
        with suppress(compiler.CompileError):
            compiler.load(list(dict.fromkeys(graphs.values())))

    def _programs(self, request: Request) -> list[Program]:
        for sort in list(self._sorts):
            try:
                programs = self._of_sort(sort, request)
                verified = (*map(id, programs), request.of, *_kinds(request), *(size == 1 for size in request.param.shape))
                if verified not in self._deviations:
                    self._deviations[verified] = deviation(programs, request, whole=sort == "compile")
                wrong = self._deviations[verified]
                if not wrong:
                    return programs
                why = f"it deviates from the engine: {wrong}"
            except LayoutError:
                break
            except UnsupportedError as error:
                why = "" if not self.strict else str(error)
                if not self.strict:
                    continue
            except Exception as error:
                why = " ".join(str(error).split())[:200] or type(error).__name__
            if self.strict:
                raise ValueError(f"backend={sort!r} can not be had for {request.rule}: {why}. Use backend='auto'")
            if (sort + why) not in self._said:
                self._said.add(sort + why)
                warn(f"backend={sort!r} is not used for {request.rule}: {why}", stacklevel=2)
        return [engine(function) for function in request.functions]

    def _of_sort(self, sort: str, request: Request) -> list[Program]:
        if sort == "fused":
            check_layout(request.arguments, _kinds(request), request.param)
        elif not all(argument.numel() and type(argument) in PLAIN and not argument.is_neg() for argument in request.arguments):
            raise LayoutError("a tensor is empty, or a subclass")
        if sort == "compile":
            if not all(map(is_dense, request.arguments[1:])):
                raise LayoutError("a tensor has gaps")
            return [inductor(function, request.arguments) for function in request.functions]
        graphs = self._traced(sort, request)
        same = sort, tuple(graph.description for graph in graphs)  # as of tensors with another number of dimensions
        if same not in self._of_graphs:
            self._of_graphs[same] = [_BY_GRAPH[sort](graph) for graph in graphs]
        return self._of_graphs[same]

    def _traced(self, sort: str, request: Request) -> list[UpdateGraph]:
        """The graphs of a request, as a sort needs them."""
        singletons = tuple(size == 1 for size in request.param.shape)
        key = sort, request.of, tuple(argument.dtype for argument in request.arguments), tuple(_kinds(request)), singletons
        if key not in self._graphs:
            try:
                graphs = [trace(function, request.arguments, request.param) for function in request.functions]
                if sort == "fused":
                    graphs = with_early_writes([simplified(graph) for graph in graphs], request.changing)
                self._graphs[key] = graphs
            except UnsupportedError as error:
                self._graphs[key] = error
        found = self._graphs[key]
        if isinstance(found, UnsupportedError):
            raise found
        return found


def _key(request: Request) -> Hashable:
    """What programs depend on: what they do, and the form of all arguments."""
    return request.of, request.param.shape, request.param.stride(), tuple(map(form, request.arguments))


def form(tensor: Tensor) -> Hashable:
    """What programs depend on of a tensor, but its values and address."""
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_neg()


def _kinds(request: Request) -> list[Any]:
    return [kind_of(argument.shape, request.param.shape) for argument in request.arguments]


_BY_GRAPH: dict[str, Callable[[UpdateGraph], Any]] = {"fused": fused, "foreach": foreach}
