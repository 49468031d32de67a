"""Adagrad."""

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive
from hyperopt_nested.ops import counter, safe_sqrt, zeros_like
from hyperopt_nested.rule import rule
from hyperopt_nested.trees import State


def _init(param: Tensor) -> State:
    return {"step": counter(param), "sum": zeros_like(param)}


@rule(
    _init,
    coupling="element",
    lr=NonNegative(1e-2),
    lr_decay=NonNegative(0.0),
    weight_decay=NonNegative(0.0),
    initial_accumulator_value=NonNegative(0.0),
    eps=Positive(1e-10),
)
def adagrad(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    lr_decay: Tensor,
    weight_decay: Tensor,
    initial_accumulator_value: Tensor,
    eps: Tensor,
) -> tuple[Tensor, State]:
    """Adagrad (Duchi, Hazan and Singer 2011), as `torch.optim.Adagrad`.

    Args:
        lr: learning rate of the first step, >= 0.
        lr_decay: the learning rate of step t is `lr / (1 + (t - 1) * lr_decay)`, >= 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        initial_accumulator_value: where the sum of squares starts, >= 0. The first update reads it, so later ones have no derivative
            with respect to it.
        eps: added to the root of the sum, > 0.
    """
    grad = grad + weight_decay * param
    total = torch.where(state["step"] == 0, initial_accumulator_value, state["sum"]) + grad * grad
    rate = lr / (1 + state["step"] * lr_decay)
    return param - rate * grad / (safe_sqrt(total) + eps), {"step": state["step"] + 1, "sum": total}
