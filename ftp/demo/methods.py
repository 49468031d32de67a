"""The network, and the ways of fine-tuning it that the demo compares, with their settings.

The settings were chosen by `python -m ftp.demo.tune`, by one rule for all methods: of a grid, the best mean accuracy on
in-distribution validation images, over seeds that the demo does not use; of equals, the first. Test images, and shifted ones, play no
part. Some run at a wrong learning rate on purpose: AdamW at one that is 100 times too low, where the learned rate starts, too; SGD and SGDP
at one that is too high, to show what the projection does about it.

The network and the length of pre-training were chosen before, on validation images too, so that a linear probe is robust: what
pre-training has not given, fine-tuning cannot keep. It matters: on a first, shallower network, whose probe failed under inversion, SGDP
was 3 points above SGD on shifted validation images; on this one it was 10.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

import hyperopt_nested as hn
from ftp.demo.data import CLASSES
from ftp.optimizers import SGDP, AdamP
from ftp.tpgm import TPGM


class Network(nn.Module):
    """A convolutional network of 23 thousand weights: a backbone, which is pre-trained, and a linear head, which is replaced."""

    def __init__(self) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (before, after) in enumerate(pairwise((1, 16, 24, 32, 40)), start=1):
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
            layers[f"norm{i}"] = nn.GroupNorm(4, after)
            layers[f"relu{i}"] = nn.ReLU()
            if i % 2 == 0:
                layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        self.backbone = nn.Sequential(layers)
        self.head = nn.Linear(160, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (n, 5), of images, shape (n, 1, 8, 8), in [0, 1]."""
        logits: Tensor = self.head(self.backbone(2 * images - 1))
        return logits


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        name: as the table shows it.
        lr: learning rate, at the start where it is learned.
        optimizer: makes the optimizer of a network.
        alpha: weight of the L2-SP penalty, alpha / 2 times the squared distance of the backbone from its start.
        tpgm: makes what projects a network beside the optimizer; its validation images are held out from the training images.
        every: steps of the optimizer for each projection.
    """

    name: str
    lr: float
    optimizer: Callable[[Network], torch.optim.Optimizer]
    alpha: float = 0.0
    tpgm: Callable[[Network], TPGM] | None = None
    every: int = 1


def linear_probe(lr: float) -> Method:
    """AdamW on the head; the backbone stays as it is."""

    def optimizer(network: Network) -> torch.optim.Optimizer:
        network.backbone.requires_grad_(False)
        return torch.optim.AdamW(network.head.parameters(), lr)

    return Method("linear probe", lr, optimizer)


def adamw(lr: float, name: str = "AdamW") -> Method:
    """AdamW on all weights."""
    return Method(name, lr, lambda network: torch.optim.AdamW(network.parameters(), lr))


def adamw_learned(lr: float, learner_lr: float) -> Method:
    """AdamW whose learning rate starts at `lr` and is learned, in its logarithm, by Adam."""

    def optimizer(network: Network) -> torch.optim.Optimizer:
        learned = hn.learn(lr, by=hn.adam(lr=learner_lr), via="log")
        return hn.HyperOptimizer(network.named_parameters(), hn.adamw(lr=learned))

    return Method("AdamW, learned lr", lr, optimizer)


def l2_sp(lr: float, alpha: float) -> Method:
    """AdamW on all weights, with a penalty on the distance from the pre-trained ones in the place of weight decay."""
    return Method("L2-SP", lr, lambda network: torch.optim.AdamW(network.parameters(), lr, weight_decay=0.0), alpha)


def adamp(lr: float) -> Method:
    """AdamW with Fast Trainable Projection of the backbone."""
    return Method("AdamP", lr, lambda network: AdamP(network.named_parameters(), lr, exclude=network.head))


def tpgm(lr: float, every: int, updates: int) -> Method:
    """AdamW, and after each `every` steps a projection of the backbone by TPGM, with so many updates of the radii."""
    return Method(
        "TPGM",
        lr,
        lambda network: torch.optim.AdamW(network.parameters(), lr, weight_decay=0.0),
        tpgm=lambda network: TPGM(network.named_parameters(), updates=updates, exclude=network.head),
        every=every,
    )


def sgd(lr: float) -> Method:
    """SGD with momentum on all weights."""
    return Method("SGD", lr, lambda network: torch.optim.SGD(network.parameters(), lr, momentum=0.9))


def sgdp(lr: float) -> Method:
    """SGD with momentum and Fast Trainable Projection of the backbone."""
    return Method("SGDP", lr, lambda network: SGDP(network.named_parameters(), lr, momentum=0.9, exclude=network.head))


LOW_LR = 1e-4
"""The learning rate of "AdamW, low lr", and where that of "AdamW, learned lr" starts."""

HIGH_LR = 3e-2
"""The learning rate of SGD and SGDP."""

METHODS = (
    linear_probe(3e-2),
    adamw(1e-2),
    adamw(LOW_LR, "AdamW, low lr"),
    adamw_learned(LOW_LR, learner_lr=1.0),
    l2_sp(1e-2, alpha=1e-3),
    adamp(1e-3),
    tpgm(1e-2, every=10, updates=10),
    sgd(HIGH_LR),
    sgdp(HIGH_LR),
)
