"""Domains: what they refuse, and that a learned value never leaves one."""

import math
from typing import Any

import pytest
import torch
from cases import SQUARE, TANH
from hypothesis import given
from hypothesis import strategies as st

import hyperopt_nested as hn
from hyperopt_nested.domains import bijection

DOMAINS = {
    "real": hn.Real(0.5),
    "positive": hn.Positive(0.5),
    "nonnegative": hn.NonNegative(0.5),
    "unit": hn.UnitInterval(0.5),
    "interval": hn.Interval(0.5, -1.0, 3.0),
}
VIAS = [("real", None), *((d, v) for d in ("positive", "nonnegative") for v in (None, "log", "softplus", SQUARE))]
VIAS += [(d, v) for d in ("unit", "interval") for v in (None, "logit", TANH)]
anything = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e308, -1e308, 1e-320]))


def rule_with(hyper: hn.typing.Hyper) -> hn.typing.FunctionRule:
    @hn.rule(separable="element")
    def shifted(param: Any, grad: Any, state: Any, *, value: Any = hyper) -> Any:
        return param - value * grad, state

    return shifted


def inside(hyper: hn.typing.Hyper, value: float) -> bool:
    above = value > hyper.lower if hyper.open_lower else value >= hyper.lower
    below = value < hyper.upper if hyper.open_upper else value <= hyper.upper
    return above and below and math.isfinite(value)


@pytest.mark.parametrize("per", ["model", "element"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("domain", "via"), VIAS)
@given(grads=st.lists(anything, min_size=1, max_size=4), learner=st.sampled_from(["sgd", "adam"]))
def test_a_learned_value_never_leaves_its_domain(domain: str, via: Any, dtype: Any, per: Any, grads: list[float], learner: str) -> None:
    hyper = DOMAINS[domain]
    nested = hn.Nested(rule_with(hyper)(value=hn.learn(0.5, by=hn.get(learner)(lr=0.3), per=per, via=via)))
    params = {"w": torch.ones(2, dtype=dtype)}
    state = nested.init(params)
    for grad in [1.0, *grads]:
        _, state = nested.step(params, {"w": torch.tensor([grad, 1.0], dtype=dtype)}, state)
        for value in next(iter(nested.hypers(state)["value"].values())).flatten().tolist():
            assert inside(hyper, value), value


@pytest.mark.parametrize(("domain", "via"), [pair for pair in VIAS if pair[1]])
@given(fraction=st.floats(0.01, 0.99))
def test_a_bijection_goes_there_and_back(domain: str, via: Any, fraction: float) -> None:
    via = bijection("via", via)
    hyper = DOMAINS[domain]
    value = torch.tensor(hyper.lower + fraction * (min(hyper.upper, 10.0) - hyper.lower))
    raw = hyper.to_unconstrained(value, via)
    torch.testing.assert_close(hyper.to_value(raw, via), value, rtol=1e-12, atol=0)
    assert torch.equal(hyper.confine(raw, via), raw)
    assert torch.equal(hyper.within(raw, via, None, None), raw)


def test_bounds_hold_and_leave_what_is_inside_alone() -> None:
    raw = torch.tensor([-3.0, 0.1, 3.0])
    hyper = hn.Positive(1.0)
    log = bijection("via", "log")
    bounded = hyper.to_value(hyper.within(raw, log, torch.tensor(0.5), torch.tensor(2.0)), log)
    torch.testing.assert_close(bounded, torch.tensor([0.5, math.exp(0.1), 2.0]))
    assert hyper.within(raw, log, torch.tensor(0.5), torch.tensor(2.0))[1] == raw[1]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: hn.sgd(lr=-0.1), ValueError, r"sgd: lr=-0\.1 is outside its domain NonNegative \[0, inf\)"),
        (lambda: hn.adam(beta1=1.0), ValueError, r"beta1=1\.0 is outside its domain UnitInterval \[0, 1\)"),
        (lambda: hn.adam(lr=math.nan), ValueError, "lr=nan"),
        (lambda: hn.adam(lr="fast"), TypeError, "lr='fast' .* must be a number, or learn"),
        (lambda: hn.adam(lr=True), TypeError, "lr=True"),
        (lambda: hn.sgd(lr=hn.learn(-1.0, by=hn.sgd())), ValueError, r"lr=-1\.0 is outside"),
        (lambda: hn.sgd(lr=hn.learn(0.0, by=hn.sgd(), via="log")), ValueError, "which via='log' never reaches"),
        (lambda: hn.sgd(lr=hn.learn(0.1, by=hn.sgd(), via=TANH)), ValueError, "via='tanh' does not map onto NonNegative"),
        (lambda: hn.Positive(1.0, via="exp"), ValueError, "via='exp' is no known bijection"),
        (lambda: hn.Interval(0.5, 1.0, 0.0), ValueError, "must be in order"),
        (lambda: hn.learn(0.1, by=torch.optim.SGD), TypeError, "must be an optimizer of this library"),
        (lambda: hn.learn(0.1, by=hn.sgd(), per="layer"), ValueError, "per='layer' must be"),
        (lambda: hn.learn(0.1, by=hn.sgd(), bounds=(1.0, 0.0)), ValueError, "out of order"),
    ],
)
def test_bad_values_are_named(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
