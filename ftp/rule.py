"""Fast Trainable Projection (arXiv 2310.19182) as an expression of the engine."""

import math
from dataclasses import dataclass
from typing import Any

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
    """The upper bound of a radius: the largest row norm of this step's displacement, shape ()."""
    norm: Tensor = state["largest_norm"]
    return norm


def ftp_radius(k: float = 1.0, lr: float | hn.Learn = 1e-2) -> hn.Learn:
    """A radius as FTP learns it (arXiv 2310.19182, algorithm 1): one a tensor, by Adam, between `FLOOR` and the largest row norm.

    Args:
        k: annealing of positive radius gradients, in [0, 1].
        lr: learning rate of the radius, >= 0, or `hn.learn(...)`.

    Raises:
        TypeError: `k` or `lr` is no number.
        ValueError: `k` or `lr` is outside its domain.
    """
    if not isinstance(lr, hn.Learn):
        if isinstance(lr, bool) or not isinstance(lr, (int, float)):
            raise TypeError(f"radius_lr={lr!r} ({type(lr).__name__}) must be a number >= 0, or hn.learn(...)")
        if not 0 <= lr < math.inf:
            raise ValueError(f"radius_lr={lr!r} must be finite and >= 0; the published value is 0.01")
    return hn.learn(FLOOR, by=hn.adam(lr=lr), per="tensor", grad=Anneal(k), bounds=(FLOOR, largest_norm))


@hn.rule(separable="element")
def identity(param: Tensor, grad: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:  # noqa: ARG001
    """No step: what combinators are put around where another optimizer steps the tensors, as in `optax.identity`."""
    return param.clone(), state


def ftp_rule(
    base: hn.Optimizer,
    k: float = 1.0,
    *,
    anchor: hn.typing.Anchor = "start",
    saturation: hn.typing.Saturation = "straight-through",
    lr: float = 1e-2,
) -> hn.Optimizer:
    """FTP around any optimizer of the engine (arXiv 2310.19182, algorithm 1): registered as "ftp".

    After each step of `base`, each tensor is projected into the MARS ball around its anchor. Its radius is learned by Adam, from the
    gradient that the next step has anyway, and is kept between `FLOOR` and the largest row norm of the displacement.

    Args:
        base: the optimizer that is projected.
        k: annealing of positive radius gradients, in [0, 1].
        anchor: "start", the values before the first step, "zero", or a tensor.
        saturation: derivative with respect to the radius where the projection is inactive; "straight-through" as published.
        lr: learning rate of the radii.

    Raises:
        TypeError: `base` is no optimizer of the engine.
        ValueError: `k` or another argument is outside its domain.

    Example:
        >>> import hyperopt_nested as hn, ftp
        >>> nested = hn.Nested(ftp.ftp_rule(hn.sgd(lr=0.1, momentum=0.9)))
    """
    return hn.project(base, onto=hn.mars, radius=ftp_radius(k, lr), anchor=anchor, saturation=saturation)


hn.rules.register("ftp", ftp_rule, check_with={"saturation": "exact"})
