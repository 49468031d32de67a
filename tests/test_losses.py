"""What users' losses may be: they return a loss, or more; draw random numbers; keep state; leave tensors out. The same in every method."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import hyperopt_nested as hn

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.ones(8, 1, dtype=torch.float64)
START = {"w": torch.full((1, 3), 0.5, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
METHODS = ["reverse", "forward", "implicit", "audit", "sweep"]


def good(params: Any, batch: Any, hypers: Any = None) -> Tensor:
    return (X @ params["w"].T + params["b"] - Y).square().mean()


def rate() -> hn.Optimizer:
    return hn.sgd(lr=hn.learn(0.1, by=hn.sgd()), weight_decay=0.1)


def decay() -> hn.Optimizer:
    return hn.sgd(lr=0.1, weight_decay=hn.learn(0.1, by=hn.sgd()))


def at_rest() -> Any:
    params = START
    for _ in range(3000):
        grads = torch.func.grad(good)(params, None)
        params = {name: p - 0.1 * (grads[name] + 0.1 * p) for name, p in params.items()}
    return params


REST = at_rest()


def call(method: str, train: Any, outer: Any = good, steps: int = 3, **how: Any) -> Any:
    if method == "audit":
        return hn.audit(rate(), START, range(steps), train, outer, horizons=[hn.OneStep()], **how)
    if method == "sweep":
        return hn.sweep(rate(), START, range(steps), train, starts={"lr": torch.tensor([0.1, 0.2])}, **how)
    if method == "implicit":
        return hn.hypergradient(decay(), REST, [0], train, outer, method="implicit", **how)
    return hn.hypergradient(rate(), START, range(steps), train, outer, method=method, **how)  # type: ignore[arg-type]


WRONG: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "pair": (lambda *a: (good(*a), 1), TypeError, r"a tuple of 2: \(a tensor of shape \(\).*with has_aux=True it may return"),
    "triple": (lambda *a: (good(*a), 1, 2), TypeError, "a tuple of 3"),
    "float": (lambda *a: 0.5, TypeError, r"0.5 \(float\).*leave out .item\(\)"),
    "nothing": (lambda *a: None, TypeError, "None.*is a return missing"),
    "dict": (lambda *a: {"loss": good(*a)}, TypeError, "return the entry that is the loss"),
    "unreduced": (lambda *a: good(*a).expand(8), ValueError, r"a tensor of shape \(8,\).*take its mean\(\) or sum\(\)"),
    "one number": (lambda *a: good(*a)[None], ValueError, r"a tensor of shape \(1,\).*take its squeeze\(\)"),
    "integer": (lambda *a: torch.tensor(3), ValueError, "dtype torch.int64.*real numbers"),
    "complex": (lambda *a: good(*a) * 1j, ValueError, "dtype torch.complex128"),
    "constant": (lambda *a: good(*a).detach(), ValueError, "does not depend on params"),
    "constant leaf": (lambda *a: torch.ones((), requires_grad=True) * 2, ValueError, "does not depend on params"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [name for name in WRONG if name != "constant leaf"])
def test_what_is_no_loss_is_refused_by_name(wrong: str, method: str) -> None:
    bad, error, words = WRONG[wrong]
    with pytest.raises(error, match=f"train_loss returned.*{words}"):
        call(method, bad)
    if method != "sweep":
        with pytest.raises(error, match=f"outer_loss returned.*{words}"):
            call(method, good, bad)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_loss_that_depends_on_something_else_is_refused(method: str) -> None:
    bad, error, words = WRONG["constant leaf"]
    with pytest.raises(error, match=f"train_loss returned.*{words}"):
        call(method, bad)


def test_pairs_are_refused_with_a_bad_loss_in_them_too() -> None:
    with pytest.raises(TypeError, match=r"train_loss returned a tuple of 2: \(1.0 \(float\), .*or a pair"):
        call("reverse", lambda *a: (1.0, good(*a)), has_aux=True)


@pytest.mark.parametrize("method", ["reverse", "sqrt", "forward", "implicit"])
def test_what_comes_with_a_loss_is_in_the_result(method: str) -> None:
    def train(params: Any, batch: Any) -> Any:
        return good(params, batch), {"batch": batch, "error": good(params, batch) * 2, "count": torch.tensor(3), "name": "train"}

    def outer(params: Any, batch: Any, hypers: Any) -> Any:
        return good(params, batch), [good(params, batch) + 1, None]

    how = {"memory": "sqrt"} if method == "sqrt" else {}
    name = "reverse" if method == "sqrt" else method
    found, plain = call(name, train, outer, steps=5, has_aux=True, **how), call(name, good, steps=5, **how)
    key = "weight_decay" if method == "implicit" else "lr"
    assert torch.equal(found[key]["model"], plain[key]["model"])
    assert len(found.train_aux) == len(found.train_losses) == (1 if method == "implicit" else 5)
    for step, (aux, loss, expected) in enumerate(zip(found.train_aux, found.train_losses, plain.train_losses, strict=True)):
        assert (aux["batch"], aux["name"], int(aux["count"])) == (step, "train", 3)
        assert not aux["error"].requires_grad
        torch.testing.assert_close(aux["error"], 2 * loss)
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found.aux[0], found.loss + 1)
    torch.testing.assert_close(found.loss, plain.loss)
    assert found.aux[1] is None
    assert plain.aux is None
    assert not found.loss.requires_grad


def test_what_comes_with_a_loss_is_in_a_sweep_by_run() -> None:
    found = call("sweep", lambda p, b: (good(p, b), {"w": p["w"], "step": b}), has_aux=True)
    assert [aux["step"] for aux in found.aux] == [0, 1, 2]
    assert found.aux[0]["w"].shape == (2, 1, 3)
    assert torch.equal(found.aux[0]["w"][1], START["w"])
    assert not torch.equal(found.aux[2]["w"][0], found.aux[2]["w"][1])
    assert torch.equal(found.losses, call("sweep", good).losses)


def noisy(draw: Callable[[], float]) -> Callable[..., Tensor]:
    return lambda params, batch, hypers=None: good({**params, "w": params["w"] * (1 + draw())}, batch)


GLOBAL: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()),
    "dropout": lambda: nn.functional.dropout(torch.ones(3), 0.4),
    "python": random.random,
    "numpy": np.random.rand,
}


def seeded() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


@pytest.mark.parametrize("source", GLOBAL)
def test_global_generators_draw_the_same_in_every_pass(source: str) -> None:
    loss, found, after = noisy(GLOBAL[source]), [], []
    for how in ({}, {"memory": "sqrt"}, {"memory": 1}, {"method": "forward"}):
        seeded()
        found.append(hn.hypergradient(rate(), START, range(7), loss, loss, **how)["lr"]["model"])  # type: ignore[arg-type]
        after.append(float(torch.as_tensor(GLOBAL[source]()).sum()))
    assert all(relative_error(each, found[0]) < 1e-10 for each in found)
    assert len(set(after)) == 1

    def end(lr: float) -> float:
        seeded()
        params = {name: p.clone().requires_grad_() for name, p in START.items()}
        opt = torch.optim.SGD(params.values(), lr=lr, weight_decay=0.1)
        for step in range(7):
            opt.zero_grad()
            loss(params, step).backward()
            opt.step()
        return loss(params, None).item()

    assert float(found[0]) == pytest.approx((end(0.1 + 1e-6) - end(0.1 - 1e-6)) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("curvature", ["none", "exact"])
@pytest.mark.parametrize("source", GLOBAL)
def test_an_audit_compares_the_same_draws(source: str, curvature: Any) -> None:
    seeded()
    loss = noisy(GLOBAL[source])
    rows = hn.audit(rate(), START, range(6), loss, loss, horizons=[hn.OneStep(), hn.Discounted(1.0, curvature)], steps=[1, 4, 6]).rows
    for row in rows:
        if row.steps == 1 or row.estimate == "discount 1, exact curvature":
            assert (row.cosine, row.magnitude) == pytest.approx((1, 1), rel=1e-9)
    assert min(row.magnitude for row in rows) < 0.9


def own_generator() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return noisy(lambda: torch.rand((), generator=generator))  # type: ignore[arg-type, return-value]


def numpy_generator() -> Callable[..., Tensor]:
    generator = np.random.default_rng(0)
    return noisy(generator.random)


def counter() -> Callable[..., Tensor]:
    count = itertools.count()
    return noisy(lambda: 0.1 * next(count))


def iterator() -> Callable[..., Tensor]:
    values = iter([0.1 * i for i in range(9)])
    return noisy(lambda: next(values))


STATEFUL = {"torch.Generator": own_generator, "numpy generator": numpy_generator, "counter": counter, "iterator": iterator}


@pytest.mark.parametrize("state", STATEFUL)
def test_a_loss_that_keeps_state_is_right_where_each_step_is_done_once_and_else_refused(state: str) -> None:
    make = STATEFUL[state]
    reverse, forward = (hn.hypergradient(rate(), START, range(7), make(), good, method=m) for m in ("reverse", "forward"))  # type: ignore[arg-type]
    assert relative_error(forward["lr"]["model"], reverse["lr"]["model"]) < 1e-10

    def end(lr: float) -> float:
        params, loss = {name: p.clone().requires_grad_() for name, p in START.items()}, make()
        opt = torch.optim.SGD(params.values(), lr=lr, weight_decay=0.1)
        for step in range(7):
            opt.zero_grad()
            loss(params, step).backward()
            opt.step()
        return good(params, None).item()

    assert float(reverse["lr"]["model"]) == pytest.approx((end(0.1 + 1e-6) - end(0.1 - 1e-6)) / 2e-6, rel=1e-6)
    for memory in ("sqrt", 1, 3):
        with pytest.raises(RuntimeError, match=r"train_loss .* when step \d was done again.*torch.Generator.*memory='full'"):
            hn.hypergradient(rate(), START, range(7), make(), good, memory=memory)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"train_loss .* was done again"):
        hn.audit(rate(), START, range(1), make(), good)


def test_a_batch_that_the_loss_empties_is_taken_once_or_refused() -> None:
    def loss(params: Any, batch: dict[str, Any]) -> Tensor:
        return batch.pop("scale") * good(params, None)

    def data() -> Any:
        return [{"scale": 1.0 + i} for i in range(5)]

    reverse, forward = (hn.hypergradient(rate(), START, data(), loss, good, method=m) for m in ("reverse", "forward"))  # type: ignore[arg-type]
    assert relative_error(forward["lr"]["model"], reverse["lr"]["model"]) < 1e-10
    with pytest.raises(RuntimeError, match=r"raised KeyError: 'scale' when step \d was done again.*changes in place.*memory='full'"):
        hn.hypergradient(rate(), START, data(), loss, good, memory="sqrt")


def test_rounding_alone_is_not_refused() -> None:
    noise = iter([1e-12 * i for i in range(99)])
    found = hn.hypergradient(rate(), START, range(9), lambda p, b: good(p, b) * (1 + next(noise)), good, memory="sqrt")
    assert relative_error(found["lr"]["model"], hn.hypergradient(rate(), START, range(9), good, good)["lr"]["model"]) < 1e-9


def by_turns(params: Any, batch: Any, hypers: Any = None) -> Tensor:
    """A loss that the bias enters in every second step."""
    return good({**params, "b": params["b"] if batch in (None, 1, 3) else torch.zeros(1)}, batch)


def momentum() -> hn.Optimizer:
    return hn.adamw(lr=hn.learn(0.1, by=hn.sgd(lr=1e-3)), weight_decay=hn.learn(0.1, by=hn.sgd(), per="tensor"), eps=0.1)


def trained(opt: hn.Optimizer, steps: int) -> tuple[Any, Any]:
    params = {name: nn.Parameter(p.clone()) for name, p in START.items()}
    made = hn.HyperOptimizer(params.items(), opt, backend="reference")
    for step in range(steps):
        made.zero_grad()
        by_turns(params, step).backward()
        made.step()
    return params, made


def test_a_sweep_leaves_tensors_without_a_gradient_alone() -> None:
    rates = torch.tensor([0.05, 0.1])
    found = hn.sweep(momentum(), START, range(5), by_turns, starts={"lr": rates})
    for run, lr in enumerate(rates.tolist()):
        params, made = trained(momentum().replace(lr=hn.learn(lr, by=hn.sgd(lr=1e-3))), 5)
        assert all(relative_error(found.params[name][run], p.detach()) < 1e-12 for name, p in params.items())
        assert relative_error(found.hypers["lr"]["model"][-1, run], made.hypers()["lr"]["group 0"]) < 1e-12


@pytest.mark.parametrize("curvature", ["none", "exact"])
def test_an_audit_leaves_tensors_without_a_gradient_alone(curvature: Any) -> None:
    horizons = [hn.OneStep(), hn.Discounted(1.0, curvature)]
    rows = hn.audit(momentum(), START, range(6), by_turns, good, horizons=horizons, steps=[1, 4, 6]).rows
    for row in rows:
        if row.steps == 1 or row.estimate == "discount 1, exact curvature":
            assert (row.cosine, row.magnitude) == pytest.approx((1, 1), rel=1e-9), row


def test_implicit_leaves_tensors_without_a_gradient_alone() -> None:
    """The bias does not enter the training loss: it has no fixed point of its own, and is a constant to the outer loss."""

    def without_shift(params: Any, batch: Any) -> Tensor:
        return (X @ params["w"].T - Y).square().mean()

    def closed(value: Tensor) -> Tensor:
        return torch.linalg.solve(2 * X.T @ X / 8 + value * torch.eye(3), 2 * X.T @ Y / 8).T

    at = {"w": closed(torch.tensor(0.1)), "b": torch.full((1,), 0.7)}
    found = hn.hypergradient(decay(), at, [0], without_shift, good, method="implicit")
    expected = torch.func.grad(lambda value: good({"w": closed(value), "b": at["b"]}, None))(torch.tensor(0.1))
    assert relative_error(found["weight_decay"]["model"], expected) < 1e-8


def test_hypers_outside_their_domain_are_refused() -> None:
    for value, words in ((-0.1, "-0.1"), (float("nan"), "nan"), (torch.tensor([0.1, 0.1, -1.0]), "-1.0")):
        with pytest.raises(ValueError, match=rf"hypers\['lr'\]\['model'\]={words} is outside its domain NonNegative"):
            call("reverse", good, hypers={"lr": {"model": value}})
    assert torch.isfinite(call("forward", good, hypers={"lr": {"model": 0.0}})["lr"]["model"])


def test_starts_outside_their_domain_are_refused() -> None:
    def swept(starts: Any, via: Any = None) -> Any:
        return hn.sweep(hn.sgd(lr=hn.learn(0.1, by=hn.sgd(), via=via)), START, range(2), good, starts=starts)

    for values, via, words in (
        ([0.0, 0.1], "log", "0.0 is an end of"),
        ([-0.5, 0.1], "log", "-0.5 is outside"),
        ([-0.5, 0.1], None, "-0.5 is outside"),
        ([float("nan"), 0.1], None, "nan is outside"),
        ([0.1, float("inf")], "softplus", "inf is outside"),
    ):
        with pytest.raises(ValueError, match=rf"starts\['lr'\]={words}"):
            swept({"lr": torch.tensor(values)}, via)
    with pytest.raises(ValueError, match=r"starts\['lr'\] has shape \(2, 2\); it must be \(n,\)"):
        swept({"lr": torch.ones(2, 2)})
    assert swept({"lr": torch.tensor([0.0, 0.1])}).losses.shape == (2, 2)
    assert swept({"lr": [0.01, 0.1]}).losses.shape == (2, 2)


def test_the_runs_of_a_sweep_draw_masks_of_their_own_or_the_same() -> None:
    f = hn.functional(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)))

    def loss(params: Any, batch: Any) -> Tensor:
        return (f(params, X) - Y).square().mean()

    def swept(rates: list[float], randomness: Any) -> Any:
        torch.manual_seed(2)
        how = {} if randomness is None else {"randomness": randomness}
        return hn.sweep(rate(), f.params, range(3), loss, starts={"lr": torch.tensor(rates)}, **how).losses

    same, different = swept([0.1, 0.1], "same"), swept([0.1, 0.1], "different")
    assert torch.equal(same[:, 0], same[:, 1])
    assert not torch.isclose(different[:, 0], different[:, 1]).any()
    assert torch.equal(different, swept([0.1, 0.1], None))
    for run, lr in enumerate([0.05, 0.2]):  # with the same masks as one run alone
        torch.manual_seed(2)
        alone = hn.hypergradient(
            hn.sgd(lr=hn.learn(lr, by=hn.sgd()), weight_decay=0.1), f.params, range(3), loss, lambda p, b, h: loss(p, b)
        )
        frozen = hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.0)), weight_decay=0.1)
        torch.manual_seed(2)
        found = hn.sweep(frozen, f.params, range(3), loss, starts={"lr": torch.tensor([0.05, 0.2])}, randomness="same").losses
        torch.testing.assert_close(found[:, run], torch.stack(alone.train_losses))
    with pytest.raises(RuntimeError, match="randomness"):
        swept([0.1, 0.1], "error")
    with pytest.raises(ValueError, match="randomness='all' must be one of 'different', 'same', 'error'"):
        swept([0.1, 0.1], "all")


def test_a_sweep_carries_buffers_of_each_run() -> None:
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    f = hn.functional(net)

    def loss(params: Any, batch: Any) -> Tensor:
        return (f(params, X + batch) - Y).square().mean()

    still = hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.0)), momentum=0.5)
    found = hn.sweep(still, f.params, range(4), loss, starts={"lr": torch.tensor([0.05, 0.2])})
    for run, lr in enumerate([0.05, 0.2]):
        opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.5)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        for step in range(4):
            opt.zero_grad()
            value = (net(X + step) - Y).square().mean()
            assert relative_error(found.losses[step, run], value.detach()) < 1e-10
            value.backward()
            opt.step()
        buffers = dict(net.named_buffers())
        assert found.buffers.keys() == buffers.keys()
        assert all(relative_error(found.buffers[name][run].double(), value.double()) < 1e-10 for name, value in buffers.items())
        net.load_state_dict(before)
