"""Averaged stochastic gradient descent."""

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative
from hyperopt_nested.ops import counter, state_dtype
from hyperopt_nested.rule import rule
from hyperopt_nested.trees import State


def _init(param: Tensor) -> State:
    return {"step": counter(param), "evaluated": param.detach().to(state_dtype(param), copy=True)}


@rule(
    _init,
    coupling="element",
    lr=NonNegative(1e-2),
    lambd=NonNegative(1e-4),
    alpha=NonNegative(0.75),
    weight_decay=NonNegative(0.0),
)
def asgd(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    lambd: Tensor,
    alpha: Tensor,
    weight_decay: Tensor,
    t0: float = 1e6,
) -> tuple[Tensor, State]:
    r"""Averaged stochastic gradient descent (Polyak and Juditsky 1992), as `torch.optim.ASGD`.

    The learning rate of step t is \(\eta / (1 + \lambda \eta (t - 1))^\alpha\). The average of the parameters is what `evaluated`
    returns (`torch.optim` keeps it as `ax`).

    Args:
        lr: \(\eta \ge 0\).
        lambd: \(\lambda \ge 0\): decay of the learning rate, and of the parameter, by the learning rate times it.
        alpha: power of the learning rate's decay, >= 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        t0: the step after which averaging starts; until then, the average is the parameter.
    """
    rate = lr / (1 + lambd * lr * state["step"]) ** alpha
    new = param * (1 - lambd * rate) - rate * (grad + weight_decay * param)
    weight = 1 / torch.clamp(state["step"] - t0, min=1)
    average = torch.where(weight == 1, new, state["evaluated"] + weight * (new - state["evaluated"]))
    return new, {"step": state["step"] + 1, "evaluated": average}
