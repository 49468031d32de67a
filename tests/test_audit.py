"""The audit: online hypergradients against exact ones."""

from io import StringIO
from typing import Any

import pytest
import torch
from cases import Tensors
from rich.console import Console
from test_unrolled import Problem, learned, perceptron

import hyperopt_nested as hn


def audited(optimizer: hn.Optimizer, steps: int = 12, **how: Any) -> hn.typing.Audit:
    problem = Problem(0, steps, perceptron)
    return hn.audit(optimizer, problem.params, problem.batches, problem.loss, problem.outer, outer_batch=problem.held_out, **how)


def adamw(per: Any = "tensor") -> hn.Optimizer:
    return hn.adamw(lr=hn.learn(0.02, by=hn.sgd(), per=per, via="log"), weight_decay=learned(0.1, per))


def test_with_exact_curvature_and_no_discount_there_is_no_bias() -> None:
    for row in audited(adamw(), horizons=[hn.Discounted(1.0, curvature="exact")]).rows:
        assert (row.cosine, row.magnitude, row.sign) == pytest.approx((1, 1, 1), rel=1e-9)


@pytest.mark.parametrize("per", ["model", "tensor", "row", "element"])
def test_after_one_step_there_is_no_bias_and_later_there_is(per: Any) -> None:
    rows = audited(adamw(per)).rows
    assert {row.estimate for row in rows} == {"one step", "discount 0.9", "discount 0.99", "discount 1"}
    for row in rows:
        if row.steps == 1:
            assert (row.cosine, row.magnitude, row.sign) == pytest.approx((1, 1, 1), rel=1e-9)
    assert {row.steps for row in rows} == {1, 2, 5, 10, 12}
    assert all(row.magnitude < 0.9 for row in rows if row.steps == 12 and row.estimate == "one step" and row.hyper == "lr")


def test_the_numbers_are_those_of_the_definition() -> None:
    """SGD on 0.5 a x^2: x_K = (1 - lr a)^K x_0; one step sees a K-th of the derivative."""
    curve = torch.tensor([1.0, 0.1])

    def loss(params: Tensors, batch: Any, hypers: Any = None) -> torch.Tensor:
        return 0.5 * (curve * params["x"].square()).sum()

    optimizer = hn.sgd(lr=learned(0.1, "element"))
    (row,) = hn.audit(optimizer, {"x": torch.ones(2)}, range(8), loss, loss, horizons=[hn.OneStep()], steps=[8]).rows
    assert (row.hyper, row.steps, row.horizon) == ("lr", 8, hn.OneStep())
    assert (row.cosine, row.magnitude, row.sign) == pytest.approx((1, 1 / 8, 1), rel=1e-12)


def test_it_prints_and_draws() -> None:
    found = audited(adamw(), steps=5)
    console = Console(width=120, file=StringIO())
    console.print(found.table())
    assert "one step" in console.file.getvalue()  # type: ignore[attr-defined]
    figure = found.figure()
    assert len(figure.axes) == 4
    assert len(figure.axes[0].lines) == 4


def test_bad_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"steps=\[13\] must be between 1 and 12, the number of batches"):
        audit_at([13])
    with pytest.raises(ValueError, match=r"steps=\[0\] must be between"):
        audit_at([0])


def audit_at(steps: list[int]) -> hn.typing.Audit:
    problem = Problem(0, 12, perceptron)
    return hn.audit(adamw(), problem.params, problem.batches, problem.loss, problem.outer, outer_batch=problem.held_out, steps=steps)
