"""Stochastic gradient descent."""

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Real
from hyperopt_nested.ops import counter
from hyperopt_nested.rule import Learn, is_on, rule
from hyperopt_nested.trees import State


def _init(param: Tensor, *, momentum: float | Learn, dampening: float | Learn, nesterov: bool) -> State:
    if nesterov and (not is_on(momentum) or is_on(dampening)):
        raise ValueError(f"nesterov=True needs momentum > 0 and dampening=0; momentum={momentum!r}, dampening={dampening!r}")
    return {"step": counter(param), "momentum_buffer": torch.zeros_like(param)} if is_on(momentum) else {}


@rule(
    _init,
    coupling="element",
    lr=NonNegative(1e-3),
    momentum=NonNegative(0.0),
    dampening=Real(0.0),
    weight_decay=NonNegative(0.0),
)
def sgd(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor,
    momentum: Tensor,
    dampening: Tensor,
    weight_decay: Tensor,
    nesterov: bool = False,
) -> tuple[Tensor, State]:
    r"""Stochastic gradient descent with momentum and coupled weight decay, as `torch.optim.SGD`.

    \(g \leftarrow g + \lambda\theta\); \(b \leftarrow \mu b + (1-\tau) g\), where the first step takes \(b = g\); \(\theta \leftarrow
    \theta - \eta b\), or \(\theta - \eta(g + \mu b)\) with Nesterov's momentum. Without momentum (0 and not learned) there is no
    state. \(b\) is kept in the parameter's dtype, as in torch: a momentum of 0.9 forgets by more than bfloat16 rounds; for one beyond
    0.99, `state_dtype=torch.float32` keeps it wider.

    Args:
        lr: learning rate \(\eta \ge 0\).
        momentum: \(\mu \ge 0\).
        dampening: \(\tau\), any real number.
        weight_decay: \(\lambda \ge 0\), added to the gradient.
        nesterov: look ahead by one momentum step; needs momentum and no dampening.
    """
    grad = grad + weight_decay * param
    if "momentum_buffer" not in state:
        return param - lr * grad, state
    running = momentum * state["momentum_buffer"] + (1 - dampening) * grad
    buffer = torch.where(state["step"] == 0, grad, running)
    direction = grad + momentum * buffer if nesterov else buffer
    return param - lr * direction, {"step": state["step"] + 1, "momentum_buffer": buffer}
