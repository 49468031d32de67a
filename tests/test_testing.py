"""The kit under test: it accepts what is right, catches every mutant, and says what a reader needs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import MUTANTS, reference, right

import hyperopt_nested as hn
from ftp import ftp_rule
from hyperopt_nested import testing
from hyperopt_nested.testing import check, programs
from hyperopt_nested.testing.hypergradients import PERS
from hyperopt_nested.testing.subject import subject

EXAMPLES = 10  # a third of what check_rule has by default


def test_a_right_rule_passes_and_the_report_says_what_was_verified() -> None:
    report = testing.check_rule(right, examples=EXAMPLES, reference=reference)
    assert set(report.verified) == {(hyper, per) for hyper in ("lr", "beta") for per in ("model", "tensor", "row", "element")}
    assert max(report.verified.values()) < 1e-6
    assert "right: every law holds" in str(report)
    assert "beta: hypergradient verified, largest relative error per model" in str(report)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda rule: rule.name)
def test_every_mutant_is_caught(mutant: hn.typing.FunctionRule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_SHRINKS", 20)  # of these, examples need not be small
    monkeypatch.setattr(check, "_EXAMPLES", 60)  # and what none of so many verifies, none of more does
    monkeypatch.setattr(check, "_ROUNDS", 4)
    words, needs_reference = MUTANTS[mutant]
    with pytest.raises(testing.RuleError) as caught:
        testing.check_rule(mutant, examples=EXAMPLES, reference=reference if needs_reference else None)
    message = str(caught.value)
    assert message.startswith(f"{mutant.name}: ")
    assert words in message, message
    if "could not be verified" in message:
        return
    namespace: dict[str, Any] = {mutant.name: mutant}
    example = message.split("To see it again:\n\n")[1]
    if not needs_reference:
        with pytest.raises(testing.RuleError):
            exec(example, namespace)


@hn.rule(hn.rules.zeros("second", "largest"), separable="element")
def forgets_its_maximum(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1), eps: Any = hn.Positive(1e-8)) -> Any:
    """AMSGrad without a first moment, which keeps the maximum only where gradients are positive."""
    second = 0.999 * state["second"] + 0.001 * grad * grad
    kept = torch.maximum(hn.rules.kink(state["largest"], second), second)
    largest = torch.where(hn.rules.kink(grad) > 0, kept, second)
    return param - lr * grad / (hn.rules.safe_sqrt(largest) + eps), {"second": second, "largest": largest}


class Maximal(torch.optim.Optimizer):
    """What `forgets_its_maximum` should do."""

    def __init__(self, params: Any, hypers: dict[str, float]) -> None:
        super().__init__(params, hypers)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["second"] = 0.999 * state.get("second", 0.0) + 0.001 * p.grad.square()
                state["largest"] = torch.maximum(state.get("largest", torch.zeros_like(p)), state["second"])
                p.sub_(group["lr"] * p.grad / (state["largest"].sqrt() + group["eps"]))


def test_a_maximum_that_is_forgotten_in_one_branch_is_caught_by_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_SHRINKS", 20)
    with pytest.raises(testing.RuleError, match="differs from the reference"):
        testing.check_rule(forgets_its_maximum, examples=EXAMPLES, reference=Maximal)


def _whole(param: torch.Tensor) -> hn.typing.State:
    count = torch.zeros((), dtype=torch.int64, device=param.device)
    return {"count": count, "seen": torch.zeros_like(param, dtype=torch.bool), "average": hn.rules.zeros_like(param)}


@hn.rule(_whole, separable="element")
def integers_and_masks(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1), beta: Any = hn.UnitInterval(0.9)) -> Any:
    count = state["count"] + 1
    average = torch.where(state["seen"], beta * state["average"], 0.0) + (1 - beta) * grad
    new = param - lr * average / (1 - beta**count) * torch.where(count % 3 == 0, 0.5, 1.0)
    return new, {"count": count, "seen": state["seen"] | (grad != 0), "average": average}


def test_integers_and_masks_as_state_pass() -> None:
    assert max(testing.check_rule(integers_and_masks, examples=EXAMPLES).verified.values()) < 1e-6


BATCHES = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 1.0], [-1.0, 1.0, 2.0], [0.3, 0.2, 0.1], [1.0, 1.0, -1.0]])


def _linear(params: Any, batch: torch.Tensor, hypers: Any = None) -> torch.Tensor:
    return (params["w"] * batch).sum()


def _after_all(beta: torch.Tensor) -> torch.Tensor:
    """The last batch's loss, after a step on each of the others."""
    params, state = {"w": torch.zeros(3)}, integers_and_masks.init(torch.zeros(3), {})
    for batch in BATCHES[:-1]:
        params["w"], state = integers_and_masks.update(params["w"], batch, state, {"lr": torch.tensor(0.1), "beta": beta})
    return _linear(params, BATCHES[-1])


@pytest.mark.parametrize("how", [{}, {"memory": "sqrt"}, {"method": "forward"}, {"horizon": 4, "memory": 3}, hn.Discounted(1.0)], ids=str)
def test_integers_and_masks_are_carried_from_step_to_step(how: Any) -> None:
    start, optimizer = {"w": torch.zeros(3)}, integers_and_masks(lr=0.1, beta=hn.learn(0.8, by=hn.sgd(), via="projection"))
    if isinstance(how, hn.Discounted):
        nested = hn.Nested(optimizer, horizon=how)
        params, state = start, nested.init(start)
        for batch in BATCHES[:-1]:
            params, state = nested.step(params, {"w": batch}, state, learn=False)
        found = nested.hypergradients(params, {"w": BATCHES[-1]}, state)
        assert (state["rule"]["w"]["count"].dtype, state["rule"]["w"]["seen"].dtype) == (torch.int64, torch.bool)
    else:
        found = hn.hypergradient(optimizer, start, BATCHES[:-1], _linear, _linear, outer_batch=BATCHES[-1], **how)
    expected = testing.finite_difference(_after_all, torch.tensor(0.8), scale=0.1)
    assert abs(float(expected.value)) > 0.01
    assert expected.agrees(found["beta"]["model"])


@hn.rule(hn.rules.zeros("average"), separable="element")
def plain_average(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1), nesterov: bool = False) -> Any:
    average = 0.5 * state["average"] + grad
    return param - lr * (average + grad if nesterov else average), {"average": average}


class Broken(hn.HyperOptimizer):
    """An optimizer whose backend "fused" is the reference, but for one thing that goes wrong where one number is learned."""

    wrong: Any = None

    def __init__(self, params: Any, optimizer: Any, *, backend: Any) -> None:
        super().__init__(params, optimizer, backend="reference")
        self.breaks = backend == "fused" and "lr" in optimizer.learned and optimizer.learned["lr"].per == "row"

    def step(self, closure: Any = None, *, loss: Any = None) -> Any:
        super().step(loss=loss)
        if self.breaks:
            type(self).wrong(self)


def _off(opt: Any, path: str) -> None:
    for param in opt.param_groups[0]["params"]:
        leaf = param.data if path == "parameter" else opt.state[param][path]
        leaf.view(-1)[:1] += 1e-6


def _fails(opt: Any) -> None:
    raise TypeError("must be Tensor, not float")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda opt: _off(opt, "parameter"), "backend='fused' after step 1: parameter 'a' differs from 'reference' by up to 1e-06: "),
        (
            lambda opt: _off(opt, "rule.average"),
            "backend='fused' after step 1: state 'rule.average' of 'a' differs from 'reference' by up to",
        ),
        (lambda opt: _off(opt, "hypers.lr"), "backend='fused' after step 1: state 'hypers.lr' of 'a' differs from 'reference' by up to"),
        (lambda opt: opt.state[opt.param_groups[0]["params"][0]].pop("rule.average"), "state 'rule.average' of 'a' is there with one of"),
        (_fails, "backend='fused' fails in step 1: TypeError: must be Tensor, not float"),
    ],
    ids=["parameter", "state", "learned value", "lost state", "error"],
)
def test_a_backend_that_deviates_is_caught(wrong: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "HyperOptimizer", Broken)
    monkeypatch.setattr(Broken, "wrong", staticmethod(wrong))
    monkeypatch.setattr(programs, "_SHAPES", ((4, 3), (5,)))
    assert not programs.check_backends(subject(plain_average), "foreach").refused
    with pytest.raises(testing.RuleError) as caught:
        programs.check_backends(subject(plain_average), "fused")
    message = str(caught.value)
    assert words in message
    assert "(lr learned per row, tensors of shape (4, 3))" in message
    example = message.split("To see it again:\n\n")[1]
    assert "plain_average().replace(lr=hn.learn(0.1, by=hn.sgd(lr=1e-06), per='row')), 'fused', {'a': (4, 3)}" in example
    with pytest.raises(testing.RuleError):
        exec(example, {"hn": hn, "plain_average": plain_average})


def test_what_a_backend_does_and_does_not_serve_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_SHAPES", ((4, 3), (5,)))
    report = testing.check_rule(plain_average, examples=5, backends=("foreach",))
    found = report.backends["foreach"]
    assert {"as declared", "values inside the domain", "nesterov=True", *(f"lr learned per {per}" for per in PERS)} < found.largest.keys()
    assert max(found.largest.values()) < 1e-12
    assert not found.refused
    assert "backend 'foreach': agrees with 'reference' in 8 settings, largest relative difference" in str(report)
    refused = testing.check_rule("clip_by_global_norm", examples=5, backends=("foreach",))
    assert not refused.backends["foreach"].largest
    assert "backend 'foreach': not served: backend='foreach' cannot be " in str(refused)
    for names in ("foreach", ("reference",), ("auto",), ("fussed",)):
        with pytest.raises(ValueError, match=r"backends=.* must be a sequence of '\w+', '\w+', '\w+'"):
            testing.check_rule(plain_average, backends=names)


def test_options_that_a_rule_refuses_are_left_out_of_the_comparison_with_a_reference() -> None:
    """Nesterov's momentum refuses dampening, which is drawn together with it."""
    with pytest.raises(testing.RuleError, match="differs from the reference"):
        testing.check_rule(hn.sgd, examples=20, reference=lambda params, hypers: torch.optim.SGD(params, lr=hypers["lr"]))


def test_a_failure_names_the_rule_the_hyper_the_shape_and_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from mutants import detached_correction

    monkeypatch.setattr(check, "_SHRINKS", 60)
    with pytest.raises(testing.RuleError) as caught:
        testing.check_rule(detached_correction, examples=EXAMPLES)
    first = str(caught.value).splitlines()[0]
    assert first.startswith("detached_correction: the hypergradient of beta is ")
    assert " but by finite differences " in first
    assert "tensors of shape (1,)" in first
    assert len(str(caught.value).splitlines()) < 25


@hn.rule(separable="element", nondifferentiable=("scale",))
def signed(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1), scale: Any = hn.Positive(1.0)) -> Any:
    return param - lr * hn.rules.kink(scale * grad).sign(), state


@hn.rule(separable="element")
def rippled(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1)) -> Any:
    """Where the gradient is positive, kinks are so close together that differences meet one in every other example."""
    ripples = torch.where(grad > 0, torch.sin(1e12 * lr), 1.0)
    return param - lr * grad * hn.rules.kink(ripples).sign().abs().to(grad.dtype), state


def test_flat_hypers_are_verified_to_be_flat_and_kinks_are_counted() -> None:
    report = testing.check_rule(signed, examples=EXAMPLES)
    assert report.nondifferentiable == ("scale",)
    assert "scale: nondifferentiable" in str(report)
    with pytest.raises(ValueError, match="scale is learned, but the derivative of signed with respect to it is zero"):
        hn.Nested(signed(scale=hn.learn(1.0, by=hn.sgd())))
    left_out = testing.check_rule(rippled, examples=EXAMPLES)
    assert left_out.kinks > 0
    assert f"{left_out.kinks} derivatives beside a kink were left out" in str(left_out)


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a rule, a combinator, an optimizer, or a registered name"):
        testing.check_rule(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no rule is registered as 'right_'; did you mean right"):
        testing.check_rule("right_")


def test_kinks_are_collected_only_inside_the_context() -> None:
    x = torch.tensor([1.0, -2.0])
    assert hn.rules.kink(x) is x
    with hn.rules.watch_kinks() as outer:
        hn.rules.kink(x, 1.0)
        with hn.rules.watch_kinks() as inner:
            hn.rules.kink(x)
    hn.rules.kink(x)
    assert [leaf.tolist() for leaf in outer] == [[0.0, -3.0]]
    assert [leaf.tolist() for leaf in inner] == [[1.0, -2.0]]


FUNCTIONS = [(torch.sin, torch.cos), (torch.exp, torch.exp), (torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x))]


@pytest.mark.parametrize(("function", "derivative"), FUNCTIONS)
@given(st.floats(-3, 3), st.floats(1e-3, 1e3))
def test_the_estimated_error_bounds_the_error(function: Any, derivative: Any, x: float, factor: float) -> None:
    """Within the factor of four that `agrees` allows; and the estimate is not a lax one."""
    at = torch.tensor([x, x / 2])
    found = testing.finite_difference(lambda y: factor * function(y).sum(), at, scale=1.0)
    expected = factor * derivative(at)
    assert bool(((found.value - expected).abs() <= 4 * found.error).all())
    assert bool((found.error < 1e-9 * factor * max(1.0, math.exp(abs(x)))).all())
    assert found.agrees(expected)
    assert not found.agrees(expected + 1e-4 * factor)


def test_differences_of_noise_say_so() -> None:
    at = torch.ones(1)
    found = testing.finite_difference(lambda x: (1e8 + 1e-6 * x).sum(), at)
    assert float(found.error) > 1e-9
    assert bool((found.value - 1e-6).abs() <= 4 * found.error)
    assert not testing.finite_difference(torch.abs, torch.zeros(()), scale=1.0).error.isnan()


VALUES = torch.linspace(-2, 2, 24, dtype=torch.float64).sin().mul(1e3).sin().reshape(4, 3, 2)
ADAM = {"lr": 0.1, "beta1": 0.6, "beta2": 0.7, "eps": 0.2}


def _after(optimizer: hn.Optimizer, hyper: str, value: torch.Tensor) -> torch.Tensor:
    """A smooth loss of the tensors after the third update, of which the last has another value of the hyper."""
    start, *grads = VALUES
    params = {"w": start}
    nested = hn.Nested(optimizer)
    state = nested.init(params)
    for grad in grads[:-1]:
        params, state = nested.step(params, {"w": grad}, state)
    new, _ = nested.step(params, {"w": grads[-1]}, state, {"w": {hyper: value}})
    return torch.exp(3 * new["w"]).mean()


@pytest.mark.parametrize("hyper", [*ADAM, "radius"])
def test_the_order_of_central_differences_is_two(hyper: str) -> None:
    """Their error falls with the square of the step, so the comparison is one with the derivative and not with rounding."""
    projected = ftp_rule(hn.sgd(lr=0.5), saturation="exact").replace(radius=0.3)
    optimizer, value = (projected, 0.3) if hyper == "radius" else (hn.adam(**ADAM), ADAM[hyper])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return _after(optimizer, hyper, x)

    exact = torch.func.grad(loss)(torch.tensor(value))
    sizes = torch.tensor([0.16, 0.08, 0.04, 0.02]) * min(value, 1 - value)
    errors = torch.stack([(testing.central_difference(loss, torch.tensor(value), size) - exact).abs() for size in sizes])
    slope = np.polyfit(sizes.log().numpy(), errors.log().numpy(), 1)[0]
    assert slope == pytest.approx(2, abs=0.2)
    assert float(abs(testing.finite_difference(loss, torch.tensor(value)).value - exact) / abs(exact)) < 1e-9


@given(st.data())
def test_strategies_draw_what_they_say(data: st.DataObject) -> None:
    shapes = data.draw(testing.shape_trees())
    params = data.draw(testing.trees(shapes, torch.float32))
    assert {name: tuple(p.shape) for name, p in params.items()} == shapes
    assert all(p.dtype == torch.float32 for p in params.values())
    for hyper in (hn.Real(-0.5), hn.Positive(1e-8), hn.NonNegative(0.0), hn.UnitInterval(0.9), hn.Interval(3.0, 2.0, 5.0)):
        hyper.check("drawn", data.draw(testing.hyper_values(hyper)))
    case = data.draw(testing.cases(right.hypers))
    again = eval(repr(case), {"hn": hn, "torch": torch})
    assert repr(again) == repr(case)
