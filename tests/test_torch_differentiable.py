"""Where torch.optim(differentiable=True) fails, ours is right: derivatives with respect to every hyper, through several steps."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DIFFERENCES, differences
from torch import Tensor

import hyperopt_nested as hn

ADAM = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.1}
# By torch's name: values at which every hyper matters, away from kinks, and the number of steps until the last one does.
RULES: dict[str, tuple[dict[str, float], int]] = {
    "SGD": ({"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}, 2),
    "Adam": (ADAM, 2),
    "AdamW": (ADAM, 2),
    "NAdam": ({**ADAM, "momentum_decay": 0.1}, 2),
    "RAdam": (ADAM, 8),  # the second moment is not used before
    "Adamax": (ADAM, 2),
    "Adagrad": ({"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 0.1}, 2),
    "Adadelta": ({"lr": 0.9, "rho": 0.8, "eps": 0.1, "weight_decay": 0.1}, 2),
    "RMSprop": ({"lr": 0.1, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.5}, 2),
    "Rprop": ({"lr": 0.1, "etaminus": 0.5, "etaplus": 1.2, "step_size_min": 0.055, "step_size_max": 0.13}, 6),  # sizes reach both ends
    "ASGD": ({"lr": 0.1, "lambd": 0.5, "alpha": 0.7, "weight_decay": 0.1}, 2),
    "Adafactor": ({"lr": 0.1, "beta2_decay": -0.8, "eps1": 1.0, "eps2": 2.0, "d": 1.05, "weight_decay": 0.1}, 4),
    "Muon": ({"lr": 0.1, "weight_decay": 0.1, "momentum": 0.8, "eps": 2.0}, 2),
}
EVERY = [(name, hyper) for name in RULES for hyper in hn.get(name.lower())().rule.hypers]

RIGHT, WRONG, NAN, NO_GRAPH, NO_MODE = "right", "wrong", "NaN", "no graph", "no such mode"
# What torch 2.13 does: the derivative is right, it is a wrong number, there is none, or an error is raised.
AS_IT_IS = {
    # the first momentum buffer is detached, the others are changed in place
    "SGD": {"lr": "RuntimeError", "momentum": RIGHT, "dampening": "TypeError", "weight_decay": WRONG},
    "Adam": dict.fromkeys(ADAM, RIGHT),
    "AdamW": dict.fromkeys(ADAM, RIGHT),
    "NAdam": {
        **dict.fromkeys(["lr", "beta1", "momentum_decay"], "RuntimeError"),
        **dict.fromkeys(["beta2", "weight_decay"], "TypeError"),
        "eps": RIGHT,
    },
    "RAdam": {"lr": RIGHT, "beta1": "RuntimeError", "beta2": "TypeError", "eps": RIGHT, "weight_decay": "TypeError"},
    "Adamax": {
        **dict.fromkeys(["lr", "beta1", "weight_decay"], "TypeError"),
        **dict.fromkeys(["beta2", "eps"], "RuntimeError"),
    },
    "Adagrad": {**dict.fromkeys(["lr", "lr_decay", "weight_decay", "initial_accumulator_value"], "TypeError"), "eps": RIGHT},
    "Adadelta": {"lr": "TypeError", "rho": "TypeError", "eps": RIGHT, "weight_decay": "TypeError"},
    "RMSprop": {"lr": "TypeError", "alpha": "TypeError", "eps": RIGHT, "weight_decay": "TypeError", "momentum": RIGHT},
    "Rprop": {
        **dict.fromkeys(["lr", "step_size_min", "step_size_max"], "TypeError"),
        **dict.fromkeys(["etaminus", "etaplus"], "RuntimeError"),
    },
    # the learning rate of the next step is kept as a plain number
    "ASGD": {"lr": NO_GRAPH, "lambd": WRONG, "alpha": NO_GRAPH, "weight_decay": "TypeError"},
    "Adafactor": dict.fromkeys(["lr", "beta2_decay", "eps1", "eps2", "d", "weight_decay"], NO_MODE),
    "Muon": dict.fromkeys(["lr", "weight_decay", "momentum", "eps"], NO_MODE),
}
AS_IT_SHOULD = [(name, hyper) for name, outcomes in AS_IT_IS.items() for hyper, outcome in outcomes.items() if outcome == RIGHT]
NO_ROOT_OF_ZERO = [("SGD", "momentum"), ("Adagrad", "eps"), ("Adadelta", "eps")]  # in the settings above

random = torch.Generator().manual_seed(2)
START, PHASE, WEIGHT = torch.randn(3, 2, 3, generator=random, dtype=torch.float64)
SCALES = torch.randn(8, 2, 3, generator=random, dtype=torch.float64) * torch.arange(1, 9)[:, None, None]
ALL = torch.ones(2, 3, dtype=torch.float64)
ONE_IS_ZERO = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)


def gradient(param: Tensor, step: int, mask: Tensor) -> Tensor:
    """A smooth function of the parameter, whose signs the step alone decides."""
    return mask * SCALES[step] * (2 + torch.sin(2 * param + PHASE))


def final(param: Tensor) -> Tensor:
    return (WEIGHT * torch.cos(param)).sum()


def values_of(name: str, mask: Tensor) -> dict[str, Tensor]:
    """Values of the hypers; without weight decay, where an entry of the gradient is to be exactly zero."""
    values = RULES[name][0]
    values = {**values, "weight_decay": 0.0} if mask is ONE_IS_ZERO and "weight_decay" in values else values
    return {hyper: torch.tensor(value, dtype=torch.float64) for hyper, value in values.items()}


def loss_of_ours(name: str, hypers: dict[str, Tensor], mask: Tensor, steps: int) -> Tensor:
    optimizer = hn.get(name.lower())(**RULES[name][0])
    param, state = START, optimizer.rule.init(START, optimizer.settings)
    for step in range(steps):
        param, state = optimizer.rule.update(param, gradient(param, step, mask), state, hypers)
    return final(param)


PAIRS = {"betas": ("beta1", "beta2"), "eps": ("eps1", "eps2")}
PAIRS |= {"etas": ("etaminus", "etaplus"), "step_sizes": ("step_size_min", "step_size_max")}


def loss_of_torch(name: str, hypers: dict[str, Tensor], mask: Tensor, steps: int, **more: bool) -> Tensor:
    given: dict[str, Any] = {key: value if value.requires_grad else value.item() for key, value in hypers.items()}
    given |= {key: tuple(given.pop(each) for each in pair) for key, pair in PAIRS.items() if pair[0] in given}
    param = START.clone()
    optimizer = getattr(torch.optim, name)([param], **given, **more)
    for step in range(steps):
        param.grad = gradient(param, step, mask).clone()
        optimizer.step()
    return final(param)


def by_differences(loss_of: Callable[..., Tensor], name: str, hyper: str, mask: Tensor) -> float:
    hypers, steps = values_of(name, mask), RULES[name][1]

    def at(h: Tensor) -> Tensor:
        return torch.stack([loss_of(name, hypers | {hyper: hypers[hyper] + each}, mask, steps) for each in h[:, 0]])[:, None]

    return differences(at, hypers[hyper].abs().reshape(1) / 10).item()


def ours(name: str, hyper: str, mask: Tensor = ALL, steps: int | None = None) -> float:
    """Derivative of the loss after some steps, by plain autograd through the rule."""
    hypers = values_of(name, mask)
    loss = loss_of_ours(name, hypers | {hyper: hypers[hyper].requires_grad_()}, mask, steps or RULES[name][1])
    return torch.autograd.grad(loss, hypers[hyper])[0].item()


def theirs(name: str, hyper: str, mask: Tensor = ALL, steps: int | None = None) -> float | str:
    """The same derivative by torch.optim(differentiable=True), or what goes wrong."""
    hypers = values_of(name, mask)
    learned = hypers[hyper].requires_grad_()
    if name in ("Adam", "AdamW") and hyper.startswith("beta"):  # which must both be tensors, or none
        hypers["beta1"].requires_grad_(), hypers["beta2"].requires_grad_()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the gradient of a tensor that is no leaf
            loss = loss_of_torch(name, hypers, mask, steps or RULES[name][1], differentiable=True)
        return torch.autograd.grad(loss, learned)[0].item() if loss.requires_grad else NO_GRAPH
    except (RuntimeError, TypeError, ValueError) as error:
        return NO_MODE if "unexpected keyword argument 'differentiable'" in str(error) else type(error).__name__


def outcome(name: str, hyper: str, mask: Tensor = ALL) -> str:
    found = theirs(name, hyper, mask)
    if isinstance(found, str):
        return found
    right = by_differences(loss_of_torch, name, hyper, mask)
    return NAN if math.isnan(found) else RIGHT if math.isclose(found, right, rel_tol=DIFFERENCES) else WRONG


def changed(name: str, hyper: str, found: object, before: str) -> str:
    return (
        f"torch has changed, not this library: the derivative of torch.optim.{name}(differentiable=True) with respect to {hyper} "
        f"was {before!r} in torch 2.13, and is {found!r} in {torch.__version__}: update this file"
    )


@pytest.mark.parametrize(("name", "hyper"), EVERY)
def test_ours_is_right(name: str, hyper: str) -> None:
    expected = by_differences(loss_of_ours, name, hyper, ALL)
    assert expected != 0
    assert ours(name, hyper) == pytest.approx(expected, rel=DIFFERENCES, abs=0)


@pytest.mark.parametrize(("name", "hyper"), EVERY)
def test_ours_is_right_where_an_entry_has_no_gradient(name: str, hyper: str) -> None:
    found = ours(name, hyper, ONE_IS_ZERO)
    assert math.isfinite(found)
    if hyper != "weight_decay":  # which is at the end of its domain
        assert found == pytest.approx(by_differences(loss_of_ours, name, hyper, ONE_IS_ZERO), rel=DIFFERENCES, abs=0)


@pytest.mark.parametrize(("name", "hyper"), EVERY)
def test_torch_as_it_is(name: str, hyper: str) -> None:
    found, before = outcome(name, hyper), AS_IT_IS[name][hyper]
    assert found == before, changed(name, hyper, found, before)


@pytest.mark.parametrize(("name", "hyper"), [pair for pair in AS_IT_SHOULD if pair[1] != "weight_decay"])
def test_torch_where_an_entry_has_no_gradient(name: str, hyper: str) -> None:
    """Where a second moment is exactly zero, its root has an infinite derivative, and what is right above is NaN."""
    found, before = outcome(name, hyper, ONE_IS_ZERO), RIGHT if (name, hyper) in NO_ROOT_OF_ZERO else NAN
    assert found == before, changed(name, hyper, found, before)


@pytest.mark.parametrize("name", [name for name in RULES if "weight_decay" in RULES[name][0] and name not in ("Adafactor", "Muon")])
def test_torch_cannot_learn_weight_decay_from_zero(name: str) -> None:
    found = theirs(name, "weight_decay", ONE_IS_ZERO)
    assert found == NO_GRAPH, changed(name, "weight_decay=0", found, NO_GRAPH)
    assert abs(ours(name, "weight_decay", ONE_IS_ZERO)) > 1e-3


def test_radam_before_it_uses_the_second_moment() -> None:
    """Its eps has derivative zero there: torch has no graph."""
    found = theirs("RAdam", "eps", steps=2)
    assert found == NO_GRAPH, changed("RAdam", "eps in the first steps", found, NO_GRAPH)
    assert ours("RAdam", "eps", steps=2) == 0
