"""Hypergradients through many steps: reverse, forward, finite differences and a loop written by hand agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DIFFERENCES, Tensors, examples, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hyperopt_nested as hn
from hyperopt_nested.backends import compiler
from hyperopt_nested.hypergradients import differentiable_update
from hyperopt_nested.testing.subject import direct, start

RULES = [name for name in hn.__all__ if isinstance(getattr(hn, name), hn.typing.FunctionRule)]
PER_MODEL = {"dog", "prodigy"}
"""Rules with hypers in a sum over all tensors, which are learned per model alone."""
AGREE = 1e-10  # reverse and forward
CLOSED = 1e-8  # a closed form


def learned(value: float, per: Any = "model", **how: Any) -> hn.Learn:
    return hn.learn(value, by=hn.sgd(), per=per, **how)


def perceptron(generator: torch.Generator) -> tuple[Tensors, Callable[[Tensors, Tensor], Tensor], tuple[int, ...]]:
    params = {name: torch.randn(shape, generator=generator) for name, shape in {"a": (4, 3), "b": (1, 4), "c": (2, 4)}.items()}
    return params, lambda p, x: torch.tanh(x @ p["a"].T + p["b"]) @ p["c"].T, (3,)


def convolution(generator: torch.Generator) -> tuple[Tensors, Callable[[Tensors, Tensor], Tensor], tuple[int, ...]]:
    params = {name: torch.randn(shape, generator=generator) for name, shape in {"k": (2, 1, 2, 2), "b": (2,), "c": (2, 2)}.items()}

    def network(p: Tensors, x: Tensor) -> Tensor:
        features = torch.nn.functional.softplus(torch.nn.functional.conv2d(x, p["k"], p["b"]))
        return torch.nn.functional.avg_pool2d(features, 3).flatten(1) @ p["c"].T

    return params, network, (1, 4, 4)


class Problem:
    """A random smooth network, a batch a step, a held-out one, and an outer loss that depends on the hypers too."""

    def __init__(self, seed: int, steps: int, make: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.params, network, shape = make(generator)
        self.batches = [(torch.randn(5, *shape, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(steps + 1)]
        self.held_out = self.batches.pop()

        def loss(params: Tensors, batch: tuple[Tensor, Tensor]) -> Tensor:
            return (network(params, batch[0]) - batch[1]).square().mean()

        def outer(params: Tensors, batch: tuple[Tensor, Tensor], hypers: Any) -> Tensor:
            penalties = [value.square().sum() for by_name in hypers.values() for value in by_name.values()]
            return loss(params, batch) + 1e-3 * torch.stack(penalties).sum()

        self.loss, self.outer = loss, outer

    def hypergradient(self, optimizer: hn.Optimizer, **how: Any) -> dict[str, Tensors]:
        return hn.hypergradient(optimizer, self.params, self.batches, self.loss, self.outer, outer_batch=self.held_out, **how)

    def by_hand(self, optimizer: hn.Optimizer, values: dict[str, Tensors]) -> Tensor:
        """The outer loss, by a loop over the rule's own functions, as a function of the values."""
        params, states = dict(self.params), start(optimizer, self.params)
        fixed = {name: torch.tensor(value) for name, value in optimizer.declared.items()}
        for batch in self.batches:
            grads = torch.func.grad(self.loss)(params, batch)
            hypers = {t: {**fixed, **{h: found.get(t, found.get("model")) for h, found in values.items()}} for t in params}
            params, states = direct(optimizer, params, grads, states, hypers)
        return self.outer(params, self.held_out, values)


def flat(tree: dict[str, Tensors]) -> dict[tuple[str, str], Tensor]:
    return {(hyper, key): value for hyper, by_key in tree.items() for key, value in by_key.items()}


def settings_of(name: str, per: Any) -> hn.Optimizer:
    """All hypers learned, at values where they matter."""
    plain = hn.get(name)()
    chosen = {"lr": 0.05, "eps": 0.1, "eps1": 0.1, "eps2": 0.1, "d": 1.1}
    values = {hyper: chosen.get(hyper, value or 0.1) for hyper, value in plain.declared.items()}
    return plain.replace(**{h: value if h in plain.rule.nondifferentiable else learned(value, per) for h, value in values.items()})


@pytest.mark.parametrize("per", ["model", "tensor", "row", "element"])
@pytest.mark.parametrize("name", [name for name in RULES if name not in PER_MODEL])
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 6), network=st.sampled_from([perceptron, convolution]))
@examples(2)
def test_reverse_forward_differences_and_a_loop_by_hand(name: str, per: Any, seed: int, steps: int, network: Any) -> None:
    optimizer = settings_of(name, per)
    problem = Problem(seed, steps, perceptron if name == "muon" else network)
    reverse, forward = (flat(problem.hypergradient(optimizer, method=method)) for method in ("reverse", "forward"))
    starts = hn.Nested(optimizer, horizon=hn.OneStep("reverse")).init(problem.params)["hypers"]
    by_hand = flat(torch.func.grad(lambda values: problem.by_hand(optimizer, values))(starts))
    assert reverse.keys() == forward.keys() == by_hand.keys()
    largest = max(float(value.abs().amax()) for value in by_hand.values())
    for path, value in by_hand.items():
        assert relative_error(reverse[path], value, 1e-3 * largest) < AGREE, path
        assert relative_error(forward[path], value, 1e-3 * largest) < AGREE, path
    hyper, key = path = sorted(by_hand)[seed % len(by_hand)]  # one of them, since each costs many runs

    def moved(value: Tensor) -> Tensor:
        return problem.by_hand(optimizer, {**starts, hyper: {**starts[hyper], key: value}})

    value = starts[hyper][key]
    room = torch.where((value > 0.5) & (value < 1), 1 - value, value.abs())
    expected = hn.testing.finite_difference(moved, value, scale=room / 4)
    smooth = expected.error < 1e-7 * max(float(expected.value.abs().amax()), 1e-3)  # a kink between the points would show here
    wrong = torch.where(smooth, (reverse[path] - expected.value).abs(), 0)
    assert float(wrong.amax()) < DIFFERENCES * max(float(expected.value.abs().amax()), 1e-3), path


@pytest.mark.parametrize("memory", ["sqrt", 1, 3, 7, 50])
def test_segments_change_nothing(memory: Any) -> None:
    problem = Problem(1, 7, perceptron)
    optimizer = hn.adamw(lr=learned(0.05), beta1=learned(0.8, "tensor"), weight_decay=learned(0.1, "element"), eps=learned(0.1, "row"))
    expected, found = flat(problem.hypergradient(optimizer)), flat(problem.hypergradient(optimizer, memory=memory))
    assert all(relative_error(found[path], value) < 1e-12 for path, value in expected.items())


@pytest.mark.parametrize("per", ["model", "row"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "adafactor"])
def test_kernels_change_nothing(name: str, per: Any) -> None:
    problem = Problem(2, 5, perceptron)
    optimizer = {key: settings_of(name, per) for key in problem.params}
    optimizer["b"] = hn.project(hn.sgd(lr=learned(0.1), momentum=0.5), onto=hn.mars, radius=learned(0.1, "tensor"))
    expected, found = (problem.hypergradient(optimizer, backend=backend) for backend in ("reference", "fused"))
    assert flat(expected).keys() == flat(found).keys()
    assert all(relative_error(flat(found)[path], value) < AGREE for path, value in flat(expected).items())
    assert all(relative_error(found.params[key], value) < AGREE for key, value in expected.params.items())
    assert any(differentiable_update._plans.values()) == bool(compiler.compiler())
    segments = flat(problem.hypergradient(optimizer, backend="fused", memory=2))
    assert all(relative_error(segments[path], value) < AGREE for path, value in flat(expected).items())


def quadratic(params: Tensors, batch: Any, hypers: Any = None) -> Tensor:
    return 0.5 * (CURVATURE * params["x"].square()).sum()


CURVATURE = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
X0 = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("method", ["reverse", "forward"])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_closed_form_of_a_learning_rate(method: Any, steps: int) -> None:
    """x_K = (1 - lr a)^K x_0 on a quadratic, so the loss after K steps has a derivative by hand."""
    found = hn.hypergradient(hn.sgd(lr=learned(0.2)), {"x": X0}, range(steps), quadratic, quadratic, method=method)["lr"]["model"]
    expected = -(CURVATURE**2 * steps * (1 - 0.2 * CURVATURE) ** (2 * steps - 1) * X0**2).sum()
    assert relative_error(found, expected) < CLOSED


@pytest.mark.parametrize("method", ["reverse", "forward"])
def test_closed_form_of_momentum(method: Any) -> None:
    """(x, b) is multiplied by a matrix in each step; the derivative of its power is a sum over the place of the derivative."""
    steps, lr, mu = 12, 0.1, 0.7
    optimizer = hn.sgd(lr=learned(lr), momentum=learned(mu))
    found = hn.hypergradient(optimizer, {"x": X0}, range(steps), quadratic, quadratic, method=method)
    expected = {"lr": 0.0, "momentum": 0.0}
    for a, x in zip(CURVATURE.tolist(), X0.tolist(), strict=True):
        matrix = torch.tensor([[1 - lr * a, -lr * mu], [a, mu]])
        slopes = {"lr": torch.tensor([[-a, -mu], [0.0, 0.0]]), "momentum": torch.tensor([[0.0, -lr], [0.0, 1.0]])}
        start = torch.tensor([x, 0.0])  # the buffer is zero, so that the first step takes the gradient alone
        end = torch.linalg.matrix_power(matrix, steps) @ start
        for hyper, slope in slopes.items():
            for step in range(steps):
                after, before = (torch.linalg.matrix_power(matrix, power) for power in (steps - 1 - step, step))
                expected[hyper] += float(a * end[0] * (after @ slope @ before @ start)[0])
    for hyper, value in expected.items():
        assert relative_error(found[hyper]["model"], torch.tensor(value)) < CLOSED


class Ridge:
    """Ridge regression, whose solution is known: by the weight decay of SGD."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        shapes = (30, 4), (30, 2), (20, 4), (20, 2)
        self.x, self.y, self.x_new, self.y_new = (torch.randn(shape, generator=generator) for shape in shapes)
        self.decay = torch.rand(2, 4, generator=generator) + 0.1

    def loss(self, params: Tensors, batch: Any) -> Tensor:
        return 0.5 * (self.x @ params["w"].T - self.y).square().sum() / 30

    def outer(self, params: Tensors, batch: Any, hypers: Any) -> Tensor:
        return 0.5 * (self.x_new @ params["w"].T - self.y_new).square().mean()

    def solution(self, decay: Tensor) -> Tensor:
        gram, right = self.x.T @ self.x / 30, self.y.T @ self.x / 30
        return torch.stack([torch.linalg.solve(gram + torch.diag(row), b) for row, b in zip(decay.expand(2, 4), right, strict=True)])

    def hypergradient(self, optimizer: hn.Optimizer, decay: Tensor, **how: Any) -> Any:
        params = {"w": self.solution(decay)}
        return hn.hypergradient(optimizer, params, [None], self.loss, self.outer, method="implicit", **how)


@pytest.mark.parametrize("how", [{}, {"solver": "neumann", "iterations": 2000}])
@pytest.mark.parametrize("per", ["model", "row", "element"])
def test_closed_form_of_a_regularization(per: Any, how: Any) -> None:
    ridge = Ridge()
    shape = {"model": (), "row": (2, 1), "element": (2, 4)}[per]
    decay = ridge.decay[:, :1].clone() if per == "row" else ridge.decay if per == "element" else torch.tensor(0.3)
    given = {"weight_decay": {"model" if per == "model" else "w": decay}}
    found = ridge.hypergradient(hn.sgd(lr=0.1, weight_decay=learned(0.3, per)), decay, hypers=given, **how)
    expected = torch.func.grad(lambda decay: ridge.outer({"w": ridge.solution(decay)}, None, None))(decay)
    value = next(iter(found["weight_decay"].values()))
    assert value.shape == shape
    assert relative_error(value, expected) < CLOSED
    assert float(found.residual) < CLOSED


def test_implicit_is_what_reverse_tends_to() -> None:
    ridge = Ridge()
    optimizer = hn.sgd(lr=0.3, momentum=0.5, weight_decay=learned(0.3, "element"))
    start = {"w": torch.zeros(2, 4)}
    unrolled = hn.hypergradient(optimizer, start, [None] * 300, ridge.loss, ridge.outer, memory="sqrt")
    found = ridge.hypergradient(optimizer, torch.tensor(0.3))
    assert relative_error(found["weight_decay"]["w"], unrolled["weight_decay"]["w"]) < CLOSED


def test_few_iterations_leave_a_residual() -> None:
    ridge = Ridge()
    residuals = [
        float(ridge.hypergradient(hn.sgd(lr=0.1, weight_decay=learned(0.3)), torch.tensor(0.3), iterations=n).residual) for n in (0, 1, 3)
    ]
    assert residuals[0] == pytest.approx(1)
    assert residuals == sorted(residuals, reverse=True)


def test_implicit_refuses_what_does_not_move_the_point_of_rest() -> None:
    ridge = Ridge()
    with pytest.raises(ValueError, match="the point where training comes to rest does not depend on lr"):
        ridge.hypergradient(hn.sgd(lr=learned(0.1), weight_decay=learned(0.3)), torch.tensor(0.3))
    with pytest.raises(ValueError, match="does not depend on weight_decay, or the tensors are not near it"):
        ridge.hypergradient(hn.sgd(lr=0.1, weight_decay=learned(0.3)), torch.tensor(30.0))
    with pytest.raises(ValueError, match="batches has 2 entries and horizon=None; method='implicit' needs one entry"):
        hn.hypergradient(
            hn.sgd(weight_decay=learned(0.3)), {"w": torch.zeros(2, 4)}, [None, None], ridge.loss, ridge.outer, method="implicit"
        )
    with pytest.raises(ValueError, match="solver='gmres' must be one of 'cg', 'neumann'"):
        ridge.hypergradient(hn.sgd(weight_decay=learned(0.3)), torch.tensor(0.3), solver="gmres")


@pytest.mark.parametrize("how", [{"backend": "reference"}, {"backend": "fused"}, {"method": "forward"}])
def test_a_schedule_has_a_derivative_in_each_step(how: Any) -> None:
    rates = torch.tensor([0.1, 0.3, 0.2, 0.05])
    optimizer = hn.sgd(lr=learned(0.1))
    found = hn.hypergradient(optimizer, {"x": X0}, range(4), quadratic, quadratic, hypers={"lr": {"model": rates}}, **how)["lr"]["model"]

    def loss(rates: Tensor) -> Tensor:
        return quadratic({"x": X0 * torch.stack([1 - rate * CURVATURE for rate in rates]).prod(0)}, None)

    assert relative_error(found, torch.func.grad(loss)(rates)) < 1e-12


def test_the_result_can_be_differentiated() -> None:
    rate = torch.tensor(0.2, requires_grad=True)
    given = {"lr": {"model": rate}}
    found = hn.hypergradient(hn.sgd(lr=learned(0.2)), {"x": X0}, range(3), quadratic, quadratic, hypers=given, create_graph=True)["lr"][
        "model"
    ]
    (second,) = torch.autograd.grad(found, rate)
    factor = 1 - 0.2 * CURVATURE
    assert relative_error(second, (CURVATURE**3 * 15 * factor**4 * X0**2).sum()) < CLOSED


def test_many_starts_at_once() -> None:
    rates = torch.linspace(0.05, 0.4, 8)

    def one(rate: Tensor) -> Tensor:
        given = {"lr": {"model": rate}}
        found = hn.hypergradient(hn.sgd(lr=learned(0.2)), {"x": X0}, range(5), quadratic, quadratic, method="forward", hypers=given)
        return found["lr"]["model"]

    together = torch.func.vmap(one)(rates)
    assert relative_error(together, torch.stack([one(rate) for rate in rates])) < 1e-12


def test_forward_takes_batches_from_a_stream_and_keeps_no_steps() -> None:
    alive = []

    def stream() -> Any:
        for step in range(50):
            alive.append(step)
            yield torch.tensor(float(step))

    found = hn.hypergradient(
        hn.sgd(lr=learned(0.01)), {"x": X0}, stream(), lambda p, b: (p["x"] - b).square().mean(), quadratic, method="forward"
    )
    assert len(alive) == 50
    assert torch.isfinite(found["lr"]["model"])


def test_a_total_over_tensors_and_shared_hypers() -> None:
    shared = learned(0.1)
    clipped = hn.clip_by_global_norm(hn.sgd(lr=shared, momentum=0.5), max_norm=learned(0.3))
    problem = Problem(4, 4, perceptron)
    mapping = {"a": clipped, "b": clipped, "c": hn.sgd(lr=shared)}
    reverse, forward = (flat(problem.hypergradient(mapping, method=method)) for method in ("reverse", "forward"))  # type: ignore[arg-type]
    assert reverse.keys() == {("lr", "model"), ("max_norm", "model")}
    assert all(relative_error(forward[path], value) < AGREE and float(value) != 0 for path, value in reverse.items())


def test_bad_arguments() -> None:
    def call(optimizer: Any = None, **how: Any) -> Any:
        return hn.hypergradient(optimizer or hn.sgd(lr=learned(0.1)), {"x": X0}, range(3), quadratic, quadratic, **how)

    with pytest.raises(ValueError, match="method='backward' must be one of 'reverse', 'forward', 'implicit'"):
        call(method="backward")
    with pytest.raises(ValueError, match="memory=0 must be 'full', 'sqrt' or a number of steps >= 1"):
        call(memory=0)
    with pytest.raises(ValueError, match="has no learned hyper"):
        call(hn.sgd(lr=0.1))
    with pytest.raises(ValueError, match="hypers has 'momentum'/'model', which is not learned; learned are lr/model"):
        call(hypers={"momentum": {"model": 0.1}})
    with pytest.raises(ValueError, match=r"hypers\['lr'\]\['model'\] has shape \(2, 2\)"):
        call(hypers={"lr": {"model": torch.ones(2, 2)}})
    with pytest.raises(ValueError, match=r"a schedule of 2 steps, but there are 3"):
        call(hypers={"lr": {"model": torch.ones(2)}})


def test_modules_as_functions() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    module[3].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    f = hn.functional(module)
    assert f.params.keys() == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}
    x = torch.randn(5, 3)
    batched = torch.func.vmap(lambda scale: f({name: scale * p for name, p in f.params.items()}, x))(torch.ones(2))
    grads = torch.func.grad(lambda params: f(params, x).square().sum())(f.params)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    torch.testing.assert_close(batched[1], module(x))
    module.eval()
    torch.testing.assert_close(hn.functional(module)(f.params, x), module(x))


def test_a_horizon_looks_through_the_last_steps_only() -> None:
    problem = Problem(5, 7, perceptron)
    optimizer = hn.adamw(lr=learned(0.05), weight_decay=learned(0.1, "tensor"))
    nested = hn.Nested(optimizer, horizon=hn.OneStep("none"))
    params, state = problem.params, nested.init(problem.params)
    for batch in problem.batches[:4]:
        grads = torch.func.grad(problem.loss)(params, batch)
        params, state["rule"] = nested.update(params, grads, state["rule"], state["hypers"])

    def rest(values: dict[str, Tensors]) -> Tensor:
        now, rule = params, state["rule"]
        for batch in problem.batches[4:]:
            now, rule = nested.update(now, torch.func.grad(problem.loss)(now, batch), rule, values)
        return problem.outer(now, problem.held_out, values)

    expected = flat(torch.func.grad(rest)(state["hypers"]))
    for how in ({"method": "reverse"}, {"method": "reverse", "memory": 2}, {"method": "forward"}):
        found = flat(problem.hypergradient(optimizer, horizon=3, **how))
        assert all(relative_error(found[path], value) < AGREE for path, value in expected.items()), how
    whole = problem.hypergradient(optimizer, horizon=7)
    assert torch.equal(whole["lr"]["model"], problem.hypergradient(optimizer)["lr"]["model"])
    for wrong in (0, -1, 8, 2.5):
        with pytest.raises(ValueError, match=rf"horizon={wrong} must be in 1 to 7"):
            problem.hypergradient(optimizer, horizon=wrong)


def test_reverse_gives_the_derivative_with_respect_to_the_initial_tensors_too() -> None:
    problem = Problem(6, 5, perceptron)
    optimizer = hn.adamw(lr=learned(0.05))
    nested = hn.Nested(optimizer, horizon=hn.OneStep("none"))

    def after(params: Tensors) -> Tensor:
        state = nested.init(params)
        for batch in problem.batches:
            params, state["rule"] = nested.update(params, torch.func.grad(problem.loss)(params, batch), state["rule"], state["hypers"])
        return problem.outer(params, problem.held_out, state["hypers"])

    expected = torch.func.grad(after)(problem.params)
    for memory in ("full", "sqrt"):
        found = problem.hypergradient(optimizer, memory=memory).params
        assert all(relative_error(found[name], value) < AGREE for name, value in expected.items())
    assert problem.hypergradient(optimizer, method="forward").params is None
    for memory in ("full", "sqrt"):
        without, found = (problem.hypergradient(optimizer, memory=memory, wrt_params=wrt) for wrt in (False, True))
        assert without.params is None
        assert torch.equal(without["lr"]["model"], found["lr"]["model"])


def test_dropout_draws_the_same_masks_with_every_memory_and_method() -> None:
    problem = Problem(7, 7, perceptron)
    plain, dropout = problem.loss, torch.nn.Dropout(0.4)
    problem.loss = lambda params, batch: plain(params, (dropout(batch[0]), batch[1]))
    found, drawn = [], []
    for how in ({}, {"memory": "sqrt"}, {"memory": 1}, {"method": "forward"}):
        torch.manual_seed(1)
        found.append(problem.hypergradient(hn.adamw(lr=learned(0.05)), **how)["lr"]["model"])
        drawn.append(torch.rand(1))
    assert all(relative_error(each, found[0]) < AGREE for each in found)
    assert all(torch.equal(each, drawn[0]) for each in drawn)


@pytest.mark.parametrize("method", ["reverse", "forward"])
def test_what_one_step_does_not_feel_has_a_derivative_through_several(method: Any) -> None:
    problem = Problem(8, 5, perceptron)
    optimizer = hn.rprop(lr=0.1, etaminus=learned(0.5))
    starts = hn.Nested(optimizer, horizon=hn.OneStep("none")).init(problem.params)["hypers"]
    expected = torch.func.grad(lambda values: problem.by_hand(optimizer, values))(starts)["etaminus"]["model"]
    found = problem.hypergradient(optimizer, method=method)["etaminus"]["model"]
    assert relative_error(found, expected) < AGREE
    assert expected != 0


def test_schedules_of_a_wrong_length_are_named() -> None:
    problem = Problem(9, 4, perceptron)
    for method in ("reverse", "forward"):
        for length in (3, 5):
            with pytest.raises(ValueError, match=rf"hypers\['lr'\]\['model'\] is a schedule of {length} steps, but there are"):
                problem.hypergradient(hn.sgd(lr=learned(0.1)), method=method, hypers={"lr": {"model": torch.full((length,), 0.1)}})
