"""Domains of hyper-parameters, and the two ways to keep a learned value inside one.

A `Hyper` declares the default and the domain of one hyper-parameter. A value that is learned stays in the domain either by
projection (it is clamped after the learner's step) or by a bijection `via`, in which case learning happens in the bijection's
unconstrained coordinates ("raw" coordinates below; without a bijection raw coordinates are the value itself).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from hyperopt_nested.checks import check_number, is_number

Bijection = Literal["log", "softplus", "square", "logit", "tanh"]
"""Name of a smooth map from the real line onto a domain: `log`, `softplus` and `square` reach a domain that is bounded below
only, `logit` and `tanh` an interval. `square` is two-to-one and reaches zero itself."""


@dataclass(frozen=True)
class _Map:
    """A map from raw coordinates onto (0, inf) or (0, 1), its inverse, and the raw coordinates that a dtype can hold."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    reach: Callable[[torch.finfo], tuple[float, float]]
    interval: bool = False


def _logit_reach(info: torch.finfo) -> tuple[float, float]:
    return math.log(info.eps), -math.log(info.eps)


_MAPS = {
    "log": _Map(torch.exp, torch.log, lambda info: (math.log(info.tiny), 0.99 * math.log(info.max))),
    "softplus": _Map(
        lambda raw: torch.logaddexp(raw, torch.zeros_like(raw)),
        lambda value: value + torch.log(-torch.expm1(-value)),
        lambda info: (math.log(info.tiny), info.max),
    ),
    "square": _Map(torch.square, torch.sqrt, lambda info: (-math.sqrt(info.max) / 2, math.sqrt(info.max) / 2)),
    "logit": _Map(torch.sigmoid, torch.logit, _logit_reach, interval=True),
    "tanh": _Map(
        lambda raw: (torch.tanh(raw) + 1) / 2,
        lambda value: torch.atanh(2 * value - 1),
        lambda info: (_logit_reach(info)[0] / 2, _logit_reach(info)[1] / 2),
        interval=True,
    ),
}


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

    def __post_init__(self) -> None:
        self.check("default", self.default, self.via)

    def __str__(self) -> str:
        left = "(" if self.open_lower or math.isinf(self.lower) else "["
        right = ")" if self.open_upper or math.isinf(self.upper) else "]"
        return f"{self.domain} {left}{self.lower:g}, {self.upper:g}{right}"

    def check(self, name: str, value: float, via: Bijection | None = None) -> None:
        """Refuse a value outside the domain, or a bijection that can not represent it.

        Args:
            name: how messages call the hyper-parameter.
            value: the value to check.
            via: the bijection that it will be learned through.

        Raises:
            TypeError: `value` is not a real number.
            ValueError: `value` is outside the domain, or `via` does not map onto the domain or never reaches the value.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be a number, or learn(<number>, by=<optimizer>)")
        below = value <= self.lower if self.open_lower else value < self.lower
        above = value >= self.upper if self.open_upper else value > self.upper
        if below or above or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} is outside its domain {self}: choose a finite value inside it")
        if via is None:
            return
        check_bijection(name, via)
        bounded = math.isfinite(self.lower), math.isfinite(self.upper)
        if bounded != (True, _MAPS[via].interval):
            raise ValueError(
                f"{name}: via={via!r} does not map onto {self}; log, softplus and square fit a domain that is bounded below "
                "only, logit and tanh an interval; via=None (projection) fits any"
            )
        if value == self.upper or (value == self.lower and via != "square"):
            raise ValueError(f"{name}={value!r} is an end of {self}, which via={via!r} never reaches: start inside, or use via=None")

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

    def to_raw(self, value: Tensor, via: Bijection | None) -> Tensor:
        """Raw coordinates of a value."""
        return value if via is None else _MAPS[via].inverse((value - self.lower) / self._scale)

    def to_value(self, raw: Tensor, via: Bijection | None) -> Tensor:
        """Value at raw coordinates."""
        if via is None:
            return raw
        return torch.clamp(self.lower + self._scale * _MAPS[via].forward(raw), *self.bounds(raw.dtype))

    def confine(self, raw: Tensor, via: Bijection | None) -> Tensor:
        """Nearest raw coordinates whose value the dtype can tell from the domain's ends: the projection after a learner's step."""
        if via is None:
            return raw.clamp(*self.bounds(raw.dtype))
        return raw.clamp(*_MAPS[via].reach(torch.finfo(raw.dtype)))

    def within(self, raw: Tensor, via: Bijection | None, low: Tensor | float | None, high: Tensor | float | None) -> Tensor:
        """Raw coordinates after clamping the value to `[low, high]` (None: no bound); where it is inside, they stay bit for bit."""
        if low is None and high is None:
            return raw
        value = self.to_value(raw, via)
        clamped = torch.clamp(value, low, high).clamp(*self.bounds(raw.dtype))  # type: ignore[arg-type]
        return torch.where(clamped == value, raw, self.confine(self.to_raw(clamped, via), via))

    @property
    def _scale(self) -> float:
        return self.upper - self.lower if math.isfinite(self.upper) else 1.0


def check_bijection(name: str, via: object) -> None:
    """Refuse what is no known bijection.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(via, str) or via not in _MAPS:
        raise ValueError(f"{name}: via={via!r} is no known bijection; choose one of {', '.join(_MAPS)}, or None to project")


def Real(default: float) -> Hyper:
    """A hyper-parameter that may be any real number."""
    return Hyper(default)


def Positive(default: float, *, via: Bijection | None = None) -> Hyper:
    """A hyper-parameter in (0, inf)."""
    return Hyper(default, "Positive", lower=0.0, open_lower=True, via=via)


def NonNegative(default: float, *, via: Bijection | None = None) -> Hyper:
    """A hyper-parameter in [0, inf)."""
    return Hyper(default, "NonNegative", lower=0.0, via=via)


def UnitInterval(default: float, *, via: Bijection | None = None) -> Hyper:
    """A hyper-parameter in [0, 1), as the decay rate of a moving average."""
    return Hyper(default, "UnitInterval", lower=0.0, upper=1.0, open_upper=True, via=via)


def Interval(default: float, lower: float, upper: float, *, via: Bijection | None = None) -> Hyper:
    """A hyper-parameter in [lower, upper].

    Raises:
        TypeError: an end is no number.
        ValueError: the ends are not finite, or not in order.
    """
    check_number("lower", lower)
    check_number("upper", upper)
    if not lower < upper:
        raise ValueError(f"lower={lower!r}, upper={upper!r}: the ends of an interval must be finite and in order")
    return Hyper(default, "Interval", lower=lower, upper=upper, via=via)
