"""Adan."""

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import counter, safe_sqrt, zeros
from hyperopt_nested.rule import rule
from hyperopt_nested.trees import State


def _init(param: Tensor) -> State:
    return {"step": counter(param), **zeros("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")(param)}


@rule(
    _init,
    coupling="element",
    lr=NonNegative(1e-3),
    beta1=UnitInterval(0.98),
    beta2=UnitInterval(0.92),
    beta3=UnitInterval(0.99),
    eps=Positive(1e-8),
    weight_decay=NonNegative(0.0),
)
def adan(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    beta3: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    no_prox: bool = False,
) -> tuple[Tensor, State]:
    r"""Adan: adaptive steps with Nesterov momentum from differences of gradients (Xie et al. 2022, arXiv 2208.06677, algorithm 1).

    As in the published program, the betas are decay rates (one minus the paper's), and the moments are corrected for their bias. The
    first step takes its own gradient for the previous one.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the gradients' average, in [0, 1).
        beta2: decay rate of the average of gradient differences, in [0, 1); also their weight in a step.
        beta3: decay rate of the second moment, in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled: the new parameter is divided by `1 + lr * weight_decay` (a proximal step), >= 0.
        no_prox: the old parameter is multiplied by `1 - lr * weight_decay` instead, as in AdamW.
    """
    step = state["step"] + 1
    change = torch.where(state["step"] == 0, 0, grad - state["previous_grad"])
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * grad
    exp_avg_diff = beta2 * state["exp_avg_diff"] + (1 - beta2) * change
    ahead = grad + beta2 * change
    exp_avg_sq = beta3 * state["exp_avg_sq"] + (1 - beta3) * ahead * ahead
    moments = {"exp_avg": exp_avg, "exp_avg_diff": exp_avg_diff, "exp_avg_sq": exp_avg_sq}
    direction = exp_avg / (1 - beta1**step) + beta2 * exp_avg_diff / (1 - beta2**step)
    move = lr * direction / (safe_sqrt(exp_avg_sq / (1 - beta3**step)) + eps)
    new = param * (1 - lr * weight_decay) - move if no_prox else (param - move) / (1 + lr * weight_decay)
    return new, {"step": step, **moments, "previous_grad": grad.clone()}
