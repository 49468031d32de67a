"""Adam and its relatives."""

from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import kink, safe_sqrt
from hyperopt_nested.registry import register
from hyperopt_nested.rule import Learn, Optimizer, learn, rule
from hyperopt_nested.rules._blocks import accumulator, average, counted, decayed, direction, larger, moments, norm, trust_ratio
from hyperopt_nested.rules.sgd import sgd
from hyperopt_nested.trees import State

_moments = counted("exp_avg", "exp_avg_sq")


def _init_adam(param: Tensor, *, amsgrad: bool) -> State:
    return counted("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * amsgrad)(param)


def _adam(grad: Tensor, state: State, beta1: Tensor, beta2: Tensor, eps: Tensor, amsgrad: bool) -> tuple[Tensor, State]:
    """Adam's direction, and its new state."""
    new = moments(grad, state, beta1, beta2)
    second: Tensor = new["exp_avg_sq"]
    if amsgrad:
        second = new["max_exp_avg_sq"] = larger(state["max_exp_avg_sq"], second)
    return direction(new["step"], new["exp_avg"], second, beta1, beta2, eps), new


@rule(_init_adam, separable="element")
def adam(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-3),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.999),
    eps: Tensor = Positive(1e-8),
    weight_decay: Tensor = NonNegative(0.0),
    amsgrad: bool = False,
) -> tuple[Tensor, State]:
    r"""Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), as `torch.optim.Adam`.

    Where the second moment is exactly zero, its root has derivative zero, so that hypergradients stay finite. `betas=(...)` gives both
    decay rates.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: coupled: added to the gradient, >= 0.
        amsgrad: use the largest second moment so far (Reddi et al. 2018).

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adam(1e-2, betas=(0.8, 0.99))
        adam(lr=0.01, beta1=0.8, beta2=0.99, eps=1e-08, weight_decay=0.0)
    """
    step, new = _adam(grad + weight_decay * param, state, beta1, beta2, eps, amsgrad)
    return param - lr * step, new


@rule(_init_adam, separable="element")
def adamw(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-3),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.999),
    eps: Tensor = Positive(1e-8),
    weight_decay: Tensor = NonNegative(1e-2),
    amsgrad: bool = False,
) -> tuple[Tensor, State]:
    r"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), as `torch.optim.AdamW`.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.
        amsgrad: use the largest second moment so far (Reddi et al. 2018).

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adamw(lr=hn.learn(1e-3, hn.sgd(1e-5))).learned["lr"]
        learn(0.001, by=sgd(lr=1e-05, momentum=0.0, dampening=0.0, weight_decay=0.0))
    """
    step, new = _adam(grad, state, beta1, beta2, eps, amsgrad)
    return param - lr * weight_decay * param - lr * step, new


def _second(state: State) -> Tensor:
    found: Tensor = state["max_exp_avg_sq" if "max_exp_avg_sq" in state else "exp_avg_sq"]
    return found


def _finish_adam(param: Tensor, state: State, *, lr: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor) -> Tensor:
    return param - lr * direction(state["step"], state["exp_avg"], _second(state), beta1, beta2, eps)


def _finish_adamw(param: Tensor, state: State, *, lr: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, weight_decay: Tensor) -> Tensor:
    step = direction(state["step"], state["exp_avg"], _second(state), beta1, beta2, eps)
    return param - lr * weight_decay * param - lr * step


adam.finishes(_finish_adam, ("lr", "eps"))
adamw.finishes(_finish_adamw, ("lr", "eps", "weight_decay"))


def adam_hd(lr: float = 1e-3, hyper_lr: float = 1e-8, **settings: Any) -> Optimizer:
    r"""Adam-HD: Adam that learns its learning rate by gradient descent (Baydin et al. 2018, arXiv 1703.04782, Adam-HD).

    \(\eta_t = \eta_{t-1} + \beta\,g_t \cdot d_{t-1}\), projected to \(\eta \ge 0\), where \(d\) is Adam's direction. One learning rate
    for all tensors, as in the paper.

    Args:
        lr: the learning rate's start, >= 0.
        hyper_lr: learning rate \(\beta \ge 0\) of the learning rate.
        **settings: further arguments of `adam`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adam_hd(0.1).learned["lr"].per
        'model'
    """
    return adam(learn(lr, sgd(hyper_lr)), **settings)


register("adam_hd", adam_hd)


def _init_nadam(param: Tensor, *, beta1: float | Learn, momentum_decay: float | Learn) -> State:
    return {**_moments(param), "mu_product": accumulator(param, beta1, momentum_decay) + 1}


@rule(_init_nadam, separable="element")
def nadam(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(2e-3),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.999),
    eps: Tensor = Positive(1e-8),
    weight_decay: Tensor = NonNegative(0.0),
    momentum_decay: Tensor = NonNegative(4e-3),
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
    param, grad = decayed(param, grad, lr, weight_decay, decoupled_weight_decay)
    new = moments(grad, state, beta1, beta2)
    step = new["step"]
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
    product = new["mu_product"] = state["mu_product"] * mu
    denominator = safe_sqrt(new["exp_avg_sq"] / (1 - beta2**step)) + eps
    ahead = (1 - mu) / (1 - product) * grad + mu_next / (1 - product * mu_next) * new["exp_avg"]
    return param - lr * ahead / denominator, new


@rule(_moments, separable="element")
def radam(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-3),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.999),
    eps: Tensor = Positive(1e-8),
    weight_decay: Tensor = NonNegative(0.0),
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
    param, grad = decayed(param, grad, lr, weight_decay, decoupled_weight_decay)
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


@rule(counted("exp_avg", "exp_inf"), separable="element")
def adamax(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(2e-3),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.999),
    eps: Tensor = Positive(1e-8),
    weight_decay: Tensor = NonNegative(0.0),
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
    step, exp_avg = state["step"] + 1, average(state["exp_avg"], grad, beta1)
    exp_inf = larger(beta2 * state["exp_inf"], kink(grad).abs() + eps)
    return param - lr / (1 - beta1**step) * exp_avg / exp_inf, {"step": step, "exp_avg": exp_avg, "exp_inf": exp_inf}


@rule(counted("exp_avg", "exp_avg_var"), separable="element")
def adabelief(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-3),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.999),
    eps: Tensor = Positive(1e-16),
    weight_decay: Tensor = NonNegative(0.0),
) -> tuple[Tensor, State]:
    r"""AdaBelief: Adam, scaled by how far gradients are from their average (Zhuang et al. 2020, arXiv 2010.07468, algorithm 2).

    As in the published program, without its rectification: `eps` is added to the second moment in every step, where it adds up, and
    to its root.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment of gradient minus first moment, in [0, 1).
        eps: added to the second moment, and to its root, > 0.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.
    """
    step, exp_avg = state["step"] + 1, average(state["exp_avg"], grad, beta1)
    surprise = grad - exp_avg
    exp_avg_var = beta2 * state["exp_avg_var"] + (1 - beta2) * surprise * surprise + eps
    along = direction(step, exp_avg, exp_avg_var, beta1, beta2, eps)
    return param - lr * (along + weight_decay * param), {"step": step, "exp_avg": exp_avg, "exp_avg_var": exp_avg_var}


@rule(counted("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"), separable="element")
def adan(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-3),
    beta1: Tensor = UnitInterval(0.98),
    beta2: Tensor = UnitInterval(0.92),
    beta3: Tensor = UnitInterval(0.99),
    eps: Tensor = Positive(1e-8),
    weight_decay: Tensor = NonNegative(0.0),
    no_prox: bool = False,
) -> tuple[Tensor, State]:
    r"""Adan: adaptive steps with Nesterov momentum from differences of gradients (Xie et al. 2022, arXiv 2208.06677, algorithm 1).

    As in the published program, the betas are decay rates (one minus the paper's), and the moments are corrected for their bias. The
    first step takes its own gradient for the previous one.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the gradients' average, in [0, 1).
        beta2: decay rate of the average of gradient differences, in [0, 1); also their weight in a step.
        beta3: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled: the new parameter is divided by `1 + lr * weight_decay` (a proximal step), >= 0.
        no_prox: the old parameter is multiplied by `1 - lr * weight_decay` instead, as in AdamW.
    """
    step = state["step"] + 1
    change = torch.where(state["step"] == 0, 0, grad - state["previous_grad"])
    exp_avg, exp_avg_diff = average(state["exp_avg"], grad, beta1), average(state["exp_avg_diff"], change, beta2)
    ahead = grad + beta2 * change
    exp_avg_sq = beta3 * state["exp_avg_sq"] + (1 - beta3) * ahead * ahead
    along = exp_avg / (1 - beta1**step) + beta2 * exp_avg_diff / (1 - beta2**step)
    move = lr * along / (safe_sqrt(exp_avg_sq / (1 - beta3**step)) + eps)
    new = param * (1 - lr * weight_decay) - move if no_prox else (param - move) / (1 + lr * weight_decay)
    averages = {"exp_avg": exp_avg, "exp_avg_diff": exp_avg_diff, "exp_avg_sq": exp_avg_sq}
    return new, {"step": step, **averages, "previous_grad": grad.clone()}


@rule(_moments, separable="tensor")
def lamb(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-3),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.999),
    eps: Tensor = Positive(1e-6),
    weight_decay: Tensor = NonNegative(1e-2),
) -> tuple[Tensor, State]:
    r"""LAMB: the direction of AdamW, scaled to the norm of each tensor (You et al. 2020, arXiv 1904.00962, algorithm 2).

    Moments are corrected for their bias, and norms are not bounded. Where the weights or the direction are zero, the ratio of their
    norms counts as 1.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: that times the parameter is added to the direction before it is scaled, >= 0.
    """
    step, new = _adam(grad, state, beta1, beta2, eps, amsgrad=False)
    step = step + weight_decay * param
    return param - lr * trust_ratio(norm(param), norm(step)) * step, new
