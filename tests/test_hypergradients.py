"""Hypergradients of whole optimizers against central finite differences; those of single rules are in test_rules.py."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    DIFFERENCES,
    EXACT,
    SHAPES,
    SQUARE,
    TANH,
    at,
    by_differences,
    differences,
    examples,
    gradients,
    problem,
    relative_error,
    run,
)
from hypothesis import assume, currently_in_test_context, given
from hypothesis import strategies as st

import hyperopt_nested as hn
from ftp import ftp_rule
from ftp.rule import FLOOR

PER = ["model", "tensor", "row", "element"]
BALLS = {ball.name: ball for ball in (hn.mars, hn.frobenius, hn.row_l2, hn.linf)}
seeds = st.integers(0, 2**31)
fractions = st.floats(0.0, 1.0)
SMALL = {name: SHAPES[name] for name in ("scalar", "bias", "weight")}


def still(value: float, per: Any = "model", **how: Any) -> hn.Learn:
    """Learned, by a learner that does not move it."""
    return hn.learn(value, by=hn.sgd(lr=0.0), per=per, **how)


def errors(optimizer: hn.Optimizer, hyper: str, seed: int, steps: int, memory: Any = "auto", shapes: Any = SMALL) -> dict[str, float]:
    """Relative error of each value's hypergradient, after some steps and one more, of a random smooth loss."""
    params, loss = problem(seed, shapes)
    nested = hn.Nested(optimizer, horizon=hn.OneStep(memory))
    params, state = run(nested, params, loss, steps)
    grads = gradients(loss, params)
    new, after = nested.step(params, grads, state)
    found = nested.hypergradients(new, gradients(loss, new), after)[hyper]
    assert found.keys() == state["hypers"][hyper].keys()
    expected = {key: by_differences(nested, params, grads, state, ("hypers", hyper, key), loss) for key in found}
    scale = max(float(value.abs().max()) for value in expected.values())
    if currently_in_test_context():
        assume(scale > 3e-3)  # else the loss's own rounding is all that differences see
    return {key: relative_error(found[key], expected[key], scale * 1e-3) for key in found}


VIA: list[tuple[Callable[..., hn.Optimizer], str, str, tuple[float, float]]] = [
    (functools.partial(hn.sgd, momentum=0.9), "lr", "log", (0.01, 0.5)),
    (functools.partial(hn.sgd, momentum=0.9), "lr", "softplus", (0.01, 0.5)),
    (functools.partial(hn.adamw, lr=0.1, eps=0.1), "weight_decay", SQUARE, (0.01, 0.5)),
    (functools.partial(hn.adam, lr=0.1, eps=0.1), "beta1", "logit", (0.1, 0.95)),
    (functools.partial(hn.adam, lr=0.1, eps=0.1), "beta2", TANH, (0.3, 0.999)),
]


@pytest.mark.parametrize(("rule", "hyper", "via", "ends"), VIA)
@given(seeds, fractions)
@examples(4)
def test_in_the_coordinates_of_a_bijection(rule: Any, hyper: str, via: Any, ends: Any, seed: int, fraction: float) -> None:
    value = ends[0] + fraction * (ends[1] - ends[0])
    found = errors(rule(**{hyper: still(value, "row", via=via)}), hyper, seed, 2)
    assert max(found.values()) < DIFFERENCES, found


def unprojected(nested: hn.Nested, params: Any, grads: Any, state: Any) -> dict[str, torch.Tensor]:
    """Displacements that the next step would make without its projection."""
    for key, raws in state["hypers"].get("radius", {}).items():
        raws = {**state["hypers"]["radius"], key: torch.full_like(raws, 1e9)}
        state = {**state, "hypers": {**state["hypers"], "radius": raws}}
    values = {} if "radius" in state["hypers"] else {name: {"radius": 1e9} for name in params}
    new, _ = nested.step(params, grads, state, values)
    return {name: new[name] - state["rule"][name]["anchor"] for name in new}


def clear_of_kinks(optimizer: hn.Optimizer, ball: hn.typing.Ball, radius: float, seed: int, steps: int) -> bool:
    """Whether, in the step after `steps`, no block's norm is near the radius and no entry of a displacement near zero."""
    params, loss = problem(seed, SMALL)
    nested = hn.Nested(optimizer)
    params, state = run(nested, params, loss, steps)
    displacements = unprojected(nested, params, gradients(loss, params), state).values()
    near_radius = any(bool(((ball.norms(d) - radius).abs() < 0.05 * radius).any()) for d in displacements)
    some_outside = any(bool((ball.norms(d) > radius).any()) for d in displacements)
    return some_outside and not near_radius and all(bool((d.abs() > 1e-3 * radius).all()) for d in displacements)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("ball", BALLS)
@given(seeds, st.floats(0.05, 0.6))
@examples(4)
def test_radius_of_an_exact_projection(ball: str, per: Any, seed: int, radius: float) -> None:
    optimizer = hn.project(hn.sgd(lr=0.1, momentum=0.9), onto=BALLS[ball], radius=still(radius, per), saturation="exact")
    assume(clear_of_kinks(optimizer, BALLS[ball], radius, seed, 2))
    found = errors(optimizer, "radius", seed, 2)
    assert max(found.values()) < DIFFERENCES, found


@pytest.mark.parametrize("per", ["model", "row", "element"])
@pytest.mark.parametrize("ball", BALLS)
@given(seeds, st.floats(0.05, 0.6))
@examples(4)
def test_hypers_of_a_projected_rule(ball: str, per: Any, seed: int, radius: float) -> None:
    optimizer = hn.project(hn.sgd(lr=still(0.1, per), momentum=0.9), onto=BALLS[ball], radius=radius, saturation="exact")
    assume(clear_of_kinks(optimizer, BALLS[ball], radius, seed, 2))
    found = errors(optimizer, "lr", seed, 2)
    assert max(found.values()) < DIFFERENCES, found


def test_projected_hypers_finer_than_a_block_are_remembered_in_reverse() -> None:
    """A row's norm couples its elements: forward memory would be wrong per element, and says so."""
    optimizer = hn.project(hn.sgd(lr=still(0.1, "element")), onto=hn.mars, radius=0.1)
    assert "inputs" in hn.Nested(optimizer).init({"w": torch.ones(2, 2)})["memory"]["w"]
    with pytest.raises(ValueError, match="memory='forward' is not exact for lr learned per element"):
        hn.Nested(optimizer, horizon=hn.OneStep("forward"))


@given(seeds, st.floats(0.05, 0.6))
def test_straight_through_radius_against_its_surrogate(seed: int, radius: float) -> None:
    """Where the ball is inactive, the surrogate continues the active formula, anchor + d r / ||d||, at the actual point."""
    optimizer = hn.project(hn.sgd(lr=0.1, momentum=0.9), onto=hn.mars, radius=still(radius, "tensor"))
    nested = hn.Nested(optimizer)
    params, loss = problem(seed, SMALL)
    params, state = run(nested, params, loss, 2)
    grads = gradients(loss, params)
    displacement = unprojected(nested, params, grads, state)
    new, after = nested.step(params, grads, state)
    found = nested.hypergradients(new, gradients(loss, new), after)["radius"]
    for name in params:
        anchor, d = state["rule"][name]["anchor"], displacement[name]
        norms = hn.mars.norms(d)

        def surrogate(h: torch.Tensor, name: str = name, anchor: Any = anchor, d: Any = d, norms: Any = norms) -> torch.Tensor:
            active = anchor + d * (radius + h) / (norms + 1e-8)
            return loss({**new, name: torch.where(norms > radius, active, anchor + d + d * h / (norms + 1e-8))})

        expected = differences(torch.func.vmap(torch.func.vmap(surrogate)), torch.tensor([radius]))
        assert relative_error(found[name], expected, 1e-3) < DIFFERENCES, name


def test_ftp_learns_from_the_hypergradient_of_its_radius() -> None:
    """One step of the radius is Adam's on that hypergradient, which straight-through sees in inactive rows too."""
    nested = hn.Nested(ftp_rule(hn.sgd(lr=0.1)))
    params, loss = problem(2, SMALL)
    params, state = run(nested, params, loss, 1)
    grad = nested.hypergradients(params, gradients(loss, params), state)["radius"]["weight"]
    assert float(grad) < 0
    _, after = run(nested, params, loss, 1, state)
    m, v = 0.1 * grad / (1 - 0.9**2), 0.001 * grad**2 / (1 - 0.999**2)
    expected = (FLOOR - 1e-2 * m / (v.sqrt() + 1e-8)).clamp(max=after["rule"]["weight"]["largest_norm"])
    assert relative_error(after["hypers"]["radius"]["weight"], expected) < EXACT


def tower(height: int, per: Any = "model") -> hn.Optimizer:
    rates = [0.1, 1e-2, 1e-3, 1e-4]
    learner = hn.sgd(lr=0.0)
    for level in reversed(range(1, height)):
        rule = hn.adam if level == 1 else hn.sgd
        learner = rule(lr=hn.learn(rates[level], by=learner))
    return hn.sgd(lr=hn.learn(rates[0], by=learner, per=per), momentum=0.5)


@pytest.mark.parametrize("memory", ["auto", "reverse"])
@pytest.mark.parametrize("per", ["model", "tensor", "element"])
@pytest.mark.parametrize("height", [2, 3])
@given(seeds)
@examples(3)
def test_towers_against_the_whole_program(height: int, per: Any, memory: Any, seed: int) -> None:
    """The top hyper-parameter moves the one below, that one the next, and at last the tensors: all in one step of the program."""
    nested = hn.Nested(tower(height, per), horizon=hn.OneStep(memory))
    params, loss = problem(seed, SMALL)
    params, state = run(nested, params, loss, 3)
    grads = gradients(loss, params)
    new, after = nested.step(params, grads, state)
    engine, found = nested, nested.hypergradients(new, gradients(loss, new), after)["lr"]
    values = after["hypers"]["lr"]
    path: tuple[str, ...] = ()
    for _ in range(height - 1):
        engine, after, path = engine.learned["lr"].learner, after["learners"]["lr"], (*path, "learners", "lr")
        found = engine.hypergradients(values, found, after)["lr"]
        values = after["hypers"]["lr"]
    for key, value in found.items():
        assert at(state, (*path, "hypers", "lr", key)).shape == value.shape
        expected = by_differences(nested, params, grads, state, (*path, "hypers", "lr", key), loss)
        assert float(expected.abs().max()) > 0
        assert relative_error(value, expected, 1e-9) < DIFFERENCES
