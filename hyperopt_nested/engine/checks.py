"""Checks of what the engine is given: horizons, optimizers, tensors."""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

import functools
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.checks import not_an_optimizer
from hyperopt_nested.engine.binding import Binding, Bindings, Tensors, Values
from hyperopt_nested.engine.discounted import Discounted
from hyperopt_nested.engine.learned import LearnedHyper
from hyperopt_nested.engine.one_step import OneStep
from hyperopt_nested.engine.sensitivity import unused
from hyperopt_nested.rule import Optimizer
from hyperopt_nested.trees import State, same

Horizon = OneStep | Discounted
"""How many past updates a hypergradient looks through."""


def check_horizon(horizon: Any) -> None:
    """Refuse what is no horizon.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(horizon, Horizon):
        raise TypeError(f"horizon={horizon!r} ({type(horizon).__name__}) must be hn.OneStep(...) or hn.Discounted(...)")


_used: set[Hashable] = set()
"""Updates that `check_used` has tried."""


def check_used(binding: Binding, name: str, param: Tensor) -> None:
    """Refuse to learn what the update does not use, tried once on a tensor of the parameter's shape (a large one has no values).

    Raises:
        ValueError: the message names the hyper and the remedy.
    """
    optimizer, learned = binding.optimizer, {each.key: (hyper, each) for hyper, each in binding.learned.items()}
    if not learned:
        return
    rule = optimizer.rule
    values = ((hyper, each.learn.value, each.learn.per, each.via) for hyper, each in binding.learned.items())
    kinds = ((kind, tuple(keys)) for kind, keys in binding.memory.items())
    update = binding.signature, *values, *kinds, param.shape, param.dtype
    if update in _used:
        return
    device = "cpu" if param.numel() < 1 << 17 else "meta"  # meta tensors cost no memory, but operations on them are slow
    probe = torch.zeros(param.shape, dtype=param.dtype, device=device)
    raws = {key: each.start(probe, each.learn.value) for key, (_, each) in learned.items()}
    trial = binding.update(probe, probe, rule.init(probe, optimizer.settings), {})
    total, in_total = None, set[str]()
    if rule.reduction:
        total = torch.zeros_like(trial.reduced(raws))
        if not unused(lambda totals: trial.param(raws, totals["total"]), {"total": total}):
            in_total = set(raws) - set(unused(trial.reduced, raws))
    for key in unused(functools.partial(trial.param, total=total), raws):
        hyper = learned[key][0]
        if key not in in_total and hyper not in rule.nondifferentiable:
            raise ValueError(
                f"{hyper} is learned, but {rule.name} does not use it in the update of {name!r} (settings: "
                f"{optimizer!r}), so its hypergradient would always be zero: give {hyper} a plain value, or switch on what uses it"
            )
    remembered = {key: kind for kind, keys in binding.memory.items() for key in keys}
    for key in in_total & remembered.keys():
        hyper, each = learned[key]
        if each.learn.per != "model" or remembered[key] != "forward":
            outermost = "" if rule.reduction == rule.name else ", or put what needs the sum outermost, where it sees the raw gradients"
            raise ValueError(
                f"{hyper} enters the sum over all tensors that {rule.name} needs: learn it per 'model', with memory "
                f"'auto' or 'forward'{outermost}"
            )
    _used.add(update)


def optimizers_of(optimizer: Any) -> list[Optimizer]:
    """The optimizers that an engine is made of.

    Raises:
        TypeError: there is something else.
    """
    if isinstance(optimizer, Optimizer):
        return [optimizer]
    if not isinstance(optimizer, Mapping):
        raise not_an_optimizer("optimizer", optimizer)
    for name, each in optimizer.items():
        if not isinstance(each, Optimizer):
            raise not_an_optimizer(f"optimizer[{name!r}]", each)
    return list(optimizer.values())


def check_losses(names: Iterable[str], values: Values, bindings: Bindings) -> None:
    """Refuse a step without the loss that a rule reads.

    Raises:
        ValueError: it is missing.
    """
    for name in names:
        rule = bindings[name].optimizer.rule
        if missing := [loss for loss in rule.loss_names if loss not in values.get(name, {})]:
            raise ValueError(f"{rule.name} reads the loss of each step: give values={{{name!r}: {{{missing[0]!r}: loss}}}}")


def check_shared(learned: LearnedHyper, optimizer: Optimizer, name: str) -> None:
    """Refuse one `learn(...)` for hypers of several names, domains or starts: its value would leave one of these.

    Raises:
        ValueError: it is given to such.
    """
    first, hyper = learned.key.split("#")[0], optimizer.rule.hypers[name]
    if first != name or learned.hyper.ends != hyper.ends or learned.via != optimizer.via(name):
        raise ValueError(
            f"one learn(...) object is given to {first} in {learned.hyper} and to {name} of {optimizer.rule.name} in {hyper}: give each a "
            "learn(...) of its own"
        )
    if learned.learn.value != (start := optimizer.declared[name]):
        raise ValueError(
            f"one learn() object is given to hypers {name} whose defaults differ, {learned.learn.value!r} and {start!r} of "
            f"{optimizer.rule.name}: give it a start, learn(value)"
        )


def check_tensors(argument: str, tensors: Any) -> None:
    """Refuse what maps no names to tensors.

    Raises:
        TypeError: it does not.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"{argument} is a {type(tensors).__name__}; it must be a mapping from names to tensors: dict(model.named_parameters())"
        )
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}[{name!r}]={tensor!r} ({type(tensor).__name__}) must be a tensor")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def check_step(
    params: Tensors,
    grads: Tensors,
    st: State,
    values: Values,
    learn: Any,
    bindings: Bindings,
    learned: Collection[str],
) -> None:
    """Refuse arguments of `Nested.step` that do not fit each other. It looks at no number of a tensor: nothing waits for a device.

    Raises:
        TypeError: `learn` is neither a bool nor a collection of names.
        ValueError: something is of no tensor or hyper, of another shape, or outside its domain.
    """
    for argument, mapping in (("params", params), ("grads", grads), ("values", values)):
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{argument} is a {type(mapping).__name__}; it must be a mapping from the names of tensors")
    for name, grad in grads.items():
        if not isinstance(grad, Tensor):
            raise TypeError(f"grads[{name!r}]={grad!r} ({type(grad).__name__}) must be a tensor; leave out tensors without a gradient")
        if name not in params or name not in st["rule"]:
            where = "params" if name not in params else "st, which init makes"
            raise ValueError(f"grads has {name!r}, which is not in {where}; there are: {_listed(params if name in grads else st['rule'])}")
        if grad.shape != params[name].shape:
            raise ValueError(f"grads[{name!r}] has shape {tuple(grad.shape)}, the tensor {tuple(params[name].shape)}: they must be equal")
    last = None
    for name, scheduled in values.items():
        if same(scheduled, last) and name in st["rule"]:
            continue  # tensors of a group share them
        last = scheduled
        if name not in st["rule"]:
            raise ValueError(f"values has {name!r}, which is no tensor; there are: {_listed(st['rule'])}")
        if not isinstance(scheduled, Mapping):
            raise TypeError(f"values[{name!r}]={scheduled!r} ({type(scheduled).__name__}) must be a mapping from hypers to numbers")
        optimizer = bindings[name].optimizer
        for hyper, value in scheduled.items():
            if hyper not in optimizer.settings:
                raise ValueError(f"values[{name!r}] has {hyper!r}, which is no hyper of {optimizer!r}")
            if not isinstance(value, Tensor):
                optimizer.rule.hypers[hyper].check_scheduled(f"values[{name!r}][{hyper!r}]", value)
    if not isinstance(learn, bool):
        if isinstance(learn, str) or not isinstance(learn, Collection):
            raise TypeError(f"learn={learn!r} must be True, False, or a collection of learned hypers, such as {[*learned][:1]}")
        if odd := [key for key in learn if key not in learned]:
            raise ValueError(f"learn has {odd[0]!r}, which is not learned; learned are: {_listed(learned)}")
