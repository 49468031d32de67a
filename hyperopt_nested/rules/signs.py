"""Steps along signs: Lion and Rprop."""

import torch
from torch import Tensor

from hyperopt_nested.domains import Interval, NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import kink, zeros
from hyperopt_nested.rule import Learn, rule
from hyperopt_nested.rules._blocks import average, counted, larger, smaller
from hyperopt_nested.trees import State


@rule(zeros("exp_avg"), separable="element", nondifferentiable=("beta1", "beta2"))
def lion(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-4),
    beta1: Tensor = UnitInterval(0.9),
    beta2: Tensor = UnitInterval(0.99),
    weight_decay: Tensor = NonNegative(0.0),
) -> tuple[Tensor, State]:
    r"""Lion, the sign of a momentum that looks ahead (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    Args:
        lr: learning rate, >= 0.
        beta1: share of the momentum in what the sign is taken of, in [0, 1). Cannot be learned: it acts through a sign.
        beta2: decay rate of the momentum, in [0, 1). Cannot be learned, for the same reason.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.lion(lr=hn.learn(1e-4)).learned
        {'lr': learn(0.0001)}
    """
    direction = kink(average(state["exp_avg"], grad, beta1)).sign()
    return param - lr * (direction + weight_decay * param), {"exp_avg": average(state["exp_avg"], grad, beta2)}


def _init_rprop(param: Tensor, *, step_size_min: float | Learn, step_size_max: float | Learn) -> State:
    low, high = (each.value if isinstance(each, Learn) else each for each in (step_size_min, step_size_max))
    if low > high:
        raise ValueError(f"step_size_min={low!r} is larger than step_size_max={high!r}: give step_size_min <= step_size_max")
    return counted("prev", "step_size")(param)


@rule(_init_rprop, separable="element", nondifferentiable=("etaminus",))
def rprop(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-2),
    etaminus: Tensor = Interval(0.5, 0.0, 1.0, open_lower=True, open_upper=True),
    etaplus: Tensor = Interval(1.2, 1.0, float("inf"), open_lower=True),
    step_size_min: Tensor = NonNegative(1e-6),
    step_size_max: Tensor = Positive(50.0),
) -> tuple[Tensor, State]:
    """Resilient backpropagation (Riedmiller and Braun 1993; this is Rprop- of Igel and Huesken 2000), as `torch.optim.Rprop`.

    Each element has its own step size, and moves by it against its gradient's sign. In the step in which that sign turns, the element
    stays, and its step size shrinks: no update has a derivative with respect to `etaminus`.

    Args:
        lr: the first step size, >= 0. The first update reads it: later ones have no derivative with respect to it.
        etaminus: factor of the step size when the sign turns, in (0, 1).
        etaplus: factor of the step size when the sign stays, > 1.
        step_size_min: smallest step size, >= 0.
        step_size_max: largest step size, > 0.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.rprop(etas=(0.5, hn.learn(1.2))).learned
        {'etaplus': learn(1.2)}
    """
    agreement = kink(grad * state["prev"])
    turned = agreement < 0
    size = torch.where(state["step"] == 0, lr, state["step_size"])
    size = torch.where(turned, etaminus * size, torch.where(agreement > 0, etaplus * size, size))
    size = smaller(larger(size, step_size_min), step_size_max)
    grad = torch.where(turned, 0, grad)
    return param - kink(grad).sign() * size, {"step": state["step"] + 1, "prev": grad, "step_size": size}
