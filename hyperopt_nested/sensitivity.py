"""Memory of one tensor's last update: enough to turn the next gradient into hypergradients, in plain tensors.

An update is seen here as `apply(raws) -> (param, state)`, a function of the raw coordinates of the learned hypers alone.
"""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.ops import State

Raws = dict[str, Tensor]
Apply = Callable[[Raws], tuple[Tensor, State]]


def remember_forward(apply: Apply, raws: Raws, names: list[str]) -> tuple[Tensor, State, dict[str, Tensor]]:
    """Do the update, and differentiate it with respect to each hyper in `names`, with a tangent of ones.

    Returns:
        The new parameter and state, and d(param)/d(raw) for each name, of the parameter's shape: element i holds the derivative
        with respect to the one entry of the hyper that belongs to element i.
    """
    sensitivities = {}
    for name in names:

        def of_one(raw: Tensor, name: str = name) -> tuple[Tensor, State]:
            return apply({**raws, name: raw})

        raw = raws[name]
        linearized: Any = torch.func.jvp(of_one, (raw,), (torch.ones_like(raw),), has_aux=True)
        param, sensitivities[name], state = linearized
    if not names:
        param, state = apply(raws)
    return param, state, sensitivities


def pull_forward(grad: Tensor, sensitivity: Tensor, raw: Tensor) -> Tensor:
    """Hypergradient of a hyper's entries: the sum, over the elements that belong to each, of gradient times sensitivity."""
    product = grad * sensitivity
    dims = [dim for dim in range(raw.ndim) if raw.shape[dim] != product.shape[dim]]
    total = product.sum() if raw.ndim == 0 else product.sum(dims, keepdim=True) if dims else product
    return total.to(raw)


def pull_reverse(grad: Tensor, apply: Apply, raws: Raws) -> dict[str, Tensor]:
    """Hypergradient of every hyper in `raws`, by the vector-Jacobian product of the remembered update."""

    def param_of(raws: Raws) -> Tensor:
        return apply(raws)[0]

    linearized: Any = torch.func.vjp(param_of, raws)
    param, pull = linearized
    return dict(pull(grad.to(param))[0])


def unused(apply: Apply, raws: Mapping[str, Tensor]) -> list[str]:
    """Names of the hypers that the update's new parameter does not depend on at all."""
    leaves: Raws = {name: torch.nn.Parameter(raw.detach().clone()) for name, raw in raws.items()}  # a leaf under functorch transforms too
    with torch.enable_grad():
        total = apply(leaves)[0].sum()
    if not total.requires_grad:
        return list(leaves)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [name for name, grad in zip(leaves, found, strict=True) if grad is None]
