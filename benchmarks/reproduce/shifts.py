"""Shifts of images that pre-training knows and fine-tuning does not.

Images have shape (n, channels, h, w), values in [0, 1]; background is 0 in `warp` and `augment`.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ftp.demo.data import contrast, noise, per_image, signs, uniform


def warp(images: Tensor, degrees: Tensor, pixels: Tensor, scale: Tensor) -> Tensor:
    """Images rotated by `degrees`, (n,), moved by `pixels`, (n, 2), and scaled by `scale`, (n,); what comes in is background."""
    angle = degrees * (math.pi / 180)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    across, down = (2 * pixels / images.shape[-1]).unbind(1)  # the grid spans [-1, 1]
    theta = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)


def augment(images: Tensor, generator: Generator) -> Tensor:
    """Images changed at random in each way that `SHIFTS` knows, each image by its own amounts; one of four stays as it is."""
    n = len(images)
    pixels = torch.stack([uniform(n, -5, 5, generator), uniform(n, -5, 5, generator)], 1)
    moved = warp(images, uniform(n, -40, 40, generator), pixels, torch.exp(uniform(n, -0.45, 0.45, generator)))
    inverted = per_image(torch.rand(n, generator=generator) < 0.5)
    noisy = noise(torch.where(inverted, 1 - moved, moved), per_image(uniform(n, 0, 0.45, generator)), generator)
    changed = contrast(noisy, per_image(uniform(n, 0.2, 1, generator)))
    return torch.where(per_image(torch.rand(n, generator=generator) < 0.25), images, changed)


def _rotation(images: Tensor, generator: Generator) -> Tensor:
    n = len(images)
    return warp(images, 30 * signs(n, generator), torch.zeros(n, 2), torch.ones(n))


def _translation(images: Tensor, generator: Generator) -> Tensor:
    n = len(images)
    return warp(images, torch.zeros(n), 4 * torch.stack([signs(n, generator), signs(n, generator)], 1), torch.ones(n))


def _scale(images: Tensor, generator: Generator) -> Tensor:
    n = len(images)
    return warp(images, torch.zeros(n), torch.zeros(n, 2), torch.where(signs(n, generator) > 0, 1.35, 0.65))


SHIFTS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "rotation": _rotation,
    "translation": _translation,
    "scale": _scale,
    "inversion": lambda images, _: 1 - images,
    "noise": lambda images, generator: noise(images, 0.35, generator),
    "contrast": lambda images, _: contrast(images, 0.3),
}
"""Shifts: 30 degrees either way; four pixels both ways; 1.35 or 0.65 times the size; black for white; noise of standard deviation 0.35;
contrast of 30% around each image's mean.

Each takes images and a generator of what is random, and returns images of the same shape and range.
"""
