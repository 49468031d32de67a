"""Default recipes: in which coordinates, at which rate and between which bounds `learn` learns a hyper when nothing is said."""

import math
from dataclasses import dataclass
from typing import Literal

from hyperopt_nested.domains import BIJECTIONS, Bijection, Hyper

RATE = 0.1
"""The learner's rate in the coordinates of a bijection: the one constant of all default recipes, without a unit."""

LEVEL_RATE = 0.15
"""The same for a level that is learned in a window, under a shape: see `hyperopt_nested.optim.level`."""

EPS = 1e-16
"""The learner's eps: far below any hypergradient, so that steps have no unit; float32 holds its inverse, and squares of what is larger."""

FACTOR = 1e4
"""How far from its start a value may go: a factor of its distance from the domain's end; of its odds in an interval."""

BELOW = 0.1
"""The part of a learning rate's start that it begins at, where the start is above the rule's default."""

_AT_ZERO = 1e-3
_OF_WIDTH = 0.01


@dataclass(frozen=True)
class Recipe:
    """How a hyper is learned by default.

    Attributes:
        via: the coordinates.
        rate: the learner's rate there.
        bounds: of the value; infinite where there is none.
    """

    via: Bijection | Literal["projection"]
    rate: float
    bounds: tuple[float, float]


def recipe(hyper: Hyper, value: float, via: Bijection | Literal["projection"] | None) -> Recipe:
    """The recipe for a hyper that starts at a value.

    Args:
        hyper: the domain.
        value: the start.
        via: coordinates that the user chose; None leaves the choice to the recipe.

    Example:
        >>> import hyperopt_nested as hn
        >>> recipe(hn.Positive(1e-3), 0.5, None).via
        log
        >>> recipe(hn.UnitInterval(0.9), 0.0, None).via
        'projection'
    """
    lower, upper = hyper.lower, hyper.upper
    is_half_line, is_interval = (math.isfinite(lower) and math.isfinite(upper) is end for end in (False, True))
    inside = lower < value < upper
    if via is None and inside:
        via = hyper.via or (BIJECTIONS["log"] if is_half_line else BIJECTIONS["logit"] if is_interval else None)
    bounds = -math.inf, math.inf
    if is_half_line and inside:
        size, bounds = RATE * (value - lower), (lower + (value - lower) / FACTOR, lower + (value - lower) * FACTOR)
    elif is_half_line:
        size = RATE * (hyper.default - lower) or _AT_ZERO
    elif is_interval:
        size = _OF_WIDTH * (upper - lower)
        bounds = (_of_odds(hyper, value, 1 / FACTOR), _of_odds(hyper, value, FACTOR)) if inside else bounds
    else:
        size = _OF_WIDTH * max(abs(value), 1.0)
    return Recipe(via or "projection", RATE if isinstance(via, Bijection) else size, bounds)


def begin(hyper: Hyper, start: float) -> float:
    """Where a learning rate begins: one that is too high damages a model before it is learned, one that is too low costs steps.

    Example:
        >>> import hyperopt_nested as hn
        >>> [begin(hn.NonNegative(1e-3), start) for start in (1e-5, 1e-3, 5e-3, 0.5)]
        [1e-05, 0.001, 0.001, 0.05]
    """
    if not math.isfinite(hyper.lower):
        return start
    return min(start, max(hyper.default, hyper.lower + BELOW * (start - hyper.lower)))


def _of_odds(hyper: Hyper, value: float, factor: float) -> float:
    """The value whose odds, its distance from the lower end over that from the upper, are a factor of those of `value`."""
    odds = factor * (value - hyper.lower) / (hyper.upper - value)
    return hyper.lower + (hyper.upper - hyper.lower) * odds / (1 + odds)
