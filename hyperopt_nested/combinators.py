"""Combinators: an optimizer in, an optimizer with more hyper-parameters out."""

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from hyperopt_nested.hyper import NonNegative
from hyperopt_nested.ops import State, state_dtype
from hyperopt_nested.projections import EPS, Ball, Saturation
from hyperopt_nested.rule import Coupling, Learn, Optimizer, Rule

Anchor = Literal["start", "zero"] | Tensor
"""Where a projection is centred: on the parameter's values when the optimizer is initialised, on zero (which takes no memory), or on
a tensor of the parameter's shape, of which the state keeps a copy."""


class Projected(Rule):
    """A rule followed by a projection into a ball around the anchor; made by `project`.

    Its state holds the base rule's (`base`), the anchor (`anchor`, unless it is zero) and the largest norm of a
    block of the last displacement, before it was projected, plus `EPS` (`largest_norm`, shape ()): no larger radius would change it.
    """

    def __init__(self, base: Rule, ball: Ball, anchor: Anchor, saturation: Saturation) -> None:
        self.base, self.ball, self.anchor, self.saturation = base, ball, anchor, saturation
        self.name = f"project({base.name}, onto={ball.name})"
        self.hypers = {**base.hypers, "radius": NonNegative(0.0)}
        self.coupling = max(base.coupling, ball.coupling, key=get_args(Coupling).index)

    def init(self, param: Tensor, settings: Mapping[str, float | Learn]) -> State:
        state: State = {"base": self.base.init(param, settings), "largest_norm": param.new_zeros((), dtype=state_dtype(param))}
        if isinstance(self.anchor, Tensor):
            if self.anchor.shape != param.shape:
                raise ValueError(f"anchor has shape {tuple(self.anchor.shape)}, the parameter {tuple(param.shape)}: they must be equal")
            return {**state, "anchor": self.anchor.detach().to(param.device, param.dtype, copy=True)}
        return state if self.anchor == "zero" else {**state, "anchor": param.detach().clone()}

    def update(self, param: Tensor, grad: Tensor, state: State, hypers: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        base_hypers = {name: hypers[name] for name in self.base.hypers}
        new, base_state = self.base.update(param, grad, state["base"], base_hypers)
        anchor = state.get("anchor")
        displacement = new if anchor is None else new - anchor
        norms = self.ball.norms(displacement)
        projected = self.ball.pull(new, displacement, norms, hypers["radius"], center=anchor, saturation=self.saturation)
        largest = norms.amax() if norms.numel() else norms.sum()
        return projected, {**state, "base": base_state, "largest_norm": largest + EPS}


def project(
    optimizer: Optimizer,
    *,
    onto: Ball,
    radius: float | Learn,
    anchor: Anchor = "start",
    saturation: Saturation = "straight-through",
) -> Optimizer:
    """The optimizer, followed by a projection of every tensor into a ball around its anchor.

    Args:
        optimizer: what makes the step that is then projected.
        onto: the ball: `mars`, `frobenius`, `row_l2` or `linf`.
        radius: the ball's radius, >= 0: a hyper like any other.
        anchor: the centre: "start", the parameter's values at initialisation; "zero", which takes no memory; or a tensor.
        saturation: derivative with respect to the radius where the projection is inactive; see `Saturation`.

    Raises:
        TypeError: `optimizer` is no optimizer of this library.
        ValueError: it has a hyper named radius already, an argument is none of its choices, or, at initialisation, the anchor is not of
            the parameter's shape.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.project(hn.sgd(lr=0.1), onto=hn.mars, radius=0.5).rule.name
        'project(sgd, onto=mars)'
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer={optimizer!r} ({type(optimizer).__name__}) must be an optimizer of this library, such as hn.adamw()")
    if "radius" in optimizer.rule.hypers:
        raise ValueError(f"{optimizer.rule.name} has a hyper named 'radius' already; project it once")
    if not isinstance(anchor, Tensor) and anchor not in ("start", "zero"):
        raise ValueError(f"anchor={anchor!r} must be 'start', 'zero' or a tensor")
    if saturation not in get_args(Saturation):
        raise ValueError(f"saturation={saturation!r} must be one of {', '.join(map(repr, get_args(Saturation)))}")
    rule = Projected(optimizer.rule, onto, anchor, saturation)
    return Optimizer(rule, {**optimizer.settings, "radius": radius}, optimizer.maximize)
