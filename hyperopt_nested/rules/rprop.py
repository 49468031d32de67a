"""Rprop."""

import torch
from torch import Tensor

from hyperopt_nested.domains import Hyper, NonNegative, Positive
from hyperopt_nested.ops import counter, kink, zeros_like
from hyperopt_nested.rule import Learn, rule
from hyperopt_nested.trees import State


def _init(param: Tensor, *, step_size_min: float | Learn, step_size_max: float | Learn) -> State:
    low, high = (each.value if isinstance(each, Learn) else each for each in (step_size_min, step_size_max))
    if low > high:
        raise ValueError(f"step_size_min={low!r} is larger than step_size_max={high!r}: give step_size_min <= step_size_max")
    return {"step": counter(param), "prev": zeros_like(param), "step_size": zeros_like(param)}


@rule(
    _init,
    coupling="element",
    flat=("etaminus",),
    lr=NonNegative(1e-2),
    etaminus=Hyper(0.5, "OpenUnitInterval", lower=0.0, upper=1.0, open_lower=True, open_upper=True),
    etaplus=Hyper(1.2, "AboveOne", lower=1.0, open_lower=True),
    step_size_min=NonNegative(1e-6),
    step_size_max=Positive(50.0),
)
def rprop(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    etaminus: Tensor,
    etaplus: Tensor,
    step_size_min: Tensor,
    step_size_max: Tensor,
) -> tuple[Tensor, State]:
    """Resilient backpropagation (Riedmiller and Braun 1993; this is Rprop- of Igel and Huesken 2000), as `torch.optim.Rprop`.

    Each element has its own step size, and moves by it against its gradient's sign. In the step in which that sign turns, the element
    stays, and its step size shrinks: so no update has a derivative with respect to `etaminus`.

    Args:
        lr: the first step size, >= 0. The first update reads it, so later ones have no derivative with respect to it.
        etaminus: factor of the step size when the sign turns, in (0, 1).
        etaplus: factor of the step size when the sign stays, > 1.
        step_size_min: smallest step size, >= 0.
        step_size_max: largest step size, > 0.
    """
    agreement = kink(grad * state["prev"])
    turned = agreement < 0
    size = torch.where(state["step"] == 0, lr, state["step_size"])
    size = torch.where(turned, etaminus * size, torch.where(agreement > 0, etaplus * size, size))
    size = torch.maximum(kink(size, step_size_min), step_size_min)
    size = torch.minimum(kink(size, step_size_max), step_size_max)
    grad = torch.where(turned, 0, grad)
    return param - kink(grad).sign() * size, {"step": state["step"] + 1, "prev": grad, "step_size": size}
