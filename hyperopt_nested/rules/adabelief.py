"""AdaBelief."""

from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import counter, safe_sqrt, zeros_like
from hyperopt_nested.rule import rule
from hyperopt_nested.trees import State


def _init(param: Tensor) -> State:
    return {"step": counter(param), "exp_avg": zeros_like(param), "exp_avg_var": zeros_like(param)}


@rule(
    _init,
    coupling="element",
    lr=NonNegative(1e-3),
    beta1=UnitInterval(0.9),
    beta2=UnitInterval(0.999),
    eps=Positive(1e-16),
    weight_decay=NonNegative(0.0),
)
def adabelief(
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
    r"""AdaBelief: Adam, scaled by how far gradients are from their average (Zhuang et al. 2020, arXiv 2010.07468, algorithm 2).

    As in the published program, without its rectification: `eps` is added to the second moment in every step, where it adds up, and
    to its root.

    Args:
        lr: learning rate, >= 0.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment of gradient minus first moment, in [0, 1).
        eps: added to the second moment, and to its root, > 0.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.
    """
    step = state["step"] + 1
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * grad
    surprise = grad - exp_avg
    exp_avg_var = beta2 * state["exp_avg_var"] + (1 - beta2) * surprise * surprise + eps
    direction = exp_avg / (1 - beta1**step) / (safe_sqrt(exp_avg_var / (1 - beta2**step)) + eps)
    return param - lr * (direction + weight_decay * param), {"step": step, "exp_avg": exp_avg, "exp_avg_var": exp_avg_var}
