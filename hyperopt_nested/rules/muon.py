"""Muon."""

import math

import torch
from torch import Tensor

from hyperopt_nested.domains import NonNegative, Positive, UnitInterval
from hyperopt_nested.ops import zeros_like
from hyperopt_nested.rule import rule
from hyperopt_nested.rules._blocks import larger
from hyperopt_nested.trees import State

_RATIOS = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / max(columns, 1))),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def _init(param: Tensor, *, adjust_lr_fn: str | None, ns_steps: int) -> State:
    if ns_steps < 1:
        raise ValueError(f"ns_steps={ns_steps!r} must be an integer >= 1")
    if param.ndim != 2:
        raise ValueError(
            f"muon orthogonalizes matrices, and a tensor of shape {tuple(param.shape)} is none: pass HyperOptimizer a function (name, "
            "tensor) -> optimizer, which returns muon(...) where tensor.ndim == 2, and another optimizer, such as adamw(), elsewhere"
        )
    if adjust_lr_fn is not None and adjust_lr_fn not in _RATIOS:
        raise ValueError(f"adjust_lr_fn={adjust_lr_fn!r} must be None or one of {', '.join(map(repr, _RATIOS))}")
    return {"momentum_buffer": zeros_like(param)}


def _orthogonalized(matrix: Tensor, eps: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """A matrix with the singular vectors of this one, and all singular values near one (by Newton-Schulz iteration)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix / larger(matrix.norm(), eps.to(matrix.dtype))
    x = x.T if tall else x
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


@rule(_init, separable="tensor")
def muon(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: Tensor = NonNegative(1e-3),
    weight_decay: Tensor = NonNegative(0.1),
    momentum: Tensor = UnitInterval(0.95),
    eps: Tensor = Positive(1e-7),
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    adjust_lr_fn: str | None = None,
    ns_dtype: torch.dtype | None = None,
) -> tuple[Tensor, State]:
    """Muon, momentum made orthogonal, for matrices (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982), as `torch.optim.Muon`.

    `torch.optim.Muon` orthogonalizes in bfloat16: `ns_dtype=torch.bfloat16` does what it does, to the bit. The default is the
    parameter's own dtype, so that derivatives are exact.

    Args:
        lr: learning rate, >= 0.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay` of itself, >= 0.
        momentum: decay rate of the gradient's average, in [0, 1).
        eps: smallest norm that the average is divided by, > 0.
        nesterov: look ahead by one momentum step.
        ns_steps: number of Newton-Schulz steps, >= 1.
        ns_coefficients: coefficients of their polynomial: of the first, third and fifth power.
        adjust_lr_fn: how the learning rate depends on the shape: None or "original" times sqrt(max(1, rows / columns)), or
            "match_rms_adamw", times 0.2 sqrt(max(rows, columns)).
        ns_dtype: the dtype of these steps; None for the update's own.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.muon(lr=hn.learn(1e-3)).learned
        {'lr': learn(0.001)}
    """
    weight = momentum.to(grad.dtype)
    buffer = torch.lerp(state["momentum_buffer"], grad, (1 - momentum).to(grad.dtype))
    update = torch.lerp(grad, buffer, weight) if nesterov else buffer
    update = _orthogonalized(update.to(ns_dtype or update.dtype), eps, ns_steps, ns_coefficients).to(update.dtype)
    ratio = _RATIOS[adjust_lr_fn or "original"](*param.shape)
    return param * (1 - lr * weight_decay) - lr * ratio * update, {"momentum_buffer": buffer}
