"""Balls: norms of a displacement, block by block, and the projection that scales each block back to the ball.

A ball of radius r holds the displacements of which every block's norm is at most r. What is outside is scaled block by block,
d -> d min(1, r / ||d||): for the Frobenius, row L2 and L-infinity balls that is the nearest point; for MARS it is the radial
scaling of FTP (arXiv 2310.19182, equation 5), not the nearest point.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hyperopt_nested.ops import kink, safe_sqrt
from hyperopt_nested.signatures import Separable

EPS = 1e-8
"""Added to a norm before dividing by it, as the published FTP and TPGM do."""

Saturation = Literal["straight-through", "exact"]
"""Derivative of the projection with respect to the radius in a block that is inside the ball: "exact" is the true one, zero;
"straight-through" is the one that an active block has, d / ||d||, as in the published FTP."""


def _rows(d: Tensor) -> tuple[int, ...]:
    """Dimensions that make up one row: all but dim 0; a tensor with fewer than two dimensions is one row."""
    return tuple(range(1, d.ndim)) if d.ndim > 1 else tuple(range(d.ndim))


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims, keepdim=True) if dims else x


def _same(sums: Tensor) -> Tensor:
    return sums


def largest(norms: Tensor) -> Tensor:
    """The largest of some norms, shape (); 0 of none."""
    return norms.amax() if norms.numel() else norms.sum()


def _absolutes(d: Tensor) -> Tensor:
    return _sum(kink(d).abs(), _rows(d))


def _squares_of_rows(d: Tensor) -> Tensor:
    return _sum(d * d, _rows(d))


def _squares(d: Tensor) -> Tensor:
    return _sum(d * d, tuple(range(d.ndim)))


def _each(d: Tensor) -> Tensor:
    return kink(d).abs()


@dataclass(frozen=True)
class Ball:
    """A ball of displacements around zero.

    Attributes:
        name: its name.
        sums: what is summed up over each block of a displacement, kept broadcastable against it: of parts of a block, sums add up.
        norms_of: the norms, given these sums; differentiable, with derivative zero where a block is zero.
        separable: the block.
    """

    name: str
    sums: Callable[[Tensor], Tensor]
    norms_of: Callable[[Tensor], Tensor]
    separable: Separable

    def norms(self, displacement: Tensor) -> Tensor:
        """Norm of each block of a displacement, kept broadcastable against it."""
        return self.norms_of(self.sums(displacement))

    def norm(self, displacement: Tensor) -> Tensor:
        """Norm of a displacement: the largest of its blocks', a tensor of shape (); 0 for an empty one."""
        return largest(self.norms(displacement))

    def project(self, point: Tensor, radius: Tensor, *, center: Tensor | None = None, saturation: Saturation = "exact") -> Tensor:
        """Point scaled, block by block, into the ball around `center`.

        Args:
            point: any shape.
            radius: >= 0, broadcastable against the blocks' norms.
            center: of the point's shape; None is zero.
            saturation: derivative with respect to the radius in blocks that are inside the ball; the value does not depend on it.

        Returns:
            A tensor of the point's shape. Blocks inside the ball are returned as they are, bit for bit.
        """
        displacement = point if center is None else point - center
        return self.shrink(point, displacement, self.norms(displacement), radius, center=center, saturation=saturation)

    def shrink(
        self,
        point: Tensor,
        displacement: Tensor,
        norms: Tensor,
        radius: Tensor,
        *,
        center: Tensor | None,
        saturation: Saturation,
    ) -> Tensor:
        """`project`, where the displacement from the center and the norms of its blocks are known already."""
        outside, safe = kink(norms, radius) > radius, norms + EPS
        factor = radius / safe
        if saturation == "straight-through":
            factor = torch.where(outside, factor, (radius - radius.detach()) / safe.detach())
            return torch.where(outside, 0 if center is None else center, point) + displacement * factor
        scaled = displacement * factor
        return torch.where(outside, scaled if center is None else center + scaled, point)


mars = Ball("mars", _absolutes, _same, "row")
"""Maximum absolute row sum: each row's sum of absolute values is at most the radius (FTP's norm)."""

frobenius = Ball("frobenius", _squares, safe_sqrt, "tensor")
"""Euclidean norm of the whole tensor."""

row_l2 = Ball("row_l2", _squares_of_rows, safe_sqrt, "row")
"""Euclidean norm of each row."""

linf = Ball("linf", _each, _same, "element")
"""Largest absolute value: each element on its own."""
