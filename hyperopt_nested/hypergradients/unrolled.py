"""Hypergradients beyond one step: through many, in reverse (with rematerialisation) or forward, or at the point of rest."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hyperopt_nested.domains import Hyper
from hyperopt_nested.engine.checks import optimizers_of
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.engine.one_step import OneStep
from hyperopt_nested.engine.sensitivity import nothing_transforms
from hyperopt_nested.hypergradients.carried import no_recomputation
from hyperopt_nested.hypergradients.implicit import Solver
from hyperopt_nested.hypergradients.losses import Hypers, OuterLoss, Tensors, TrainLoss
from hyperopt_nested.hypergradients.training import Trace, Training
from hyperopt_nested.rule import Learn, Optimizer

Method = Literal["reverse", "forward", "implicit"]
"""How a hypergradient is taken through the steps of training: see `hypergradient`."""

Backend = Literal["auto", "reference", "fused"]
"""What does updates, and pulls back through them, in reverse:

* "reference": the engine and autograd.
* "fused": native kernels, for which autograd keeps the arguments of updates alone: for tensors on the CPU, and rules that go row by row or
  element by element, where there is a C++ compiler; else the engine. They are compiled when a rule is first used, and used after they have
  reproduced the engine's results on examples of finite numbers. Plain gradient descent needs none: two of torch's operators do it.
* "auto": "fused" where steps times numbers are many; else the engine.
"""

_MANY = 1 << 19
"""Numbers that are updated, in all steps together, from which on kernels are compiled for them."""


@no_recomputation()
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
    has_aux: bool = False,
    create_graph: bool = False,
    solver: Solver = "cg",
    iterations: int = 100,
    backend: Backend = "auto",
    wrt_params: bool = True,
) -> "Hypergradients":
    """Gradient of a loss after training with respect to every learned hyper: through all steps, and through the model's curvature.

    The tensors are trained by the optimizer, with hypers that stay at their values, on one batch a step; then the outer loss is taken.

    Args:
        optimizer: with `learn(...)` in the place of the hypers to differentiate with respect to; who learns them does not matter. Or a
            mapping from each tensor's name to its optimizer.
        params: the tensors before the first step, by name.
        batches: one a step; anything that `train_loss` takes. `method="forward"` takes them one by one.
        train_loss: pure function of tensors and a batch to a loss of shape (). Tensors that do not enter it in a step are left alone in
            that step, as without a gradient in `torch.optim`. In reverse, what it computes under `torch.no_grad` or detaches is a constant.
        outer_loss: pure function of the trained tensors, `outer_batch` and the values of hypers to a loss of shape ().
        outer_batch: handed to `outer_loss`.
        method: "reverse" takes time that does not depend on the number of hypers, and memory that grows with the number of steps;
            "forward" takes time that grows with the number of entries of hypers, and memory that does not depend on the steps;
            "implicit" takes `params` for trained already, on one batch, to where the optimizer's first update changes nothing, and its
            cost does not depend on how they came there.
        horizon: differentiate through so many last steps only, and do those before them without; None: through all.
        memory: of "reverse": "full" keeps all steps; "sqrt", or a number, keeps the start of each segment of about sqrt(steps), or so
            many, steps and does the steps of one segment again at a time.
        hypers: other values than those declared, in their domains, by hyper and by key. A value with one more leading dimension, as long as
            there are steps, is a schedule: an entry a step.
        has_aux: whether the losses may return a pair of the loss and anything else, such as metrics, which the result then has.
        solver: of "implicit"; see `Solver`.
        iterations: of "implicit": how many the solver makes.
        create_graph: of "reverse" with `memory="full"`: whether the result can be differentiated by autograd.
        backend: of "reverse": what does the updates; see `Backend`.
        wrt_params: of "reverse": whether the derivative with respect to `params` is taken too, at the cost of one Hessian-vector product.

    Returns:
        By hyper and by key, the derivative with respect to its value (not to its coordinates in a bijection), of the value's shape.

    Raises:
        ValueError: an argument is none of its choices, nothing is learned, there are too few batches, or, with "implicit", there is not
            just one, the point of rest does not depend on a hyper (as on a learning rate), or the tensors are not near it.
        NotImplementedError: an operation in `train_loss` has no derivative that the method needs, or torch's is wrong, or a module changes
            a buffer outside of autograd; the message names it.
        TypeError: a loss returns something else than a tensor; the message names it.
        RuntimeError: with segments of steps, `train_loss` returns another loss when a step is done again.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> optimizer = hn.sgd(lr=hn.learn(0.1, by=hn.sgd()))
        >>> loss = lambda params, batch, hypers=None: params["w"].square().sum() / 2
        >>> # w is (1 - lr)^3
        >>> hn.hypergradient(optimizer, {"w": torch.ones(1)}, range(3), loss, loss)
        {'lr': {'model': tensor(-1.7715, dtype=torch.float64)}}
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, get_args(Method)))}")
    if create_graph and (method != "reverse" or memory != "full"):
        raise ValueError(f"create_graph=True needs method='reverse' and memory='full', not {method!r} and {memory!r}")
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} must be one of {', '.join(map(repr, get_args(Backend)))}")
    nested = Nested(in_values(optimizer), horizon=OneStep(memory="none"))
    if not nested.learned:
        raise ValueError(f"optimizer={optimizer!r} has no learned hyper: put hn.learn(...) in the place of a number")
    rule, declared = nested.begin(params, {})
    values = _started(nested, declared, hypers or {})
    schedules = [(key, name) for key, by_name in values.items() for name in by_name if by_name[name].shape != declared[key][name].shape]
    carry = {"params": {name: p.detach().clone() for name, p in params.items()}, "rule": rule, "buffers": {}}
    reverse = method != "forward"
    losses = train_loss, lambda params, values: outer_loss(params, outer_batch, values)
    steps = batches if method == "forward" and horizon is None else list(batches)
    many = isinstance(steps, list) and len(steps) * sum(p.numel() for p in params.values()) >= _MANY
    by_kernels = method == "reverse" and not create_graph and nothing_transforms() and (backend == "fused" or (backend == "auto" and many))
    order = 3 if create_graph else 2
    training = Training(
        nested, schedules, *losses, reverse=reverse, has_aux=has_aux, order=order, by_kernels=by_kernels, wrt_params=wrt_params
    )
    if not isinstance(steps, list):
        return Hypergradients(training.forward(carry, values, steps, 0), trace=training.trace)
    if method == "implicit":
        if solver not in get_args(Solver):
            raise ValueError(f"solver={solver!r} must be one of {', '.join(map(repr, get_args(Solver)))}")
        if len(steps) != 1 or horizon is not None:
            raise ValueError(
                f"batches has {len(steps)} entries and horizon={horizon!r}; method='implicit' needs one entry, all the data that the point "
                "of rest is of, and no horizon"
            )
        found, residual = training.implicit(carry, values, steps[0], solver, iterations)
        return Hypergradients(found, residual=residual, trace=training.trace)
    if horizon is not None and (not isinstance(horizon, int) or not 1 <= horizon <= len(steps)):
        raise ValueError(f"horizon={horizon!r} must be in 1 to {len(steps)}, the number of batches; None looks through all")
    begin = 0 if horizon is None else len(steps) - horizon
    segment = _segment(memory, len(steps) - begin)
    carry = training.run(carry, values, steps[:begin], 0, graph=False)
    if method == "forward":
        return Hypergradients(training.forward(carry, values, steps[begin:], begin), trace=training.trace)
    found, through = training.reverse(carry, values, steps[begin:], begin, segment, create_graph)
    return Hypergradients(found, params=through, trace=training.trace)


class Hypergradients(dict[str, Tensors]):
    """Hypergradients by hyper and by key.

    Attributes:
        params: of "reverse" with `wrt_params`: the derivative with respect to the tensors as they were before the first of the steps that
            are looked through, by name. Else None.
        residual: of "implicit": norm of the residual of its linear system, relative to the right-hand side; shape (). Else None.
        loss: the outer loss, shape ().
        aux: with `has_aux`: what `outer_loss` returned beside its loss, without graphs. Else None.
        train_losses: the training loss before each step, shape () each.
        train_aux: what `train_loss` returned beside its loss in each step, as `aux`.
    """

    def __init__(
        self, found: Mapping[str, Tensors], *, params: Tensors | None = None, residual: Tensor | None = None, trace: Trace
    ) -> None:
        super().__init__(found)
        self.params, self.residual, self.loss, self.aux = params, residual, trace.outer, trace.outer_aux
        self.train_losses, self.train_aux = trace.losses, trace.aux


def in_values(optimizer: Optimizer | Mapping[str, Optimizer]) -> Optimizer | dict[str, Optimizer]:
    """The same optimizers with hypers that are their own coordinates; a `learn` that several share stays shared.

    Raises:
        ValueError: an update reads the loss, through which nothing is differentiated.
    """
    for each in optimizers_of(optimizer):  # refuses what is none
        if each.rule.loss_names:
            raise ValueError(f"{each.rule.name} reads the loss of each step: use an optimizer without it, or hn.HyperOptimizer")
    made: dict[int, Learn] = {}

    def plain(each: Optimizer) -> Optimizer:
        for learn in each.learned.values():
            made.setdefault(learn.key, replace(learn, via="projection"))
        return each.replace(**{name: made[learn.key] for name, learn in each.learned.items()})

    if isinstance(optimizer, Optimizer):
        return plain(optimizer)
    found = {id(each): plain(each) for each in optimizer.values()}
    return {name: found[id(each)] for name, each in optimizer.items()}


def check_values(name: str, values: Tensor, hyper: Hyper, via: Any = None) -> None:
    """Refuse a tensor of values of a hyper with one that is outside its domain; values under `torch.func.vmap` are not seen.

    Raises:
        ValueError: one is; the message names it.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        return
    for end in (values.detach().amin(), values.detach().amax()) if values.numel() else ():
        hyper.check(name, float(end), via)


def _started(nested: Nested, declared: Hypers, given: Mapping[str, Mapping[str, Tensor | float]]) -> dict[str, Tensors]:
    """The declared values, replaced by those given: of the same shape, or with a leading dimension of steps."""
    for key, by_name in given.items():
        if not isinstance(by_name, Mapping):
            names = list(declared.get(key, {"model": None}))
            kind = type(by_name).__name__
            raise TypeError(f"hypers[{key!r}]={by_name!r} ({kind}) must map names to values, such as {{{names[0]!r}: ...}}")
        for name in by_name:
            if key not in declared or name not in declared[key]:
                known = ", ".join(f"{key}/{name}" for key, names in declared.items() for name in names)
                raise ValueError(f"hypers has {key!r}/{name!r}, which is not learned; learned are {known}")
    values = {key: dict(by_name) for key, by_name in declared.items()}
    for key, by_name in given.items():
        for name, replaced in by_name.items():
            start = declared[key][name]
            value = torch.as_tensor(replaced, dtype=start.dtype, device=start.device)
            if value.shape != start.shape and value.shape[1:] != start.shape:
                wanted = tuple(start.shape)
                raise ValueError(f"hypers[{key!r}][{name!r}] has shape {tuple(value.shape)}; it must be {wanted}, or (steps, *{wanted})")
            check_values(f"hypers[{key!r}][{name!r}]", value, nested.learned[key].hyper)
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
