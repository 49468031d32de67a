"""Emoji of two vendors, and two tasks on them: their kind, and their outline in front of photographs.

Emoji that pre-training, fine-tuning, validation and tests see are disjoint: they are split by character, the same for both vendors.
Images are float32 in [0, 1], shape (n, 3, 64, 64).

Credits: Noto emoji by Google, Apache License 2.0; Twemoji by Twitter and other contributors, CC-BY 4.0; both from the packages
`emoji-datasource-google` and `emoji-datasource-twitter`. The photographs are those of scikit-learn, CC-BY, by Mondo Generator and hoshi.
"""

import functools
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Generator, Tensor
from torch.nn import functional as F

from benchmarks.reproduce.data import SPLIT_SEED, Examples, Package, draw, keep
from benchmarks.reproduce.shifts import warp
from ftp.demo.data import contrast, noise, per_image, signs, uniform

VENDORS = {
    "google": Package(
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twitter": Package(
        "emoji-datasource-twitter@16.0.0",
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
}
OLD = ("Smileys & Emotion", "People & Body", "Flags", "Symbols")
"""Categories of pre-training, whose classes are their subcategories."""

NEW = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
"""Categories of fine-tuning: the classes."""

POOL, VALIDATION = 30, 25
"""Emoji of each new category that fine-tuning draws from, and of validation; the others are for tests."""


@functools.cache
def _archives() -> dict[str, Any]:
    """Of the archives: the list of emoji that all vendors have, and their pictures by vendor in that order, bytes, (n, 4, 64, 64)."""
    return cast(dict[str, Any], keep("emoji", _read))


def _read() -> dict[str, Any]:
    with tarfile.open(VENDORS["google"].fetch()) as archive:
        file = archive.extractfile("package/emoji.json")
        assert file is not None
        listed = [entry for entry in json.load(file) if all(entry[f"has_img_{vendor}"] for vendor in VENDORS)]
    images = [entry["image"] for entry in listed]
    entries = [{key: entry[key] for key in ("category", "subcategory")} for entry in listed]
    return {"list": entries, **{vendor: _pictures(vendor, images) for vendor in VENDORS}}


def _pictures(vendor: str, images: Sequence[str]) -> Tensor:
    wanted = {f"package/img/{vendor}/64/{image}": index for index, image in enumerate(images)}
    found = torch.empty(len(wanted), 4, 64, 64, dtype=torch.uint8)
    with tarfile.open(VENDORS[vendor].fetch()) as archive:
        for member in archive:
            if member.name in wanted:
                file = archive.extractfile(member)
                assert file is not None
                pixels = numpy.asarray(Image.open(io.BytesIO(file.read())).convert("RGBA"))
                found[wanted.pop(member.name)] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    assert not wanted, f"{vendor} has no picture {next(iter(wanted))}"
    return found


def _list() -> list[dict[str, str]]:
    """Category and subcategory of each emoji."""
    return cast(list[dict[str, str]], _archives()["list"])


@functools.cache
def pictures(vendor: str) -> Tensor:
    """The emoji that all vendors have, in the same order: red, green, blue and alpha in [0, 1], shape (n, 4, 64, 64)."""
    images: Tensor = _archives()[vendor]
    return images / 255


def members(categories: Sequence[str], key: str) -> Examples:
    """Positions of the emoji of some categories, as images, with classes by the values of `key` in their order."""
    entries = [(index, entry) for index, entry in enumerate(_list()) if entry["category"] in categories]
    names = list(dict.fromkeys(entry[key] for _, entry in entries)) if key != "category" else list(categories)
    return Examples(torch.tensor([index for index, _ in entries]), torch.tensor([names.index(entry[key]) for _, entry in entries]))


def parts() -> tuple[Examples, Examples, Examples]:
    """Emoji of the new categories, by position: those that fine-tuning draws from, of validation, of tests."""
    pool, rest = draw(members(NEW, "category"), POOL, SPLIT_SEED)
    return (pool, *draw(rest, VALIDATION, SPLIT_SEED))


@functools.cache
def photographs() -> Tensor:
    """Photographs as backgrounds: shape (2, 3, h, w)."""
    return torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images])


def backgrounds(kind: str, n: int, generator: Generator) -> Tensor:
    """Backgrounds, shape (n, 3, 64, 64): "white", "plain" of random colors, or "photograph", random parts of photographs."""
    if kind == "white":
        return torch.ones(n, 3, 64, 64)
    if kind == "plain":
        return torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, 64, 64)
    images = photographs()
    which = torch.randint(len(images), (n,), generator=generator).tolist()
    top = torch.randint(images.shape[2] - 128, (n,), generator=generator).tolist()
    left = torch.randint(images.shape[3] - 128, (n,), generator=generator).tolist()
    crops = [images[i, :, y : y + 128, x : x + 128] for i, y, x in zip(which, top, left, strict=True)]
    return F.avg_pool2d(torch.stack(crops), 2)


def moved(emoji: Tensor, degrees: float, pixels: float, log_scale: float, generator: Generator) -> Tensor:
    """Emoji rotated, moved and scaled at random, up to these amounts; what comes in is transparent."""
    n = len(emoji)
    by = torch.stack([uniform(n, -pixels, pixels, generator), uniform(n, -pixels, pixels, generator)], 1)
    return warp(emoji, uniform(n, -degrees, degrees, generator), by, torch.exp(uniform(n, -log_scale, log_scale, generator)))


def composed(emoji: Tensor, background: Tensor) -> Tensor:
    """Emoji in front of backgrounds."""
    return emoji[:, :3] * emoji[:, 3:] + background * (1 - emoji[:, 3:])


def augmented(emoji: Tensor, generator: Generator) -> Tensor:
    """Images of pre-training, of emoji that were moved: any background, inversion, noise, contrast, gray."""
    n = len(emoji)
    kinds = [backgrounds(kind, n, generator) for kind in ("white", "plain", "photograph")]
    images = composed(emoji, torch.stack(kinds)[torch.randint(3, (n,), generator=generator), torch.arange(n)])
    inverted = per_image(torch.rand(n, generator=generator) < 0.3)
    gray = per_image(torch.rand(n, generator=generator) < 0.3)
    images = torch.where(gray, images.mean(1, keepdim=True), torch.where(inverted, 1 - images, images))
    return contrast(noise(images, per_image(uniform(n, 0, 0.2, generator)), generator), per_image(uniform(n, 0.3, 1, generator)))


Shift = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]
"""From emoji of Google and of Twitter, (n, 4, 64, 64), to images and alpha."""


def _plainly(kind: str = "white", vendor: int = 0) -> Shift:
    def shift(google: Tensor, twitter: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        emoji = (google, twitter)[vendor]
        return composed(emoji, backgrounds(kind, len(emoji), generator)), emoji[:, 3]

    return shift


def _after(change: Callable[[Tensor, Generator], Tensor]) -> Shift:
    def shift(google: Tensor, twitter: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        images, alpha = _plainly()(google, twitter, generator)
        return change(images, generator), alpha

    return shift


def _rotation(google: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    n = len(google)
    turned = warp(google, 45 * signs(n, generator), torch.zeros(n, 2), torch.full((n,), 0.8))
    return composed(turned, backgrounds("white", n, generator)), turned[:, 3]


SHIFTS: dict[str, Shift] = {
    "vendor": _plainly(vendor=1),
    "plain": _plainly("plain"),
    "photograph": _plainly("photograph"),
    "rotation": _rotation,
    "inversion": _after(lambda images, _: 1 - images),
    "gray": _after(lambda images, _: images.mean(1, keepdim=True).expand_as(images).contiguous()),
    "noise": _after(lambda images, generator: noise(images, 0.2, generator)),
    "contrast": _after(lambda images, _: contrast(images, 0.3)),
}
"""Shifts of Google's emoji on white: the other vendor; other backgrounds; 45 degrees either way; negative; gray; noise; contrast."""


@dataclass(frozen=True)
class Emoji:
    """A task on emoji.

    Attributes:
        dense: outlines, in the place of the five new categories.
        per_class: emoji of each new category.
        steps: of fine-tuning.
        classes: of predictions: categories, or outside and inside.
    """

    dense: bool
    per_class: int
    steps: int
    classes: int
    shifts: tuple[str, ...] = tuple(SHIFTS)

    @property
    def knows(self) -> str:
        return "outlines" if self.dense else "emoji"

    def _examples(self, which: Examples, shift: Shift, seed: int) -> Examples:
        google, twitter = (pictures(vendor)[which.images] for vendor in VENDORS)
        images, alpha = shift(google, twitter, Generator().manual_seed(seed))
        return Examples(images, (alpha > 0.5).long() if self.dense else which.labels)

    def training(self, per_class: int | None, seed: int) -> Examples:
        """Google's emoji on white."""
        pool, _, _ = parts()
        return self._examples(pool if per_class is None else draw(pool, per_class, seed)[0], _plainly(), 0)

    def validation(self, limit: int | None) -> Examples:
        """Google's emoji on white."""
        _, validation, _ = parts()
        return self._examples(validation, _plainly(), 0)[torch.arange(len(validation))[:limit]]

    def tests(self, limit: int | None) -> dict[str, Examples]:
        """Google's emoji on white, and shifted."""
        _, _, tests = parts()
        tests = tests[torch.randperm(len(tests), generator=Generator().manual_seed(SPLIT_SEED))[:limit]]
        return {name: self._examples(tests, shift, SPLIT_SEED) for name, shift in {"test": _plainly(), **SHIFTS}.items()}

    def pretraining(self) -> tuple[Callable[[Generator], Examples], int]:
        """What draws a batch of emoji of the old categories, of either vendor and augmented, and the number of classes."""
        old = members(OLD, "subcategory")
        both = torch.stack([pictures(vendor) for vendor in VENDORS])

        def batch(generator: Generator) -> Examples:
            chosen = old[torch.randint(len(old), (32,), generator=generator)]
            emoji = moved(both[torch.randint(2, (32,), generator=generator), chosen.images], 50, 8, 0.4, generator)
            return Examples(augmented(emoji, generator), (emoji[:, 3] > 0.5).long() if self.dense else chosen.labels)

        return batch, 2 if self.dense else int(old.labels.max()) + 1
