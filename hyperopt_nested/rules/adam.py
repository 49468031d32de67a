"""Adam and AdamW."""

from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.hyper import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import State, counter, kink, safe_sqrt, zeros_like
from hyperopt_nested.rule import rule

_HYPERS: dict[str, Any] = {"lr": NonNegative(1e-3), "beta1": UnitInterval(0.9), "beta2": UnitInterval(0.999), "eps": Positive(1e-8)}


def init_moments(param: Tensor) -> State:
    """A step counter, and the first and the second moment at zero."""
    return {"step": counter(param), "exp_avg": zeros_like(param), "exp_avg_sq": zeros_like(param)}


def moments(grad: Tensor, state: State, beta1: Tensor, beta2: Tensor) -> State:
    """The step counter and both moments after one more gradient, not corrected for their bias."""
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * grad
    return {"step": state["step"] + 1, "exp_avg": exp_avg, "exp_avg_sq": beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad}


def _init(param: Tensor, *, amsgrad: bool = False, initial_second_moment: float = 0.0) -> State:
    if not initial_second_moment >= 0:
        raise ValueError(f"initial_second_moment={initial_second_moment!r} must be a number >= 0")
    second = zeros_like(param) + initial_second_moment
    state = {**init_moments(param), "exp_avg_sq": second}
    return {**state, "max_exp_avg_sq": second.clone()} if amsgrad else state


def direction(grad: Tensor, state: State, beta1: Tensor, beta2: Tensor, eps: Tensor) -> tuple[Tensor, State]:
    """Bias-corrected first moment over the root of the second (Kingma and Ba 2015, algorithm 1)."""
    new = moments(grad, state, beta1, beta2)
    step, second = new["step"], new["exp_avg_sq"]
    if "max_exp_avg_sq" in state:
        second = new["max_exp_avg_sq"] = torch.maximum(kink(state["max_exp_avg_sq"], second), second)
    denominator = safe_sqrt(second / (1 - beta2**step)) + eps
    return new["exp_avg"] / (1 - beta1**step) / denominator, new


@rule(_init, coupling="element", **_HYPERS, weight_decay=NonNegative(0.0))
def adam(
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
    r"""Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), as `torch.optim.Adam`.

    Where the second moment is exactly zero, its root has derivative zero, so that hypergradients stay finite.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: coupled: added to the gradient, >= 0.
        amsgrad: use the largest second moment so far (Reddi et al. 2018).
        initial_second_moment: where the second moment starts, >= 0.
    """
    step, new = direction(grad + weight_decay * param, state, beta1, beta2, eps)
    return param - lr * step, new


@rule(_init, coupling="element", **_HYPERS, weight_decay=NonNegative(1e-2))
def adamw(
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
    r"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), as `torch.optim.AdamW`.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.
        amsgrad: use the largest second moment so far (Reddi et al. 2018).
        initial_second_moment: where the second moment starts, >= 0.
    """
    step, new = direction(grad, state, beta1, beta2, eps)
    return param - lr * weight_decay * param - lr * step, new
