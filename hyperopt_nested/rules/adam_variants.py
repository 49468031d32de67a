"""Relatives of Adam: NAdam, RAdam and Adamax."""

from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import counter, kink, safe_sqrt, zeros_like
from hyperopt_nested.rule import Learn, accumulator, rule
from hyperopt_nested.rules.adam import init_moments, moments
from hyperopt_nested.trees import State

_HYPERS: dict[str, Any] = {
    "beta1": UnitInterval(0.9),
    "beta2": UnitInterval(0.999),
    "eps": Positive(1e-8),
    "weight_decay": NonNegative(0.0),
}


def _init_nadam(param: Tensor, *, beta1: float | Learn, momentum_decay: float | Learn) -> State:
    return {**init_moments(param), "mu_product": accumulator(param, beta1, momentum_decay) + 1}


def _init_adamax(param: Tensor) -> State:
    return {"step": counter(param), "exp_avg": zeros_like(param), "exp_inf": zeros_like(param)}


def _decayed(param: Tensor, grad: Tensor, lr: Tensor, weight_decay: Tensor, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Parameter and gradient after weight decay."""
    return (param - lr * weight_decay * param, grad) if decoupled else (param, grad + weight_decay * param)


@rule(_init_nadam, coupling="element", lr=NonNegative(2e-3), **_HYPERS, momentum_decay=NonNegative(4e-3))
def nadam(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    momentum_decay: Tensor,
    decoupled_weight_decay: bool = False,
) -> tuple[Tensor, State]:
    r"""Adam with Nesterov's momentum (Dozat 2016, algorithm 2), as `torch.optim.NAdam`.

    The momentum of step t is \(\beta_1 (1 - 0.96^{t \psi} / 2)\).

    Args:
        lr: learning rate, >= 0.
        beta1: where the momentum tends to, and the decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        momentum_decay: \(\psi\), how fast the momentum tends to `beta1`, >= 0.
        decoupled_weight_decay: shrink the parameter by `lr * weight_decay` of itself instead.
    """
    param, grad = _decayed(param, grad, lr, weight_decay, decoupled_weight_decay)
    new = moments(grad, state, beta1, beta2)
    step = new["step"]
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
    product = new["mu_product"] = state["mu_product"] * mu
    denominator = safe_sqrt(new["exp_avg_sq"] / (1 - beta2**step)) + eps
    direction = (1 - mu) / (1 - product) * grad + mu_next / (1 - product * mu_next) * new["exp_avg"]
    return param - lr * direction / denominator, new


@rule(init_moments, coupling="element", lr=NonNegative(1e-3), **_HYPERS)
def radam(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    decoupled_weight_decay: bool = False,
) -> tuple[Tensor, State]:
    """Rectified Adam (Liu et al. 2020, arXiv 1908.03265, algorithm 2), as `torch.optim.RAdam`.

    In the first steps (five, with `beta2` at its default) the second moment is not used.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        decoupled_weight_decay: shrink the parameter by `lr * weight_decay` of itself instead.
    """
    param, grad = _decayed(param, grad, lr, weight_decay, decoupled_weight_decay)
    new = moments(grad, state, beta1, beta2)
    step = new["step"]
    correction = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / correction
    rectified = kink(length, 5.0) > 5
    length, longest = (torch.where(rectified, each, 6) for each in (length, longest))  # else the root's argument may be negative
    rectification = torch.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    adaptive = rectification * torch.sqrt(correction) / (safe_sqrt(new["exp_avg_sq"]) + eps)
    return param - lr * new["exp_avg"] / (1 - beta1**step) * torch.where(rectified, adaptive, 1), new


@rule(_init_adamax, coupling="element", lr=NonNegative(2e-3), **_HYPERS)
def adamax(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, State]:
    """Adam with a decaying maximum in the place of the second moment (Kingma and Ba 2015, algorithm 2), as `torch.optim.Adamax`.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the maximum, in [0, 1).
        eps: added to the gradient's absolute value, > 0.
        weight_decay: added to the gradient times the parameter, >= 0.
    """
    grad = grad + weight_decay * param
    step = state["step"] + 1
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * grad
    before, now = beta2 * state["exp_inf"], kink(grad).abs() + eps
    exp_inf = torch.maximum(kink(before, now), now)
    return param - lr / (1 - beta1**step) * exp_avg / exp_inf, {"step": step, "exp_avg": exp_avg, "exp_inf": exp_inf}
