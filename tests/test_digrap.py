"""DiGraP: the published recursion, its derivatives, and what it says to bad input."""

from typing import Any

import pytest
import torch
from cases import EXACT

import ftp
import hyperopt_nested as hn


def published(weights: torch.Tensor, grads: list[torch.Tensor], lr: float, mu: float) -> tuple[torch.Tensor, list[float]]:
    """Algorithm 1 of arXiv 2502.15895, with Adam; the weights at the end, and the strength of each step."""
    anchor, omega, strengths = weights, 0.0, list[float]()
    m, v, mean, square, last = torch.zeros_like(weights), torch.zeros_like(weights), 0.0, 0.0, torch.zeros_like(weights)
    for t, grad in enumerate(grads, start=1):
        moved = weights - anchor
        projected = (grad * moved).sum() / moved.square().sum() * moved if t > 1 else torch.zeros_like(moved)
        slope = float((grad * last).sum())
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        omega -= mu * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)) ** 0.5 + 1e-8)
        omega, last = min(1.0, max(0.0, omega)), projected
        strengths.append(omega)
        used = grad - omega * projected if float((grad * moved).sum()) >= 0 else grad
        m, v = 0.9 * m + 0.1 * used, 0.999 * v + 0.001 * used.square()
        weights = weights - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return weights, strengths


@pytest.mark.parametrize("backend", ["reference", "foreach", "fused"])
def test_it_is_the_published_algorithm(backend: Any) -> None:
    start, grads = torch.randn(4, 3), [torch.randn(4, 3) for _ in range(30)]
    expected, strengths = published(start, grads, 0.05, 0.1)
    weight = torch.nn.Parameter(start.clone())
    opt = hn.HyperOptimizer([("weight", weight)], ftp.digrap(hn.adam(lr=0.05), lr=0.1), backend=backend)
    for grad, strength in zip(grads, strengths, strict=True):
        weight.grad = grad
        opt.step()
        assert opt.learned()["strength/weight"] == pytest.approx(strength, abs=1e-12)
    torch.testing.assert_close(weight.detach(), expected, rtol=EXACT, atol=EXACT)
    assert min(strengths) == 0
    assert max(strengths) > 0.2


@pytest.mark.parametrize("base", [lambda: hn.sgd(lr=0.1), lambda: hn.adam(lr=0.05)], ids=["sgd", "adam"])
def test_its_exact_derivative_passes_the_kit(base: Any) -> None:
    hn.testing.check_rule(ftp.digrap(base(), derivative="exact"), examples=5)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="derivative='sideways' must be 'straight-through' or 'exact'"):
        hn.HyperOptimizer([torch.nn.Parameter(torch.ones(2))], ftp.digrap(hn.sgd(), derivative="sideways"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength"):
        ftp.directional_projection(hn.sgd(), strength=1.5)
