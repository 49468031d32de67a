"""Stochastic rounding to bfloat16: unbiased, the same bits on all backends and after a resume, and looked through by hypergradients."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import ftp
import hyperopt_nested as hn

BF16 = torch.bfloat16
ALL = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(BF16)  # all that bfloat16 has
RULES = {"sgd": lambda: hn.sgd(lr=0.25, momentum=0.5), "adamw": lambda: hn.adamw(lr=1e-3)}


@hn.rule(separable="element")
def descent(param: Tensor, grad: Tensor, state: hn.typing.State, *, lr: Any = hn.Positive(1.0)) -> tuple[Tensor, hn.typing.State]:
    return param - lr * grad, state


def up(exact: Tensor, rounded: Tensor) -> Tensor:
    """What was rounded away from zero."""
    return (rounded.double().abs() > exact.double().abs()).double()


def expectation(exact: float) -> float:
    """The probability that a number is rounded away from zero."""
    return int(torch.tensor(exact, dtype=torch.float32).view(torch.int32) & 0xFFFF) / 0x10000


def one_step(rule: str, dtype: torch.dtype, rounding: Any) -> dict[str, Tensor]:
    nested = hn.Nested(RULES[rule](), state_dtype=dtype, rounding=rounding)
    param, grad = ({"w": torch.full((20_000,), number, dtype=BF16).to(dtype)} for number in (1.2, 0.3))
    new, st = nested.step(param, grad, nested.init(param))
    return {"param": new["w"], **{key: leaf for key, leaf in st["rule"]["w"].items() if leaf.ndim}}


@pytest.mark.parametrize("rule", RULES)
def test_parameters_and_moments_are_unbiased(rule: str) -> None:
    exact, rounded = one_step(rule, torch.float32, "nearest"), one_step(rule, BF16, "stochastic")
    assert len(rounded) == {"sgd": 2, "adamw": 3}[rule]
    directions = []
    for key, x in exact.items():
        assert rounded[key].dtype == BF16
        p, direction = expectation(float(x[0])), up(x, rounded[key])
        assert abs(float(direction.mean()) - p) <= 4 * (p * (1 - p) / len(x)) ** 0.5
        assert float((rounded[key].double() - x.double()).abs().max()) < float(x[0].abs()) / 128  # one of the two neighbors
        directions += [direction] if 0 < p < 1 else []
    assert len(directions) == {"sgd": 1, "adamw": 3}[rule]  # the first momentum is the gradient itself
    _uncorrelated(directions)


def _uncorrelated(directions: list[Tensor]) -> None:
    """Whether the bits of streams have nothing to do with each other."""
    found = torch.corrcoef(torch.stack(directions)).view(len(directions), -1) - torch.eye(len(directions))
    assert float(found.abs().max()) < 4.5 / len(directions[0]) ** 0.5


def test_tensors_and_steps_have_bits_of_their_own() -> None:
    nested = hn.Nested(hn.sgd(lr=1.0), rounding="stochastic")
    params = {name: torch.ones(20_000, dtype=BF16) for name in ("a", "b", "layers.1.weight", "layers.2.weight")}
    grads, st, directions = {name: torch.full_like(p, -(2.0**-9)) for name, p in params.items()}, nested.init(params), []
    before = torch.get_rng_state()
    for _ in range(3):
        new, st = nested.step(params, grads, st)
        directions += [up(params[name], new[name]) for name in params]
    nested.shards["a"] = 1
    part, _ = nested.step(params, grads, nested.init(params))
    directions.append(up(params["a"], part["a"]))
    _uncorrelated(directions)
    _uncorrelated([*(each[:-1] for each in directions), *(each[1:] for each in directions)])  # of neighbors
    torch.manual_seed(7)
    again, _ = nested.step(params, grads, nested.init(params))
    assert torch.equal(up(params["b"], again["b"]), directions[1])  # deterministic
    torch.set_rng_state(before)


def test_small_updates_are_kept() -> None:
    w = torch.nn.Parameter(torch.ones(300, dtype=BF16))
    opt = hn.HyperOptimizer([("w", w)], hn.sgd(lr=1e-3), rounding="stochastic", backend="reference")
    for _ in range(1000):
        w.grad = torch.ones_like(w)
        opt.step()
    assert abs(float(w.detach().float().mean())) < 0.01


@pytest.mark.parametrize("backend", ["reference", "foreach", "fused", "compile"])
@pytest.mark.usefixtures("quick_programs")
def test_what_is_representable_stays(backend: Any) -> None:
    w = torch.nn.Parameter(ALL.clone())
    opt = hn.HyperOptimizer([("w", w)], descent(lr=1.0), rounding="stochastic", backend=backend)
    for _ in range(2):
        w.grad = torch.zeros_like(w)
        opt.step()
    number = ~ALL.isnan()
    assert torch.equal(w.detach().view(torch.int16)[number], ALL.view(torch.int16)[number])  # signs of zeros, too
    assert bool(w.isnan()[~number].all())
    assert opt.backend == backend


def test_numbers_beyond_the_largest_are_rounded_to_nearest() -> None:
    largest = torch.finfo(BF16).max
    ulp = largest - float(torch.tensor(largest, dtype=BF16).nextafter(torch.tensor(0.0, dtype=BF16)))
    nested = hn.Nested(hn.sgd(lr=1.0), rounding="stochastic")
    for part in (0.3, 0.7, -0.5):
        params = {"w": torch.full((1000,), largest, dtype=BF16)}
        new, _ = nested.step(params, {"w": torch.full((1000,), -part * ulp, dtype=torch.float32)}, nested.init(params))
        if part > 0:
            assert torch.equal(new["w"], torch.full((1000,), largest + part * ulp, dtype=torch.float32).to(BF16))
        else:
            assert set(new["w"].tolist()) == {largest, largest - ulp}


def problem(rule: Callable[[], Any], backend: Any, steps: int = 3, **how: Any) -> tuple[list[torch.nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 7), (6, 1), (1, 1), (3,), ()
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(BF16)) for shape in shapes]
    image = torch.randn(4, 3, 2, 2, generator=generator).to(BF16, memory_format=torch.channels_last)
    params.append(torch.nn.Parameter(image))
    opt = hn.HyperOptimizer([(f"w{i}", p) for i, p in enumerate(params)], rule(), backend=backend, rounding="stochastic", **how)
    return stepped(params, opt, steps), opt


def stepped(params: list[torch.nn.Parameter], opt: torch.optim.Optimizer, steps: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randint(-32, 32, p.shape, generator=generator).to(p.dtype) / 256  # sums and products are exact
        opt.step()
    return params


def bits(params: list[torch.nn.Parameter], opt: Any) -> list[Tensor]:
    states = [[leaf for key, leaf in opt.state[p].items() if key.startswith(("rule.", "rounding."))] for p in params]
    return [*(p.detach() for p in params), *(leaf for state in states for leaf in state)]


@pytest.mark.parametrize("backend", ["foreach", "fused", "compile"])
@pytest.mark.usefixtures("quick_programs")
def test_backends_have_the_same_bits(backend: Any) -> None:
    wanted, found = (problem(RULES["sgd"], each) for each in ("reference", backend))
    assert found[1].backend == backend
    assert all(map(torch.equal, bits(*found), bits(*wanted)))


@pytest.mark.parametrize("backend", ["foreach", "fused"])
@pytest.mark.usefixtures("quick_programs")
def test_learned_values_and_rows_too(backend: Any) -> None:
    def rule() -> hn.Optimizer:
        return ftp.ftp_rule(hn.adamw(lr=hn.learn(1e-2, by=hn.sgd(lr=1e-4)), weight_decay=0.1))

    wanted, found = (problem(rule, each, state_dtype=BF16) for each in ("reference", backend))
    for one, other in zip(bits(*found), bits(*wanted), strict=True):
        assert float((one == other).double().mean()) >= 0.9 or one.numel() < 10  # arithmetic is not exact here
        assert torch.allclose(one.float(), other.float(), rtol=2e-2, atol=1e-4)


def test_a_resumed_run_goes_on_bitwise() -> None:
    params, opt = problem(RULES["adamw"], "reference", state_dtype=BF16)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = hn.HyperOptimizer(again, RULES["adamw"](), rounding="stochastic", backend="reference", state_dtype=BF16)
    resumed.load_state_dict(deepcopy(opt.state_dict()))
    assert all(map(torch.equal, bits(stepped(again, resumed, 2), resumed), bits(stepped(params, opt, 2), opt)))


def test_rounding_may_change_with_a_checkpoint_or_a_dtype() -> None:
    params, opt = problem(RULES["adamw"], "reference", steps=1)
    nearest = hn.HyperOptimizer(params, RULES["adamw"](), backend="reference")
    nearest.load_state_dict(opt.state_dict())
    assert not any("rounding" in key for key in nearest.state[params[0]])
    opt.load_state_dict(nearest.state_dict())
    stepped(params, opt, 1)
    assert "rounding.count" in opt.state[params[0]]

    model = torch.nn.Linear(3, 2).float()
    opt = hn.optim.AdamW(model.parameters(), lr=1e-3, rounding="stochastic", backend="reference")
    stepped([*model.parameters()], opt, 1)
    assert not any("rounding" in key for key in opt.state[model.weight])  # float32 costs nothing
    model.bfloat16()
    stepped([*model.parameters()], opt, 1)
    assert {key for key in opt.state[model.weight] if "rounding" in key} == {"rounding.count"}
    assert opt.state[model.weight]["steps"] == 2


@pytest.mark.parametrize("memory", ["auto", "kept", "reverse"])
def test_hypergradients_look_through_it(memory: Any) -> None:
    hypergradients = {}
    generator = torch.Generator().manual_seed(0)
    start, first, second = (torch.randn(2000, generator=generator).to(BF16) for _ in range(3))
    for dtype, rounding in ((torch.float32, "nearest"), (BF16, "nearest"), (BF16, "stochastic")):
        rule = hn.adamw(lr=hn.learn(1e-2, by=hn.sgd(lr=0.0)), weight_decay=hn.learn(0.1, by=hn.sgd(lr=0.0)))
        nested = hn.Nested(rule, rounding=rounding, horizon=hn.OneStep(memory))  # type: ignore[arg-type]
        params = {"w": start.to(dtype)}
        params, st = nested.step(params, {"w": first.to(dtype)}, nested.init(params))
        found = nested.hypergradients(params, {"w": second.to(dtype)}, st)
        hypergradients[dtype, rounding] = torch.stack([found[key]["model"] for key in ("lr", "weight_decay")])
    exact, nearest, stochastic = hypergradients.values()
    error, allowed = ((each - exact).abs() / exact.abs() for each in (stochastic, nearest))
    assert bool((error <= 2 * allowed + 2e-3).all())


def test_a_learning_rate_is_learned() -> None:
    torch.manual_seed(0)
    w, target = torch.nn.Parameter(torch.zeros(50, dtype=BF16)), torch.randn(50)
    opt = hn.optim.AdamW([w], lr=hn.learn(1e-4), rounding="stochastic", backend="foreach")
    losses = []
    for _ in range(60):
        opt.zero_grad()
        loss = (w.float() - target).square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert opt.learned()["lr"] > 1e-3


def test_transforms_look_through_it() -> None:
    nested = hn.Nested(hn.sgd(lr=0.25, momentum=0.5), rounding="stochastic")
    params = {"w": torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(BF16)}
    grads = {"w": torch.full_like(params["w"], 0.3)}
    st = torch.func.vmap(nested.init)(params)
    for _ in range(2):
        found, st = torch.func.vmap(nested.step)(params, grads, st)
    for i in range(3):
        one = {"w": params["w"][i]}
        now = nested.init(one)
        for _ in range(2):
            new, now = nested.step(one, {"w": grads["w"][i]}, now)
        assert torch.equal(new["w"], found["w"][i])
        assert torch.equal(now["rule"]["w"]["momentum_buffer"], st["rule"]["w"]["momentum_buffer"][i])

    def total(w: Tensor) -> Tensor:
        return nested.step({"w": w}, {"w": grads["w"][0]}, nested.init({"w": w}))[0]["w"].float().sum()

    assert torch.equal(torch.func.grad(total)(params["w"][0]), torch.ones(4, 5, dtype=BF16))  # straight through


@pytest.mark.parametrize("make", [hn.optim.SGD, ftp.AdamP, ftp.SGDP])
def test_unknown_ways_to_round_are_refused(make: Any) -> None:
    for rounding in ("up", None):
        with pytest.raises(ValueError, match="must be one of 'nearest', 'stochastic'"):
            make([torch.nn.Parameter(torch.ones(2))], lr=0.1, rounding=rounding)
    make([("w", torch.nn.Parameter(torch.ones(2)))], lr=0.1, rounding="stochastic")
