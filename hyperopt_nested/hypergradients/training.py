"""Training as a function of the values of hypers, and its derivatives."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.hypergradients.carried import Carried
from hyperopt_nested.hypergradients.differentiable_update import DifferentiableUpdate
from hyperopt_nested.hypergradients.double_backward import check_twice, named, twice
from hyperopt_nested.hypergradients.draws import Draws, devices_of, drawn_again
from hyperopt_nested.hypergradients.implicit import Solver, implicit
from hyperopt_nested.hypergradients.losses import (
    Hypers,
    Loss,
    Tensors,
    TrainLoss,
    detached,
    evaluate,
    followed,
    gradients,
    is_real,
    is_tensor,
    parted,
    refuse_constant,
)
from hyperopt_nested.trees import State, leaves, map_tree

Values = dict[str, Tensors]

_FEW = 32
"""Steps from which on it is tried in the first whether gradients can be differentiated; before, all steps are soon differentiated."""


@dataclass
class Trace:
    """What the losses returned.

    Attributes:
        losses: the training loss before each step, shape () each.
        aux: what `train_loss` returned beside it, or None.
        outer: the outer loss.
        outer_aux: what `outer_loss` returned beside it, or None.
    """

    losses: list[Tensor] = field(default_factory=list)
    aux: list[Any] = field(default_factory=list)
    outer: Tensor | None = None
    outer_aux: Any = None

    def add(self, loss: Tensor, aux: Any) -> None:
        """Take down what `train_loss` returned in a step."""
        self.losses.append(loss.detach())
        self.aux.append(None if aux is None else detached(aux))

    def end(self, loss: Tensor, aux: Any) -> None:
        """Take down what `outer_loss` returned."""
        self.outer, self.outer_aux = loss.detach(), detached(aux)


class Training:
    """Training as a function of the values of hypers. What goes from step to step is tensors, states of rules, and buffers.

    Args:
        nested: the engine.
        schedules: hyper and key of each value that has an entry a step.
        train_loss: the training loss.
        outer_loss: the outer loss, of tensors and values.
        reverse: whether gradients are differentiated in reverse: what has no such derivative is refused in the first step.
        has_aux: whether the losses may return pairs of a loss and anything else.
        order: how many derivatives of the training loss are taken.
        by_kernels: whether native kernels do and differentiate updates, where there are some, in reverse.
        wrt_params: whether the derivative with respect to the tensors before the first step is wanted, in reverse.

    Attributes:
        trace: what the losses returned.
    """

    def __init__(
        self,
        nested: Nested,
        schedules: Collection[tuple[str, str]],
        train_loss: TrainLoss,
        outer_loss: Callable[[Tensors, Hypers], Loss],
        *,
        reverse: bool,
        has_aux: bool,
        order: int = 2,
        by_kernels: bool = False,
        wrt_params: bool = True,
    ) -> None:
        self._nested, self._schedules, self._train_loss, self._outer_loss = nested, schedules, train_loss, outer_loss
        self._checked: set[str] | None = set() if reverse else None
        self._to_check = reverse
        self._has_aux, self._order, self._tries, self._wrt_params = has_aux, order, True, wrt_params
        self._differentiable = DifferentiableUpdate(nested) if by_kernels else nested.update
        self.trace = Trace()

    def reverse(
        self, carry: State, values: Values, batches: Sequence[Any], first: int, segment: int, create_graph: bool
    ) -> tuple[Values, Tensors | None]:
        """By autograd, one segment of steps at a time, the last one first; from step number `first`."""
        self._check_schedules(values, first + len(batches))
        self._tries = len(batches) >= _FEW
        wanted = ["params"] if self._wrt_params else []
        starts, kept = list(range(0, len(batches), segment)) or [0], [carry]
        devices = devices_of(carry["params"].values())
        draws: list[Draws] = []
        for begin in starts[:-1]:
            draws.append(Draws.now(devices))
            kept.append(self.run(kept[-1], values, batches[begin : begin + segment], first + begin, graph=False))
        total = map_tree(torch.zeros_like, values)
        cotangents: list[Tensor | None] | None = None
        for begin in reversed(starts):
            start, hypers = kept.pop(), map_tree(_differentiable if create_graph else _leaf, values)
            start = {part: map_tree(_leaf if begin or part in wanted else torch.Tensor.detach, tree) for part, tree in start.items()}
            part, at = batches[begin : begin + segment], first + begin
            with torch.enable_grad(), twice():
                if cotangents is None:
                    loss, aux = self._outer(self.run(start, hypers, part, at, graph=True), hypers)
                    self.trace.end(loss, aux)
                    outputs = [loss]
                else:
                    with drawn_again(draws.pop()):
                        outputs = leaves(self._run_again(start, hypers, part, at))
                pairs = [(each, weight) for each, weight in zip(outputs, cotangents or [None], strict=True) if each.requires_grad]
                inputs = {"start": start, "hypers": hypers}
                found = torch.autograd.grad(
                    [each for each, _ in pairs],
                    [each for each in leaves(inputs) if each.requires_grad],
                    [weight for _, weight in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
            slopes = iter(found)
            through = map_tree(lambda leaf: next(slopes) if leaf.requires_grad else leaf, inputs)  # noqa: B023
            before = through["start"]
            cotangents = [*leaves(before)]
            total = map_tree(torch.add, total, through["hypers"])
        return total, before["params"] if wanted else None

    def run(self, carry: State, values: Hypers, batches: Sequence[Any], begin: int, *, graph: bool) -> State:
        """Some steps of training, from step number `begin`; with `graph`, autograd can differentiate them."""
        with torch.enable_grad(), twice():
            for step, batch in enumerate(batches, start=begin):
                carry, loss, aux = self._step(carry, values, batch, step, graph)
                self.trace.add(loss, aux)
        return carry

    def _run_again(self, carry: State, values: Hypers, batches: Sequence[Any], begin: int) -> State:
        """The same steps again.

        Raises:
            RuntimeError: the losses are not the same.
        """
        losses: list[Tensor] = []
        for step, batch in enumerate(batches, start=begin):
            try:
                carry, loss, _ = self._step(carry, values, batch, step, graph=True)
            except (NotImplementedError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise other_again(step, f"raised {type(error).__name__}: {error}", self.trace.losses[step]) from error
            losses.append(loss.detach())
        refuse_other(losses, self.trace.losses[begin : begin + len(losses)], begin)
        return carry

    def _step(self, carry: State, values: Hypers, batch: Any, step: int, graph: bool) -> tuple[State, Tensor, Any]:
        """One step: what goes on, the loss, and what came with it."""
        moving = graph and (self._order > 2 or any(p.requires_grad for p in carry["params"].values()))  # else gradients are constants
        params = {name: p if graph and p.requires_grad else _leaf(p) for name, p in carry["params"].items()}
        twins = _Twins(params)
        check = self._to_check and (moving or not graph)
        carried = Carried(params, carry["buffers"], twin=twins if graph else None, checked=self._checked, apart=True)
        loss, aux = evaluate("train_loss", self._train_loss, carried, batch, has_aux=self._has_aux)
        grads = gradients(loss, params, graph=moving or check)
        if check:
            self._to_check = False
            check_twice(loss, grads, params, order=self._order, trial=self._tries)
        twins.open = True
        with torch.set_grad_enabled(graph):
            buffers = carried.buffers if graph else detached(carried.buffers)
            return self._update(carry, grads, buffers, values, step, differentiable=graph), loss, aux

    def forward(self, carry: State, values: Values, batches: Iterable[Any], first: int) -> Values:
        """By jvp, with one tangent for each entry of the hypers, all at once under vmap; from step number `first`."""
        flat, structure = tree_flatten(values)
        sizes = [value.numel() for value in flat]
        rows = torch.split(torch.eye(sum(sizes), dtype=torch.float64), sizes, dim=1)
        basis = tree_unflatten([row.reshape(-1, *value.shape).to(value) for row, value in zip(rows, flat, strict=True)], structure)

        # torch takes a millisecond for an operator of a tensor that has a derivative and one that has none: these get one of zero
        fixed = {name: self._nested.bindings[name].numbers({}, p.device) for name, p in carry["params"].items()}
        still = map_tree(torch.zeros_like, fixed)

        def pushed(function: Callable[[State, Values, Values], Any], carry: State, tangents: list[Tensor]) -> tuple[Any, list[Tensor]]:
            """What the function returns, a value and anything else, and the value's derivatives along each tangent, by real leaf."""
            at, rebuilt = parted(carry, is_real)
            leaves: list[Any] = []  # of what is returned: it is not batched, and so can leave vmap this way
            places: list[int] = []
            structure: list[Any] = []

            def parts(at: list[Tensor], values: Values, fixed: Values) -> tuple[list[Tensor], list[Tensor]]:
                returned = function(rebuilt(at), values, fixed)
                leaves[:], tree = tree_flatten(returned)
                structure[:] = [tree]
                real = [i for i, leaf in enumerate(leaves[: len(tree_leaves(returned[0]))]) if is_real(leaf)]
                others = [i for i, leaf in enumerate(leaves) if is_tensor(leaf) and i not in real]
                places[:] = real + others
                return [leaves[i] for i in real], [leaves[i] for i in others]

            def push(*along: Any) -> list[Tensor]:
                pushed: Any = torch.func.jvp(parts, (at, values, fixed), (*along, still), has_aux=True)
                real, slopes, others = pushed
                for place, leaf in zip(places, [*real, *others], strict=True):
                    leaves[place] = leaf
                found: list[Tensor] = slopes
                return found

            with named("forward derivative of its gradient", "try method='reverse'"):
                slopes = torch.func.vmap(push, randomness="same")(tangents, basis)
            return tree_unflatten(leaves, structure[0]), slopes

        tangents = [leaf.new_zeros(sum(sizes), *leaf.shape) for leaf in parted(carry, is_real)[0]]
        step = first - 1
        for step, batch in enumerate(batches, start=first):

            def advance(carry: State, values: Values, fixed: Values, step: int = step, batch: Any = batch) -> tuple[State, Any]:
                loss, aux, grads, buffers = self._gradients(carry, batch)
                return self._update(carry, grads, buffers, values, step, fixed=fixed), (loss, aux)

            (carry, (loss, aux)), tangents = pushed(advance, carry, tangents)
            self.trace.add(loss, aux)
        self._check_schedules(values, step + 1)

        def outer(carry: State, values: Values, _: Values) -> Any:
            return followed(lambda params, values: self._outer({**carry, "params": params}, values), carry["params"], values)

        (loss, aux), (slopes,) = pushed(outer, carry, tangents)
        self.trace.end(loss, aux)
        parts = [part.reshape(value.shape).to(value) for part, value in zip(torch.split(slopes, sizes), flat, strict=True)]
        found: Values = tree_unflatten(parts, structure)
        return found

    def implicit(self, carry: State, values: Values, batch: Any, solver: Solver, iterations: int) -> tuple[Any, Tensor]:
        """At the fixed point of the first update. Tensors that do not enter the loss stay as they are."""
        draws = Draws.now(devices_of(carry["params"].values()))
        reached, changed = self._tried(carry, batch)
        kept = {name: p for name, p in carry["params"].items() if name not in reached}

        def update(params: Tensors, values: Values) -> Tensors:
            at = {**carry, "params": {**kept, **params}}
            with drawn_again(draws), twice():
                _, _, grads, _ = self._gradients(at, batch)
            new: Tensors = self._update(at, grads, at["buffers"], values, 0)["params"]
            return {name: new[name] for name in params}

        params = {name: carry["params"][name] for name in reached}
        leaves, hypers = map_tree(_leaf, params), map_tree(_leaf, values)
        with torch.enable_grad():
            at = {**carry, "params": {name: leaves.get(name, p) for name, p in carry["params"].items()}}
            loss, aux = self._outer(at, hypers, still=changed)
            inputs, rebuilt = parted((leaves, hypers), is_real)
            slope, direct = rebuilt(list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)))
        self.trace.end(loss, aux)
        return implicit(update, slope, direct, params, values, solver, iterations)

    def _tried(self, carry: State, batch: Any) -> tuple[list[str], set[str]]:
        """Names of the tensors that enter the training loss, and of the buffers that it changes; tried once.

        Raises:
            NotImplementedError: the loss depends on buffers that it changes, or an operation has no double backward.
        """
        params = {name: _leaf(p) for name, p in carry["params"].items()}
        with torch.enable_grad(), twice():
            carried = Carried(params, carry["buffers"], checked=self._checked)
            loss, aux = evaluate("train_loss", self._train_loss, carried, batch, has_aux=self._has_aux)
            grads = gradients(loss, params, graph=True)
            check_twice(loss, grads, params)
        self.trace.add(loss, aux)
        odd = sorted(key for key in carried.changed if is_real(carried.buffers[key]) and not key.endswith(("running_mean", "running_var")))
        if odd:
            raise NotImplementedError(
                f"train_loss changes the buffer {odd[0]!r}, which method='implicit' does not carry to the fixed point: put the module into "
                "evaluation mode, or use method='reverse' or 'forward'"
            )
        return list(grads), carried.changed

    def _gradients(self, carry: State, batch: Any) -> tuple[Tensor, Any, Tensors, Tensors]:
        """Training loss and what came with it, gradients, and new buffers; may be differentiated by torch.func and by autograd."""

        def inside(params: Tensors) -> tuple[Tensor, Any, Tensors, Tensors]:
            carried = Carried(params, carry["buffers"], twin=carry["params"].__getitem__, apart=True)
            loss, aux = evaluate("train_loss", self._train_loss, carried, batch, has_aux=self._has_aux)
            return loss, aux, gradients(loss, params, graph=True), carried.buffers

        found: tuple[Tensor, Any, Tensors, Tensors] = followed(inside, carry["params"])
        return found

    def _outer(self, carry: State, values: Hypers, still: Collection[str] = ()) -> tuple[Tensor, Any]:
        """The outer loss, and what came with it; buffers named in `still` are not known."""
        carried = Carried(carry["params"], carry["buffers"], twin=carry["params"].__getitem__, checked=self._checked, unknown=still)
        loss, aux = evaluate("outer_loss", lambda params: self._outer_loss(params, values), carried, has_aux=self._has_aux)
        if not loss.requires_grad:
            raise refuse_constant("outer_loss", "params or hypers")
        return loss, aux

    def _update(
        self,
        carry: State,
        grads: Tensors,
        buffers: Tensors,
        values: Hypers,
        step: int,
        *,
        differentiable: bool = False,
        fixed: Values | None = None,
    ) -> State:
        """One step with the values of that step: of a schedule, its entry. What has no gradient is left alone.

        `fixed` are values of hypers that are not learned, by tensor; None for those that are declared.
        """
        now: dict[str, Tensors] = {key: {**by_name} for key, by_name in values.items()}
        for key, name in self._schedules:
            if step >= len(schedule := values[key][name]):
                raise ValueError(f"hypers[{key!r}][{name!r}] is a schedule of {len(schedule)} steps, but there are more batches")
            now[key][name] = schedule[step]
        before = carry["params"]
        if differentiable:
            params, rule = self._differentiable(before, grads, carry["rule"], now)
        else:
            params, rule = self._nested.update(before, grads, carry["rule"], now, {name: fixed[name] for name in grads} if fixed else None)
        params = {**before, **params}
        if differentiable:  # gradients of the next step must not reach this one's tensors, through buffers
            params = {name: p.view_as(p) if p is before[name] else p for name, p in params.items()}
        return {"params": params, "rule": {**carry["rule"], **rule}, "buffers": buffers}

    def _check_schedules(self, values: Hypers, steps: int) -> None:
        for key, name in self._schedules:
            if (length := len(values[key][name])) != steps:
                raise ValueError(f"hypers[{key!r}][{name!r}] is a schedule of {length} steps, but there are {steps}")


_JUMP = 100.0  # times the largest difference so far: what rounding becomes in one step


def refuse_other(losses: Sequence[Tensor], before: Sequence[Tensor], begin: int) -> None:
    """Refuse losses of steps that are done again, if they are not those of before, up to rounding.

    Raises:
        RuntimeError: the message names the step, and the remedy.
    """
    again, first = (torch.stack([loss.detach().double().cpu() for loss in each]) for each in (losses, before))
    rounding = torch.finfo(losses[0].dtype).eps
    size = first.abs().nan_to_num(0, 0).amax() * rounding
    differ = (again - first).abs() / first.abs().clamp(min=size.clamp(min=torch.finfo(torch.float64).tiny))
    differ = torch.where((again == first) | (again.isnan() & first.isnan()), 0, differ).nan_to_num(math.inf)
    allowed = math.sqrt(rounding)
    for step, found in enumerate(differ.tolist()):
        if found > allowed:
            raise other_again(begin + step, f"returned {float(again[step])!r}", first[step])
        allowed = max(allowed, _JUMP * found)


def other_again(step: int, what: str, before: Tensor) -> RuntimeError:
    """The error for a step that was done again, and was another."""
    return RuntimeError(
        f"train_loss {what} when step {step} was done again, and {float(before)!r} before: it keeps something from call to call, such as a "
        "generator of its own (torch.Generator, numpy.random.default_rng), a counter, an iterator or a batch that it changes in place, or "
        "it is not deterministic. Use memory='full', which does each step once, or make what changes a part of the batches"
    )


class _Twins:
    """Views of tensors, by name: no derivatives go through them before they are open."""

    def __init__(self, params: Tensors) -> None:
        self._params, self.open = params, False

    def __call__(self, name: str) -> Tensor:
        twin = self._params[name].view_as(self._params[name])
        if twin.requires_grad:
            twin.register_hook(lambda slope: slope if self.open else torch.zeros_like(slope))  # type: ignore[no-untyped-call]
        return twin


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _differentiable(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else _leaf(tensor)
