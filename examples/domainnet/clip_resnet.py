"""The ResNet-50 of CLIP (Radford et al. 2021, arXiv 2103.00020) with a linear head, named as its checkpoint names it."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """A residual block that halves the resolution by average pooling, where it does."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            conv, norm = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential(OrderedDict([("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", norm)]))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """Attention of the mean over all places to each of them."""

    def __init__(self, places: int, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.heads, self.positional_embedding = heads, nn.Parameter(torch.randn(places + 1, width) / width**0.5)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.c_proj = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        q, k, v = self._split(self.q_proj(x[:, :1])), self._split(self.k_proj(x)), self._split(self.v_proj(x))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ClipResNet(nn.Module):
    """CLIP's image encoder with a linear head.

    Args:
        layers: blocks of each stage.
        width: channels of the first stage, a quarter of its output's.
        heads: of the attention.
        features: of the encoder's output.
        size: height and width of the images.
        classes: of the head.
    """

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        heads: int = 32,
        features: int = 1024,
        size: int = 224,
        classes: int = 345,
    ) -> None:
        super().__init__()
        self.input_size, half = size, width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        inputs = width
        for stage, blocks in enumerate(layers):
            own = width * 2**stage
            strides = [2 if stage else 1] + [1] * (blocks - 1)
            stacked = [Bottleneck(inputs if block == 0 else 4 * own, own, stride) for block, stride in enumerate(strides)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*stacked))
            inputs = 4 * own
        self.stages = len(layers)
        self.attnpool = AttentionPool((size // 2 ** (self.stages + 1)) ** 2, inputs, heads, features)
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        for number in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)))
        x = F.avg_pool2d(x, 2)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.head(self.attnpool(x))


def clip_resnet50() -> ClipResNet:
    """Make the network; its weights are those of a file."""
    return ClipResNet()
