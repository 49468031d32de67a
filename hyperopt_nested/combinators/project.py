"""Projection of every tensor into a ball around its anchor."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hyperopt_nested.combinators.base import Step, combinator
from hyperopt_nested.domains import NonNegative
from hyperopt_nested.ops import finite, row_shape, state_dtype
from hyperopt_nested.projections import EPS, Ball, Saturation, largest, mars
from hyperopt_nested.rule import Learn
from hyperopt_nested.rules._anchor import Anchor, anchor_of, displacement, keep_anchor, moved_anchor
from hyperopt_nested.signatures import Separable
from hyperopt_nested.trees import State

Relative = Literal["tensor", "row", None]
"""The norm of an anchor that radii are relative to: the largest of the ball's blocks, that of each row, or none."""

_BALLS = "mars", "frobenius", "row_l2", "linf"


def _init(
    param: Tensor,
    *,
    radius: float | Learn,
    onto: Ball,
    saturation: Saturation,
    relative: Relative,
    anchor: Anchor = "start",
    anchor_decay: float,
    anchor_dtype: torch.dtype | None = None,
    anchor_device: str | torch.device | None = None,
) -> State:
    if saturation not in get_args(Saturation):
        raise ValueError(f"saturation={saturation!r} must be one of {', '.join(map(repr, get_args(Saturation)))}")
    if relative not in get_args(Relative):
        raise ValueError(f"relative={relative!r} must be one of {', '.join(map(repr, get_args(Relative)))}")
    if relative == "row" and onto.separable != "row":
        raise ValueError(f"relative='row' needs a ball that goes by row, hn.mars or hn.row_l2; onto is {onto.name}")
    kept = keep_anchor(param, anchor, decay=anchor_decay, dtype=anchor_dtype, device=anchor_device)
    by_row = isinstance(radius, Learn) and radius.per == "row" and onto.separable == "row"
    state = {"largest_norm": param.new_zeros(row_shape(param) if by_row else (), dtype=state_dtype(param)), **kept}
    if relative is None:
        return state
    if not kept:
        raise ValueError(f"relative={relative!r} needs an anchor that has a norm; anchor='zero' has none")
    norms = onto.norms(finite(kept["anchor"].to(param.device, state_dtype(param))))
    top = largest(norms)
    top = torch.where(top > 0, top, 1)  # weights of zeros have no size
    return {**state, "anchor_norm": top if relative == "tensor" else torch.where(norms > 0, norms, top)}


def _separable(options: Mapping[str, Any]) -> Separable:
    onto = options["onto"]
    if not isinstance(onto, Ball):
        by_name = f": hn.{onto}" if isinstance(onto, str) and onto in _BALLS else f", such as {', '.join(f'hn.{ball}' for ball in _BALLS)}"
        raise TypeError(f"onto={onto!r} ({type(onto).__name__}) must be a ball{by_name}")
    return onto.separable


def _maxima(options: Mapping[str, Any]) -> tuple[str, ...] | None:
    return ("largest_norm",) if options["relative"] is None else None  # of the anchor's norms, `init` takes the largest


def _sums(param: Tensor, state: State, options: Mapping[str, Any]) -> Tensor:
    onto: Ball = options["onto"]
    return onto.sums(finite(displacement(param, state)))


@combinator(_init, separable=_separable, maxima=_maxima, sums=_sums, check_with={"saturation": "exact"})
def project(
    param: Tensor,
    grad: Tensor,
    state: State,
    step: Step,
    *,
    sums: Tensor | None,
    radius: Tensor = NonNegative(1.0),
    onto: Ball = mars,
    saturation: Saturation = "straight-through",
    relative: Relative = None,
    anchor_decay: float = 1.0,
) -> tuple[Tensor, State]:
    r"""The optimizer, followed by a projection of every tensor into a ball around its anchor.

    With the new values \(\theta\) and the displacement \(d = \theta - \theta_0\), each block \(d_i\) of a norm larger than
    \(\gamma s_i\) is scaled to \(\gamma s_i d_i / \lVert d_i\rVert\).

    Its state holds the anchor (unless that is zero) and the largest \(\lVert d_i\rVert / s_i\), plus 1e-8 (`largest_norm`, shape ()):
    no larger radius would change the step. A radius that is learned per row has one for each row, if the ball goes by row. Norms leave
    out elements that are not finite.

    Args:
        radius: \(\gamma \ge 0\).
        onto: the ball: `mars`, `frobenius`, `row_l2` or `linf`.
        anchor: \(\theta_0\): "start", the parameter's values before its first step; "zero", which takes no memory; or a tensor.
        anchor_dtype: what the centre is kept in, and thereby rounded to; None is the parameter's dtype.
        anchor_device: where it is kept, and fetched from in each step: "cpu" saves a GPU's memory; None is where the parameter is.
        saturation: derivative with respect to the radius where the projection is inactive; see `Saturation`.
        relative: what radii are in units of: None, \(s_i = 1\); "tensor", the largest norm of a block of the first anchor; "row", the
            norm of each of its rows. In the place of a row's norm that is zero stands the largest, and 1 if all are.
        anchor_decay: \(\beta\) in [0, 1]; after each step, \(\theta_0 \leftarrow \beta \theta_0 + (1 - \beta) \theta\). 1: it is fixed.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.project(hn.sgd(lr=0.1), onto=hn.mars, radius=0.5).rule.name
        'project(sgd)'
    """
    new = step(param, grad)
    moved = displacement(new, state)
    sums = onto.sums(finite(moved)) if sums is None else sums  # an element that is not finite spoils no other
    norms, last = onto.norms_of(sums), state["largest_norm"]
    reach = radius if relative is None else radius * state["anchor_norm"]
    projected = onto.shrink(new, moved, norms, reach, center=anchor_of(new, state), saturation=saturation)
    norms = norms if relative is None else norms / state["anchor_norm"]
    top = finite(norms, -1.0)
    top = top if top.shape == last.shape else largest(top)
    known = (top > 0) | ((top == 0) & torch.isfinite(moved.sum_to_size(last.shape)))  # else nothing is finite: the last one stays
    return projected, moved_anchor(projected, {**state, "largest_norm": torch.where(known, top + EPS, last)}, anchor_decay)
