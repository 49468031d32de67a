"""Rules that read the loss of the step: from a closure, from `loss=`, in sweeps; and where that is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hyperopt_nested as hn
from hyperopt_nested.rule import Optimizer

BACKENDS = ("reference", "foreach", "fused")


def train(optimizer: Optimizer, steps: int, *, backend: Any = "auto", closure: bool = False) -> tuple[list[float], hn.HyperOptimizer]:
    """Losses of steps on a quadratic, and the optimizer."""
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    opt, losses = hn.HyperOptimizer([("w", w)], optimizer, backend=backend), []

    def evaluate() -> Tensor:
        opt.zero_grad()
        loss = (w.square() * torch.tensor([1.0, 0.1])).sum() / 2
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(steps):
        opt.step(evaluate) if closure else opt.step(loss=evaluate())
    return losses, opt


def null_step() -> Optimizer:
    return hn.null_step(hn.sgd(hn.learn(8.0, by=hn.adam(0.3), via="log")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_that_is_far_too_high_comes_down_without_damage(backend: str) -> None:
    losses, opt = train(null_step(), 30, backend=backend)
    assert losses == pytest.approx(train(null_step(), 30, backend="reference", closure=True)[0], rel=1e-12)
    assert max(losses) > 10 * losses[0]
    best = opt.eval_params()["w"]
    assert float((best.square() * torch.tensor([1.0, 0.1])).sum() / 2) == min(losses) < losses[0] / 2
    assert opt.learned()["lr"] < 2


def test_a_loss_that_is_not_a_number_takes_the_step_back() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([w], hn.null_step(hn.sgd(0.5)))
    for loss, grad in ((1.0, 1.0), (math.nan, math.nan), (0.25, 0.5)):
        w.grad = torch.full_like(w, grad)
        opt.step(loss=loss)
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.25))  # 1 to 0.5, back and to 0.5 again, to 0.25


def test_polyak_steps() -> None:
    losses, opt = train(hn.polyak(hn.sgd(1.0), largest=5.0), 20)
    w, expected = torch.tensor([3.0, 4.0], dtype=torch.float64), []
    for _ in range(20):
        grad = w * torch.tensor([1.0, 0.1])
        expected.append(float((w * grad).sum() / 2))
        w = w - min(expected[-1] / float(grad.square().sum()), 5.0) * grad
    assert losses == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(next(opt.named_parameters())[1].detach(), w)


def test_nothing_happens_without_a_loss() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    opt = hn.HyperOptimizer([w], null_step())
    with pytest.raises(ValueError, match=r"null_step\(sgd\) reads the loss of each step: call step\(loss=loss\), or step\(closure\)"):
        opt.step()
    with pytest.raises(TypeError, match=r"loss='high' \(str\) must be a number, or a tensor of one number"):
        opt.step(loss="high")  # type: ignore[arg-type]
    assert torch.equal(w.detach(), torch.ones(2))


def test_a_sweep_gives_each_run_its_loss() -> None:
    starts = torch.tensor([0.1, 8.0], dtype=torch.float64)
    params = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    loss = lambda params, batch: (params["w"].square() * torch.tensor([1.0, 0.1])).sum() / 2  # noqa: E731
    runs = hn.sweep(null_step(), params, range(30), loss, starts={"lr": starts})
    assert runs.losses[:, 1].tolist() == pytest.approx(train(null_step(), 30)[0], rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hn.null_step(hn.sgd(0.1), loss=hn.learn(1.0)), "loss is the loss of each step, which cannot be learned"),
        (
            lambda: hn.Nested(hn.null_step(hn.sgd(0.1))).step({"w": torch.ones(1)}, {"w": torch.ones(1)}, {"rule": {"w": {}}}),
            r"null_step\(sgd\) reads the loss of each step: give values=\{'w': \{'loss': loss\}\}",
        ),
        (
            lambda: hn.hypergradient(null_step(), {"w": torch.ones(1)}, [0], lambda *_: torch.ones(()), lambda *_: torch.ones(())),
            "reads the loss of each step: use an optimizer without it",
        ),
        (lambda: hn.Nested(null_step(), horizon=hn.Discounted(0.9)), "discount=0.9 is not exact for .*, which reads the loss"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
