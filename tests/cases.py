"""What several test files share: tolerances, random problems, finite differences, and the table of hypers under test."""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

import hyperopt_nested as hn

EXACT = 1e-12  # two float64 programs that compute the same thing, relative to the largest entry
ROWLESS = {"adafactor", "erfi_tuner", "muon"}  # rules that go neither row by row nor element by element, or sum a series: no graphs
DIFFERENCES = 1e-6  # a derivative against finite differences in float64

Tensors = dict[str, Tensor]

SQUARE = hn.Bijection("square", torch.square, torch.sqrt, lambda info: (-math.sqrt(info.max) / 2, math.sqrt(info.max) / 2), even=True)
TANH = hn.Bijection(
    "tanh",
    lambda raw: (torch.tanh(raw) + 1) / 2,
    lambda value: torch.atanh(2 * value - 1),
    lambda info: (math.log(info.eps) / 2, -math.log(info.eps) / 2),
    interval=True,
)


def examples(count: int) -> settings:
    """So many examples with the quick profile, and as many times more with another as that has."""
    return settings(max_examples=count * settings.default.max_examples // settings.get_profile("quick").max_examples)


SHAPES: dict[str, tuple[int, ...]] = {"scalar": (), "bias": (3,), "weight": (3, 2), "kernel": (2, 2, 1, 2)}


def randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[Tensors, Callable[[Tensors], Tensor]]:
    """Random tensors, and a random smooth loss of them without symmetries."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: randn(shape, generator) for name, shape in shapes.items()}
    weights = {name: (randn(shape, generator), randn(shape, generator)) for name, shape in shapes.items()}

    def loss(params: Tensors) -> Tensor:
        parts = [(a * torch.sin(params[name] + b)).sum() + 0.1 * (params[name] * a).square().sum() for name, (a, b) in weights.items()]
        return torch.stack(parts).sum()

    return params, loss


def gradients(loss: Callable[[Tensors], Tensor], params: Tensors) -> Tensors:
    return dict(torch.func.grad(loss)(params))


def run(nested: hn.Nested, params: Tensors, loss: Callable[[Tensors], Tensor], steps: int, st: Any = None) -> tuple[Tensors, Any]:
    st = nested.init(params) if st is None else st
    for _ in range(steps):
        params, st = nested.step(params, gradients(loss, params), st)
    return params, st


POINTS = torch.tensor([1 / 50, 1 / 100, 1 / 200, -1 / 50, -1 / 100, -1 / 200], dtype=torch.float64)


def differences(function: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
    """Derivative at 0 along each of n directions, by central differences, extrapolated twice (Richardson): error of order h^6.

    Args:
        function: from offsets (6, n), one direction at a time, to values (6, n).
        scale: (n,), over which the function is smooth.
    """
    h = POINTS[:, None] * scale
    values = function(h)
    coarse, middle, fine = (values[:3] - values[3:]) / (2 * h[:3])
    return (64 * fine - 20 * middle + coarse) / 45


def replaced(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> dict[str, Any]:
    """The tree with another leaf at a path."""
    key, *rest = path
    return {**tree, key: replaced(tree[key], tuple(rest), leaf) if rest else leaf}


def at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def by_differences(
    nested: hn.Nested, params: Tensors, grads: Tensors, st: dict[str, Any], path: tuple[str, ...], loss: Callable[[Tensors], Tensor]
) -> Tensor:
    """Derivative of the loss after one more step with respect to each entry of the state's leaf at `path`."""
    leaf = at(st, path)
    size = leaf.flatten().abs().clamp(min=1e-3)
    room = torch.where((leaf.flatten() > 0.5) & (leaf.flatten() < 1), 1 - leaf.flatten(), math.inf)  # a decay rate must stay below 1

    def after(moved: Tensor) -> Tensor:
        return loss(nested.step(params, grads, replaced(st, path, moved))[0])

    def values(h: Tensor) -> Tensor:
        moved = leaf.flatten() + torch.diag_embed(h)  # (6, n, n): one entry moves at a time
        return torch.func.vmap(torch.func.vmap(after))(moved.reshape(*h.shape, *leaf.shape))

    return differences(values, torch.minimum(size, room)).reshape(leaf.shape)


def relative_error(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Largest difference, relative to the largest expected entry or to `scale` if that is larger."""
    if expected.numel() == 0:
        return 0.0
    size = max(float(expected.abs().max()), scale)
    return float((found - expected).abs().max()) / size if size else float((found - expected).abs().max())


assert math.isclose(float(differences(torch.exp, torch.ones(1))), 1.0, rel_tol=1e-12)
