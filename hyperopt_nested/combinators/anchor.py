"""Anchors: the point that a projection is centred on, or that a decay pulls towards."""

from typing import Literal

import torch
from torch import Tensor

from hyperopt_nested.ops import State

Anchor = Literal["start", "zero"] | Tensor
"""A point to stay near: the parameter's values when the optimizer is initialised ("start"), zero (which takes no memory), or a tensor
of the parameter's shape, of which the state keeps a copy."""


def keep_anchor(param: Tensor, anchor: Anchor) -> State:
    """The anchor as a part of a tensor's state: `{"anchor": ...}` in the parameter's dtype, or nothing where it is zero.

    Raises:
        ValueError: `anchor` is none of the choices, or a tensor of another shape than the parameter.
    """
    if isinstance(anchor, Tensor):
        if anchor.shape != param.shape:
            raise ValueError(f"anchor has shape {tuple(anchor.shape)}, the parameter {tuple(param.shape)}: they must be equal")
        return {"anchor": anchor.detach().to(param.device, param.dtype, copy=True)}
    if anchor not in ("start", "zero"):
        raise ValueError(f"anchor={anchor!r} must be 'start', 'zero' or a tensor")
    return {} if anchor == "zero" else {"anchor": param.detach().clone()}


def displacement(param: Tensor, state: State) -> Tensor:
    """Parameter minus anchor, of the parameter's shape."""
    anchor = state.get("anchor")
    return param if anchor is None else torch.sub(param, anchor)
