"""Anchors: the point that a projection is centred on, or that a decay pulls towards; it is fixed, or follows the weights."""

from typing import Literal

import torch
from torch import Tensor

from hyperopt_nested.checks import check_dtype
from hyperopt_nested.ops import state_dtype
from hyperopt_nested.trees import State

Anchor = Literal["start", "zero"] | Tensor
"""A point to stay near: the parameter's values before its first step ("start"), zero (which takes no memory), or a tensor of the
parameter's shape, of which the state keeps a copy. `HyperOptimizer` takes "start" at the first step of each tensor; in `Nested`, that is
what `init` is given."""


def keep_anchor(
    param: Tensor,
    anchor: Anchor,
    *,
    decay: float = 1.0,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> State:
    """The anchor as a part of a tensor's state: `{"anchor": ...}`, or nothing where it is zero.

    Args:
        param: the parameter.
        anchor: the point.
        decay: as `moved_anchor` will be given it.
        dtype: what it is kept in, real floating-point; None is the parameter's, or float32 if that is wider and the anchor moves.
        device: where it is kept; None is where the parameter is.

    Returns:
        The part of the state.

    Raises:
        TypeError: `dtype` is no dtype.
        ValueError: `anchor` is none of the choices, a tensor of another shape than the parameter, or not finite; `decay` is outside
            [0, 1], or less than 1 where the anchor is zero; `dtype` is none for weights; or there is no such `device`.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.keep_anchor(torch.ones(2), "start")
        {'anchor': tensor([1., 1.])}
    """
    check_dtype("anchor_dtype", dtype)
    if not 0 <= decay <= 1:
        raise ValueError(f"anchor_decay={decay!r} must be in [0, 1]: 1 leaves the anchor where it is")
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
        if decay < 1:
            raise ValueError(f"anchor_decay={decay!r} moves the anchor, but anchor='zero' is not kept: give a tensor of zeros")
        return {}
    point = param if isinstance(anchor, str) else anchor
    return {"anchor": point.detach().to(device, dtype or (param.dtype if decay == 1 else state_dtype(param)), copy=True)}


def anchor_of(param: Tensor, state: State) -> Tensor | None:
    """The anchor, where the parameter is; None if it is zero.

    Returns:
        A tensor of the parameter's shape, or None.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.anchor_of(torch.ones(2), {"anchor": torch.zeros(2)})
        tensor([0., 0.])
    """
    anchor = state.get("anchor")
    return None if anchor is None else anchor.to(param.device)


def displacement(param: Tensor, state: State) -> Tensor:
    """Parameter minus anchor, of the parameter's shape.

    Returns:
        The difference.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.displacement(torch.ones(2), {"anchor": torch.zeros(2)})
        tensor([1., 1.])
    """
    anchor = anchor_of(param, state)
    return param if anchor is None else torch.sub(param, anchor)


def moved_anchor(new: Tensor, state: State, decay: float) -> State:
    r"""The state after a step, in which the anchor is an exponential moving average of the weights.

    \(\theta_0 \leftarrow \beta \theta_0 + (1 - \beta) \theta\)

    Args:
        new: \(\theta\), the parameter after the step.
        state: with the anchor \(\theta_0\).
        decay: \(\beta\) in [0, 1]; with 1, the anchor stays.

    Returns:
        The new state.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> hn.rules.moved_anchor(torch.ones(2), {"anchor": torch.zeros(2)}, 0.75)
        {'anchor': tensor([0.2500, 0.2500])}
    """
    if decay == 1:
        return state
    return {**state, "anchor": decay * state["anchor"] + (1 - decay) * new.to(state["anchor"].device)}
