"""Steps in proportion to the norm of each tensor: LARS and LAMB."""

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import kink, zeros_like
from hyperopt_nested.projections import frobenius
from hyperopt_nested.rule import Learn, is_on, rule
from hyperopt_nested.rules.adam import direction, init_moments, moments
from hyperopt_nested.trees import State


def _trust_ratio(weight_norm: Tensor, update_norm: Tensor, coefficient: Tensor | float = 1.0, eps: Tensor | float = 0.0) -> Tensor:
    """Coefficient times weight norm over update norm plus `eps`; 1 where either norm is zero."""
    defined = (kink(weight_norm) > 0) & (kink(update_norm) > 0)
    return torch.where(defined, coefficient * weight_norm / (torch.where(defined, update_norm, 1) + eps), 1)


def _init_lars(param: Tensor, *, momentum: float | Learn) -> State:
    return {"momentum_buffer": zeros_like(param)} if is_on(momentum) else {}


@rule(
    _init_lars,
    coupling="tensor",
    lr=NonNegative(1.0),
    momentum=NonNegative(0.9),
    trust_coefficient=NonNegative(1e-3),
    weight_decay=NonNegative(0.0),
    eps=Positive(1e-8),
)
def lars(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    momentum: Tensor,
    trust_coefficient: Tensor,
    weight_decay: Tensor,
    eps: Tensor,
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
    """
    weight_norm = frobenius.norms(param)
    update_norm = frobenius.norms(grad) + weight_decay * weight_norm
    move = lr * _trust_ratio(weight_norm, update_norm, trust_coefficient, eps) * (grad + weight_decay * param)
    if "momentum_buffer" not in state:
        return param - move, state
    buffer = momentum * state["momentum_buffer"] + move
    return param - buffer, {"momentum_buffer": buffer}


@rule(
    init_moments,
    coupling="tensor",
    lr=NonNegative(1e-3),
    beta1=UnitInterval(0.9),
    beta2=UnitInterval(0.999),
    eps=Positive(1e-6),
    weight_decay=NonNegative(1e-2),
)
def lamb(
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
    new = moments(grad, state, beta1, beta2)
    step = direction(new, beta1, beta2, eps)
    step = step + weight_decay * param
    ratio = _trust_ratio(frobenius.norms(param), frobenius.norms(step))
    return param - lr * ratio * step, new
