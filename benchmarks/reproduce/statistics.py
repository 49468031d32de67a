"""Means with standard errors, paired differences, and the answers of the protocol."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t

MARGIN = 0.5
"""Percentage points that a difference may be ignored up to."""

HOLDS, FAILS, NOISY, NOT_RUN = "holds", "does not hold", "too noisy to say", "not run"
TRADE = "does not hold: a trade, more OOD for less ID"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: in percentage points, or whatever the values are in.
        error: its standard error; NaN for one value.
        count: of values.
    """

    mean: float
    error: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Student's t; all numbers for fewer than two values."""
        if self.count < 2:
            return -math.inf, math.inf
        half = float(t.ppf(0.975, self.count - 1)) * self.error
        return self.mean - half, self.mean + half


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value.

    Args:
        values: independent ones, such as of seeds, or their paired differences.
    """
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(mean(values), error, len(values))


def answer(inside: Estimate, outside: Estimate) -> str:
    """Whether a method is better under shifts at equal accuracy in distribution.

    Args:
        inside: paired differences of accuracy in distribution.
        outside: of accuracy under shifts.
    """
    if outside.interval[0] > 0 and inside.mean > -MARGIN:
        return HOLDS
    if outside.interval[0] > 0 and inside.interval[1] < -MARGIN:
        return TRADE
    if outside.interval[1] < MARGIN or inside.interval[1] < -MARGIN:
        return FAILS
    return NOISY
