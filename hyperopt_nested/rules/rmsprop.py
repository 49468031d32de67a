"""RMSprop."""

from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import safe_sqrt, zeros
from hyperopt_nested.rule import Learn, is_on, rule
from hyperopt_nested.trees import State


def _init(param: Tensor, *, momentum: float | Learn, centered: bool) -> State:
    return zeros("square_avg", *["grad_avg"] * centered, *["momentum_buffer"] * is_on(momentum))(param)


@rule(
    _init,
    coupling="element",
    lr=NonNegative(1e-2),
    alpha=UnitInterval(0.99),
    eps=Positive(1e-8),
    weight_decay=NonNegative(0.0),
    momentum=NonNegative(0.0),
)
def rmsprop(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    alpha: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    centered: bool = False,
) -> tuple[Tensor, State]:
    """RMSprop (Tieleman and Hinton 2012, lecture 6.5; centered: Graves 2013, arXiv 1308.0850), as `torch.optim.RMSprop`.

    A variance that rounding makes negative is taken as zero, where `torch.optim` returns NaN.

    Args:
        lr: learning rate, >= 0.
        alpha: decay rate of the averages, in [0, 1).
        eps: added to the root, > 0.
        weight_decay: added to the gradient times the parameter, >= 0.
        momentum: >= 0; at 0 and not learned, there is no buffer.
        centered: divide by the root of the gradient's variance, and not of its second moment.
    """
    grad = grad + weight_decay * param
    new = {"square_avg": alpha * state["square_avg"] + (1 - alpha) * grad * grad}
    square = new["square_avg"]
    if centered:
        average = new["grad_avg"] = state["grad_avg"] + (1 - alpha) * (grad - state["grad_avg"])
        square = square - average * average
    direction = grad / (safe_sqrt(square) + eps)
    if "momentum_buffer" in state:
        direction = new["momentum_buffer"] = momentum * state["momentum_buffer"] + direction
    return param - lr * direction, new
