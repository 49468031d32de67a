"""Adadelta."""

import torch
from torch import Tensor

from hyperopt_nested.domains import Interval, NonNegative, Positive
from hyperopt_nested.ops import zeros
from hyperopt_nested.rule import rule
from hyperopt_nested.trees import State


@rule(
    zeros("square_avg", "acc_delta"),
    coupling="element",
    lr=NonNegative(1.0),
    rho=Interval(0.9, 0.0, 1.0),
    eps=Positive(1e-6),
    weight_decay=NonNegative(0.0),
)
def adadelta(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    rho: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, State]:
    """Adadelta (Zeiler 2012, arXiv 1212.5701, algorithm 1), as `torch.optim.Adadelta`.

    Args:
        lr: a factor of the update, >= 0.
        rho: decay rate of the averages of squared gradients and of squared updates, in [0, 1].
        eps: added to both averages before their roots, > 0.
        weight_decay: added to the gradient times the parameter, >= 0.
    """
    grad = grad + weight_decay * param
    square_avg = rho * state["square_avg"] + (1 - rho) * grad * grad
    delta = torch.sqrt(state["acc_delta"] + eps) / torch.sqrt(square_avg + eps) * grad
    acc_delta = rho * state["acc_delta"] + (1 - rho) * delta * delta
    return param - lr * delta, {"square_avg": square_avg, "acc_delta": acc_delta}
