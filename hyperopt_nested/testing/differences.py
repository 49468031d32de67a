"""Finite differences with an error estimate, so that a tolerance can follow the estimate."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.ops import watch_kinks
from hyperopt_nested.testing.comparison import TOLERANCE

LEVELS = 5
"""Steps, each half of the one before, that are extrapolated from."""

_PROBES = torch.tensor([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0], dtype=torch.float64)
_PROBE = 2.0**-40
"""Points so near to each other, in units of the scale, that values at them are a straight line but for rounding."""


@dataclass(frozen=True)
class Difference:
    """A derivative by finite differences.

    Attributes:
        value: the derivative.
        error: estimate of its error, of the same shape: truncation and rounding.
    """

    value: Tensor
    error: Tensor

    def agrees(self, found: Tensor, *, relative: float = TOLERANCE) -> bool:
        """Whether `found` is within four times the estimated error, and `relative` times the largest entry, of the value."""
        largest = self.value.abs().amax() if self.value.numel() else 0.0
        return bool(((found - self.value).abs() <= 4 * self.error + relative * largest).all())


@dataclass(frozen=True)
class Slopes(Difference):
    """Derivatives of m outputs along n directions, (n, m).

    Attributes:
        smooth: (n,), whether no declared kink lies between the points along a direction.
        up, down: slopes to the points on either side, of the largest step first, (levels, n, m).
    """

    smooth: Tensor
    up: Tensor
    down: Tensor


def central_difference(function: Callable[[Tensor], Tensor], at: Tensor, step: float | Tensor) -> Tensor:
    """Gradient of a scalar function by central differences with one step: the error falls with its square.

    Args:
        function: from a tensor like `at` to a tensor of shape (); it is run under `torch.func.vmap`.
        at: where, in float64.
        step: broadcastable against `at`, > 0.

    Returns:
        A tensor of the shape of `at`.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> at = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> hn.testing.central_difference(lambda x: x.square().sum(), at, 1e-3)
        tensor([2.0000, 4.0000], dtype=torch.float64)
    """
    h = torch.as_tensor(step, dtype=at.dtype, device=at.device).broadcast_to(at.shape).flatten()
    values: Tensor = _along_axes(lambda offset: function(at + offset.reshape(at.shape)), torch.stack([h, -h]))
    return ((values[0] - values[1]) / (2 * h)).reshape(at.shape)


def finite_difference(function: Callable[[Tensor], Tensor], at: Tensor, *, scale: float | Tensor | None = None) -> Difference:
    """Gradient of a scalar function by central differences, extrapolated to step zero (Richardson; Ridders 1982).

    Args:
        function: from a tensor like `at` to a tensor of shape (), smooth; it is run under `torch.func.vmap`.
        at: where, in float64.
        scale: over which the function is smooth, broadcastable against `at`; by default the size of each entry, 1 where it is 0. The
            largest step is an eighth of it.

    Returns:
        Value and error, each of the shape of `at`. The error has two parts: truncation, from how much the extrapolations differ, and
        rounding, from how much the function's values scatter between points that are almost the same.

    Example:
        >>> import torch
        >>> at = torch.zeros(2, dtype=torch.float64)
        >>> found = finite_difference(lambda x: x.exp().sum(), at)
        >>> bool((found.value - 1).abs().max() < found.error.max() < 1e-11)
        True
    """
    size = torch.where(at == 0, 1, at.abs()) if scale is None else torch.as_tensor(scale, dtype=at.dtype, device=at.device)
    found = slopes(lambda offset: function(at + offset.reshape(at.shape))[None], size.broadcast_to(at.shape).flatten())
    return Difference(found.value.reshape(at.shape), found.error.reshape(at.shape))


def slopes(function: Callable[[Tensor], Tensor], scale: Tensor, noise: float | Tensor = 0.0) -> Slopes:
    """Derivatives of a function at zero along each axis.

    Args:
        function: from offsets (n,) to values (m,); it is run under `torch.func.vmap`.
        scale: (n,), over which the function is smooth.
        noise: a lower bound for the rounding error of a value, broadcastable against (n, m).
    """

    def watched(offsets: Tensor) -> tuple[Tensor, list[Tensor]]:
        with watch_kinks() as kinks:
            values = function(offsets)
        return values, [torch.sign(kink) for kink in kinks if kink.numel()]

    middle, signs_middle = watched(torch.zeros_like(scale))
    smooth = torch.ones(len(scale), dtype=torch.bool, device=scale.device)
    if not len(scale):
        none = middle.new_zeros(0, len(middle))
        return Slopes(none, none, smooth, none.expand(LEVELS, -1, -1), none.expand(LEVELS, -1, -1))
    steps = scale * 0.5 ** torch.arange(3, 3 + LEVELS, dtype=scale.dtype, device=scale.device)[:, None]
    values, signs = _along_axes(watched, torch.cat([steps, -steps, scale * _PROBE * _PROBES.to(scale)[:, None]]))
    for sign, here in zip(signs, signs_middle, strict=True):
        smooth &= (sign == here).reshape(*sign.shape[:2], -1).all(-1).all(0)
    up, down, probes = torch.split(values, [LEVELS, LEVELS, len(_PROBES)])
    h = steps[:, :, None]
    value, error = _extrapolated((up - down) / (2 * h), _scatter(probes, values).maximum(torch.as_tensor(noise).to(values)) / h)
    return Slopes(value, error, smooth, up / h, -down / h)


def _scatter(probes: Tensor, values: Tensor) -> Tensor:
    """The rounding error of values (n, m): how far those at the probes are from a straight line."""
    line = _PROBES.to(probes)[:, None, None]
    rest = probes - line * (line * probes).sum(0) / line.square().sum()
    return torch.maximum(rest.amax(0) - rest.amin(0), torch.finfo(values.dtype).eps * values.abs().amax(0))


def _extrapolated(row: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Of all entries of the extrapolation table, the one with the least estimated error, and that error."""
    values, errors = [row[0]], [torch.full_like(row[0], torch.inf)]
    for order in range(1, LEVELS):
        new = torch.stack([fine + (fine - coarse) / (4.0**order - 1) for coarse, fine in pairwise(row)])
        spread = torch.maximum((new - row[:-1]).abs(), (new - row[1:]).abs())
        values += new.unbind()
        errors += (spread + 2 * rounding[order:]).unbind()
        row = new
    table = torch.stack(errors)
    best = table.nan_to_num(torch.inf).argmin(0, keepdim=True)
    return torch.stack(values).gather(0, best)[0], table.gather(0, best)[0]


def _along_axes(function: Callable[[Tensor], Any], steps: Tensor) -> Any:
    """What a function of offsets (n,) returns for each of the steps (k, n), one axis at a time."""
    vmapped: Any = torch.func.vmap(torch.func.vmap(function))
    return vmapped(torch.diag_embed(steps))
