"""Images of files as tensors: decoded once where they fit into memory, cropped, flipped and corrupted."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from ftp.finetuning.corruptions import corruption
from ftp.finetuning.files import package
from ftp.finetuning.folders import Labeled
from ftp.finetuning.heads import Preprocessing

MEMORY = 2 << 30
"""Bytes of decoded images that are kept, of one set."""


class Images(Dataset[Any]):
    """Images of files, decoded and resized to squares.

    Args:
        labeled: files and labels.
        preprocessing: of the model.
        augment: take crops at random places, and of half of the images the mirror image; else the center.
        flip: whether images may be mirrored.
        memory: bytes up to which all are kept decoded; of more, each is decoded when it is needed.
        workers: threads that decode.
        advance: called after each image that is decoded now.

    Attributes:
        identity: what tells these images from others.

    Raises:
        ValueError: images cannot be read. The message names them.
    """

    def __init__(
        self,
        labeled: Labeled,
        preprocessing: Preprocessing,
        *,
        augment: bool = False,
        flip: bool = True,
        memory: int = MEMORY,
        workers: int = 4,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        package("PIL.Image")
        self.files, self.labels, self.preprocessing = labeled.files, torch.tensor(labeled.labels), preprocessing
        self.augment, self.flip = augment, flip
        self.side = max(preprocessing.size, round(preprocessing.size / preprocessing.crop))
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._ahead: dict[tuple[int, ...], list[Future[Tensor]]] = {}
        self._mean = torch.tensor(preprocessing.mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(preprocessing.std, dtype=torch.float32).view(-1, 1, 1)
        names = [f"{file.relative_to(labeled.folder)} {label}" for file, label in zip(self.files, labeled.labels, strict=True)]
        told = repr((names, preprocessing, augment and flip)).encode()
        self.identity = f"{len(names):,} images of {labeled.folder.name} ({blake2b(told, digest_size=4).hexdigest()})"
        keep = len(names) * preprocessing.channels * self.side**2 <= memory
        self._decoded = self._check(advance, keep=keep)

    def _check(self, advance: Callable[[], None], *, keep: bool) -> Tensor | None:
        """Decode all images, for what is wrong with them to be known before training; return them if they are kept."""
        shape = len(self) if keep else 0, self.preprocessing.channels, self.side, self.side
        decoded, bad = torch.empty(shape, dtype=torch.uint8), []
        for index, image in enumerate(self._pool.map(self._attempt, self.files)):
            if isinstance(image, str):
                bad.append(f"{self.files[index]} ({image})")
            elif keep:
                decoded[index] = image
            advance()
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise ValueError(f"images cannot be read: {', '.join(bad[:3])}{more}. Replace or remove them")
        return decoded if keep else None

    def _attempt(self, file: Path) -> Tensor | str:
        try:
            return decode(file, self.side, self.preprocessing.channels)
        except Exception as error:  # Pillow raises many kinds
            return str(error).replace(f" {str(file)!r}", "") or type(error).__name__

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, indices: Tensor) -> Tensor:
        """The squares that are cropped from, shape (n, channels, side, side), uint8."""
        if self._decoded is not None:
            return self._decoded[indices]
        self.prefetch(indices)
        return torch.stack([each.result() for each in self._ahead.pop(tuple(indices.tolist()))])

    def prefetch(self, indices: Tensor) -> None:
        """Begin to decode images that are needed soon, unless they are kept decoded."""
        key = tuple(indices.tolist())
        if self._decoded is None and key not in self._ahead:
            how = self.side, self.preprocessing.channels
            self._ahead[key] = [self._pool.submit(decode, self.files[index], *how) for index in key]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the model, shape (n, channels, size, size), and labels, shape (n,)."""
        pixels, size = self.pixels(indices), self.preprocessing.size
        if not self.augment:
            return self.normalized(_unit(_center(pixels, size))), self.labels[indices]
        room = self.side - size
        if room:
            corners = torch.randint(room + 1, (len(indices), 2)).tolist()
            crops = [image[:, top : top + size, left : left + size] for image, (top, left) in zip(pixels, corners, strict=True)]
            pixels = torch.stack(crops)
        if self.flip:
            mirrored = torch.rand(len(indices)) < 0.5
            pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return self.normalized(_unit(pixels)), self.labels[indices]

    def normalized(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model takes them."""
        return (images - self._mean) / self._std


class Corrupted(Dataset[Any]):
    """Images that are corrupted, the same way each time.

    Args:
        images: what is corrupted, without augmentation.
        name: a key of `CORRUPTIONS`.
        severity: from 1 to 5.
    """

    def __init__(self, images: Images, name: str, severity: int) -> None:
        self.images, self.name, self.severity, self._corrupt = images, name, severity, corruption(name)
        self.identity = f"{images.identity}, {name} {severity}"

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the model, shape (n, channels, size, size), and labels, shape (n,)."""
        whole = _unit(_center(self.images.pixels(indices), self.images.preprocessing.size))
        key = f"{self.name} {self.severity} {int(indices[0])}".encode()
        generator = Generator().manual_seed(int.from_bytes(blake2b(key, digest_size=7).digest(), "little"))
        return self.images.normalized(self._corrupt(whole, self.severity, generator)), self.images.labels[indices]


def decode(file: Path, side: int, channels: int) -> Tensor:
    """Read an image: the shorter side resized, and the center square of it, shape (channels, side, side), uint8.

    Args:
        file: to read.
        side: pixels of the square.
        channels: 3, or 1 for gray.

    Raises:
        OSError: it is no image, or not a whole one.
    """
    image_module, ops = package("PIL.Image"), package("PIL.ImageOps")
    with image_module.open(file) as opened:
        opened.draft("RGB" if channels == 3 else "L", (2 * side, 2 * side))  # JPEG: no more than is needed
        image = ops.exif_transpose(opened)
        if image.mode in ("P", "RGBA", "LA", "PA"):
            image = image.convert("RGBA")
            white = image_module.new("RGBA", image.size, (255, 255, 255, 255))
            image = image_module.alpha_composite(white, image)
        image = image.convert("RGB" if channels == 3 else "L")
    image = ops.fit(image, (side, side), method=image_module.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, channels).permute(2, 0, 1)


def _unit(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32) / 255


def _center(pixels: Tensor, size: int) -> Tensor:
    first = (pixels.shape[-1] - size) // 2
    return pixels[..., first : first + size, first : first + size]


def corrupted(tests: Sequence[tuple[str, Images]], names: Sequence[str], severities: Sequence[int]) -> dict[str, Corrupted]:
    """Corruptions of test sets by name, such as "test/fog/3".

    Args:
        tests: names and images.
        names: keys of `CORRUPTIONS`.
        severities: from 1 to 5.
    """
    return {
        f"{test}/{name}/{severity}": Corrupted(images, name, severity)
        for test, images in tests
        for name in names
        for severity in severities
    }
