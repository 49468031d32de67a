"""Adam and its relatives."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperopt_nested.domains import Interval, NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import kink, safe_sqrt
from hyperopt_nested.projections import frobenius
from hyperopt_nested.registry import register
from hyperopt_nested.rule import FunctionRule, Learn, Optimizer, learn, rule
from hyperopt_nested.rules._blocks import accumulator, average, counted, decayed, direction, is_on, larger, moments, trust_ratio
from hyperopt_nested.rules.sgd import sgd
from hyperopt_nested.signatures import Init, Separable
from hyperopt_nested.trees import State


class Hypers(NamedTuple):
    """The hypers that the family shares."""

    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    weight_decay: Tensor


_ARGS = {
    "lr": "learning rate, >= 0.",
    "beta1": "decay rate of the first moment, in [0, 1).",
    "beta2": "decay rate of the second moment, in [0, 1).",
    "eps": "added to the root of the second moment, > 0.",
    "weight_decay": "added to the gradient times the parameter, >= 0.",
}


def _like_adam(
    init: Init, *, lr: float = 1e-3, eps: float = 1e-8, weight_decay: float = 0.0, separable: Separable = "element"
) -> Callable[[Callable[..., tuple[Tensor, State]]], FunctionRule]:
    """Make a rule of `update(param, grad, state, hypers, *, <further hypers and options>)`, with the hypers and the Args of the family."""

    def decorate(function: Callable[..., tuple[Tensor, State]]) -> FunctionRule:
        def update(param: Tensor, grad: Tensor, state: State, **values: Any) -> tuple[Tensor, State]:
            shared = Hypers(*(values.pop(name) for name in Hypers._fields))
            return function(param, grad, state, shared, **values)

        domains = NonNegative(lr), UnitInterval(0.9), UnitInterval(0.999), Positive(eps), NonNegative(weight_decay)
        parameters = list(inspect.signature(function).parameters.values())
        shared = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=each) for name, each in zip(_ARGS, domains, strict=True)]
        text, _, args = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")
        lines = [f"    {name}: {said}" for name, said in _ARGS.items() if f"\n    {name}: " not in args]
        signature = inspect.Signature([*parameters[:3], *shared, *parameters[4:]])
        functools.update_wrapper(update, function).__signature__ = signature  # type: ignore[attr-defined]
        update.__doc__ = "\n".join([f"{text}\n\nArgs:", *lines]) + args
        return rule(init, separable=separable)(update)

    return decorate


_moments = counted("exp_avg", "exp_avg_sq")


def _init_adam(param: Tensor, *, amsgrad: bool = False) -> State:
    return counted("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * amsgrad)(param)


def _renewed(grad: Tensor, state: State, h: Hypers) -> State:
    """Adam's state after one more gradient."""
    new = moments(grad, state, h.beta1, h.beta2)
    if "max_exp_avg_sq" in state:
        new["max_exp_avg_sq"] = larger(state["max_exp_avg_sq"], new["exp_avg_sq"])
    return new


def _direction(state: State, h: Hypers) -> Tensor:
    """Adam's direction, given its new state."""
    second = state["max_exp_avg_sq" if "max_exp_avg_sq" in state else "exp_avg_sq"]
    return direction(state["step"], state["exp_avg"], second, h.beta1, h.beta2, h.eps)


def _move_adam(param: Tensor, state: State, h: Hypers) -> Tensor:
    return param - h.lr * _direction(state, h)


def _move_adamw(param: Tensor, state: State, h: Hypers) -> Tensor:
    return param - h.lr * h.weight_decay * param - h.lr * _direction(state, h)


@_like_adam(_init_adam)
def adam(param: Tensor, grad: Tensor, state: State, h: Hypers) -> tuple[Tensor, State]:
    r"""Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), as `torch.optim.Adam`.

    Where the second moment is exactly zero, its root has derivative zero, so that hypergradients stay finite. `betas=(...)` gives both
    decay rates.

    Args:
        amsgrad: use the largest second moment so far (Reddi et al. 2018).

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adam(1e-2, betas=(0.8, 0.99))
        adam(lr=0.01, beta1=0.8, beta2=0.99, eps=1e-08, weight_decay=0.0)
    """
    new = _renewed(grad + h.weight_decay * param, state, h)
    return _move_adam(param, new, h), new


@_like_adam(_init_adam, weight_decay=1e-2)
def adamw(param: Tensor, grad: Tensor, state: State, h: Hypers) -> tuple[Tensor, State]:
    r"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), as `torch.optim.AdamW`.

    Args:
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.
        amsgrad: use the largest second moment so far (Reddi et al. 2018).

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adamw(lr=hn.learn(1e-3, hn.sgd(1e-5))).learned["lr"]
        learn(0.001, by=sgd(lr=1e-05, momentum=0.0, dampening=0.0, weight_decay=0.0))
    """
    new = _renewed(grad, state, h)
    return _move_adamw(param, new, h), new


adam.finishes(lambda param, state, **hypers: _move_adam(param, state, Hypers(**hypers)), late=("lr", "eps"))
adamw.finishes(lambda param, state, **hypers: _move_adamw(param, state, Hypers(**hypers)), late=("lr", "eps", "weight_decay"))


def adam_hd(lr: float = 1e-3, hyper_lr: float = 1e-8, **settings: Any) -> Optimizer:
    r"""Adam-HD: Adam that learns its learning rate by gradient descent (Baydin et al. 2018, arXiv 1703.04782, Adam-HD).

    \(\eta_t = \eta_{t-1} + \beta\,g_t \cdot d_{t-1}\), projected to \(\eta \ge 0\), where \(d\) is Adam's direction. One learning rate
    for all tensors, as in the paper.

    Args:
        lr: the learning rate's start, >= 0.
        hyper_lr: learning rate \(\beta \ge 0\) of the learning rate.
        **settings: further arguments of `adam`.

    Returns:
        The `Optimizer`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adam_hd(0.1).learned["lr"].per
        'model'
    """
    return adam(learn(lr, sgd(hyper_lr)), **settings)


register("adam_hd", adam_hd)


def _init_nadam(param: Tensor, *, beta1: float | Learn, momentum_decay: float | Learn) -> State:
    return {**_moments(param), "mu_product": accumulator(param, beta1, momentum_decay) + 1}


@_like_adam(_init_nadam, lr=2e-3)
def nadam(
    param: Tensor,
    grad: Tensor,
    state: State,
    h: Hypers,
    *,
    momentum_decay: Tensor = NonNegative(4e-3),
    decoupled_weight_decay: bool = False,
) -> tuple[Tensor, State]:
    r"""Adam with Nesterov's momentum (Dozat 2016, algorithm 2), as `torch.optim.NAdam`.

    The momentum of step t is \(\beta_1 (1 - 0.96^{t \psi} / 2)\).

    Args:
        beta1: where the momentum tends to, and the decay rate of the first moment, in [0, 1).
        momentum_decay: \(\psi\), how fast the momentum tends to `beta1`, >= 0.
        decoupled_weight_decay: shrink the parameter by `lr * weight_decay` of itself instead.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.nadam(lr=hn.learn(2e-3)).learned
        {'lr': learn(0.002)}
    """
    param, grad = decayed(param, grad, h.lr, h.weight_decay, decoupled_weight_decay)
    new = moments(grad, state, h.beta1, h.beta2)
    step = new["step"]
    mu, mu_next = (h.beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
    product = new["mu_product"] = state["mu_product"] * mu
    denominator = safe_sqrt(new["exp_avg_sq"] / (1 - h.beta2**step)) + h.eps
    ahead = (1 - mu) / (1 - product) * grad + mu_next / (1 - product * mu_next) * new["exp_avg"]
    return param - h.lr * ahead / denominator, new


@_like_adam(_moments)
def radam(param: Tensor, grad: Tensor, state: State, h: Hypers, *, decoupled_weight_decay: bool = False) -> tuple[Tensor, State]:
    """Rectified Adam (Liu et al. 2020, arXiv 1908.03265, algorithm 2), as `torch.optim.RAdam`.

    In the first steps (five, with `beta2` at its default) the second moment is not used.

    Args:
        decoupled_weight_decay: shrink the parameter by `lr * weight_decay` of itself instead.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.radam(lr=hn.learn(1e-3)).learned
        {'lr': learn(0.001)}
    """
    param, grad = decayed(param, grad, h.lr, h.weight_decay, decoupled_weight_decay)
    new = moments(grad, state, h.beta1, h.beta2)
    step = new["step"]
    correction = 1 - h.beta2**step
    longest = 2 / (1 - h.beta2) - 1
    length = longest - 2 * step * h.beta2**step / correction
    rectified = kink(length, 5.0) > 5
    length, longest = (torch.where(rectified, each, 6) for each in (length, longest))  # else the root's argument may be negative
    rectification = torch.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    adaptive = rectification * torch.sqrt(correction) / (safe_sqrt(new["exp_avg_sq"]) + h.eps)
    return param - h.lr * new["exp_avg"] / (1 - h.beta1**step) * torch.where(rectified, adaptive, 1), new


@_like_adam(counted("exp_avg", "exp_inf"), lr=2e-3)
def adamax(param: Tensor, grad: Tensor, state: State, h: Hypers) -> tuple[Tensor, State]:
    """Adam with a decaying maximum in the place of the second moment (Kingma and Ba 2015, algorithm 2), as `torch.optim.Adamax`.

    Args:
        beta2: decay rate of the maximum, in [0, 1).
        eps: added to the gradient's absolute value, > 0.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adamax(beta1=hn.learn(0.9)).learned
        {'beta1': learn(0.9)}
    """
    grad = grad + h.weight_decay * param
    step, exp_avg = state["step"] + 1, average(state["exp_avg"], grad, h.beta1)
    exp_inf = larger(h.beta2 * state["exp_inf"], kink(grad).abs() + h.eps)
    return param - h.lr / (1 - h.beta1**step) * exp_avg / exp_inf, {"step": step, "exp_avg": exp_avg, "exp_inf": exp_inf}


@_like_adam(_moments, lr=1e-2)
def coherent_adam(param: Tensor, grad: Tensor, state: State, h: Hypers) -> tuple[Tensor, State]:
    r"""Adam whose steps are shorter where gradients disagree: the default learner of `hn.learn`. It has no paper.

    Adam's direction \(d_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon)\) is near \(\pm 1\) where gradients agree, and near 0 where they
    cancel. A step is \(-\eta\, c_t \lvert c_t \rvert\), where \(c_t\) is \(d_t\) between \(-\sqrt 2\) and \(\sqrt 2\): at most
    \(2\eta\). What starts far away travels fast, and what has arrived hardly moves.

    Args:
        lr: learning rate, >= 0: the length of a step where gradients agree.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adamw(lr=hn.learn(1e-3)).learned["lr"].by.rule.name
        'coherent_adam'
    """
    new = moments(grad + h.weight_decay * param, state, h.beta1, h.beta2)
    found = direction(new["step"], new["exp_avg"], new["exp_avg_sq"], h.beta1, h.beta2, h.eps)
    kink(found.abs(), math.sqrt(2))
    capped = found.clamp(-math.sqrt(2), math.sqrt(2))
    return param - h.lr * capped * capped.abs(), new


@_like_adam(counted("exp_avg", "exp_avg_var"), eps=1e-16)
def adabelief(param: Tensor, grad: Tensor, state: State, h: Hypers) -> tuple[Tensor, State]:
    r"""AdaBelief: Adam, scaled by how far gradients are from their average (Zhuang et al. 2020, arXiv 2010.07468, algorithm 2).

    As in the published program, without its rectification: `eps` is added to the second moment in every step, where it adds up, and
    to its root.

    Args:
        beta2: decay rate of the second moment of gradient minus first moment, in [0, 1).
        eps: added to the second moment, and to its root, > 0.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adabelief(lr=hn.learn(1e-3)).learned
        {'lr': learn(0.001)}
    """
    step, exp_avg = state["step"] + 1, average(state["exp_avg"], grad, h.beta1)
    surprise = grad - exp_avg
    exp_avg_var = h.beta2 * state["exp_avg_var"] + (1 - h.beta2) * surprise * surprise + h.eps
    along = direction(step, exp_avg, exp_avg_var, h.beta1, h.beta2, h.eps)
    return param - h.lr * (along + h.weight_decay * param), {"step": step, "exp_avg": exp_avg, "exp_avg_var": exp_avg_var}


@_like_adam(_moments, eps=1e-6, weight_decay=1e-2, separable="tensor")
def lamb(param: Tensor, grad: Tensor, state: State, h: Hypers) -> tuple[Tensor, State]:
    r"""LAMB: the direction of AdamW, scaled to the norm of each tensor (You et al. 2020, arXiv 1904.00962, algorithm 2).

    Moments are corrected for their bias, and norms are not bounded. Where the weights or the direction are zero, the ratio of their
    norms counts as 1.

    Args:
        weight_decay: that times the parameter is added to the direction before it is scaled, >= 0.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.lamb(lr=hn.learn(1e-3)).learned
        {'lr': learn(0.001)}
    """
    new = _renewed(grad, state, h)
    step = _direction(new, h) + h.weight_decay * param
    return param - h.lr * trust_ratio(frobenius.norms(param), frobenius.norms(step)) * step, new


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

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.adan(lr=hn.learn(1e-3)).learned
        {'lr': learn(0.001)}
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


def _init_mada(param: Tensor, *, beta3: float | Learn, amsgrad: float | Learn, avgrad: float | Learn) -> State:
    adan, largest, mean = map(is_on, (beta3, amsgrad, avgrad))
    more = [*["exp_avg_diff", "previous_grad"] * adan, *["max_exp_avg_sq"] * largest, *["mean_sq"] * mean]
    return counted("exp_avg", "exp_avg_sq", *more)(param)


def _move_mada(param: Tensor, state: State, h: Hypers, beta3: Tensor, amsgrad: Tensor, avgrad: Tensor) -> Tensor:
    step, second = state["step"], state["exp_avg_sq"]
    first: Tensor = state["exp_avg"] / (1 - h.beta1**step)
    if "exp_avg_diff" in state:
        first = first + beta3 * state["exp_avg_diff"] / (1 - beta3**step)
    if "max_exp_avg_sq" in state:
        second = average(state["max_exp_avg_sq"], second, amsgrad)
    second = second / (1 - h.beta2**step)
    if "mean_sq" in state:
        second = average(state["mean_sq"], second, avgrad)
    return param - h.lr * h.weight_decay * param - h.lr * first / (safe_sqrt(second) + h.eps)


@_like_adam(_init_mada)
def mada(
    param: Tensor,
    grad: Tensor,
    state: State,
    h: Hypers,
    *,
    beta3: Tensor = UnitInterval(0.0),
    yogi: Tensor = Interval(0.0, 0.0, 1.0),
    amsgrad: Tensor = Interval(0.0, 0.0, 1.0),
    avgrad: Tensor = Interval(0.0, 0.0, 1.0),
) -> tuple[Tensor, State]:
    r"""Between Adam, Adan, Yogi, AMSGrad and AVGrad, wherever learned coefficients lead (MADA, Ozkara et al. 2024, arXiv 2401.08893).

    With \(\Delta = g_t - g_{t-1}\), zero in the first step:

    \(m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t\), \(n_t = \beta_3 n_{t-1} + (1 - \beta_3) \Delta\), \(\hat g = g_t + \beta_3 \Delta\),

    \(v_t = \beta_2 v_{t-1} + (1 - \beta_2) ((1 - y) \hat g^2 + y\,(v_{t-1} + \hat g^2\,\mathrm{sign}(\hat g^2 - v_{t-1})))\),

    \(u_t = (1 - a)\,((1 - s)\,v_t + s \max_{i \le t} v_i) + a\,\mathrm{mean}_{i \le t} v_i\), and the step is
    \(-\eta\,(m_t + \beta_3 n_t) / (\sqrt{u_t} + \epsilon)\), where averages are corrected for their bias, as Adam's.

    All coefficients at zero is AdamW. `beta3` alone is Adan, and the others alone at 1 are Yogi, AMSGrad and AVGrad. A state is only kept
    for coefficients that are learned or not zero. The paper's \(\rho\) is \(1 - a\), and its \(c\) is \(1 - y\).

    Args:
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.
        beta3: decay rate \(\beta_3\) and weight of the average of gradient differences, in [0, 1).
        yogi: share \(y\) of Yogi's additive second moment, in [0, 1].
        amsgrad: share \(s\) of the largest second moment so far, in [0, 1].
        avgrad: share \(a\) of the mean of all second moments so far, in [0, 1].

    Example:
        >>> import hyperopt_nested as hn
        >>> by = hn.adam(1e-2)
        >>> beta3, yogi, avgrad = (hn.learn(0.5, by) for _ in range(3))
        >>> optimizer = hn.mada(1e-3, beta3=beta3, yogi=yogi, avgrad=avgrad)
    """
    ahead, new = grad, {"step": state["step"] + 1, "exp_avg": average(state["exp_avg"], grad, h.beta1)}
    if "exp_avg_diff" in state:
        change = torch.where(state["step"] == 0, 0, grad - state["previous_grad"])
        new["exp_avg_diff"], new["previous_grad"] = average(state["exp_avg_diff"], change, beta3), grad.clone()
        ahead = grad + beta3 * change
    square, before = ahead * ahead, state["exp_avg_sq"]
    additive = before + square * kink(square - before).sign()
    second = new["exp_avg_sq"] = average(before, average(additive, square, yogi), h.beta2)
    if "max_exp_avg_sq" in state:
        new["max_exp_avg_sq"] = larger(state["max_exp_avg_sq"], second)
    if "mean_sq" in state:
        new["mean_sq"] = state["mean_sq"] + (second / (1 - h.beta2 ** new["step"]) - state["mean_sq"]) / new["step"]
    return _move_mada(param, new, h, beta3, amsgrad, avgrad), new


def _finish_mada(param: Tensor, state: State, *, yogi: Tensor, **hypers: Tensor) -> Tensor:  # noqa: ARG001 - not of the last part
    beta3, amsgrad, avgrad = (hypers.pop(name) for name in ("beta3", "amsgrad", "avgrad"))
    return _move_mada(param, state, Hypers(**hypers), beta3, amsgrad, avgrad)


mada.finishes(_finish_mada, late=("lr", "eps", "weight_decay", "amsgrad", "avgrad"))
