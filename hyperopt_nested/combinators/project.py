"""Projection of every tensor into a ball around its anchor."""

from typing import get_args

import torch
from torch import Tensor

from hyperopt_nested.combinator import Step, combinator
from hyperopt_nested.combinators.anchor import Anchor, anchor_of, displacement, keep_anchor
from hyperopt_nested.hyper import NonNegative
from hyperopt_nested.ops import State, state_dtype
from hyperopt_nested.projections import EPS, Ball, Saturation, largest, mars


def _init(
    param: Tensor,
    *,
    saturation: Saturation,
    anchor: Anchor = "start",
    anchor_dtype: torch.dtype | None = None,
    anchor_device: str | torch.device | None = None,
) -> State:
    if saturation not in get_args(Saturation):
        raise ValueError(f"saturation={saturation!r} must be one of {', '.join(map(repr, get_args(Saturation)))}")
    kept = keep_anchor(param, anchor, dtype=anchor_dtype, device=anchor_device)
    return {"largest_norm": param.new_zeros((), dtype=state_dtype(param)), **kept}


@combinator(_init, coupling=lambda *, onto: onto.coupling, check_with={"saturation": "exact"}, radius=NonNegative(1.0))
def project(
    param: Tensor,
    grad: Tensor,
    state: State,
    step: Step,
    *,
    radius: Tensor,
    onto: Ball = mars,
    saturation: Saturation = "straight-through",
) -> tuple[Tensor, State]:
    """The optimizer, followed by a projection of every tensor into a ball around its anchor.

    Its state holds the anchor (unless that is zero) and the largest norm of a block of the last displacement, before it was
    projected, plus 1e-8 (`largest_norm`, shape ()): no larger radius would change it.

    Args:
        radius: the ball's radius, >= 0.
        onto: the ball: `mars`, `frobenius`, `row_l2` or `linf`.
        anchor: the centre: "start", the parameter's values at initialisation; "zero", which takes no memory; or a tensor.
        anchor_dtype: what the centre is kept in, and thereby rounded to; None is the parameter's dtype.
        anchor_device: where it is kept, and fetched from in each step: "cpu" saves a GPU's memory; None is where the parameter is.
        saturation: derivative with respect to the radius where the projection is inactive; see `Saturation`.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.project(hn.sgd(lr=0.1), onto=hn.mars, radius=0.5).rule.name
        'project(sgd)'
    """
    new = step(param, grad)
    moved = displacement(new, state)
    norms = onto.norms(moved)
    pulled = onto.pull(new, moved, norms, radius, center=anchor_of(new, state), saturation=saturation)
    return pulled, {**state, "largest_norm": largest(norms) + EPS}
