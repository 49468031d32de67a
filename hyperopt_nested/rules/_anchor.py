"""Anchors: the point that a projection is centred on, or that a decay pulls towards."""

from typing import Literal

import torch
from torch import Tensor

from hyperopt_nested.checks import check_dtype
from hyperopt_nested.trees import State

Anchor = Literal["start", "zero"] | Tensor
"""A point to stay near: the parameter's values before its first step ("start"), zero (which takes no memory), or a tensor of the
parameter's shape, of which the state keeps a copy. `HyperOptimizer` takes "start" at the first step of each tensor; in `Nested`, that is
what `init` is given."""


def keep_anchor(param: Tensor, anchor: Anchor, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> State:
    """The anchor as a part of a tensor's state: `{"anchor": ...}`, or nothing where it is zero.

    Args:
        param: the parameter.
        anchor: the point.
        dtype: what it is kept in, real floating-point; None is the parameter's.
        device: where it is kept; None is where the parameter is.

    Raises:
        TypeError: `dtype` is no dtype.
        ValueError: `anchor` is none of the choices, a tensor of another shape than the parameter, or not finite; `dtype` is none for
            weights; or there is no such `device`.
    """
    check_dtype("anchor_dtype", dtype)
    try:
        device = param.device if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"anchor_device={device!r} is no device: {str(error).splitlines()[0]}") from error
    if isinstance(anchor, Tensor):
        if anchor.shape != param.shape:
            raise ValueError(f"anchor has shape {tuple(anchor.shape)}, the parameter {tuple(param.shape)}: they must be equal")
        if not anchor.is_floating_point() or not bool(torch.isfinite(anchor).all()):
            raise ValueError(f"anchor must be finite, of real floating-point numbers; this one ({anchor.dtype}) has others")
    elif not isinstance(anchor, str) or anchor not in ("start", "zero"):
        raise ValueError(f"anchor={anchor!r} must be 'start', 'zero' or a tensor")
    if isinstance(anchor, str) and anchor == "zero":
        return {}
    point = param if isinstance(anchor, str) else anchor
    return {"anchor": point.detach().to(device, dtype or param.dtype, copy=True)}


def anchor_of(param: Tensor, state: State) -> Tensor | None:
    """The anchor, where the parameter is; None if it is zero."""
    anchor = state.get("anchor")
    return None if anchor is None else anchor.to(param.device)


def displacement(param: Tensor, state: State) -> Tensor:
    """Parameter minus anchor, of the parameter's shape."""
    anchor = anchor_of(param, state)
    return param if anchor is None else torch.sub(param, anchor)
