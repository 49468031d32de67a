"""Hypergradients beyond one step: through many, in reverse (with rematerialisation) or forward, or at the point of rest."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from hyperopt_nested.implicit import Solver, implicit
from hyperopt_nested.nested import Nested
from hyperopt_nested.ops import State, map_tree
from hyperopt_nested.rule import Learn, Optimizer
from hyperopt_nested.twice import check_double_backward, check_forward

Tensors = dict[str, Tensor]
Hypers = Mapping[str, Mapping[str, Tensor]]
"""Values of learned hypers, by hyper and by key ("model", or the tensor's name)."""
Method = Literal["reverse", "forward", "implicit"]
"""How a hypergradient is taken through the steps of training: see `hypergradient`."""

TrainLoss = Callable[[Tensors, Any], Tensor]
OuterLoss = Callable[[Tensors, Any, Hypers], Tensor]


def hypergradient(
    optimizer: Optimizer | Mapping[str, Optimizer],
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    train_loss: TrainLoss,
    outer_loss: OuterLoss,
    *,
    outer_batch: Any = None,
    method: Method = "reverse",
    horizon: int | None = None,
    memory: Literal["full", "sqrt"] | int = "full",
    hypers: Mapping[str, Mapping[str, Tensor | float]] | None = None,
    create_graph: bool = False,
    solver: Solver = "cg",
    iterations: int = 100,
) -> "Hypergradients":
    """Gradient of a loss after training with respect to every learned hyper: through all steps, and through the model's curvature.

    The tensors are trained by the optimizer, with hypers that stay at their values, on one batch a step; then the outer loss is taken.

    Args:
        optimizer: with `learn(...)` in the place of the hypers to differentiate with respect to; who learns them does not matter. Or a
            mapping from each tensor's name to its optimizer.
        params: the tensors before the first step, by name.
        batches: one a step; anything that `train_loss` takes. `method="forward"` takes them one by one.
        train_loss: pure function of tensors and a batch to a loss of shape ().
        outer_loss: pure function of the trained tensors, `outer_batch` and the values of hypers to a loss of shape ().
        outer_batch: handed to `outer_loss`.
        method: "reverse" takes time that does not depend on the number of hypers, and memory that grows with the number of steps;
            "forward" takes time that grows with the number of entries of hypers, and memory that does not depend on the steps;
            "implicit" takes `params` for trained already, on one batch, to where the optimizer's first update changes nothing, and its
            cost does not depend on how they came there.
        horizon: differentiate through so many last steps only, and do those before them without; None: through all.
        memory: of "reverse": "full" keeps all steps; "sqrt", or a number, keeps the start of each segment of about sqrt(steps), or so
            many, steps and does the steps of one segment again at a time.
        hypers: other values than those declared, by hyper and by key. A value with one more leading dimension, as long as there are
            steps, is a schedule: an entry a step.
        solver: of "implicit"; see `Solver`.
        iterations: of "implicit": how many the solver makes.
        create_graph: of "reverse" with `memory="full"`: whether the result can be differentiated by autograd.

    Returns:
        By hyper and by key, the derivative with respect to its value (not to its coordinates in a bijection), of the value's shape.

    Raises:
        ValueError: an argument is none of its choices, nothing is learned, there are too few batches, or, with "implicit", there is not
            just one, the point of rest does not depend on a hyper (as on a learning rate), or the tensors are not near it.
        NotImplementedError: an operation in `train_loss` has no derivative that the method needs; the message names it.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> optimizer = hn.sgd(lr=hn.learn(0.1, by=hn.sgd()))
        >>> loss = lambda params, batch, hypers=None: params["w"].square().sum() / 2
        >>> hn.hypergradient(optimizer, {"w": torch.ones(1)}, range(3), loss, loss)  # w is (1 - lr)^3
        {'lr': {'model': tensor(-1.7715, dtype=torch.float64)}}
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, get_args(Method)))}")
    nested = Nested(in_values(optimizer), memory="none")
    if not nested.learned:
        raise ValueError(f"optimizer={optimizer!r} has no learned hyper: put hn.learn(...) in the place of a number")
    st = nested.init(params)
    values = _started(st["hypers"], hypers or {})
    carry = {"params": {name: p.detach() for name, p in params.items()}, "rule": st["rule"]}
    training = _Training(nested, st["hypers"], train_loss, lambda params, values: outer_loss(params, outer_batch, values))
    if method == "forward" and horizon is None:
        return Hypergradients(training.forward(carry, values, batches, 0))
    steps = list(batches)
    if method == "implicit":
        if solver not in get_args(Solver):
            raise ValueError(f"solver={solver!r} must be one of {', '.join(map(repr, get_args(Solver)))}")
        if len(steps) != 1 or horizon is not None:
            raise ValueError(
                f"batches has {len(steps)} entries and horizon={horizon!r}; method='implicit' needs one entry, all the data that the point "
                "of rest is of, and no horizon"
            )
        found, residual = training.implicit(carry, values, steps[0], solver, iterations)
        return Hypergradients(found, residual=residual)
    if horizon is not None and (not isinstance(horizon, int) or not 1 <= horizon <= len(steps)):
        raise ValueError(f"horizon={horizon!r} must be in 1 to {len(steps)}, the number of batches; None looks through all")
    begin = 0 if horizon is None else len(steps) - horizon
    segment = _segment(memory, len(steps) - begin)
    carry = training.run(carry, values, steps[:begin], 0, graph=False)
    if method == "forward":
        return Hypergradients(training.forward(carry, values, steps[begin:], begin))
    found, through = training.reverse(carry, values, steps[begin:], begin, segment, create_graph)
    return Hypergradients(found, params=through)


class Hypergradients(dict[str, Tensors]):
    """Hypergradients by hyper and by key.

    Attributes:
        params: of "reverse": the derivative with respect to the tensors as they were before the first of the steps that are looked
            through, by name, which costs nothing more. Else None.
        residual: of "implicit": norm of the residual of its linear system, relative to the right-hand side; shape (). Else None.
    """

    def __init__(self, found: Mapping[str, Tensors], *, params: Tensors | None = None, residual: Tensor | None = None) -> None:
        super().__init__(found)
        self.params, self.residual = params, residual


def in_values(optimizer: Optimizer | Mapping[str, Optimizer]) -> Optimizer | dict[str, Optimizer]:
    """The same optimizers with hypers that are their own coordinates; a `learn` that several share stays shared."""
    made: dict[int, Learn] = {}

    def plain(each: Optimizer) -> Optimizer:
        for learn in each.learned.values():
            made.setdefault(id(learn), replace(learn, via="projection"))
        return each.replace(**{name: made[id(learn)] for name, learn in each.learned.items()})

    if isinstance(optimizer, Optimizer):
        return plain(optimizer)
    found = {id(each): plain(each) for each in optimizer.values()}
    return {name: found[id(each)] for name, each in optimizer.items()}


def _started(declared: Hypers, given: Mapping[str, Mapping[str, Tensor | float]]) -> dict[str, Tensors]:
    """The declared values, replaced by those given: of the same shape, or with a leading dimension of steps."""
    for key, by_name in given.items():
        for name in by_name:
            if key not in declared or name not in declared[key]:
                known = ", ".join(f"{key}/{name}" for key, names in declared.items() for name in names)
                raise ValueError(f"hypers has {key!r}/{name!r}, which is not learned; learned are {known}")
    values: dict[str, Tensors] = {}
    for key, by_name in declared.items():
        values[key] = {}
        for name, start in by_name.items():
            value = torch.as_tensor(given.get(key, {}).get(name, start), dtype=start.dtype, device=start.device)
            if value.shape != start.shape and value.shape[1:] != start.shape:
                wanted = tuple(start.shape)
                raise ValueError(f"hypers[{key!r}][{name!r}] has shape {tuple(value.shape)}; it must be {wanted}, or (steps, *{wanted})")
            values[key][name] = value
    return values


def _segment(memory: Literal["full", "sqrt"] | int, steps: int) -> int:
    """Number of steps that are differentiated at a time."""
    if memory == "full":
        return max(steps, 1)
    if memory == "sqrt":
        return max(math.isqrt(steps), 1)
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory={memory!r} must be 'full', 'sqrt' or a number of steps >= 1")
    return memory


class _Training:
    """Training as a function of the values of hypers. What goes from step to step is the tensors and the states of their rules."""

    def __init__(self, nested: Nested, declared: Hypers, train_loss: TrainLoss, outer_loss: Callable[[Tensors, Hypers], Tensor]) -> None:
        self._nested, self._declared, self._train_loss, self._outer_loss = nested, declared, train_loss, outer_loss

    def reverse(
        self, carry: State, values: dict[str, Tensors], batches: Sequence[Any], first: int, segment: int, create_graph: bool
    ) -> tuple[dict[str, Tensors], Tensors]:
        """By autograd, one segment of steps at a time, the last one first; from step number `first`."""
        self._check_schedules(values, first + len(batches))
        if batches:
            check_double_backward(functools.partial(self._loss, batches[0]), carry["params"])
        starts, kept = list(range(0, len(batches), segment)) or [0], [carry]
        random = []
        for begin in starts[:-1]:
            random.append((*get_device_states(*tree_leaves(carry)), torch.get_rng_state()))
            kept.append(self.run(kept[-1], values, batches[begin : begin + segment], first + begin, graph=False))
        total = map_tree(torch.zeros_like, values)
        cotangents: list[Tensor | None] | None = None
        for begin in reversed(starts):
            start, hypers = map_tree(_leaf, kept.pop()), map_tree(_differentiable if create_graph else _leaf, values)
            with torch.enable_grad(), _drawn_again(*random.pop()) if cotangents else nullcontext():
                end = self.run(start, hypers, batches[begin : begin + segment], first + begin, graph=True)
                outputs = [self._outer_loss(end["params"], hypers)] if cotangents is None else tree_leaves(end)
            pairs = [(each, weight) for each, weight in zip(outputs, cotangents or [None], strict=True) if each.requires_grad]
            inputs, structure = tree_flatten((start, hypers))
            found = torch.autograd.grad(
                [each for each, _ in pairs],
                inputs,
                [weight for _, weight in pairs],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
            before, through = tree_unflatten(found, structure)
            cotangents = tree_leaves(before)
            total = map_tree(torch.add, total, through)
        return total, before["params"]

    def run(self, carry: State, values: Hypers, batches: Sequence[Any], begin: int, *, graph: bool) -> State:
        """Some steps of training, from step number `begin`; with `graph`, autograd can differentiate them."""
        for step, batch in enumerate(batches, start=begin):
            params = carry["params"] if graph else map_tree(_leaf, carry["params"])
            with torch.enable_grad():
                loss = self._train_loss(params, batch)
                found = torch.autograd.grad(loss, list(params.values()), create_graph=graph, allow_unused=True, materialize_grads=True)
            with torch.set_grad_enabled(graph):
                carry = self._update(carry, dict(zip(params, found, strict=True)), values, step)
        return carry

    def forward(self, carry: State, values: dict[str, Tensors], batches: Iterable[Any], first: int) -> dict[str, Tensors]:
        """By jvp, with one tangent for each entry of the hypers, all at once under vmap; from step number `first`."""
        flat, structure = tree_flatten(values)
        sizes = [value.numel() for value in flat]
        rows = torch.split(torch.eye(sum(sizes), dtype=torch.float64), sizes, dim=1)
        basis = tree_unflatten([row.reshape(-1, *value.shape).to(value) for row, value in zip(rows, flat, strict=True)], structure)
        tangents = map_tree(lambda leaf: leaf.new_zeros(sum(sizes), *leaf.shape), carry)

        def pushed(function: Callable[[State, dict[str, Tensors]], Any], carry: State, tangents: State) -> Any:
            """The function's value, and its derivative along each tangent."""
            values_at = []  # the value is not batched, and so can leave vmap this way

            def push(*along: Any) -> Any:
                pushed: Any = torch.func.jvp(function, (carry, values), along)
                values_at.append(pushed[0])
                return pushed[1]

            slopes = torch.func.vmap(push, randomness="same")(tangents, basis)
            return values_at[0], slopes

        step = first - 1
        for step, batch in enumerate(batches, start=first):
            if step == first:
                check_forward(functools.partial(self._loss, batch), carry["params"])

            def advance(carry: State, values: dict[str, Tensors], step: int = step, batch: Any = batch) -> State:
                return self._update(carry, torch.func.grad(self._train_loss)(carry["params"], batch), values, step)

            carry, tangents = pushed(advance, carry, tangents)
        self._check_schedules(values, step + 1)
        _, slopes = pushed(lambda carry, values: self._outer_loss(carry["params"], values), carry, tangents)
        parts = [part.reshape(value.shape).to(value) for part, value in zip(torch.split(slopes, sizes), flat, strict=True)]
        found: dict[str, Tensors] = tree_unflatten(parts, structure)
        return found

    def implicit(self, carry: State, values: dict[str, Tensors], batch: Any, solver: Solver, iterations: int) -> tuple[Any, Tensor]:
        """At the point of rest of the first update."""

        def update(params: Tensors, values: dict[str, Tensors]) -> Tensors:
            grads = torch.func.grad(self._train_loss)(params, batch)
            new: Tensors = self._update({**carry, "params": params}, grads, values, 0)["params"]
            return new

        check_double_backward(functools.partial(self._loss, batch), carry["params"])
        return implicit(update, self._outer_loss, carry["params"], values, solver, iterations)

    def _loss(self, batch: Any, params: Tensors) -> Tensor:
        return self._train_loss(params, batch)

    def _update(self, carry: State, grads: Tensors, values: Hypers, step: int) -> State:
        """One step with the values of that step: of a schedule, its entry."""
        now: dict[str, Tensors] = {key: {} for key in values}
        for key, name, value, scheduled in self._each(values):
            if scheduled and step >= len(value):
                raise ValueError(f"hypers[{key!r}][{name!r}] is a schedule of {len(value)} steps, but there are more batches")
            now[key][name] = value[step] if scheduled else value
        params, rule = self._nested.update(carry["params"], grads, carry["rule"], now)
        return {"params": params, "rule": rule}

    def _each(self, values: Hypers) -> Iterator[tuple[str, str, Tensor, bool]]:
        """Hyper, key and value of each, and whether it is a schedule."""
        for key, by_name in values.items():
            for name, value in by_name.items():
                yield key, name, value, value.shape != self._declared[key][name].shape

    def _check_schedules(self, values: Hypers, steps: int) -> None:
        for key, name, value, scheduled in self._each(values):
            if scheduled and len(value) != steps:
                raise ValueError(f"hypers[{key!r}][{name!r}] is a schedule of {len(value)} steps, but there are {steps}")


@contextmanager
def _drawn_again(devices: list[int], states: list[Tensor], cpu: Tensor) -> Iterator[None]:
    """Draw the random numbers again that were drawn from these states of the generators on, and no others after that."""
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _differentiable(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else _leaf(tensor)
