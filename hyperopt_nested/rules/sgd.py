"""Stochastic gradient descent: with momentum, averaged, scaled by layer, and with a learned learning rate."""

from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, Real
from hyperopt_nested.ops import counter, zeros_like
from hyperopt_nested.projections import frobenius
from hyperopt_nested.registry import register
from hyperopt_nested.rule import Learn, Optimizer, learn, rule
from hyperopt_nested.rules._blocks import copy_of, is_on, trust_ratio
from hyperopt_nested.trees import State


def _init_sgd(param: Tensor, *, momentum: float | Learn, dampening: float | Learn, nesterov: bool) -> State:
    if nesterov and (not is_on(momentum) or is_on(dampening)):
        raise ValueError(f"nesterov=True needs momentum > 0 and dampening=0; momentum={momentum!r}, dampening={dampening!r}")
    return {"step": counter(param), "momentum_buffer": torch.zeros_like(param)} if is_on(momentum) else {}


@rule(_init_sgd, separable="element")
def sgd(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-3),
    momentum: Tensor = NonNegative(0.0),
    dampening: Tensor = Real(0.0),
    weight_decay: Tensor = NonNegative(0.0),
    nesterov: bool = False,
) -> tuple[Tensor, State]:
    r"""Stochastic gradient descent with momentum and coupled weight decay, as `torch.optim.SGD`.

    \(g \leftarrow g + \lambda\theta\); \(b \leftarrow \mu b + (1-\tau) g\), where the first step takes \(b = g\); \(\theta \leftarrow
    \theta - \eta b\), or \(\theta - \eta(g + \mu b)\) with Nesterov's momentum. Without momentum (0 and not learned) there is no
    state. \(b\) is kept in the parameter's dtype, as in torch: a momentum of 0.9 forgets by more than bfloat16 rounds; for one beyond
    0.99, `state_dtype=torch.float32` keeps it wider.

    Args:
        lr: learning rate \(\eta \ge 0\).
        momentum: \(\mu \ge 0\).
        dampening: \(\tau\), any real number.
        weight_decay: \(\lambda \ge 0\), added to the gradient.
        nesterov: look ahead by one momentum step; needs momentum and no dampening.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.sgd(0.1, momentum=0.9)
        sgd(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0)
    """
    grad = grad + weight_decay * param
    if "momentum_buffer" not in state:
        return param - lr * grad, state
    running = momentum * state["momentum_buffer"] + (1 - dampening) * grad
    buffer = torch.where(state["step"] == 0, grad, running)
    direction = grad + momentum * buffer if nesterov else buffer
    return param - lr * direction, {"step": state["step"] + 1, "momentum_buffer": buffer}


def sgd_hd(lr: float = 1e-3, hyper_lr: float = 1e-6, **settings: Any) -> Optimizer:
    r"""SGD-HD: SGD that learns its learning rate by gradient descent (Baydin et al. 2018, arXiv 1703.04782, SGD-HD).

    Without momentum, \(\eta_t = \eta_{t-1} + \beta\,g_t \cdot g_{t-1}\), projected to \(\eta \ge 0\), and \(\theta_{t+1} = \theta_t -
    \eta_t g_t\). One learning rate for all tensors.

    Args:
        lr: the learning rate's start, >= 0.
        hyper_lr: learning rate \(\beta \ge 0\) of the learning rate.
        **settings: further arguments of `sgd`; with `momentum` and `nesterov=True` it is SGDN-HD.

    Returns:
        The `Optimizer`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.sgd_hd(0.1).learned["lr"].per
        'model'
    """
    return sgd(learn(lr, sgd(hyper_lr)), **settings)


register("sgd_hd", sgd_hd)


def _init_asgd(param: Tensor) -> State:
    return {"step": counter(param), "eval_params": copy_of(param)}


@rule(_init_asgd, separable="element")
def asgd(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-2),
    lambd: Tensor = NonNegative(1e-4),
    alpha: Tensor = NonNegative(0.75),
    weight_decay: Tensor = NonNegative(0.0),
    t0: float = 1e6,
) -> tuple[Tensor, State]:
    r"""Averaged stochastic gradient descent (Polyak and Juditsky 1992), as `torch.optim.ASGD`.

    The learning rate of step t is \(\eta / (1 + \lambda \eta (t - 1))^\alpha\). The average of the parameters is what `eval_params`
    returns (`torch.optim` keeps it as `ax`).

    Args:
        lr: \(\eta \ge 0\).
        lambd: \(\lambda \ge 0\): decay of the learning rate, and of the parameter, by the learning rate times it.
        alpha: power of the learning rate's decay, >= 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        t0: the step after which averaging starts; until then, the average is the parameter.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.asgd(lr=hn.learn(1e-2)).learned
        {'lr': learn(0.01)}
    """
    rate = lr / (1 + lambd * lr * state["step"]) ** alpha
    new = param * (1 - lambd * rate) - rate * (grad + weight_decay * param)
    weight = 1 / torch.clamp(state["step"] - t0, min=1)
    mean = torch.where(weight == 1, new, state["eval_params"] + weight * (new - state["eval_params"]))
    return new, {"step": state["step"] + 1, "eval_params": mean}


def _init_lars(param: Tensor, *, momentum: float | Learn) -> State:
    return {"momentum_buffer": zeros_like(param)} if is_on(momentum) else {}


@rule(_init_lars, separable="tensor")
def lars(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1.0),
    momentum: Tensor = NonNegative(0.9),
    trust_coefficient: Tensor = NonNegative(1e-3),
    weight_decay: Tensor = NonNegative(0.0),
    eps: Tensor = Positive(1e-8),
) -> tuple[Tensor, State]:
    r"""Layer-wise adaptive rate scaling of SGD with momentum (You, Gitman and Ginsburg 2017, arXiv 1708.03888, algorithm 1).

    \(v \leftarrow \mu v + \eta\,\tau\frac{\lVert\theta\rVert}{\lVert g\rVert + \lambda\lVert\theta\rVert + \epsilon}
    (g + \lambda\theta)\); \(\theta \leftarrow \theta - v\). The momentum keeps steps, not gradients, so a new learning rate does not
    change the steps taken before. Where the weights, or gradient and decay, are zero, the factor at \(\eta\) is 1. All tensors are
    scaled; to leave biases out, give them `sgd`.

    Args:
        lr: learning rate \(\eta \ge 0\).
        momentum: \(\mu \ge 0\).
        trust_coefficient: \(\tau \ge 0\).
        weight_decay: \(\lambda \ge 0\), added to the gradient.
        eps: \(\epsilon > 0\), guards the division.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.lars(lr=hn.learn(0.1), momentum=0.9).learned
        {'lr': learn(0.1)}
    """
    weight_norm = frobenius.norms(param)
    update_norm = frobenius.norms(grad) + weight_decay * weight_norm
    move = lr * trust_ratio(weight_norm, update_norm, trust_coefficient, eps) * (grad + weight_decay * param)
    if "momentum_buffer" not in state:
        return param - move, state
    buffer = momentum * state["momentum_buffer"] + move
    return param - buffer, {"momentum_buffer": buffer}
