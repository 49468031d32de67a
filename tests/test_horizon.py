"""Horizons beyond one step, online: what is carried from step to step agrees with hypergradients through all steps."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Tensors, examples, gradients, problem, relative_error
from hypothesis import given
from hypothesis import strategies as st
from test_unrolled import RULES, Problem, flat, learned, perceptron, settings_of

import hyperopt_nested as hn

AGREE = 1e-10


def product(loss: Callable[[Tensors], torch.Tensor], at: Tensors) -> Callable[[Tensors], Tensors]:
    return lambda along: torch.func.jvp(torch.func.grad(loss), (at,), (along,))[1]


def carried(problem: Problem, optimizer: hn.Optimizer, curvature: Any = "exact", discount: float = 1.0) -> dict[str, Tensors]:
    """Hypergradients of the held-out loss after all batches."""
    nested = hn.Nested(optimizer, horizon=hn.Discounted(discount, curvature))
    params, state = problem.params, nested.init(problem.params)
    for batch in problem.batches:

        def loss(params: Tensors, batch: Any = batch) -> torch.Tensor:
            return problem.loss(params, batch)

        hessian = product(loss, params) if curvature == "exact" else None
        params, state = nested.step(params, gradients(loss, params), state, learn=False, hessian=hessian)
    return nested.hypergradients(params, gradients(lambda params: problem.loss(params, problem.held_out), params), state)


def exact(problem: Problem, optimizer: hn.Optimizer) -> dict[str, Tensors]:
    return hn.hypergradient(
        optimizer, problem.params, problem.batches, problem.loss, lambda p, batch, _: problem.loss(p, batch), outer_batch=problem.held_out
    )


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("name", [name for name in RULES if name != "coin_betting"])  # whose first derivative is rounding alone
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 5))
@examples(2)
def test_with_curvature_and_no_discount_all_steps_are_looked_through(name: str, per: Any, seed: int, steps: int) -> None:
    optimizer, problem = settings_of(name, per), Problem(seed, steps, perceptron)
    values = optimizer.settings  # in their own coordinates, as `hypergradient` gives them
    optimizer = optimizer.replace(**{h: learned(v.value, per, via="projection") for h, v in values.items() if isinstance(v, hn.Learn)})
    expected, found = flat(exact(problem, optimizer)), flat(carried(problem, optimizer))
    largest = max(float(value.abs().amax()) for value in expected.values())
    assert found.keys() == expected.keys()
    assert all(relative_error(found[path], value, 1e-3 * largest) < AGREE for path, value in expected.items())


@pytest.mark.parametrize("per", ["model", "tensor", "row", "element"])
@pytest.mark.parametrize("make", [hn.sgd, hn.adamw, hn.rmsprop])
def test_without_curvature_it_is_exact_where_there_is_none(make: Any, per: Any) -> None:
    """The loss is linear in the parameters: its gradient does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, 2, generator=generator), "b": torch.randn(3, generator=generator)}
    batches = [{name: torch.randn(p.shape, generator=generator) for name, p in params.items()} for _ in range(6)]

    def loss(params: Tensors, batch: Tensors, hypers: Any = None) -> torch.Tensor:
        return torch.stack([(params[name] * batch[name]).sum() for name in params]).sum()

    settings = {"lr": learned(0.05, per), "weight_decay": learned(0.1, per), "momentum": learned(0.8, per)}
    optimizer = make(**{key: value for key, value in settings.items() if key in make.hypers})
    nested = hn.Nested(optimizer, horizon=hn.Discounted(1.0))
    now, state = params, nested.init(params)
    for batch in batches[:-1]:
        now, state = nested.step(now, batch, state, learn=False)
    expected = flat(hn.hypergradient(optimizer, params, batches[:-1], loss, loss, outer_batch=batches[-1]))
    found = flat(nested.hypergradients(now, batches[-1], state))
    assert all(relative_error(found[path], value) < 1e-12 for path, value in expected.items())


def test_a_total_over_all_tensors_is_looked_through() -> None:
    problem = Problem(3, 5, perceptron)
    for optimizer in (
        hn.clip_by_global_norm(hn.adamw(lr=learned(0.05), weight_decay=learned(0.1)), max_norm=learned(0.1)),
        hn.prodigy(lr=learned(0.5), beta2=learned(0.9), eps=learned(0.1), weight_decay=learned(0.1), d0=1e-2),
    ):
        expected, found = flat(exact(problem, optimizer)), flat(carried(problem, optimizer))
        assert all(relative_error(found[path], value) < AGREE and float(value) != 0 for path, value in expected.items())


@pytest.mark.parametrize("curvature", ["none", "exact"])
def test_the_discount_goes_from_one_step_to_all(curvature: Any) -> None:
    """SGD without momentum: S' = -g + z (1 - lr H) S."""
    curve = torch.tensor([0.5, 2.0])
    nested = hn.Nested(hn.sgd(lr=learned(0.1)), horizon=hn.Discounted(0.7, curvature))
    params: Tensors = {"x": torch.tensor([1.0, -2.0])}
    state, expected = nested.init(params), torch.zeros(2)
    for _ in range(5):
        grad = curve * params["x"]
        expected = 0.7 * (1 - 0.1 * curve * (curvature == "exact")) * expected - grad
        hessian = (lambda along: {"x": curve * along["x"]}) if curvature == "exact" else None
        params, state = nested.step(params, {"x": grad}, state, learn=False, hessian=hessian)
    found = nested.hypergradients(params, {"x": torch.ones(2)}, state)["lr"]["model"]
    torch.testing.assert_close(found, expected.sum(), rtol=1e-14, atol=0)


def test_a_tiny_discount_is_nearly_one_step() -> None:
    params, loss = problem(0)
    optimizer = hn.adamw(lr=learned(0.05), weight_decay=learned(0.1, "tensor"))
    found = []
    for horizon in (hn.OneStep(), hn.Discounted(1e-13)):
        nested = hn.Nested(optimizer, horizon=horizon)
        now, state = params, nested.init(params)
        for _ in range(4):
            now, state = nested.step(now, gradients(loss, now), state, learn=False)
        found.append(flat(nested.hypergradients(now, gradients(loss, now), state)))
    assert all(relative_error(found[1][path], value) < 1e-11 for path, value in found[0].items())


def test_learning_with_a_horizon_is_another_trajectory_and_towers_have_one() -> None:
    params, loss = problem(1)
    ends = []
    for horizon in (hn.OneStep(), hn.Discounted(0.5), hn.Discounted(1.0)):
        tower = hn.sgd(lr=hn.learn(1e-3, by=hn.sgd(lr=hn.learn(1e-8, by=hn.sgd(lr=1e-16)))))
        nested = hn.Nested(tower, horizon=horizon)
        now, state = params, nested.init(params)
        for _ in range(5):
            now, state = nested.step(now, gradients(loss, now), state)
        ends.append([float(values["model"]) for values in nested.hypers(state).values()])
    assert len({end[0] for end in ends}) == len({end[1] for end in ends}) == 3


def test_what_is_not_finite_begins_a_new_horizon() -> None:
    params, loss = problem(2)
    nested = hn.Nested(hn.sgd(lr=learned(0.01), momentum=0.9), horizon=hn.Discounted(1.0))
    state = nested.init(params)
    params, state = nested.step(params, gradients(loss, params), state, learn=False)
    sensitivity = state["memory"]["bias"]["carried"]["lr"]["model"]["param"]
    sensitivity[0] = float("nan")
    assert not nested.hypergradients(params, gradients(loss, params), state)["lr"]["model"].isfinite()
    before = nested.hypers(state)["lr"]["model"]
    params, state = nested.step(params, gradients(loss, params), state)
    assert nested.hypers(state)["lr"]["model"] == before
    assert float(nested.nonfinite_counts(state)["lr"]) == 1
    assert nested.hypergradients(params, gradients(loss, params), state)["lr"]["model"].isfinite()


def test_a_tensor_without_gradient_keeps_its_sensitivities() -> None:
    params, loss = problem(3)
    nested = hn.Nested(hn.adamw(lr=learned(0.01)), horizon=hn.Discounted(0.9))
    state = nested.init(params)
    params, state = nested.step(params, gradients(loss, params), state)
    grads = {name: grad for name, grad in gradients(loss, params).items() if name != "bias"}
    _, after = nested.step(params, grads, state)
    old, new = (each["memory"]["bias"]["carried"]["lr"]["model"] for each in (state, after))
    assert torch.equal(old["param"], new["param"])
    assert torch.equal(old["state"]["exp_avg"], new["state"]["exp_avg"])


def model_and_data() -> tuple[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    return model, [(torch.randn(6, 3), torch.randn(6, 1)) for _ in range(8)]


def hyper_optimizer(model: torch.nn.Module, **how: Any) -> hn.HyperOptimizer:
    by = hn.adam(lr=1e-3)
    optimizer = hn.adamw(lr=hn.learn(0.05, by=by, per="tensor", via="log"), weight_decay=hn.learn(0.1, by=by))
    return hn.HyperOptimizer(model.named_parameters(), optimizer, **how)


def train(model: torch.nn.Module, opt: hn.HyperOptimizer, batches: Any) -> None:
    exact = opt._nested.horizon.curvature == "exact"
    for x, y in batches:

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> Any:
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            if not exact:
                loss.backward()
            return loss

        opt.step(closure)


HORIZONS = [hn.Discounted(0.9), hn.Discounted(1.0, curvature="exact")]


@pytest.mark.parametrize("horizon", HORIZONS, ids=str)
def test_the_optimizer_is_the_pure_engine(horizon: hn.Discounted) -> None:
    model, batches = model_and_data()
    opt = hyper_optimizer(model, horizon=horizon)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    functional = hn.functional(model)
    nested = hn.Nested(opt._choice, horizon=horizon)  # type: ignore[arg-type]
    state = nested.init(params)
    train(model, opt, batches)
    for x, y in batches:

        def loss(params: Tensors, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            return (functional(params, x) - y).square().mean()

        hessian = product(loss, params) if horizon.curvature == "exact" else None
        params, state = nested.step(params, gradients(loss, params), state, hessian=hessian)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), params[name], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(opt.hypers()["lr"][name], nested.hypers(state)["lr"][name], rtol=1e-11, atol=0)


@pytest.mark.parametrize("horizon", HORIZONS, ids=str)
def test_the_state_checkpoints_exactly(horizon: hn.Discounted) -> None:
    model, batches = model_and_data()
    opt = hyper_optimizer(model, horizon=horizon)
    train(model, opt, batches[:4])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    other, _ = model_and_data()
    resumed = hyper_optimizer(other, horizon=horizon)
    saved = torch.load(file)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    copied_model, copied = copy.deepcopy((model, opt))
    for each, optimizer in ((model, opt), (other, resumed), (copied_model, copied)):
        train(each, optimizer, batches[4:])
    for a, b, c in zip(model.parameters(), other.parameters(), copied_model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_what_does_not_go_together_is_refused() -> None:
    model, batches = model_and_data()
    before = copy.deepcopy(model.state_dict())
    for discount in (0, 1.5):
        with pytest.raises(ValueError, match=rf"discount={discount} must be in \(0, 1\], .* use hn\.OneStep\(\) for the last alone"):
            hn.Discounted(discount)
    with pytest.raises(ValueError, match=r"curvature='some' must be one of 'none', 'exact'"):
        hn.Discounted(1.0, "some")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"horizon=0.9 \(float\) must be hn.OneStep\(...\) or hn.Discounted\(...\)"):
        hyper_optimizer(model, horizon=0.9)
    with pytest.raises(ValueError, match="lr is learned per row, but curvature='exact' keeps a copy"):
        hn.Nested(hn.sgd(lr=learned(0.1, "row")), horizon=hn.Discounted(1.0, curvature="exact"))
    with pytest.raises(ValueError, match=r"discount=0.5 is not exact for lr learned per row, since muon is separable by tensor"):
        hn.Nested(hn.muon(lr=learned(0.1, "row")), horizon=hn.Discounted(0.5))
    with pytest.raises(ValueError, match=r"discount=0.5 is not exact for lr learned per tensor, since clip_by_global_norm"):
        hn.Nested(hn.clip_by_global_norm(hn.sgd(lr=learned(0.1, "tensor"))), horizon=hn.Discounted(0.5))
    opt = hyper_optimizer(model, horizon=HORIZONS[1])
    with pytest.raises(ValueError, match="closure=None, but curvature='exact' needs the loss"):
        opt.step()
    with pytest.raises(ValueError, match=r"closure returned 1\.0: .* it must return a tensor"):
        opt.step(lambda: 1.0)
    nested = hn.Nested(hn.sgd(lr=learned(0.1)))
    with pytest.raises(ValueError, match="but curvature='none': give products with the Hessian if it is 'exact', only"):
        nested.step({}, {}, {}, hessian=lambda along: along)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    train(model, opt, batches)


def test_a_hyper_that_one_step_does_not_feel_can_be_learned_with_a_horizon() -> None:
    params, loss = problem(4)
    optimizer = hn.rprop(etaminus=hn.learn(0.5, by=hn.sgd(lr=1e-3)))
    with pytest.raises(ValueError, match="derivative of rprop with respect to it is zero"):
        hn.Nested(optimizer)
    nested = hn.Nested(optimizer, horizon=hn.Discounted(1.0))
    now, state = params, nested.init(params)
    for step in range(6):
        grads = {name: grad * (-1) ** step for name, grad in gradients(loss, now).items()}  # signs that change
        now, state = nested.step(now, grads, state)
    assert float(nested.hypers(state)["etaminus"]["model"]) != 0.5
