"""Which programs run a step."""

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal, get_args
from warnings import warn

import torch

from hyperopt_nested.backends import compiler
from hyperopt_nested.backends.cpp import code
from hyperopt_nested.backends.foreach import Interpreter
from hyperopt_nested.backends.fused import PLAIN, Kernel, LayoutError, check_layout
from hyperopt_nested.backends.graph import UnsupportedError, UpdateGraph
from hyperopt_nested.backends.inductor import Inductor, compiler_for
from hyperopt_nested.backends.program import Engine, Program, Request
from hyperopt_nested.backends.sweeps import with_early_writes
from hyperopt_nested.backends.trace import trace
from hyperopt_nested.backends.verify import deviation
from hyperopt_nested.engine.binding import Tensors
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.ops import is_dense

Backend = Literal["auto", "reference", "foreach", "compile", "fused"]
"""What runs a step. All do what the engine does, up to rounding. Programs are made from the engine when tensors of their kind are first
stepped. They are used after they have reproduced the engine's results on small examples; what deviates, or does not compile, is left to the
next sort, tensor by tensor, with a warning.

* "reference": the engine itself.
* "foreach": torch's own operators, on many tensors at once; needs no compiler.
* "compile": inductor's programs, for CPUs with a C++ compiler, and for GPUs with Triton, where one program steps all tensors of a kind and
  takes minutes to compile.
* "fused": native kernels for the CPU, which pass over memory as seldom as can be; for rules that go row by row or element by element.
* "auto": on the CPU "fused", or "foreach" without a C++ compiler; elsewhere "foreach". Small models on the CPU take their first 16 steps by
  the engine while kernels are compiled in the background.
"""

WARM_UP = 16  # steps that the engine does for a small model while its kernels are compiled: fixed, so that runs are reproducible
MANY = 1_000_000  # numbers of a model that does not wait: its kernels are compiled before its first step
_WHOLE = 1 << 16  # numbers of a tensor up to which programs of fixed sizes are tried on examples of its own size


def chosen(backend: Backend, nested: Nested, params: Tensors, *, sharded: bool = False) -> Backend:
    """What runs the steps, if not for some tensors that it does not serve; raises ValueError if it is not known, or cannot be used."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} must be one of {', '.join(map(repr, get_args(Backend)))}")
    if backend == "reference":
        return backend
    devices = {param.device for param in params.values()}
    why = _only_by_engine(nested, params, sharded=sharded)
    if backend != "auto":
        if why := why or _missing(backend, devices):
            raise ValueError(f"backend={backend!r} cannot be used: {why}. Use backend='auto'")
        return backend
    if why:
        return "reference"
    return "foreach" if _missing("fused", devices) else "fused"


def _only_by_engine(nested: Nested, params: Tensors, *, sharded: bool) -> str:
    """Why only the engine can step these tensors; nothing if others can."""
    if summed := [rule.name for rule in (nested.bindings[name].optimizer.rule for name in params) if rule.reduction]:
        return f"{summed[0]} needs a total over all tensors"
    if nested.horizon.curvature == "exact":
        return "curvature='exact' differentiates the model in each step"
    if scheduled := [key for key, each in nested.learned.items() if each.learn.scheduled_by and (sharded or not each.is_own)]:
        return f"the learner of {scheduled[0]}, which is scheduled, shares values between tensors"
    special = [type(param).__name__ for param in params.values() if type(param) not in PLAIN]
    return f"a parameter is a {special[0]}, whose data the engine alone can reach" if special else ""


def _missing(backend: Backend, devices: Iterable[torch.device]) -> str:
    """What a backend needs, and is not here; nothing if it is."""
    types = sorted({device.type for device in devices})
    if backend == "fused":
        if elsewhere := [each for each in types if each != "cpu"]:
            return f"it is for the CPU, and there are tensors on {elsewhere[0]}"
        if compiler.compiler() is None:
            return "there is no C++ compiler here; install one, such as g++"
        return "" if compiler.folder() else f"there is no folder for compiled kernels; name one in {compiler.CACHE_VARIABLE}"
    missing = [each for each in types if backend == "compile" and not compiler_for(each)]
    return f"there is no compiler for {missing[0]} here; install one, such as g++ for the CPU" if missing else ""


class Programs:
    """Makes programs, one for all tensors that it serves, of the first sort that does what the engine does.

    With `strict`, no sort but `backend` will do for a rule. Tensors whose layout programs do not take are left to the engine all the same.
    """

    def __init__(self, backend: Backend, *, strict: bool) -> None:
        self.strict, self.backend = strict, backend
        self._sorts: list[str] = [backend] if strict or backend == "foreach" else [backend, "foreach"]
        self._made: dict[Hashable, list[Program]] = {}
        self._graphs: dict[Hashable, list[UpdateGraph] | UnsupportedError] = {}
        self._of_graphs: dict[Hashable, list[Program]] = {}
        self._deviations: dict[Hashable, str] = {}
        self._said: set[str] = set()
        self._ahead: tuple[int, threading.Thread] | None = None

    def begin(self, requests: Callable[[], Sequence[Request]]) -> None:
        """Compile what is needed for requests in the background; what fails then fails again, and is told, when it is asked for."""
        if self._ahead is None:
            needed = requests()
            self._ahead = os.getpid(), compiler.in_background(lambda: self._compile(needed))

    def make(self, requests: Sequence[Request]) -> list[list[Program]]:
        """Programs for each request; raises ValueError if there are none of the sort that was asked for."""
        if self._ahead and self._ahead[0] == os.getpid():  # a forked child has no such thread
            self._ahead[1].join()
        self._ahead = None
        new = {key: request for request in requests if (key := _key(request)) not in self._made}
        if len(new) > 1:
            self._compile(list(new.values()))
        self._made |= {key: self._programs(new[key]) for key in sorted(new, key=lambda key: -new[key].param.ndim)}
        return [self._made[_key(request)] for request in requests]

    def _compile(self, requests: Sequence[Request]) -> None:
        """Compile native kernels of all requests at once."""
        if "fused" not in self._sorts:
            return
        graphs: dict[UpdateGraph, str] = {}
        for request in requests:
            if compiler.stopping.is_set():
                return
            try:
                check_layout(request.arguments, request.kinds, request.param)
                graphs |= {graph: code(graph) for graph in self._traced("fused", request) if graph not in graphs}
            except UnsupportedError:
                continue
        with suppress(compiler.CompileError):
            compiler.load(list(dict.fromkeys(graphs.values())))

    def _programs(self, request: Request) -> list[Program]:
        for sort in self._sorts:
            try:
                programs = self._of_sort(sort, request)
                if not (deviates := self._deviation(sort, programs, request)):
                    return programs
                why = f"it deviates from the engine: {deviates}"
            except LayoutError:
                break
            except Exception as error:
                if isinstance(error, UnsupportedError) and not self.strict:
                    continue
                why = " ".join(str(error).split())[:200] or type(error).__name__
            if self.strict:
                raise ValueError(f"backend={sort!r} cannot be used for {request.rule}: {why}. Use backend='auto'")
            if (sort + why) not in self._said:
                self._said.add(sort + why)
                warn(f"backend={sort!r} is not used for {request.rule}: {why}", stacklevel=2)
        return [Engine(function) for function in request.functions]

    def _of_sort(self, sort: str, request: Request) -> list[Program]:
        if sort == "fused":
            check_layout(request.arguments, request.kinds, request.param)
        elif not all(argument.numel() and type(argument) in PLAIN and not argument.is_neg() for argument in request.arguments):
            raise LayoutError("a tensor is empty, or a subclass")
        if sort == "compile":
            if not all(map(is_dense, request.arguments[1:])):
                raise LayoutError("a tensor has gaps")
            return self._of_graphs.setdefault((sort, request.of), [Inductor(function) for function in request.functions])
        graphs = self._traced(sort, request)
        rows: Hashable = sort, "rows", request.of, *(each.dtype for each in request.arguments)
        if sort == "foreach" and request.param.ndim == 1 and rows in self._of_graphs and self._is_one_row(request, graphs):
            return self._of_graphs[rows]
        same: Hashable = sort, tuple(graph.description for graph in graphs)  # as of tensors with another number of dimensions
        if same not in self._of_graphs:
            self._of_graphs[same] = [Kernel(graph) if sort == "fused" else Interpreter(graph) for graph in graphs]
        if request.param.ndim > 1 and not any(request.singletons):
            self._of_graphs[rows] = self._of_graphs[same]
        return self._of_graphs[same]

    def _deviation(self, sort: str, programs: list[Program], request: Request) -> str:
        """What deviates from the engine; found once for all tensors for which that is the same."""
        of = (*map(id, programs), request.of, *(() if sort == "compile" else (request.kinds, request.singletons)))
        if of not in self._deviations:
            self._deviations[of] = deviation(programs, request, whole=sort == "compile" and request.param.numel() <= _WHOLE)
        return self._deviations[of]

    def _traced(self, sort: str, request: Request) -> list[UpdateGraph]:
        """The graphs of a request, as a sort needs them."""
        key = sort, request.of, request.kinds, request.singletons, tuple(argument.dtype for argument in request.arguments)
        if key not in self._graphs:
            try:
                graphs = [trace(function, request.arguments, request.param) for function in request.functions]
                if sort == "fused":
                    graphs = with_early_writes(graphs, request.changing)
                self._graphs[key] = graphs
            except UnsupportedError as error:
                self._graphs[key] = error
        found = self._graphs[key]
        if isinstance(found, UnsupportedError):
            raise found
        return found

    def _is_one_row(self, request: Request, graphs: Sequence[UpdateGraph]) -> bool:
        """Whether a vector is stepped as a matrix of one row is."""
        at = request.param, *request.arguments
        param, *row = (each.reshape(1, -1) if each.shape == at[0].shape else each for each in at)
        with suppress(UnsupportedError, RuntimeError, ValueError):
            traced = self._traced("foreach", replace(request, param=param, arguments=row))
            return [graph.description for graph in traced] == [graph.description for graph in graphs]
        return False


def _key(request: Request) -> Hashable:
    """What programs depend on: what they do, and the form of all arguments."""
    forms = ((type(each), each.shape, each.stride(), each.dtype, each.device, each.is_neg()) for each in request.arguments)
    return request.of, request.param.shape, request.param.stride(), *forms
