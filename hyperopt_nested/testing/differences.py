"""Finite differences with an error estimate, so that a tolerance can follow the estimate."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

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

    def agrees(self, found: Tensor, *, relative: float = 1e-6) -> bool:
        """Whether `found` is within four times the estimated error, and `relative` times the largest entry, of the value."""
        largest = self.value.abs().amax() if self.value.numel() else 0.0
        return bool(((found - self.value).abs() <= 4 * self.error + relative * largest).all())


def central_difference(function: Callable[[Tensor], Tensor], at: Tensor, step: float | Tensor) -> Tensor:
    """Gradient of a scalar function by central differences with one step: the error falls with its square.

    Args:
        function: from a tensor like `at` to a tensor of shape (); it is run under `torch.func.vmap`.
        at: where, in float64.
        step: broadcastable against `at`, > 0.

    Returns:
        A tensor of the shape of `at`.
    """
    h = torch.as_tensor(step, dtype=at.dtype, device=at.device).broadcast_to(at.shape).flatten()
    values = _evaluated(function, at, torch.stack([h, -h]))
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
        >>> found = finite_difference(lambda x: x.exp().sum(), torch.zeros(2, dtype=torch.float64))
        >>> bool((found.value - 1).abs().max() < found.error.max() < 1e-11)
        True
    """
    size = torch.where(at == 0, 1, at.abs()) if scale is None else torch.as_tensor(scale, dtype=at.dtype, device=at.device)
    h = steps(size.broadcast_to(at.shape).flatten())
    found = extrapolated(_evaluated(function, at, h), h)
    return Difference(found.value.reshape(at.shape), found.error.reshape(at.shape))


def steps(scale: Tensor) -> Tensor:
    """Steps along n directions, (k, n), from scales (n,): up, down, and where rounding is probed."""
    up = scale * 0.5 ** torch.arange(3, 3 + LEVELS, dtype=scale.dtype, device=scale.device)[:, None]
    return torch.cat([up, -up, scale * _PROBE * _PROBES.to(scale)[:, None]])


def extrapolated(values: Tensor, h: Tensor, noise: float | Tensor = 0.0) -> Difference:
    """Derivatives along n directions from values (k, n) at the steps `h` that `steps` made; value and error are (n,).

    Of all entries of the extrapolation table, the one with the least estimated error is taken, direction by direction. `noise` is a
    lower bound for the rounding error of a value.
    """
    up, down, probes = torch.split(values, [LEVELS, LEVELS, len(_PROBES)])
    h = h[:LEVELS]
    line = _PROBES.to(values)[:, None]
    probes = probes - line * (line * probes).sum(0) / line.square().sum()
    scatter = torch.maximum(probes.amax(0) - probes.amin(0), torch.finfo(values.dtype).eps * values.abs().amax(0))
    rounding = torch.maximum(scatter, torch.as_tensor(noise, dtype=values.dtype, device=values.device)) / h
    row = list((up - down) / (2 * h))
    candidates = [(row[0], torch.full_like(row[0], torch.inf))]
    for order in range(1, LEVELS):
        factor = 4.0**order
        new = [fine + (fine - coarse) / (factor - 1) for coarse, fine in pairwise(row)]
        for level, value in enumerate(new):
            spread = torch.maximum((value - row[level]).abs(), (value - row[level + 1]).abs())
            candidates.append((value, spread + 2 * rounding[level + order]))
        row = new
    table, errors = torch.stack([value for value, _ in candidates]), torch.stack([error for _, error in candidates])
    best = errors.nan_to_num(torch.inf).argmin(0, keepdim=True)
    return Difference(table.gather(0, best)[0], errors.gather(0, best)[0])


def _evaluated(function: Callable[[Tensor], Tensor], at: Tensor, h: Tensor) -> Tensor:
    """Values (k, n) of the function with one entry of `at` moved at a time, by the steps (k, n)."""
    moved = at.flatten() + torch.diag_embed(h)
    vmapped = torch.func.vmap(torch.func.vmap(lambda x: function(x.reshape(at.shape))))
    values: Tensor = vmapped(moved)
    return values
