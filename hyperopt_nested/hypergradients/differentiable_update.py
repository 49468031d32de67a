"""The update of tensors with a native pull-back: autograd keeps what an update is given, and nothing that is computed on the way."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.backends import compiler
from hyperopt_nested.backends.cpp import code
from hyperopt_nested.backends.fused import Kernel, check_layout, sizes
from hyperopt_nested.backends.graph import UnsupportedError, UpdateGraph, Value, Values, kind_of
from hyperopt_nested.backends.program import Request
from hyperopt_nested.backends.trace import trace
from hyperopt_nested.backends.verify import deviation, examples
from hyperopt_nested.engine.binding import Tensors
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.engine.sensitivity import Named
from hyperopt_nested.rule import Learn
from hyperopt_nested.trees import State, filled, leaves


@dataclass(frozen=True, eq=False)
class _Plan:
    """Kernels of one tensor's update. Its arguments: gradient, tensor, leaves of the state, unconstrained values. Results come after.

    Arguments of both kernels are these, a cotangent of each result that is followed, and what the kernels write: a derivative for each
    argument that is wanted, and each result that is no argument.
    """

    update: Kernel
    pull: Kernel
    passed: list[int | None]  # by result: the argument that it is, if it is one
    followed: list[int]  # results that depend on wanted arguments
    wanted: list[int]  # arguments that autograd follows
    written: list[int]  # results that are no arguments
    read: frozenset[int]  # arguments that the pull-back reads
    forms: list[tuple[torch.Size, tuple[int, ...], torch.dtype]] = field(default_factory=list)  # of arguments: shape, strides and dtype
    sizes: tuple[int, int] = 0, 0  # rows and columns


_plans: dict[Hashable, _Plan | None] = {}


class DifferentiableUpdate:
    """`Nested.update`, by kernels that are traced from it and verified against it; by itself, where there are none.

    Autograd can differentiate it once.

    Args:
        nested: the engine; its learned hypers have no bijections.
    """

    def __init__(self, nested: Nested) -> None:
        self._nested = nested
        self._plans: dict[Hashable, _Plan | None] = {}

    def __call__(
        self, params: Tensors, grads: Tensors, rule: Mapping[str, State], hypers: Mapping[str, Named]
    ) -> tuple[dict[str, Tensor], dict[str, State]]:
        """New tensors and states; arguments as of `Nested.update`."""
        rows, plans = list[list[Tensor]](), list[_Plan]()
        for name, grad in grads.items():
            raws = (hypers[each.key][each.key_of(name)] for each in self._nested.bindings[name].learned.values())
            row = [grad, params[name], *leaves(rule[name]), *raws]
            key = name, *(each.requires_grad for each in row)
            if key not in self._plans:
                self._plans[key] = self._plan(name, row, rule[name])
            if (plan := self._plans[key]) is None:
                return self._nested.update(params, grads, rule, hypers)
            rows.append(row)
            plans.append(plan)
        made = iter(_apply(plans, *chain.from_iterable(rows)))
        new = [[next(made) if i is None else row[i] for i in plan.passed] for plan, row in zip(plans, rows, strict=True)]
        named = list(zip(grads, new, strict=True))
        return {name: first for name, (first, *_) in named}, {name: filled(rule[name], state) for name, (_, *state) in named}

    def _plan(self, name: str, row: Sequence[Tensor], state: State) -> _Plan | None:
        """What to do for one tensor; None if the engine has to do it."""
        optimizer, param = self._nested.bindings[name].optimizer, row[1]
        try:
            kinds = tuple(kind_of(each.shape, param.shape) for each in row)
            check_layout([row[1], *row[1:]], kinds, param)
        except UnsupportedError:
            return None
        fixed = ((hyper, None if isinstance(value, Learn) else value) for hyper, value in optimizer.settings.items())
        followed = ((each.dtype, each.requires_grad) for each in row)
        ones = (size == 1 for size in param.shape)
        key = optimizer.rule.signature, optimizer.maximize, *fixed, str(state.keys()), kinds, *followed, *ones
        if key not in _plans:
            try:
                _plans[key] = self._made(name, row, state)
            except (UnsupportedError, compiler.CompileError):
                _plans[key] = None
        found = _plans[key]
        forms = [(each.shape, each.stride(), each.dtype) for each in [row[1], *row[1:]]]
        return found and replace(found, forms=forms, sizes=sizes(param))

    def _made(self, name: str, row: Sequence[Tensor], state: State) -> _Plan | None:
        count, results = len(row), range(len(leaves(state)) + 1)
        keys = [(each.key, each.key_of(name)) for each in self._nested.bindings[name].learned.values()]

        def update(row: Sequence[Tensor]) -> list[Tensor]:
            grad, param, *rest = row
            raws = {key: {value: raw} for (key, value), raw in zip(keys, rest[len(results) - 1 :], strict=True)}
            new, rule = self._nested.update({name: param}, {name: grad}, {name: filled(state, rest)}, raws)
            return [new[name], *leaves(rule[name])]

        hypers = {len(results) + i: each for i, each in enumerate(self._nested.bindings[name].learned.values(), start=1)}

        def trials(arguments: Sequence[Tensor], *, whole: bool = False, less: int = 0) -> Iterator[list[Tensor]]:
            made = examples(arguments, row[1].detach(), hypers, 1, advance, whole=whole, less=less)
            return (each for each in made if all(bool(torch.isfinite(tensor).all()) for tensor in each))

        def advance(*given: Tensor) -> list[Tensor | None]:
            return [None, *update(given[:count]), *(None for _ in given[len(results) + 1 :])]

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
        compiler.load([code(graph) for graph in graphs])  # side by side
        kernels = [Kernel(graph) for graph in graphs]
        request = Request((), "", functions, arguments, row[1], (), partial(trials, arguments))
        if deviation(kernels, request):
            return None
        read = frozenset(value.args[0] for value in graphs[-1].values if value.op == "input")
        return _Plan(kernels[0], kernels[-1], passed, followed, wanted, written, read)


class _Update(torch.autograd.Function):
    """The updates of many tensors: of the arguments of all, to all results that are no arguments."""

    @staticmethod
    def forward(ctx: Any, plans: Sequence[_Plan], *tensors: Tensor) -> Any:
        given, batches = iter(tensors), dict[Kernel, _Batch]()
        results, constant, kept = list[Tensor](), list[Tensor](), list[Tensor | None]()
        for plan in plans:
            row = [_lying(next(given), *form) for form in plan.forms]
            new = [_empty(*plan.forms[1 + i]) for i in plan.written]
            results += new
            constant += [each for i, each in zip(plan.written, new, strict=True) if i not in plan.followed]
            kept += [each if i in plan.read else None for i, each in enumerate(row)]
            batches.setdefault(plan.update, []).append((plan.sizes, [*row, *(None for _ in (*plan.followed, *plan.wanted)), *new]))
        _run(batches)
        ctx.plans = plans
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(*constant)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        kept, along, batches = iter(ctx.saved_tensors), iter(cotangents), dict[Kernel, _Batch]()
        slopes = list[Tensor | None]()
        for plan in ctx.plans:
            row, given = [next(kept) for _ in plan.forms], {i: next(along) for i in plan.written}
            found = {i: _empty(*plan.forms[i]) for i in plan.wanted}
            slopes += [found.get(i) for i in range(len(row))]
            pulled = [_lying(given[i], *plan.forms[1 + i]) for i in plan.followed]
            batches.setdefault(plan.pull, []).append((plan.sizes, [*row, *pulled, *found.values(), *(None for _ in given)]))
        _run(batches)
        return None, *slopes


_apply: Any = _Update.apply
_Batch = list[tuple[tuple[int, int], list[Tensor | None]]]


def _run(batches: Mapping[Kernel, _Batch]) -> None:
    for kernel, batch in batches.items():
        kernel.run(*zip(*batch, strict=True))


def _empty(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


def _lying(tensor: Tensor, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor, or a copy of it, with these strides."""
    return tensor if tensor.stride() == strides and not tensor.is_neg() else _empty(shape, strides, dtype).copy_(tensor)


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
