"""What is trained in the arena: small models on real data, as pure functions, so that many runs are one batched program.

A batch is a tuple of tensors whose first dimension is that of examples; a loss is their mean.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_breast_cancer
from torch import Generator, Tensor
from torch.nn import functional as F

from benchmarks.reproduce.data import mnist

Tensors = dict[str, Tensor]
Batch = tuple[Tensor, ...]
Shapes = Mapping[str, tuple[int, ...]]

VALIDATION = 2000
"""Examples of validation, at most."""


@dataclass(frozen=True)
class Task:
    """A problem of training.

    Attributes:
        name: of its file of rows.
        held_out: whether it is looked at once, when the recipe is chosen.
        steps: of training.
        batch_size: examples of a batch; 0 is all of them, in their order.
        shapes: of the parameters, by name.
        loss: pure function of parameters and a batch, to the mean loss.
        data: the training examples, and those of validation.
        accuracy: pure function of parameters and a batch, to the share of right answers; None where there are no answers.
    """

    name: str
    held_out: bool
    steps: int
    batch_size: int
    shapes: Shapes
    loss: Callable[[Tensors, Batch], Tensor]
    data: Callable[[], tuple[Batch, Batch]]
    accuracy: Callable[[Tensors, Batch], Tensor] | None = None

    def init(self, seed: int) -> Tensors:
        """Initial parameters: matrices normal with variance 1 / fan-in, embeddings (`emb`) 0.02 wide, scales 1, biases 0."""
        generator = Generator().manual_seed(seed)

        def one(name: str, shape: tuple[int, ...]) -> Tensor:
            if name.endswith("scale"):
                return torch.ones(shape)
            if name.endswith("bias"):
                return torch.zeros(shape)
            normal = torch.randn(shape, generator=generator)
            return normal * (0.02 if "emb" in name else 1 / math.sqrt(shape[0]))

        return {name: one(name, shape) for name, shape in self.shapes.items()}

    def batches(self, seed: int, steps: int) -> Tensor:
        """Indices of the examples of each step, (steps, batch_size), drawn with replacement."""
        count = len(self.data()[0][0])
        if not self.batch_size:
            return torch.arange(count).expand(steps, count)
        return torch.randint(count, (steps, self.batch_size), generator=Generator().manual_seed(1000 + seed))


def linear(p: Tensors, name: str, x: Tensor) -> Tensor:
    """A layer of weights (inputs, outputs) and biases."""
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def layers(**sizes: tuple[int, int]) -> Shapes:
    """The shapes of such layers."""
    return {f"{name}.{part}": size[i:] for name, size in sizes.items() for i, part in enumerate(("weight", "bias"))}


def _classified(scores: Callable[[Tensors, Tensor], Tensor]) -> dict[str, Callable[[Tensors, Batch], Tensor]]:
    def loss(p: Tensors, batch: Batch) -> Tensor:
        return F.cross_entropy(scores(p, batch[0]), batch[1])

    def accuracy(p: Tensors, batch: Batch) -> Tensor:
        return (scores(p, batch[0]).argmax(-1) == batch[1]).float().mean()

    return {"loss": loss, "accuracy": accuracy}


@functools.cache
def _mnist() -> tuple[Batch, Batch]:
    whole = mnist("train")
    images, labels = whole.images.flatten(1), whole.labels
    return (images[:50_000], labels[:50_000]), (images[50_000 : 50_000 + VALIDATION], labels[50_000 : 50_000 + VALIDATION])


@functools.cache
def _colored() -> tuple[Batch, Batch]:
    """MNIST with a random color of ink and a darker one of paper in each image, (n, 3 * 784)."""

    def colored(batch: Batch, seed: int) -> Batch:
        images, labels = batch
        ink, paper = torch.rand(2, len(images), 3, 1, generator=Generator().manual_seed(seed))
        return (images[:, None] * (0.5 + ink / 2) + (1 - images[:, None]) * paper / 2).flatten(1), labels

    train, validation = _mnist()
    return colored((train[0][:20_000], train[1][:20_000]), 0), colored(validation, 1)


CONTEXT, VOCABULARY = 32, 128


@functools.cache
def _text() -> tuple[Batch, Batch]:
    """Windows of Python's own documentation, (n, CONTEXT + 1) characters; the last tenth is for validation."""
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, CONTEXT + 1, CONTEXT // 2)
    cut = len(windows) * 9 // 10
    return (windows[:cut],), (windows[cut:][::10],)


WORDS, RANK = 1000, 16


@functools.cache
def _words() -> tuple[Batch, Batch]:
    """Pairs of words near each other in Python's documentation, with the logarithm of how often, as GloVe has them."""
    words = " ".join(topics[name] for name in sorted(topics)).lower().split()
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(WORDS))}
    ids = [number.get(word, -1) for word in words]
    pairs: Counter[tuple[int, int]] = Counter()
    for apart in range(1, 6):
        for one, other in zip(ids, ids[apart:], strict=False):
            if min(one, other) >= 0:
                pairs[one, other] += 1
                pairs[other, one] += 1
    rows = torch.tensor([[*pair, count] for pair, count in sorted(pairs.items())])
    rows = rows[torch.randperm(len(rows), generator=Generator().manual_seed(0))]
    batch = rows[:, 0], rows[:, 1], rows[:, 2].float()
    cut = len(rows) * 9 // 10
    return tuple(each[:cut] for each in batch), tuple(each[cut:] for each in batch)


@functools.cache
def _tumors() -> tuple[Batch, Batch]:
    """scikit-learn's breast cancer data, standardized: 400 examples of 30 numbers, the others for validation."""
    x, y = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(x), generator=Generator().manual_seed(0))
    x, y = torch.tensor(x)[order], torch.tensor(y)[order].float()
    x = ((x - x[:400].mean(0)) / x[:400].std(0)).float()
    return (x[:400], y[:400]), (x[400:], y[400:])


@functools.cache
def _points() -> tuple[Batch, Batch]:
    """Normal points around the optimum, (n, 100), and the optimum itself."""
    optimum = torch.randn(100, generator=Generator().manual_seed(0))
    points = optimum + 0.5 * torch.randn(10_000, 100, generator=Generator().manual_seed(1))
    return (points,), (points.mean(0, keepdim=True),)


def _mlp(p: Tensors, x: Tensor) -> Tensor:
    return linear(p, "out", F.relu(linear(p, "second", F.relu(linear(p, "first", x)))))


def _autoencoder(p: Tensors, batch: Batch) -> Tensor:
    code = linear(p, "code", F.relu(linear(p, "first", batch[0])))
    decoded = linear(p, "out", F.relu(linear(p, "second", code)))
    return F.mse_loss(torch.sigmoid(decoded), batch[0])


def _quadratic(p: Tensors, batch: Batch) -> Tensor:
    curvatures = torch.logspace(-2, 0, 100, device=batch[0].device)
    return 0.5 * ((p["at"] - batch[0]).square() * curvatures).sum(-1).mean()


def _logistic(p: Tensors, batch: Batch) -> Tensor:
    scores = linear(p, "out", batch[0]).squeeze(-1)
    return F.binary_cross_entropy_with_logits(scores, batch[1]) + 1e-3 * p["out.weight"].square().sum()


def _factorization(p: Tensors, batch: Batch) -> Tensor:
    one, other, count = batch
    found = (p["emb.one"][one] * p["emb.other"][other]).sum(-1) + p["one.bias"][one] + p["other.bias"][other]
    return ((count / 100).clamp(max=1) ** 0.75 * (found - count.log()).square()).mean()


def _normed(p: Tensors, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.scale"], p[f"{name}.bias"])


def _transformer(p: Tensors, x: Tensor, depth: int, heads: int, causal: bool) -> Tensor:
    """Blocks of attention and of two layers, each after a norm and beside the identity; x is (n, tokens, width)."""
    for at in range(depth):
        query, key, value = (
            linear(p, f"{at}.{part}", _normed(p, f"{at}.norm1", x)).unflatten(-1, (heads, -1)).transpose(1, 2) for part in ("q", "k", "v")
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1), -math.inf)
        x = x + linear(p, f"{at}.o", (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        x = x + linear(p, f"{at}.down", F.gelu(linear(p, f"{at}.up", _normed(p, f"{at}.norm2", x))))
    return _normed(p, "norm", x)


def _blocks(width: int, depth: int) -> Shapes:
    norms = ["norm", *(f"{i}.norm{j}" for i in range(depth) for j in (1, 2))]
    vectors = {f"{name}.{part}": (width,) for name in norms for part in ("scale", "bias")}
    square = {f"{i}.{part}": (width, width) for i in range(depth) for part in "qkvo"}
    wide = {f"{i}.{part}": size for i in range(depth) for part, size in (("up", (width, 4 * width)), ("down", (4 * width, width)))}
    return {**vectors, **layers(**square, **wide)}


def _gpt(p: Tensors, batch: Batch) -> Tensor:
    x = p["emb.token"][batch[0][:, :-1]] + p["emb.place"]
    scores = linear(p, "out", _transformer(p, x, depth=2, heads=2, causal=True))
    return F.cross_entropy(scores.flatten(0, 1), batch[0][:, 1:].flatten())


def _vit(p: Tensors, images: Tensor) -> Tensor:
    patches = images.reshape(-1, 3, 4, 7, 4, 7).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    x = linear(p, "patch", patches) + p["emb.place"]
    return linear(p, "out", _transformer(p, x, depth=2, heads=2, causal=False).mean(1))


def _gru(p: Tensors, images: Tensor) -> Tensor:
    """A gated recurrent unit that reads an image row by row."""
    rows = linear(p, "in", images.reshape(-1, 28, 28))
    state = rows.new_zeros(len(rows), rows.shape[-1] // 3)
    for t in range(28):
        reset, update, new = rows[:, t].chunk(3, -1)
        back_reset, back_update, back_new = linear(p, "back", state).chunk(3, -1)
        update = torch.sigmoid(update + back_update)
        state = update * state + (1 - update) * torch.tanh(new + torch.sigmoid(reset + back_reset) * back_new)
    return linear(p, "out", state)


TASKS = {
    task.name: task
    for task in (
        Task("mlp", False, 600, 64, layers(first=(784, 64), second=(64, 64), out=(64, 10)), data=_mnist, **_classified(_mlp)),
        Task(
            "autoencoder",
            False,
            600,
            64,
            layers(first=(784, 64), code=(64, 16), second=(16, 64), out=(64, 784)),
            data=_mnist,
            loss=_autoencoder,
        ),
        Task(
            "gpt",
            False,
            600,
            16,
            {"emb.token": (VOCABULARY, 32), "emb.place": (CONTEXT, 32), **_blocks(32, 2), **layers(out=(32, VOCABULARY))},
            data=_text,
            loss=_gpt,
        ),
        Task("quadratic", False, 600, 8, {"at": (100,)}, data=_points, loss=_quadratic),
        Task(
            "vit",
            True,
            600,
            32,
            {"emb.place": (16, 32), **_blocks(32, 2), **layers(patch=(147, 32), out=(32, 10))},
            data=_colored,
            **_classified(_vit),
        ),
        Task("gru", True, 600, 32, layers(**{"in": (28, 96), "back": (32, 96), "out": (32, 10)}), data=_mnist, **_classified(_gru)),
        Task(
            "factorization",
            True,
            600,
            1024,
            {"emb.one": (WORDS, RANK), "emb.other": (WORDS, RANK), "one.bias": (WORDS,), "other.bias": (WORDS,)},
            data=_words,
            loss=_factorization,
        ),
        Task("logistic", True, 300, 0, layers(out=(30, 1)), data=_tumors, loss=_logistic),
    )
}
"""By name. Those of the first half are for finding the recipe; those that are held out are looked at once."""
