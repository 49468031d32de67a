"""Domains of hyper-parameters, and the two ways to keep a learned value inside one.

A `Hyper` declares the default and the domain of one hyper-parameter. A learned value stays in the domain either by projection (it is
clamped after the learner's step) or by a bijection `via`: it is then learned in the bijection's unconstrained coordinates. Without a
bijection the unconstrained coordinates are the value itself.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hyperopt_nested.checks import check_number, host_number, is_number


@dataclass(frozen=True)
class Bijection:
    """A smooth map from the real line onto (0, inf), or onto (0, 1); a domain is a shifted or scaled copy of one of them.

    `"log"`, `"softplus"` (half-lines) and `"logit"` (intervals) name the ones that come with the library.

    Args:
        name: its name, for messages and checkpoints.
        forward: from unconstrained coordinates to values, tensor to tensor, elementwise.
        inverse: from values to unconstrained coordinates.
        limits: the smallest and the largest unconstrained coordinate that a dtype can hold.
        interval: whether it maps onto (0, 1), and not onto (0, inf).
        even: whether it is two-to-one, `forward(-x) == forward(x)`, and reaches the lower end, at 0.

    Example:
        >>> import hyperopt_nested as hn
        >>> def limits(info):
        ...     return -(info.max**0.5), info.max**0.5
        >>> square = hn.Bijection("square", torch.square, torch.sqrt, limits, even=True)
        >>> hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=1e-3), via=square)).via("lr")
        square
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    limits: Callable[[torch.finfo], tuple[float, float]]
    interval: bool = False
    even: bool = False

    def __repr__(self) -> str:
        return self.name

    @property
    def number(self) -> int:
        """A number for its name, by which checkpoints tell bijections apart; none is 0."""
        return zlib.crc32(self.name.encode()) or 1


def _log_limits(info: torch.finfo) -> tuple[float, float]:
    return math.log(info.tiny), 0.99 * math.log(info.max)


def _softplus(unconstrained: Tensor) -> Tensor:
    return torch.logaddexp(unconstrained, torch.zeros_like(unconstrained))


def _softplus_inverse(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


def _softplus_limits(info: torch.finfo) -> tuple[float, float]:
    return math.log(info.tiny), info.max


def _logit_limits(info: torch.finfo) -> tuple[float, float]:
    return math.log(info.eps), -math.log(info.eps)


BIJECTIONS = {
    each.name: each
    for each in (
        Bijection("log", torch.exp, torch.log, _log_limits),
        Bijection("softplus", _softplus, _softplus_inverse, _softplus_limits),
        Bijection("logit", torch.sigmoid, torch.logit, _logit_limits, interval=True),
    )
}
"""The bijections that have names."""


def bijection(name: str, via: str | Bijection | None) -> Bijection | None:
    """The bijection that is meant by its name or by itself.

    Args:
        name: how messages call what it is given to.
        via: the bijection, its name, or None.

    Raises:
        ValueError: there is none of that name.
    """
    if via is None or isinstance(via, Bijection):
        return via
    if not isinstance(via, str) or via not in BIJECTIONS:
        raise ValueError(
            f"{name}: via={via!r} is no known bijection; choose one of {', '.join(BIJECTIONS)}, a hn.Bijection, or None to project"
        )
    return BIJECTIONS[via]


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter: its default value and its domain.

    Made by `Real`, `Positive`, `NonNegative`, `UnitInterval` and `Interval`.

    Args:
        default: the value when the user gives none.
        domain: the domain's name, for messages and tables.
        lower: the domain's lower end; included unless `open_lower`.
        upper: the domain's upper end; included unless `open_upper`.
        open_lower: the lower end is not in the domain.
        open_upper: the upper end is not in the domain.
        via: the bijection in whose coordinates the value is learned when `learn` names none; None keeps it in the domain by
            projection.
        is_loss: it is no setting, but the loss of each step; see `StepLoss`.

    Raises:
        TypeError: the default is not a number.
        ValueError: the default is outside the domain, or `via` does not map onto it.
    """

    default: float
    domain: str = "Real"
    lower: float = -math.inf
    upper: float = math.inf
    open_lower: bool = False
    open_upper: bool = False
    via: Bijection | None = None
    is_loss: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "via", bijection("default", self.via))
        self.check("default", self.default, self.via)

    def __str__(self) -> str:
        left = "(" if self.open_lower or math.isinf(self.lower) else "["
        right = ")" if self.open_upper or math.isinf(self.upper) else "]"
        return f"{self.domain} {left}{self.lower:g}, {self.upper:g}{right}"

    def check(self, name: str, value: float, via: Bijection | None = None) -> None:
        """Refuse a value outside the domain, or a bijection that cannot represent it.

        Args:
            name: how messages call the hyper-parameter.
            value: the value to check; a tensor of one number, too.
            via: the bijection that it will be learned through.

        Raises:
            TypeError: `value` is not a real number.
            ValueError: `value` is a tensor of several numbers, or outside the domain; or `via` does not map onto the domain, or never
                reaches the value.
        """
        value = host_number(name, value, self.default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be a number, or learn(<number>, by=<optimizer>)")
        below = value <= self.lower if self.open_lower else value < self.lower
        above = value >= self.upper if self.open_upper else value > self.upper
        if below or above or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} is outside its domain {self}: choose a finite value inside it")
        if via is None:
            return
        if (math.isfinite(self.lower), math.isfinite(self.upper)) != (True, via.interval):
            raise ValueError(
                f"{name}: via={via.name!r} does not map onto {self}; log and softplus fit a domain that is bounded below only, logit an "
                "interval; via=None (projection) fits any"
            )
        if value == self.upper or (value == self.lower and not via.even):
            raise ValueError(f"{name}={value!r} is an end of {self}, which via={via.name!r} never reaches: start inside, or use via=None")

    def check_scheduled(self, name: str, value: object) -> None:
        """Refuse a number that a schedule has made of a value: outside the domain; but an open lower end it may reach, as of 0.

        Args:
            name: how messages call it.
            value: the number.

        Raises:
            TypeError: it is no real number.
            ValueError: it is not finite, or outside the domain.
        """
        if not is_number(value):
            raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be a number")
        number = float(cast(float, value))
        above = number >= self.upper if self.open_upper else number > self.upper
        if not math.isfinite(number) or number < self.lower or above:
            raise ValueError(f"{name}={value!r} is outside its domain {self}: let the schedule end inside it")

    @property
    def ends(self) -> tuple[float, float, bool, bool]:
        """The domain's ends, and whether they are open."""
        return self.lower, self.upper, self.open_lower, self.open_upper

    def bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """Smallest and largest number of `dtype` in the domain; an open end is moved inwards by the least step."""
        info = torch.finfo(dtype)
        low = self.lower + max(info.tiny, abs(self.lower) * info.eps) if self.open_lower else max(self.lower, info.min)
        high = self.upper - max(info.tiny, abs(self.upper) * info.eps) if self.open_upper else min(self.upper, info.max)
        return low, high

    def to_unconstrained(self, value: Tensor, via: Bijection | None) -> Tensor:
        """Unconstrained coordinates of a value."""
        return value if via is None else via.inverse((value - self.lower) / self._scale)

    def to_value(self, unconstrained: Tensor, via: Bijection | None) -> Tensor:
        """Value at unconstrained coordinates."""
        if via is None:
            return unconstrained
        return torch.clamp(self.lower + self._scale * via.forward(unconstrained), *self.bounds(unconstrained.dtype))

    def confine(self, unconstrained: Tensor, via: Bijection | None) -> Tensor:
        """Nearest coordinates whose value the dtype can tell from the domain's ends: the projection after a learner's step."""
        if via is None:
            return unconstrained.clamp(*self.bounds(unconstrained.dtype))
        return unconstrained.clamp(*via.limits(torch.finfo(unconstrained.dtype)))

    def within(self, unconstrained: Tensor, via: Bijection | None, low: Tensor | float | None, high: Tensor | float | None) -> Tensor:
        """Coordinates after clamping the value to `[low, high]` (None: no bound); where it is inside, they stay bit for bit."""
        if low is None and high is None:
            return unconstrained
        value, (lower, upper) = self.to_value(unconstrained, via), self.bounds(unconstrained.dtype)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            clamped = torch.clamp(value, low, high).clamp(lower, upper)  # type: ignore[arg-type]
        else:
            clamped = value.clamp(lower if low is None else max(low, lower), upper if high is None else min(high, upper))
        if via is None:
            return clamped
        return torch.where(clamped == value, unconstrained, self.confine(self.to_unconstrained(clamped, via), via))

    @property
    def _scale(self) -> float:
        return self.upper - self.lower if math.isfinite(self.upper) else 1.0


def Real(default: float) -> Any:
    """Declare a hyper-parameter that may be any real number.

    Like the other domains it returns a `Hyper`; its type is Any, since it stands as the default of a parameter that is a tensor.

    Returns:
        The domain, with its default.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.Real(0.0).default
        0.0
    """
    return Hyper(default)


def StepLoss() -> Any:
    """Declare that an update reads the loss of the step that it is called in, as a tensor of shape ().

    It is declared as a hyper, but cannot be set or learned: `HyperOptimizer.step` takes it from its closure, or as `loss=`;
    `Nested.step` as one of `values`.

    Returns:
        The domain: all real numbers.

    Example:
        >>> import hyperopt_nested as hn
        >>> @hn.combinator(separable="element")
        ... def times_loss(param, grad, state, step, *, loss=hn.rules.StepLoss()):
        ...     return param + loss * (step(param, grad) - param), state
        >>> times_loss(hn.sgd(0.1)).rule.loss_names
        ('loss',)
    """
    return Hyper(1.0, "Loss", is_loss=True)


def Positive(default: float, *, via: str | Bijection | None = None) -> Any:
    """Declare a hyper-parameter in (0, inf).

    Returns:
        The domain, with its default.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.Positive(1e-3).open_lower
        True
    """
    return Interval(default, 0.0, math.inf, open_lower=True, via=via, domain="Positive")


def NonNegative(default: float, *, via: str | Bijection | None = None) -> Any:
    """Declare a hyper-parameter in [0, inf).

    Returns:
        The domain, with its default.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.NonNegative(0.0).lower
        0.0
    """
    return Interval(default, 0.0, math.inf, via=via, domain="NonNegative")


def UnitInterval(default: float, *, via: str | Bijection | None = None) -> Any:
    """Declare a hyper-parameter in [0, 1), as the decay rate of a moving average.

    Returns:
        The domain, with its default.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.UnitInterval(0.9).upper
        1.0
    """
    return Interval(default, 0.0, 1.0, open_upper=True, via=via, domain="UnitInterval")


def Interval(
    default: float,
    lower: float,
    upper: float,
    *,
    open_lower: bool = False,
    open_upper: bool = False,
    via: str | Bijection | None = None,
    domain: str = "Interval",
) -> Any:
    """Declare a hyper-parameter between two ends.

    Args:
        default: the value when the user gives none.
        lower: the lower end; may be -inf.
        upper: the upper end; may be inf.
        open_lower: the lower end is not in the domain.
        open_upper: the upper end is not in the domain.
        via: the bijection in whose coordinates it is learned by default; None keeps it in the domain by projection.
        domain: the domain's name, for messages and tables.

    Returns:
        The domain, with its default.

    Raises:
        TypeError: an end is no number.
        ValueError: the ends are not in order.

    Example:
        >>> import hyperopt_nested as hn
        >>> hn.Interval(0.0, -1.0, 1.0).ends
        (-1.0, 1.0, False, False)
    """
    for name, end in (("lower", lower), ("upper", upper)):
        if not is_number(end):
            check_number(name, end)
    if not lower < upper:
        raise ValueError(f"lower={lower!r}, upper={upper!r}: the ends of an interval must be in order")
    return Hyper(default, domain, lower, upper, open_lower, open_upper, bijection("default", via))
