"""With nothing learned, the rules are torch.optim's; with a learner that does not move, they are themselves, bit for bit."""

from typing import Any

import pytest
import torch
from cases import EXACT, HYPERS, SHAPES, drawn, make, problem, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import hyperopt_nested as hn

rates = st.floats(1e-4, 0.3)
betas = st.floats(0.0, 0.999)
decay = st.one_of(st.just(0.0), st.floats(0.0, 0.5))
flags = st.booleans()


@st.composite
def sgd_settings(draw: Any) -> dict[str, Any]:
    momentum = draw(st.one_of(st.just(0.0), st.floats(0.1, 1.0)))
    nesterov = draw(flags) and momentum > 0
    dampening = 0.0 if nesterov else draw(st.one_of(st.just(0.0), st.floats(-1.0, 1.0)))
    return {
        "lr": draw(rates),
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": draw(decay),
        "nesterov": nesterov,
        "maximize": draw(flags),
    }


adam_settings = st.fixed_dictionaries(
    {
        "lr": st.one_of(st.just(0.0), rates),
        "betas": st.tuples(betas, betas),
        "eps": st.floats(1e-8, 1e-1),
        "weight_decay": decay,
        "amsgrad": flags,
        "maximize": flags,
    }
)


def compare(name: str, settings: dict[str, Any], seed: int, dtype: torch.dtype = torch.float64, steps: int = 50) -> float:
    """Largest difference from torch.optim over all steps, relative to the tensor's largest entry so far; gradients have exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**SHAPES, "empty": (0, 3)}
    ours = {key: torch.nn.Parameter(randn(shape, generator).to(dtype)) for key, shape in shapes.items()}
    theirs = {key: torch.nn.Parameter(p.detach().clone()) for key, p in ours.items()}
    hypers = {key: value for key, value in settings.items() if key != "betas"}
    if "betas" in settings:
        hypers["beta1"], hypers["beta2"] = settings["betas"]
    opt = hn.HyperOptimizer(ours.items(), hn.get(name.lower())(**hypers))
    reference = getattr(torch.optim, name)(theirs.values(), **settings)
    worst, largest = 0.0, dict.fromkeys(shapes, 0.0)
    for step in range(steps):
        for key, shape in shapes.items():
            grad = randn(shape, generator).to(dtype) * (torch.rand(shape, generator=generator) > 0.2)
            ours[key].grad, theirs[key].grad = (None, None) if step % 7 == 3 and key == "bias" else (grad, grad.clone())
        opt.step()
        reference.step()
        for key, theirs_now in theirs.items():
            largest[key] = max(largest[key], theirs_now.detach().abs().amax().item() if theirs_now.numel() else 0.0)
            worst = max(worst, relative_error(ours[key].detach(), theirs_now.detach(), largest[key]))
    return worst


@given(sgd_settings(), st.integers(0, 2**31))
def test_sgd_is_torch(settings: dict[str, Any], seed: int) -> None:
    assert compare("SGD", settings, seed) < EXACT


@given(adam_settings, st.integers(0, 2**31))
def test_adam_is_torch(settings: dict[str, Any], seed: int) -> None:
    assert compare("Adam", settings, seed) < EXACT


@given(adam_settings, st.integers(0, 2**31))
def test_adamw_is_torch(settings: dict[str, Any], seed: int) -> None:
    assert compare("AdamW", settings, seed) < EXACT


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_float32_is_torch(name: str) -> None:
    assert compare(name, {"lr": 1e-2, "weight_decay": 1e-2}, seed=1, dtype=torch.float32) < 1e-5


# One value is kept in float64 whatever the parameter's dtype, many values in float32: those round differently beside narrow parameters.
KEPT = [("model", torch.float64), ("model", torch.float32), ("model", torch.bfloat16), ("tensor", torch.float32)]
KEPT += [("row", torch.float64), ("element", torch.float64)]


@pytest.mark.parametrize(("per", "dtype"), KEPT)
@pytest.mark.parametrize(("rule", "hyper"), HYPERS)
def test_a_learner_that_does_not_move_changes_nothing(rule: str, hyper: str, per: Any, dtype: torch.dtype) -> None:
    value = drawn(rule, hyper, 0.5)
    start, loss = problem(3)
    models = []
    for setting in (value, hn.learn(value, by=hn.sgd(lr=0.0), per=per)):
        params = {name: torch.nn.Parameter(p.to(dtype)) for name, p in start.items()}
        opt = hn.HyperOptimizer(params.items(), make(rule, hyper, setting))
        for _ in range(10):
            opt.zero_grad()
            loss(params).backward()
            opt.step()
        models.append(params)
    for name in start:
        assert torch.equal(models[0][name], models[1][name]), name
