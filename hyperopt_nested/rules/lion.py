"""Lion."""

from torch import Tensor

from hyperopt_nested.domains import NonNegative, UnitInterval
from hyperopt_nested.ops import kink, zeros
from hyperopt_nested.rule import rule
from hyperopt_nested.trees import State


@rule(
    zeros("exp_avg"),
    coupling="element",
    flat=("beta1", "beta2"),
    lr=NonNegative(1e-4),
    beta1=UnitInterval(0.9),
    beta2=UnitInterval(0.99),
    weight_decay=NonNegative(0.0),
)
def lion(
    param: Tensor, grad: Tensor, state: State, *, lr: Tensor, beta1: Tensor, beta2: Tensor, weight_decay: Tensor
) -> tuple[Tensor, State]:
    r"""Lion, the sign of a momentum that looks ahead (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    Args:
        lr: learning rate, >= 0.
        beta1: share of the momentum in what the sign is taken of, in [0, 1). Can not be learned: it acts through a sign.
        beta2: decay rate of the momentum, in [0, 1). Can not be learned, for the same reason.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.
    """
    direction = kink(beta1 * state["exp_avg"] + (1 - beta1) * grad).sign()
    return param - lr * (direction + weight_decay * param), {"exp_avg": beta2 * state["exp_avg"] + (1 - beta2) * grad}
