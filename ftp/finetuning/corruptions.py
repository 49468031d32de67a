"""Common corruptions of images at five severities, after ImageNet-C.

Parameters are those of ImageNet-C, whose images have 224 x 224 pixels. The widths of blurs are scaled by `min(h, w) / 224`: a severity
blurs the same share of a small image as of a large one. Noise, colors, ratios (zoom, pixelate) and the quality of JPEG are not scaled.

Four of the fifteen published corruptions need pictures, sequential code or textures and are left out: glass blur, snow, frost, elastic.
Gaussian blur is from the published extra set.

References:
    Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (2019), arXiv 1903.12261.
"""

import math
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from itertools import product
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from ftp.finetuning.files import extra

Corruption = Callable[[Tensor, int, Generator], Tensor]

SEVERITIES = range(1, 6)

CORRUPTIONS: dict[str, Corruption] = {}
"""By name: a function of images (n, c, h, w) in [0, 1], float32, c = 1 or 3; a severity from 1 to 5; and a generator of what is random.

It returns new images of the same shape, in [0, 1]. Equal generators, images and severities give equal results.

Example:
    >>> images = torch.rand(2, 3, 32, 32, dtype=torch.float32)
    >>> generator = torch.Generator().manual_seed(0)
    >>> CORRUPTIONS["gaussian_noise"](images, 3, generator).shape
    torch.Size([2, 3, 32, 32])
"""


def corruption(name: str) -> Corruption:
    """Look up a corruption.

    Args:
        name: a key of `CORRUPTIONS`.

    Returns:
        The function.

    Raises:
        ValueError: there is none of this name.

    Example:
        >>> corruption("fog") is CORRUPTIONS["fog"]
        True
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r} is unknown: choose from {', '.join(CORRUPTIONS)}")
    return CORRUPTIONS[name]


def _corruption(*parameters: Any) -> Callable[[Callable[[Tensor, Any, Generator], Tensor]], Corruption]:
    """Add a function of images, the parameter of a severity and a generator to `CORRUPTIONS` under its name."""

    def register(function: Callable[[Tensor, Any, Generator], Tensor]) -> Corruption:
        @wraps(function)
        def checked(images: Tensor, severity: int, generator: Generator) -> Tensor:
            _check(images, severity)
            return function(images, parameters[severity - 1], generator).clamp(0, 1)

        CORRUPTIONS[function.__name__] = checked
        return checked

    return register


def _check(images: Tensor, severity: int) -> None:
    if not isinstance(severity, int) or severity not in SEVERITIES:
        raise ValueError(f"severity={severity!r} must be a whole number from 1 to 5")
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images {tuple(images.shape)}, {images.dtype}, must have shape (n, c, h, w) with c = 1 or 3, and dtype float32")
    low, high = (float(end) for end in images.aminmax())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"images from {low:g} to {high:g} must be in [0, 1]: corrupt them before they are normalized")


@_corruption(0.08, 0.12, 0.18, 0.26, 0.38)
def gaussian_noise(images: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Add noise of a normal distribution."""
    return images + deviation * _random(torch.randn, images.shape, generator).to(images)


@_corruption(60, 25, 12, 5, 3)
def shot_noise(images: Tensor, photons: float, generator: Generator) -> Tensor:
    """Count photons: noise of a Poisson distribution."""
    return torch.poisson((images * photons).to(generator.device), generator=generator).to(images) / photons


@_corruption(0.03, 0.06, 0.09, 0.17, 0.27)
def impulse_noise(images: Tensor, amount: float, generator: Generator) -> Tensor:
    """Set a share of the values to 0 or 1."""
    draw = _random(torch.rand, images.shape, generator).to(images)
    return torch.where(draw < amount, (draw < amount / 2).to(images), images)


@_corruption(1, 2, 3, 4, 6)
def gaussian_blur(images: Tensor, deviation: float, _: Generator) -> Tensor:
    """Blur by a normal distribution."""
    deviation *= _scale(images)
    offsets = _square(4 * deviation)
    return _blurred(images, _kernels(offsets[None], (-offsets.square().sum(1) / (2 * deviation**2)).exp()))


@_corruption(3, 4, 6, 8, 10)
def defocus_blur(images: Tensor, radius: float, _: Generator) -> Tensor:
    """Blur by a disk."""
    radius *= _scale(images)
    offsets = _square(radius)
    return _blurred(images, _kernels(offsets[None], (offsets.square().sum(1) <= radius**2).double()))


@_corruption((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
def motion_blur(images: Tensor, parameters: tuple[float, float], generator: Generator) -> Tensor:
    """Blur along a line, at an angle from -45 to 45 degrees that each image draws."""
    radius, deviation = (length * _scale(images) for length in parameters)
    angles = (_random(torch.rand, (len(images),), generator).cpu().double() - 0.5) * math.pi / 2
    times = torch.linspace(0, 2 * radius, _count(2 * radius), dtype=torch.float64)
    offsets = times[None, :, None] * torch.stack([-angles.sin(), angles.cos()], 1)[:, None]
    return _blurred(images, _kernels(offsets, (-times.square() / (2 * deviation**2)).exp()))


@_corruption(range(0, 11, 1), range(0, 16, 1), range(0, 21, 2), range(0, 26, 2), range(0, 31, 3))
def zoom_blur(images: Tensor, percents: range, _: Generator) -> Tensor:
    """Average over zooms into the center."""
    total = images
    for percent in percents:
        by = 100 / (100 + percent)
        grid = functional.affine_grid(images.new_tensor([[[by, 0, 0], [0, by, 0]]]), [1, *images.shape[1:]], align_corners=False)
        grid = grid.expand(len(images), *grid.shape[1:])
        total = total + functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return total / (len(percents) + 1)


@_corruption((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
def fog(images: Tensor, parameters: tuple[float, float], generator: Generator) -> Tensor:
    """Mix with a cloud, a fractal."""
    density, decay = parameters
    h, w = images.shape[-2:]
    clouds = _plasma(len(images), 2 ** math.ceil(math.log2(max(h, w, 2))), decay, generator)[:, None, :h, :w]
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + density * clouds.to(images)) * brightest / (brightest + density)


@_corruption(0.1, 0.2, 0.3, 0.4, 0.5)
def brightness(images: Tensor, more: float, _: Generator) -> Tensor:
    """Raise the value of the HSV color space."""
    value = images.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp(min=1e-12)), raised)


@_corruption(0.4, 0.3, 0.2, 0.1, 0.05)
def contrast(images: Tensor, share: float, _: Generator) -> Tensor:
    """Shrink the distance of each channel to its mean."""
    return images.mean((2, 3), keepdim=True).lerp(images, share)


@_corruption(0.6, 0.5, 0.4, 0.3, 0.25)
def pixelate(images: Tensor, ratio: float, _: Generator) -> Tensor:
    """Lower the resolution."""
    rows, columns = (_averages(size, max(1, int(size * ratio))).to(images) for size in images.shape[-2:])
    return rows @ images @ columns


@_corruption(25, 18, 15, 10, 7)
def jpeg_compression(images: Tensor, quality: int, _: Generator) -> Tensor:
    """Compress as JPEG; needs Pillow."""
    with extra():
        from PIL import Image

    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    compressed = []
    for image in pixels:
        file = BytesIO()
        Image.fromarray(image.squeeze(2).numpy()).save(file, "JPEG", quality=quality)
        compressed.append(torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).reshape(image.shape))
    return torch.stack(compressed).permute(0, 3, 1, 2).to(images) / 255


def _averages(size: int, blocks: int) -> Tensor:
    """The matrix that replaces each of `size` values by the mean of its block."""
    block = (torch.arange(size) + 0.5).mul(blocks / size).long()
    same = (block[:, None] == block).double()
    return same / same.sum(1)


def _random(draw: Callable[..., Tensor], shape: tuple[int, ...], generator: Generator) -> Tensor:
    return draw(shape, generator=generator, device=generator.device, dtype=torch.float32)


def _scale(images: Tensor) -> float:
    return min(images.shape[-2:]) / 224


def _count(length: float) -> int:
    """How many points sample a length in pixels: at least two a pixel, and at least 32."""
    return max(32, math.ceil(2 * length)) + 1


def _square(reach: float) -> Tensor:
    """Offsets (m, 2) of a grid that fills the square from -reach to reach."""
    line = torch.linspace(-reach, reach, _count(2 * reach), dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def _kernels(offsets: Tensor, weights: Tensor) -> Tensor:
    """Kernels (n, k, k) of weights (m,) at offsets (n, m, 2) in pixels.

    The four pixels around a point share its weight bilinearly: the blur of an image that is enlarged, blurred and averaged back. Blurs
    narrower than a pixel have an effect.
    """
    reach = int(offsets.abs().max()) + 1
    size = 2 * reach + 1
    corner = offsets.floor()
    part = offsets - corner
    kernels = torch.zeros(len(offsets), size * size, dtype=offsets.dtype)
    for down, right in product((0, 1), (0, 1)):
        share = weights * (part[..., 0] if down else 1 - part[..., 0]) * (part[..., 1] if right else 1 - part[..., 1])
        index = (corner[..., 0] + down + reach) * size + corner[..., 1] + right + reach
        kernels.scatter_add_(1, index.long(), share)
    return (kernels / kernels.sum(1, keepdim=True)).reshape(-1, size, size)


def _blurred(images: Tensor, kernels: Tensor) -> Tensor:
    """Images convolved with one kernel (1, k, k), or with one each (n, k, k); outside, their edges are repeated."""
    reach = kernels.shape[-1] // 2
    padded = functional.pad(images, [reach] * 4, mode="replicate")
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernels[:, None].to(images), s=size)
    whole: Tensor = torch.fft.irfft2(spectrum, s=size)
    return whole[..., 2 * reach :, 2 * reach :]


def _plasma(count: int, size: int, decay: float, generator: Generator) -> Tensor:
    """Height maps (count, size, size) in [0, 1] by the diamond-square algorithm; the size is a power of two, edges wrap around."""
    heights = torch.zeros(count, size, size, device=generator.device, dtype=torch.float32)
    step, roughness = size, 100.0
    while step >= 2:
        half = step // 2
        corners, centers = heights[:, ::step, ::step], heights[:, half::step, half::step]

        def mean(total: Tensor, amplitude: float = roughness**2) -> Tensor:
            return total / 4 + amplitude * (2 * _random(torch.rand, total.shape, generator) - 1)

        rows = corners + corners.roll(-1, 1)
        centers.copy_(mean(rows + rows.roll(-1, 2)))
        heights[:, ::step, half::step] = mean(centers + centers.roll(1, 1) + corners + corners.roll(-1, 2))
        heights[:, half::step, ::step] = mean(centers + centers.roll(1, 2) + corners + corners.roll(-1, 1))
        step, roughness = half, roughness / decay
    low, high = heights.amin((1, 2), keepdim=True), heights.amax((1, 2), keepdim=True)
    return (heights - low) / (high - low)
