"""Rules, the registry and combinators: what they accept, and what they say otherwise."""

import copy
import inspect
import pickle
import pydoc
from typing import Any

import pytest
import torch

import hyperopt_nested as hn
from ftp import ftp_rule


def test_the_registry_lists_and_finds() -> None:
    assert {"sgd", "adam", "adamw", "ftp"} <= set(hn.names())
    assert hn.get("sgd") is hn.sgd
    assert hn.get("ftp") is ftp_rule
    with pytest.raises(KeyError, match="did you mean adam"):
        hn.get("adamm")


def test_a_duplicate_is_refused_but_the_same_definition_may_run_again() -> None:
    def define() -> hn.typing.FunctionRule:
        @hn.rule
        def defined_twice(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1)) -> Any:
            return param - lr * grad, state

        return defined_twice

    define()
    again = define()
    assert hn.get("defined_twice") is again
    with pytest.raises(ValueError, match="name='defined_twice' is registered already"):
        hn.rules.register("defined_twice", hn.sgd)


def test_hypers_are_declared_never_inferred() -> None:
    def update(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1), beta: Any) -> Any:
        return param - lr * beta * grad, state

    def positional(param: Any, grad: Any, state: Any, lr: Any = hn.Positive(0.1)) -> Any:
        return param - lr * grad, state

    with pytest.raises(TypeError, match=r"parameter 'beta' has no default: declare its domain, such as beta=hn\.Positive"):
        hn.rule(update)
    with pytest.raises(TypeError, match=r"the hyper 'lr' must be keyword-only: put a `\*` before it"):
        hn.rule(positional)
    with pytest.raises(TypeError, match="init takes 'gamma', which the update does not"):
        hn.rule(lambda param, *, gamma: {})(lambda param, grad, state: (param, state))
    with pytest.raises(TypeError, match=r"optimizer=.adam. .str. must be an optimizer of this library"):
        hn.HyperOptimizer([torch.ones(2, requires_grad=True)], "adam")  # type: ignore[arg-type]


def test_a_rule_may_need_sums_over_all_tensors() -> None:
    def sums(param: Any, grad: Any, state: Any, *, power: int) -> Any:
        return torch.stack([grad.sum(), (param**power).sum()])

    @hn.rule(global_reduce=sums)
    def summed(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1), power: int = 2, reduced: Any) -> Any:
        return param - lr * reduced[0] / reduced[1], state

    params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    nested = hn.Nested(summed(0.5, power=3))
    new, _ = nested.step(params, {"a": torch.ones(2), "b": torch.tensor(4.0)}, nested.init(params))
    assert all(torch.equal(new[key], params[key] - 0.5 * 6 / 36) for key in params)
    with pytest.raises(TypeError, match="`global_reduce=` and the parameter `reduced` need each other"):
        hn.rule(lambda param, grad, state, *, reduced: (param, state))
    with pytest.raises(TypeError, match="global_reduce takes 'decay', which the update does not: add it there"):
        hn.rule(global_reduce=lambda param, grad, state, *, decay: grad)(lambda param, grad, state, *, reduced: (param, state))


def test_hypers_in_a_sum_are_learned_per_model_where_it_matters() -> None:
    by, params = hn.sgd(lr=0.1), {"a": torch.ones(2)}
    hn.Nested(hn.prodigy(lr=hn.learn(1.0, by), beta1=hn.learn(0.9, by, per="tensor"))).init(params)
    hn.Nested(hn.dadapt_adam(lr=hn.learn(1.0, by, per="tensor"))).init(params)  # the sum acts on the next step alone
    with pytest.raises(ValueError, match="lr enters the sum over all tensors that prodigy needs: learn it per 'model', with memory 'auto'"):
        hn.Nested(hn.prodigy(lr=hn.learn(1.0, by, per="tensor"))).init(params)


def test_calls_are_checked() -> None:
    with pytest.raises(TypeError, match="sgd has no argument 'learning_rate'; it has lr, momentum"):
        hn.sgd(learning_rate=0.1)
    with pytest.raises(TypeError, match="adam has no hyper 'radius'"):
        hn.adam().replace(radius=1.0)
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        hn.Nested(hn.sgd(nesterov=True)).init({"w": torch.ones(1)})


def test_project_is_checked() -> None:
    with pytest.raises(ValueError, match="has a hyper named 'radius' already"):
        hn.project(hn.project(hn.sgd(), onto=hn.mars, radius=1.0), onto=hn.linf, radius=1.0)
    with pytest.raises(ValueError, match="saturation='soft' must be one of"):
        hn.Nested(hn.project(hn.sgd(), saturation="soft")).init({"w": torch.ones(1)})
    with pytest.raises(TypeError, match="must be an optimizer of this library"):
        hn.project(hn.sgd)
    with pytest.raises(ValueError, match=r"radius=-1\.0 is outside"):
        hn.project(hn.sgd(), onto=hn.mars, radius=-1.0)


def test_a_learned_hyper_that_is_not_used_is_an_error_that_names_it() -> None:
    learn = hn.learn(0.5, by=hn.sgd())
    for optimizer, words in [
        (hn.sgd(dampening=learn), "dampening is learned, but sgd does not use it in the update of 'w'"),
        (hn.Optimizer(unused, {"lr": 0.1, "beta": learn}), "beta is learned, but unused does not use it"),
        (detached(lr=learn), "lr is learned, but detached does not use it"),
    ]:
        with pytest.raises(ValueError, match=words):
            hn.Nested(optimizer).init({"w": torch.ones(2)})


@hn.rule
def unused(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1), beta: Any = hn.UnitInterval(0.5)) -> Any:
    return param - lr * grad, state


@hn.rule
def detached(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1)) -> Any:
    return param - lr.detach() * grad, state


def test_optimizers_can_be_pickled_and_copied() -> None:
    optimizer = ftp_rule(hn.adam(lr=hn.learn(0.1, by=hn.sgd()), amsgrad=True), 0.5)
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert repr(other) == repr(optimizer)
        assert "max_exp_avg_sq" in other.rule.init(torch.ones(2), other.settings)["base"]


def test_rules_say_what_they_are() -> None:
    assert repr(hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.5), per="row"))).startswith("sgd(lr=learn(0.1, by=sgd(lr=0.5")
    assert str(hn.sgd.hypers["lr"]) == "NonNegative [0, inf)"
    assert hn.sgd.__doc__ is not None
    assert "torch.optim.SGD" in hn.sgd.__doc__


def test_a_rule_is_called_as_its_signature_says() -> None:
    signature = inspect.signature(hn.adamw)
    assert list(signature.parameters) == ["lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize"]
    assert [each.default for each in signature.parameters.values()] == [1e-3, 0.9, 0.999, 1e-8, 1e-2, False, False]
    assert signature.parameters["beta1"].annotation == float | torch.Tensor | hn.Learn
    assert signature.return_annotation is hn.Optimizer
    assert list(inspect.signature(hn.clip_by_norm).parameters) == ["optimizer", "max_norm"]
    shown = (
        "adamw(lr: float | torch.Tensor | hyperopt_nested.rule.Learn = 0.001, *," if torch.__version__ >= "2.12" else "adamw = <rule adamw>"
    )
    assert pydoc.plain(pydoc.render_doc(hn.adamw)).splitlines()[2].startswith(shown)
    assert hn.adamw.__name__ == "adamw"


def test_the_first_hyper_goes_by_position() -> None:
    assert repr(hn.sgd(0.1)) == repr(hn.sgd(lr=0.1))
    assert repr(hn.sgd(hn.learn(1e-3, hn.sgd(1e-5)))) == repr(hn.sgd(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-5))))
    assert repr(hn.clip_by_norm(hn.sgd(), 2.0)) == repr(hn.clip_by_norm(hn.sgd(), max_norm=2.0))
    assert hn.project(hn.sgd(), hn.learn(1.0, hn.sgd())).learned.keys() == {"radius"}


def test_a_bijection_of_ones_own() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return (x / (1 + x.abs()) + 1) / 2

    def inverse(value: torch.Tensor) -> torch.Tensor:
        return (2 * value - 1) / (1 - (2 * value - 1).abs())

    softsign = hn.Bijection("softsign", forward, inverse, lambda _: (-1e6, 1e6), interval=True)
    nested = hn.Nested(hn.adam(beta1=hn.learn(0.9, hn.sgd(0.1), via=softsign)))
    params = {"w": torch.ones(2)}
    state = nested.init(params)
    for grad in (1.0, -1.0, 2.0):
        params, state = nested.step(params, {"w": torch.full((2,), grad)}, state)
    value = float(nested.hypers(state)["beta1"]["model"])
    assert 0 < value < 1
    assert value != 0.9
