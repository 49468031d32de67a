"""The update of tensors with a native pull-back: autograd keeps what an update is given, and nothing that is computed on the way."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends import compiler
from hyperopt_nested.backends.cpp import code
from hyperopt_nested.backends.fused import PLAIN, Kernel, check_layout, sizes
from hyperopt_nested.backends.graph import Kind, UnsupportedError, UpdateGraph, Value, Values, kind_of
from hyperopt_nested.backends.program import Batch, Engine, Request, write_over
from hyperopt_nested.backends.trace import trace
from hyperopt_nested.backends.verify import deviation, examples
from hyperopt_nested.engine.binding import Tensors
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.engine.sensitivity import Named
from hyperopt_nested.trees import State, filled, leaves

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype."""


@dataclass(frozen=True, eq=False)
class _Plan:
    """Kernels of one tensor's update. Its arguments: gradient, tensor, leaves of the state, unconstrained values. Results come after.

    Arguments of both kernels are these, a cotangent of each result that is followed, and what the kernels write: a derivative for each
    argument that is wanted, and each result that is no argument.
    """

    update: Kernel
    pull: Kernel | None  # None: no derivative has to be computed
    passed: list[int | None]  # by result: the argument that it is, if it is one
    written: list[int]  # results that are no arguments
    followed: list[int]  # results that depend on wanted arguments
    wanted: list[int]  # arguments that autograd follows
    handed: dict[int, int]  # wanted arguments whose derivative is the cotangent of a result
    read: frozenset[int]  # arguments that the pull-back reads
    forms: Sequence[Form] = ()  # of arguments
    sizes: tuple[int, int] = 0, 0  # rows and columns


@dataclass(eq=False)
class _Descent:
    """Descent by a learned rate alone, by operators of torch: autograd takes less time for these than for a kernel and its pull-back."""

    rate: int  # the argument that is the rate
    last: tuple[Tensor | None, Tensor | None] = None, None  # the rate in the last step, and what it was cast to

    def __call__(self, grad: Tensor, param: Tensor, *rest: Tensor) -> Tensor:
        rate, factor = rest[self.rate - 2], self.last[1]
        if factor is None or self.last[0] is not rate:
            factor = -rate.to(param.dtype)
            self.last = rate, factor
        return param + factor * grad  # a difference would negate cotangents


_plans: dict[Hashable, _Plan | _Descent | None] = {}


class DifferentiableUpdate:
    """`Nested.update`, by programs that are traced from it and verified against it; by itself, where there are none.

    Autograd can differentiate it once.

    Args:
        nested: the engine; its learned hypers have no bijections.
    """

    def __init__(self, nested: Nested) -> None:
        self._nested = nested
        self._keys = cache(lambda name: [(each.key, each.key_of(name)) for each in nested.bindings[name].learned.values()])
        self._plans: dict[Hashable, _Plan | _Descent | None] = {}
        self._descents: dict[tuple[int, torch.dtype], _Descent] = {}

    def __call__(
        self, params: Tensors, grads: Tensors, rule: Mapping[str, State], hypers: Mapping[str, Named]
    ) -> tuple[dict[str, Tensor], dict[str, State]]:
        """New tensors and states; arguments as of `Nested.update`."""
        new: dict[str, Tensor] = {}
        states, rows, plans = {**rule}, {}, []
        for name, grad in grads.items():
            row = [grad, params[name], *leaves(rule[name]), *[hypers[key][value] for key, value in self._keys(name)]]
            key = name, *[each.requires_grad for each in row]
            if key not in self._plans:
                self._plans[key] = self._plan(name, row, rule[name])
            if (plan := self._plans[key]) is None:
                return self._nested.update(params, grads, rule, hypers)
            if isinstance(plan, _Plan):
                rows[name] = row
                plans.append(plan)
            else:
                new[name] = plan(*row)
        if not plans:
            return new, states
        made = iter(_apply(plans, *chain.from_iterable(rows.values())))
        for plan, (name, row) in zip(plans, rows.items(), strict=True):
            new[name], *state = [next(made) if i is None else row[i] for i in plan.passed]
            states[name] = filled(rule[name], state)
        return new, states

    def _plan(self, name: str, row: Sequence[Tensor], state: State) -> _Plan | _Descent | None:
        """What to do for one tensor; None if the engine has to do it."""
        param = row[1]
        if any(type(each) not in PLAIN for each in row):
            return None
        try:
            kinds = tuple(kind_of(each.shape, param.shape) for each in row)
        except UnsupportedError:
            return None
        followed = ((each.dtype, each.requires_grad) for each in row)
        ones = (size == 1 for size in param.shape)
        key = self._nested.bindings[name].signature, str(state.keys()), kinds, param.device, *followed, *ones
        if key not in _plans:
            try:
                _plans[key] = self._made(name, row, state)
            except (UnsupportedError, compiler.CompileError):
                _plans[key] = None
        if isinstance(found := _plans[key], _Descent):
            return self._descents.setdefault((found.rate, param.dtype), _Descent(found.rate))
        if found is None:
            return None
        try:
            check_layout([param, *row[1:]], kinds, param)
        except UnsupportedError:
            return None
        return replace(found, forms=[(each.shape, each.stride(), each.dtype) for each in [param, *row[1:]]], sizes=sizes(param))

    def _made(self, name: str, row: Sequence[Tensor], state: State) -> _Plan | _Descent | None:
        count, results = len(row), range(len(leaves(state)) + 1)

        def update(row: Sequence[Tensor]) -> list[Tensor]:
            grad, param, *rest = row
            raws = {key: {value: raw} for (key, value), raw in zip(self._keys(name), rest[len(results) - 1 :], strict=True)}
            new, rule = self._nested.update({name: param}, {name: grad}, {name: filled(state, rest)}, raws)
            return [new[name], *leaves(rule[name])]

        hypers = {len(results) + i: each for i, each in enumerate(self._nested.bindings[name].learned.values(), start=1)}

        def trials(arguments: Sequence[Tensor], *, whole: bool = False, less: int = 0) -> Iterator[list[Tensor]]:
            for each in examples(arguments, row[1].detach(), hypers, 1, whole=whole, less=less):
                if all(bool(torch.isfinite(tensor).all()) for tensor in each):
                    yield each
                write_over(each, [None, *update(each[:count]), *(None for _ in each[len(results) + 1 :])])

        small = next(trials([each.detach() for each in row]))
        with torch.enable_grad():
            at = [each.requires_grad_(like.requires_grad) for each, like in zip(small, row, strict=True)]
            new = update(at)
        passed = [next((i for i, each in enumerate(at) if each is result), None) for result in new]
        written = [i for i in results if passed[i] is None]
        followed = [i for i in written if new[i].requires_grad]
        wanted = [i for i, each in enumerate(row) if each.requires_grad]
        waves = [torch.arange(row[1 + i].numel()).sin().reshape(row[1 + i].shape).to(row[1 + i]) for i in followed]
        arguments = [*row, *waves, *(row[i].clone() for i in wanted), *(row[1 + i].clone() for i in written)]

        def updated(*given: Tensor) -> list[Tensor | None]:
            new = update(given[:count])
            return [*(None for _ in given[: len(given) - len(written)]), *(new[i] for i in written)]

        def pulled(*given: Tensor) -> list[Tensor | None]:
            def chosen(*at: Tensor) -> list[Tensor]:
                row = [*given[:count]]
                for i, each in zip(wanted, at, strict=True):
                    row[i] = each
                new = update(row)
                return [new[i] for i in followed]

            through: Any = torch.func.vjp(chosen, *(given[i] for i in wanted))
            found = through[1](list(given[count : count + len(followed)]))
            return [*(None for _ in given[: count + len(followed)]), *found, *(None for _ in written)]

        functions = [updated, pulled]
        arguments = [each.detach() for each in arguments]
        graphs = [_without_zeros(trace(function, arguments, row[1])) for function in functions]
        request = Request((), "", functions, arguments, row[1], (), partial(trials, arguments))
        if len(results) == 1 and (descent := _descent(graphs[0])):
            program = Engine(lambda *given: [*(None for _ in given[1:]), descent(*given)])
            return None if deviation([program], replace(request, functions=functions[:1])) else descent
        if row[1].device.type != "cpu":
            return None
        outputs, form = dict(graphs[1].outputs), [(each.shape, each.dtype) for each in arguments]
        same = {i: value.args[0] for i, value in outputs.items() if value.op == "input" and form[value.args[0]] == form[i]}
        graphs[1] = UpdateGraph(graphs[1].inputs, tuple((i, value) for i, value in outputs.items() if i not in same))
        compiler.load([code(graph) for graph in graphs])  # side by side
        step, pull = Kernel(graphs[0]), Kernel(graphs[1]) if graphs[1].outputs else None

        def completed(*given: Tensor) -> list[Tensor | None]:
            if pull:
                pull(Batch([[*given]]))
            return [given[same[i]] if i in same else None for i in range(len(given))]

        if deviation([step, Engine(completed)], request):
            return None
        handed = {wanted[i - count - len(followed)]: followed[at - count] for i, at in same.items()}
        read = frozenset(value.args[0] for value in graphs[1].values if value.op == "input")
        return _Plan(step, pull, passed, written, followed, wanted, handed, read)


class _Update(torch.autograd.Function):
    """The updates of many tensors by kernels: of the arguments of all, to all results that are no arguments."""

    @staticmethod
    def forward(ctx: Any, plans: Sequence[_Plan], *tensors: Tensor) -> Any:
        batches: dict[Kernel, _Batch] = {}
        given, results, constant, kept = iter(tensors), [], [], []
        for plan in plans:
            row = [*islice(given, len(plan.forms))]
            row[0] = _lying(row[0], plan.forms[0])
            new = [torch.empty_like(row[1 + i]) for i in plan.written]
            results += new
            constant += [each for i, each in zip(plan.written, new, strict=True) if i not in plan.followed]
            kept += [each if i in plan.read else None for i, each in enumerate(row)]
            batches.setdefault(plan.update, []).append((plan.sizes, [*row, *(None for _ in (*plan.followed, *plan.wanted)), *new]))
        _run(batches)
        ctx.plans = plans
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        batches: dict[Kernel, _Batch] = {}
        kept, along, slopes = iter(ctx.saved_tensors), iter(cotangents), []
        for plan in ctx.plans:
            row, given = [*islice(kept, len(plan.forms))], {i: next(along) for i in plan.written}
            found = {i: given[plan.handed[i]] if i in plan.handed else _empty(plan.forms[i]) for i in plan.wanted}
            slopes += [found.get(i) for i in range(len(row))]
            if plan.pull:
                pulled = [_lying(given[i], plan.forms[1 + i]) for i in plan.followed]
                results = (None if i in plan.handed else each for i, each in found.items())
                batches.setdefault(plan.pull, []).append((plan.sizes, [*row, *pulled, *results, *(None for _ in given)]))
        _run(batches)
        return None, *slopes


_apply: Any = _Update.apply
_Batch = list[tuple[tuple[int, int], list[Tensor | None]]]


def _run(batches: Mapping[Kernel, _Batch]) -> None:
    for kernel, batch in batches.items():
        kernel.run(*zip(*batch, strict=True))


def _empty(form: Form) -> Tensor:
    shape, strides, dtype = form
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


def _lying(tensor: Tensor | None, form: Form) -> Tensor:
    """A tensor, or a copy of it, with the strides of a form; None for zeros."""
    if tensor is None:
        return _empty(form).zero_()
    return tensor if tensor.stride() == form[1] and not tensor.is_neg() else _empty(form).copy_(tensor)


def _descent(graph: UpdateGraph) -> _Descent | None:
    """Descent by a rate, if that is what a graph does."""
    match [(value.op, *value.args) for _, value in graph.outputs]:
        case [("sub", Value(op="input", args=(1,)), Value(op="mul", args=factors))]:
            match sorted(factors, key=lambda value: value.kind):
                case [Value(op="input", args=(rate,), kind=Kind.NUMBER), Value(op="input", args=(0,))]:
                    return _Descent(rate)
    return None


def _without_zeros(graph: UpdateGraph) -> UpdateGraph:
    """A graph that does the same to finite numbers, without products with a constant zero, such as a weight decay that is off."""
    made, new = Values(), dict[Value, Value]()
    for value in graph.values:
        args = [new[arg] if isinstance(arg, Value) else arg for arg in value.args]
        zeros = [isinstance(arg, Value) and arg.is_constant(0) for arg in args]
        new[value] = made(value.op, args, value.kind, value.dtype, value.computed)
        if any(zeros) and value.op in ("mul", "cast", "expand"):
            new[value] = made("constant", (0,), value.kind, value.dtype)
        elif any(zeros) and value.op == "add":
            other = args[zeros.index(True) - 1]
            if (other.kind, other.dtype) == (value.kind, value.dtype):
                new[value] = other
    return UpdateGraph(graph.inputs, tuple((i, new[value]) for i, value in graph.outputs))
