"""Projection of every tensor into a ball around its anchor."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from hyperopt_nested.combinators.base import Step, combinator
from hyperopt_nested.domains import NonNegative
from hyperopt_nested.ops import finite, state_dtype
from hyperopt_nested.projections import EPS, Ball, Saturation, largest, mars
from hyperopt_nested.rules._anchor import Anchor, anchor_of, displacement, keep_anchor
from hyperopt_nested.signatures import Separable
from hyperopt_nested.trees import State

_BALLS = "mars", "frobenius", "row_l2", "linf"


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


def _separable(options: Mapping[str, Any]) -> Separable:
    onto = options["onto"]
    if not isinstance(onto, Ball):
        by_name = f": hn.{onto}" if isinstance(onto, str) and onto in _BALLS else f", such as {', '.join(f'hn.{ball}' for ball in _BALLS)}"
        raise TypeError(f"onto={onto!r} ({type(onto).__name__}) must be a ball{by_name}")
    return onto.separable


@combinator(_init, separable=_separable, check_with={"saturation": "exact"})
def project(
    param: Tensor,
    grad: Tensor,
    state: State,
    step: Step,
    *,
    radius: Tensor = NonNegative(1.0),
    onto: Ball = mars,
    saturation: Saturation = "straight-through",
) -> tuple[Tensor, State]:
    """The optimizer, followed by a projection of every tensor into a ball around its anchor.

    Its state holds the anchor (unless that is zero) and the largest norm of a block of the last displacement, before it was
    projected, plus 1e-8 (`largest_norm`, shape ()): no larger radius would change it. Norms leave out elements that are not finite.

    Args:
        radius: the ball's radius, >= 0.
        onto: the ball: `mars`, `frobenius`, `row_l2` or `linf`.
        anchor: the centre: "start", the parameter's values before its first step; "zero", which takes no memory; or a tensor.
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
    norms = onto.norms(finite(moved))  # an element that is not finite spoils no other
    projected = onto.shrink(new, moved, norms, radius, center=anchor_of(new, state), saturation=saturation)
    top = largest(torch.where(torch.isfinite(norms), norms, -1))
    known = (top > 0) | ((top == 0) & torch.isfinite(moved.sum()))  # else nothing is finite: the last one stays
    return projected, {**state, "largest_norm": torch.where(known, top + EPS, state["largest_norm"])}
