"""Many runs as one batched program are the runs one by one."""

from typing import Any

import pytest
import torch
from cases import EXACT, gradients, problem, relative_error

import hyperopt_nested as hn

STARTS = {"lr": torch.tensor([0.02, 0.1, 0.3], dtype=torch.float64), "beta1": torch.tensor([0.5, 0.8, 0.9], dtype=torch.float64)}


def optimizer(**start: float) -> hn.Optimizer:
    by = hn.sgd(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-5)))
    values = {"lr": 0.1, "beta1": 0.9, **start}
    return hn.adam(lr=hn.learn(values["lr"], by=by), beta1=hn.learn(values["beta1"], by=by, per="tensor"), eps=0.1)


ONE_START = {"lr": STARTS["lr"]}


@pytest.mark.parametrize(("starts", "batched_params"), [(STARTS, False), (STARTS, True), (ONE_START, False), (ONE_START, True), ({}, True)])
def test_a_sweep_is_its_runs(starts: dict[str, torch.Tensor], batched_params: bool) -> None:
    params, loss = problem(3)
    factors = torch.tensor([1.0, 0.5, -1.0]) if batched_params else torch.ones(3)
    many = {name: torch.stack([factor * p for factor in factors]) for name, p in params.items()} if batched_params else params
    found = hn.sweep(
        optimizer(), many, [1.0, 2.0, 0.5, 1.0], lambda p, batch: batch * loss(p), starts=starts, batched_params=batched_params
    )
    assert found.losses.shape == (4, 3)
    for run, factor in enumerate(factors):
        nested = hn.Nested(optimizer(**{key: float(value[run]) for key, value in starts.items()}))
        now: Any = {name: factor * p for name, p in params.items()}
        st = nested.init(now)
        for step, scale in enumerate([1.0, 2.0, 0.5, 1.0]):
            assert relative_error(found.losses[step, run], scale * loss(now)) < EXACT
            now, st = nested.step(now, {name: scale * grad for name, grad in gradients(loss, now).items()}, st)
            for path, by_key in nested.hypers(st).items():
                for key, value in by_key.items():
                    assert relative_error(found.hypers[path][key][step, run], value) < EXACT, (path, key)
        for name, p in now.items():
            assert relative_error(found.params[name][run], p) < EXACT


def test_nothing_happens_in_no_steps() -> None:
    params, loss = problem(0)
    found = hn.sweep(optimizer(), params, [], lambda p, batch: loss(p), starts=STARTS)
    assert found.losses.shape == (0, 3)
    assert found.hypers == {}
    assert torch.equal(found.params["weight"][2], params["weight"])


def test_runs_must_be_counted_alike() -> None:
    params, loss = problem(0)
    for how, words in (
        ({}, "nothing differs between runs: give starts"),
        ({"starts": {"lr": torch.ones(2), "beta1": torch.ones(3)}}, r"\"starts\['lr'\]\": 2"),
        ({"starts": {"momentum": torch.ones(2)}}, "start names 'momentum', which is not learned"),
    ):
        with pytest.raises(ValueError, match=words):
            hn.sweep(optimizer(), params, [1.0], lambda p, batch: loss(p), **how)  # type: ignore[arg-type]
