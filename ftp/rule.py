"""Fast Trainable Projection (arXiv 2310.19182) as an expression of the engine."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import hyperopt_nested as hn

FLOOR = 9.99999993922529e-09
"""The smallest radius, where each one starts: 1e-8 rounded to float32, as the published program has it."""


@dataclass(frozen=True)
class Anneal:
    """Multiply positive hypergradients, those that shrink the radius, by `k` (any shape).

    Args:
        k: in [0, 1]; 1 leaves them; with 0 only the bound, the largest row norm, shrinks the radius.

    Raises:
        TypeError: `k` is no number.
        ValueError: `k` is outside [0, 1].

    Example:
        >>> import torch
        >>> from ftp import Anneal
        >>> Anneal(0.5)(torch.tensor([-2.0, 2.0]))
        tensor([-2.,  1.])
    """

    k: float

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, (int, float)):
            raise TypeError(f"k={self.k!r} ({type(self.k).__name__}) must be a number in [0, 1]")
        if not 0 <= self.k <= 1:
            raise ValueError(f"k={self.k!r} must be in [0, 1]: 1 projects most strongly, 0 least")

    def __call__(self, grad: Tensor) -> Tensor:
        return torch.where(grad > 0, self.k * grad, grad)


def largest_norm(state: dict[str, Any]) -> Tensor:
    """The upper bound of a radius: the largest row norm of this step's displacement, shape ().

    Returns:
        The norm.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> import ftp
        >>> ftp.largest_norm({"largest_norm": torch.tensor(2.0)})
        tensor(2.)
    """
    norm: Tensor = state["largest_norm"]
    return norm


_UNLIMITED = 1e20
"""A radius that projects nothing; the bound then makes it the largest norm of that step."""


def _exp(log: Tensor) -> Tensor:
    return log.clamp(max=math.log(_UNLIMITED) - 1).exp()


def _limits(info: torch.finfo) -> tuple[float, float]:
    return math.log(info.tiny), 0.99 * math.log(info.max)


_LOG = hn.Bijection("log", _exp, torch.log, _limits)
"""Logarithms; but an unlimited radius has derivative zero and not its own size, which Adam's moments would remember."""

_Per = Literal["model", "tensor", "row"]


@dataclass(frozen=True)
class Radius:
    r"""A variant of FTP's radii. The default is the published algorithm.

    Row \(i\) of a tensor is projected into the ball of radius \(\gamma s_i\) around its anchor \(\theta_{0,i}\), and Adam, at the rate
    \(\mu\) (`radius_lr`), learns \(\gamma\) from its gradient \(h\): \(\gamma \leftarrow \gamma - \mu\, \mathrm{Adam}(h)\), between
    `FLOOR` and \(\max_i \lVert \theta_i - \theta_{0,i}\rVert / s_i\) of the step.

    Args:
        per: one radius for each "tensor"; "row": one for each, \(\gamma_i\), each with the bound of its row; or one for the "model".
        via: None; or "log": \(\log\gamma \leftarrow \log\gamma - \mu\, \mathrm{Adam}(\gamma h)\), so that a radius changes by a share of
            about \(\mu\) in each step, however large it is. From `FLOOR` that takes long: start at the displacement.
        relative: what radii are in units of: None, \(s_i = 1\); "tensor", the largest row norm of the anchor,
            \(s_i = \max_j \lVert \theta_{0,j}\rVert\); "row", \(s_i = \lVert \theta_{0,i}\rVert\). See `hn.project`.
        start: the radius of the first step, at least `FLOOR`; None is `FLOOR`, as published, or, where an anchor is given that the
            weights have left already, the largest \(\lVert \theta_i - \theta_{0,i}\rVert / s_i\) before that step; "displacement": the
            first step is not projected, and then \(\gamma\) is the largest after it (of weights that it leaves in place, `FLOOR`).
        scheduled: whether \(\mu\) is multiplied by what schedules have made of the learning rate \(\eta\) that was declared,
            \(\mu_t = \mu\, \eta_t / \eta\): radii move no faster than the schedule lets the weights move.

    Raises:
        TypeError: `start` is no number, or `scheduled` no bool.
        ValueError: an argument is none of its choices, or two do not go together.

    Example:
        >>> import torch, ftp
        >>> model = torch.nn.Linear(2, 1)
        >>> radius = ftp.Radius(relative="row", start="displacement")
        >>> opt = ftp.AdamP(model.named_parameters(), radius=radius)
    """

    per: _Per = "tensor"
    via: Literal["log"] | None = None
    relative: hn.typing.Relative = None
    start: float | Literal["displacement"] | None = None
    scheduled: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("per", get_args(_Per)), ("via", (None, "log")), ("relative", get_args(hn.typing.Relative))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} of a radius must be {' or '.join(map(repr, choices))}")
        if not isinstance(self.scheduled, bool):
            raise TypeError(f"scheduled={self.scheduled!r} ({type(self.scheduled).__name__}) must be True or False")
        if self.scheduled and self.per == "model":
            raise ValueError("scheduled=True needs per='tensor' or 'row': what all tensors share may have several schedules")
        if self.start not in (None, "displacement"):
            if isinstance(self.start, bool) or not isinstance(self.start, (int, float)):
                raise TypeError(f"start={self.start!r} ({type(self.start).__name__}) must be a number, None or 'displacement'")
            if not FLOOR <= self.start < _UNLIMITED:
                raise ValueError(f"start={self.start!r} must be between ftp.FLOOR and {_UNLIMITED:g}, None or 'displacement'")


def projection(k: float = 1.0, lr: float | hn.Learn = 1e-2, radius: Radius = Radius()) -> Callable[..., hn.Optimizer]:
    """`hn.project` into a MARS ball whose radius is learned as FTP does (arXiv 2310.19182, algorithm 1): by Adam, in its bounds.

    Args:
        k: annealing of positive radius gradients, in [0, 1].
        lr: learning rate of the radius, >= 0, or `hn.learn(...)`.
        radius: the variant.

    Raises:
        TypeError: `k` or `lr` is no number, or `radius` no `Radius`.
        ValueError: `k` or `lr` is outside its domain.
    """
    if not isinstance(radius, Radius):
        raise TypeError(f"radius={radius!r} ({type(radius).__name__}) must be an ftp.Radius(...)")
    if not isinstance(lr, hn.Learn):
        if isinstance(lr, bool) or not isinstance(lr, (int, float)):
            raise TypeError(f"radius_lr={lr!r} ({type(lr).__name__}) must be a number >= 0, or hn.learn(...)")
        if not 0 <= lr < math.inf:
            raise ValueError(f"radius_lr={lr!r} must be finite and >= 0; the published value is 0.01")
    start = _UNLIMITED if radius.start == "displacement" else FLOOR if radius.start is None else radius.start
    how: dict[str, Any] = {"per": radius.per, "via": _LOG if radius.via else None, "scheduled_by": "lr" if radius.scheduled else None}
    learned = hn.learn(start, by=hn.adam(lr=1e-2).replace(lr=lr), grad=Anneal(k), bounds=(FLOOR, largest_norm), **how)
    return functools.partial(hn.project, onto=hn.mars, radius=learned, relative=radius.relative)


@hn.rule(separable="element", nondifferentiable=("lr",))
def identity(
    param: Tensor,
    grad: Tensor,  # noqa: ARG001
    state: dict[str, Any],
    *,
    lr: Tensor = hn.NonNegative(1.0),  # noqa: ARG001
) -> tuple[Tensor, dict[str, Any]]:
    """No step: what combinators are put around where another optimizer steps the tensors, as in `optax.identity`.

    Args:
        lr: that optimizer's learning rate: for combinators that read it, and for `hn.learn(..., scheduled_by="lr")`.

    Example:
        >>> import ftp
        >>> ftp.identity().rule.name
        'identity'
    """
    return param.clone(), state


def ftp_rule(
    base: hn.Optimizer,
    k: float = 1.0,
    *,
    anchor: hn.typing.Anchor = "start",
    anchor_decay: float = 1.0,
    saturation: hn.typing.Saturation = "straight-through",
    lr: float | hn.Learn = 1e-2,
    radius: Radius = Radius(),
) -> hn.Optimizer:
    """FTP around any optimizer of the engine (arXiv 2310.19182, algorithm 1): registered as "ftp".

    After each step of `base`, each tensor is projected into the MARS ball around its anchor. Its radius is learned by Adam, from the
    gradient that the next step has anyway, and is kept between `FLOOR` and the largest row norm of the displacement.

    Args:
        base: the optimizer that is projected.
        k: annealing of positive radius gradients, in [0, 1].
        anchor: "start", the values before the first step, "zero", or a tensor.
        anchor_decay: in [0, 1]: after each step, `anchor = anchor_decay * anchor + (1 - anchor_decay) * weights`; 1 is a fixed anchor.
        saturation: derivative with respect to the radius where the projection is inactive; "straight-through" as published.
        lr: learning rate of the radii, >= 0, or `hn.learn(...)`.
        radius: a variant of the radii; see `Radius`.

    Returns:
        The `Optimizer`.

    Raises:
        TypeError: `base` is no optimizer of the engine.
        ValueError: `k` or another argument is outside its domain.

    Example:
        >>> import hyperopt_nested as hn, ftp
        >>> nested = hn.Nested(ftp.ftp_rule(hn.sgd(lr=0.1, momentum=0.9)))
    """
    return projection(k, lr, radius)(base, anchor=anchor, anchor_decay=anchor_decay, saturation=saturation)


hn.rules.register("ftp", ftp_rule, check_with={"saturation": "exact"})
