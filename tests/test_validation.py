"""Learning from a validation loss: steps learn nothing, hyper steps move the hypers alone."""

import copy
from typing import Any

import pytest
import torch
from cases import DIFFERENCES, EXACT, gradients, problem, relative_error, replaced

import hyperopt_nested as hn


def optimizer(by: hn.Optimizer, per: Any = "tensor") -> hn.Optimizer:
    return hn.adam(lr=hn.learn(0.1, by=by, per=per), weight_decay=hn.learn(0.2, by=by), eps=0.1)


@pytest.mark.parametrize("memory", ["auto", "reverse"])
@pytest.mark.parametrize("per", ["model", "tensor", "row", "element"])
def test_a_hyper_step_descends_the_validation_loss_as_a_function_of_the_hypers(per: Any, memory: Any) -> None:
    """A hyper step of SGD moves each hyper by its rate times the derivative of the validation loss after the last update."""
    params, loss = problem(1)
    _, validation = problem(2)
    nested = hn.Nested(optimizer(hn.sgd(lr=1e-3), per), horizon=hn.OneStep(memory))
    before = nested.init(params)
    for _ in range(3):
        previous, grads = params, gradients(loss, params)
        last = before
        params, before = nested.step(params, grads, before, learn=False)
    after = nested.hyper_step(params, gradients(validation, params), before)
    for key in ("lr", "weight_decay"):
        for name, raw in before["hypers"][key].items():
            assert torch.equal(raw, last["hypers"][key][name])

            def moved(value: torch.Tensor, path: tuple[str, ...] = ("hypers", key, name)) -> torch.Tensor:
                return validation(nested.step(previous, grads, replaced(last, path, value), learn=False)[0])

            expected = hn.testing.finite_difference(moved, raw)
            found = (raw - after["hypers"][key][name]) / 1e-3
            assert relative_error(found, expected.value, 1e-2) < DIFFERENCES, (key, name)
    assert after["rule"] is before["rule"]
    assert after["memory"] is before["memory"]


def test_the_optimizer_does_what_the_engine_does() -> None:
    start, loss = problem(3)
    _, validation = problem(4)
    params = {name: torch.nn.Parameter(p.clone()) for name, p in start.items()}
    opt = hn.HyperOptimizer(params.items(), optimizer(hn.adam(lr=0.01)), learn_from="validation")
    nested = hn.Nested(optimizer(hn.adam(lr=0.01)))
    now, st = start, nested.init(start)
    for step in range(6):
        opt.zero_grad()
        loss(params).backward()
        opt.step()
        now, st = nested.step(now, gradients(loss, now), st, learn=False)
        for _ in range(step % 3):  # none, one, or several
            opt.zero_grad()
            validation(params).backward()
            opt.hyper_step()
            st = nested.hyper_step(now, gradients(validation, now), st)
        assert all(relative_error(params[name].detach(), now[name]) < EXACT for name in now)
        found, expected = opt.hypers(), nested.hypers(st)
        assert all(relative_error(found["lr"][name], value) < EXACT for name, value in expected["lr"].items())
        assert relative_error(found["weight_decay"]["group 0"], expected["weight_decay"]["model"]) < EXACT
    assert float((found["lr"]["weight"] - 0.1).abs()) > 1e-3


def test_without_hyper_steps_nothing_is_learned() -> None:
    start, loss = problem(3)
    trained = []
    for opt in (
        lambda params: hn.HyperOptimizer(params, optimizer(hn.adam(lr=0.5)), learn_from="validation"),
        lambda params: hn.HyperOptimizer(params, hn.adam(lr=0.1, weight_decay=0.2, eps=0.1)),
    ):
        params = {name: torch.nn.Parameter(p.clone()) for name, p in start.items()}
        made = opt(params.items())
        for _ in range(5):
            made.zero_grad()
            loss(params).backward()
            made.step()
        trained.append(params)
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in start)


def test_it_survives_a_copy_and_a_checkpoint() -> None:
    start, loss = problem(5)
    params = {name: torch.nn.Parameter(p.clone()) for name, p in start.items()}
    opt = hn.HyperOptimizer(params.items(), optimizer(hn.sgd(lr=0.1)), learn_from="validation")
    loss(params).backward()
    opt.step()
    other = hn.HyperOptimizer(params.items(), optimizer(hn.sgd(lr=0.1)), learn_from="validation")
    other.load_state_dict(opt.state_dict())
    opt.hyper_step()
    other.hyper_step()
    assert torch.equal(opt.hypers()["lr"]["weight"], other.hypers()["lr"]["weight"])
    copied = copy.deepcopy(opt)
    for mine, its in zip(opt.param_groups[0]["params"], copied.param_groups[0]["params"], strict=True):
        its.grad = mine.grad.clone()  # a copy of a parameter has none
    opt.hyper_step()
    copied.hyper_step()
    assert repr(copied.hypers()) == repr(opt.hypers()) != repr(other.hypers())


def test_what_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="learn_from='test' must be 'training' or 'validation'"):
        hn.HyperOptimizer([weight], optimizer(hn.sgd()), learn_from="test")  # type: ignore[arg-type]
    opt = hn.HyperOptimizer([weight], optimizer(hn.sgd()))
    with pytest.raises(RuntimeError, match="make it with learn_from='validation' to use this"):
        opt.hyper_step()
