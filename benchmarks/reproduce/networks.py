"""The networks that are pre-trained here, a convolutional one and a small vision transformer, and their pre-training."""

import io
import os
import time
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.reproduce import data
from benchmarks.reproduce.shifts import augment


class CNN(nn.Module):
    """Four convolutions with batch norm, and a linear head: 32 thousand weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, size, stride in ((1, 16, 5, 2), (16, 32, 3, 2), (32, 32, 3, 1), (32, 48, 3, 2)):
            convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
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


NETWORKS = {"cnn": CNN, "vit": ViT}
EPOCHS = {"cnn": 4, "vit": 10}
"""Passes over the images of pre-training; images of two digits only are 2.4 times fewer, and are passed over so much more often."""


def pretrained(network: str, digits: Sequence[int], seed: int, steps: int | None = None) -> nn.Module:
    """A network that was trained on MNIST's training images of some digits, under broad augmentation.

    Args:
        network: of `NETWORKS`.
        digits: labels are positions in it.
        seed: of the initialization, the batches and the augmentation.
        steps: of training, in batches of 128; None is by `EPOCHS`.
    """
    path = data.cache() / f"{network}-{''.join(map(str, digits))}-{steps or 'full'}-{seed}.pt"
    if not path.exists():
        buffer = io.BytesIO()
        torch.save(_pretrain(network, digits, seed, steps).state_dict(), buffer)
        scratch = path.with_suffix(f".part{os.getpid()}")
        scratch.write_bytes(buffer.getvalue())
        os.replace(scratch, path)
    model = NETWORKS[network](len(digits))
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _pretrain(network: str, digits: Sequence[int], seed: int, steps: int | None) -> nn.Module:
    examples = data.select(data.mnist("train"), digits)
    steps = steps or EPOCHS[network] * 30_000 // 128
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[network](len(digits))
    generator = Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    started = time.perf_counter()
    for step in range(steps):
        batch = examples[torch.randint(len(examples), (128,), generator=generator)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(augment(batch.images, generator)), batch.labels)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            seconds = time.perf_counter() - started
            print(
                f"pre-training {network} on {digits}, seed {seed}: step {step + 1} of {steps}, loss {loss:.3f}, {seconds:.0f} s", flush=True
            )
    return model.eval()
