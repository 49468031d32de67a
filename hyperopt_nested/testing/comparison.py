"""Programs that should compute the same: the comparison, its tolerances, and the error of a rule that breaks a law."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.testing.strategies import Case

EXACT = 1e-12
"""Two programs in float64 that compute the same thing, relative to the size of what is summed."""

SAME = 1e-9
"""A backend and the reference in float64, which round differently, relative to the tensor's largest entry."""

TOLERANCE = 1e-6
"""A derivative against finite differences, relative to the largest one."""


class RuleError(AssertionError):
    """A rule breaks a law; the message says which, with which numbers, and on which example.

    Attributes:
        case: the example, if it is not the one that was drawn.
    """

    case: Case | None = None


def difference(found: Tensor, expected: Tensor) -> Tensor:
    """How far entries differ, in float64: by nothing where both are NaN, or the same infinity."""
    a, b = found.to(torch.float64), expected.to(torch.float64)
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs())


def compare(found: Mapping[str, Any], expected: Mapping[str, Any], where: str, other: str, tolerance: float = 0.0) -> float:
    """Compare what two programs computed, by path.

    Args:
        found: leaves; what is no tensor is not compared.
        expected: leaves of the other program.
        where: what messages begin with.
        other: what messages call the other program.
        tolerance: relative to a tensor's largest entry, besides `EXACT` of the largest entry of all.

    Returns:
        The largest difference, relative to the tensor's largest entry, or to 1.

    Raises:
        RuleError: a difference is larger, or a tensor is missing or has another shape.
    """
    if found.keys() != expected.keys():
        raise RuleError(f"{where}: {min(found.keys() ^ expected.keys())} is there with one of the two programs only")
    tensors = {path: leaf for path, leaf in expected.items() if isinstance(leaf, Tensor)}
    sizes = {path: float(leaf.to(torch.float64).abs().nan_to_num(0, 0, 0).amax()) for path, leaf in tensors.items() if leaf.numel()}
    worst = 0.0
    for path, leaf in tensors.items():
        if found[path].shape != leaf.shape:
            raise RuleError(f"{where}: {path} has shape {tuple(found[path].shape)}, but {tuple(leaf.shape)} with {other}")
        if path not in sizes:
            continue
        off = difference(found[path], leaf).flatten()
        if not float(off.amax()) <= tolerance * sizes[path] + EXACT * max(1.0, *sizes.values()):
            at = int(off.nan_to_num(torch.inf).argmax())
            pair = f"{found[path].flatten()[at].item():.10g} in the place of {leaf.flatten()[at].item():.10g}"
            raise RuleError(f"{where}: {path} differs from {other} by up to {off.amax().item():.3g}: {pair}")
        worst = max(worst, float(off.amax()) / max(sizes[path], 1.0))
    return worst
