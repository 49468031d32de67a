"""Adam and AdamW."""

from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import counter, kink, safe_sqrt, zeros_like
from hyperopt_nested.rule import rule
from hyperopt_nested.trees import State

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


def _renewed(grad: Tensor, state: State, beta1: Tensor, beta2: Tensor) -> State:
    """The state after one more gradient."""
    new = moments(grad, state, beta1, beta2)
    if "max_exp_avg_sq" in state:
        new["max_exp_avg_sq"] = torch.maximum(kink(state["max_exp_avg_sq"], new["exp_avg_sq"]), new["exp_avg_sq"])
    return new


def direction(state: State, beta1: Tensor, beta2: Tensor, eps: Tensor) -> Tensor:
    """Bias-corrected first moment over the root of the second (Kingma and Ba 2015, algorithm 1)."""
    step, second = state["step"], state.get("max_exp_avg_sq", state["exp_avg_sq"])
    found: Tensor = state["exp_avg"] / (1 - beta1**step) / (safe_sqrt(second / (1 - beta2**step)) + eps)
    return found


def _finish_adam(param: Tensor, state: State, *, lr: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor) -> Tensor:
    return param - lr * direction(state, beta1, beta2, eps)


def _finish_adamw(param: Tensor, state: State, *, lr: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, weight_decay: Tensor) -> Tensor:
    return param - lr * weight_decay * param - lr * direction(state, beta1, beta2, eps)


@rule(_init, coupling="element", finish=_finish_adam, late=("lr", "eps"), **_HYPERS, weight_decay=NonNegative(0.0))
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
    new = _renewed(grad + weight_decay * param, state, beta1, beta2)
    return _finish_adam(param, new, lr=lr, beta1=beta1, beta2=beta2, eps=eps), new


@rule(_init, coupling="element", finish=_finish_adamw, late=("lr", "eps", "weight_decay"), **_HYPERS, weight_decay=NonNegative(1e-2))
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
    new = _renewed(grad, state, beta1, beta2)
    return _finish_adamw(param, new, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay), new
