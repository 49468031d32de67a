"""Handwritten digits: what is pre-trained on, what is fine-tuned on, and the shifts that fine-tuning never sees.

Images are float32 in [0, 1], shape (n, 1, 8, 8), background 0; labels are 0 to 4 in both tasks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor
from torch.nn import functional as F

CLASSES = 5
"""Classes of either task: digits 0 to 4 in pre-training, 5 to 9 in fine-tuning."""

TEST_SEED = 2310
"""Seed of the one split that holds out the test images; they are the same for every seed, so that tuning never meets them."""


@dataclass(frozen=True)
class Examples:
    """Labelled images.

    Attributes:
        images: shape (n, 1, 8, 8), in [0, 1].
        labels: shape (n,), 0 to 4.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FineTuning:
    """Digits 5 to 9, in disjoint parts: few to train on, half to test on, the rest to choose settings by."""

    train: Examples
    validation: Examples
    test: Examples


def pretraining() -> Examples:
    """All images of digits 0 to 4: 901 of them."""
    return _digits(0)


def fine_tuning(seed: int, per_class: int = 10) -> FineTuning:
    """Images of digits 5 to 9: test images that are always the same, and a stratified draw of training and validation images.

    Args:
        seed: of the draw.
        per_class: training images of each class.
    """
    digits = _digits(CLASSES)
    rest, test = _split(digits, test_size=0.5, seed=TEST_SEED)
    train, validation = _split(rest, train_size=per_class * CLASSES, seed=seed)
    return FineTuning(train, validation, test)


def hold_out(examples: Examples, seed: int, per_class: int = 2) -> tuple[Examples, Examples]:
    """The examples without some, and these: `per_class` of each class, drawn from `seed`."""
    return _split(examples, test_size=per_class * CLASSES, seed=seed)


def augment(images: Tensor, generator: Generator) -> Tensor:
    """Images changed at random in every way that `SHIFTS` knows, each by its own amount: the breadth of pre-training.

    Args:
        images: shape (n, 1, 8, 8), in [0, 1].
        generator: of the random amounts.
    """
    n = len(images)
    degrees = uniform(n, -40, 40, generator)
    pixels = torch.stack([uniform(n, -1.5, 1.5, generator), uniform(n, -1.5, 1.5, generator)], 1)
    noisy = noise(_warp(images, degrees, pixels), per_image(uniform(n, 0, 0.4, generator)), generator)
    inverted = per_image(torch.rand(n, generator=generator) < 0.5)
    return contrast(torch.where(inverted, 1 - noisy, noisy), per_image(uniform(n, 0.2, 1, generator)))


def _rotation(images: Tensor, generator: Generator) -> Tensor:
    return _warp(images, 30 * signs(len(images), generator), torch.zeros(len(images), 2))


def _translation(images: Tensor, generator: Generator) -> Tensor:
    n = len(images)
    return _warp(images, torch.zeros(n), torch.stack([signs(n, generator), signs(n, generator)], 1))


SHIFTS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "rotation": _rotation,
    "translation": _translation,
    "noise": lambda images, generator: noise(images, 0.3, generator),
    "inversion": lambda images, _: 1 - images,
    "contrast": lambda images, _: contrast(images, 0.3),
}
"""Shifts: 30 degrees either way; one pixel both ways; noise of standard deviation 0.3; black for white; contrast of 30%
around each image's mean.

Each takes images, shape (n, 1, 8, 8), and a generator of what is random, and returns images of the same shape and range.
"""


def shifted(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Images under each of `SHIFTS`, by its name; what is random is drawn from `seed`.

    Args:
        images: shape (n, 1, 8, 8), in [0, 1].
        seed: of the noise, and of the directions of rotations and translations.
    """
    return {name: shift(images, torch.Generator().manual_seed(seed)) for name, shift in SHIFTS.items()}


def _digits(first: int) -> Examples:
    images, labels = load_digits(return_X_y=True)
    chosen = (labels >= first) & (labels < first + CLASSES)
    pixels = torch.tensor(images[chosen] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return Examples(pixels, torch.tensor(labels[chosen] - first))


def _split(examples: Examples, *, seed: int, **sizes: float) -> tuple[Examples, Examples]:
    """Two disjoint parts, with the classes in the same proportions."""
    labels = examples.labels.numpy()
    parts = train_test_split(np.arange(len(labels)), stratify=labels, random_state=seed, **sizes)
    first, second = (Examples(examples.images[part], examples.labels[part]) for part in parts)
    return first, second


def _warp(images: Tensor, degrees: Tensor, pixels: Tensor) -> Tensor:
    """Images rotated by `degrees`, shape (n,), and moved by `pixels`, shape (n, 2); what comes in is background."""
    angle = degrees * (math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    across, down = (2 * pixels / images.shape[-1]).unbind(1)  # the grid spans [-1, 1]
    theta = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)


def noise(images: Tensor, scale: float | Tensor, generator: Generator) -> Tensor:
    """Images with normal noise of a standard deviation."""
    return (images + scale * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def contrast(images: Tensor, factor: float | Tensor) -> Tensor:
    """Images with less contrast around the mean of each."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + factor * (images - mean)


def uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    """Random numbers, shape (n,)."""
    return torch.empty(n).uniform_(low, high, generator=generator)


def signs(n: int, generator: Generator) -> Tensor:
    """Random signs, shape (n,)."""
    return torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1


def per_image(values: Tensor) -> Tensor:
    """Values, (n,), as they are broadcast over images."""
    return values.reshape(-1, 1, 1, 1)
