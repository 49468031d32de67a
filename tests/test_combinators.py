"""Combinators: chains of them, totals over all tensors, evaluated weights, and what they refuse."""

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import DIFFERENCES, EXACT, examples, gradients, problem, relative_error, replaced, run
from hypothesis import given
from hypothesis import strategies as st

import hyperopt_nested as hn

CHAINS = {
    "clip, decay": lambda: hn.clip_by_value(hn.coupled_decay(hn.sgd(lr=0.1, momentum=0.9), decay=0.2, anchor="start"), max_value=0.7),
    "decay, clip": lambda: hn.coupled_decay(hn.clip_by_norm(hn.adam(lr=0.05, eps=0.1), max_norm=1.3), decay=0.2),
    "global clip, decay": lambda: hn.clip_by_global_norm(hn.coupled_decay(hn.sgd(lr=0.1), decay=0.2), max_norm=1.1),
    "decay, global clip": lambda: hn.coupled_decay(hn.clip_by_global_norm(hn.sgd(lr=0.1), max_norm=1.1), decay=0.2),
    "rescale, clip": lambda: hn.rescale(hn.clip_by_norm(hn.adam(lr=0.05, eps=0.1), max_norm=1.3), scale=0.4),
    "decay, rescale": lambda: hn.coupled_decay(hn.rescale(hn.sgd(lr=0.1, momentum=0.9), scale=0.4), decay=0.2),
    "all": lambda: hn.project(
        hn.lookahead(hn.ema(hn.spd(hn.centralize(hn.clip_by_global_norm(hn.adamw(lr=0.05, eps=0.1), max_norm=1.1)))), k=2),
        onto=hn.row_l2,
        radius=0.2,
        saturation="exact",
    ),
}


def still(value: float, per: Any = "model") -> hn.Learn:
    return hn.learn(value, by=hn.sgd(lr=0.0), per=per)


def errors(optimizer: hn.Optimizer, names: list[str], seed: int, memory: Any = "auto") -> dict[tuple[str, str], float]:
    """Relative error of the hypergradients after three steps of a random problem with several tensors.

    Near a kink the extrapolations of finite differences disagree, so that their error estimate is large: such entries are left out.
    """
    nested = hn.Nested(optimizer, horizon=hn.OneStep(memory))
    params, loss = problem(seed)
    params, state = run(nested, params, loss, 2)
    grads = gradients(loss, params)
    new, after = nested.step(params, grads, state)
    found = nested.hypergradients(new, gradients(loss, new), after)
    wrong = {}
    for name in names:
        for key, raw in state["hypers"][name].items():

            def moved(value: torch.Tensor, path: tuple[str, ...] = ("hypers", name, key)) -> torch.Tensor:
                return loss(nested.step(params, grads, replaced(state, path, value))[0])

            expected = hn.testing.finite_difference(moved, raw, scale=raw.clamp(max=1 - raw) if name.startswith("beta") else raw)
            size = max(float(expected.value.abs().amax()), 1e-2)
            sharp = expected.error < 1e-7 * size
            wrong[name, key] = float(torch.where(sharp, (found[name][key] - expected.value) / size, 0).abs().amax())
    return wrong


@pytest.mark.parametrize("chain", CHAINS)
@given(seed=st.integers(0, 2**31))
@examples(3)
def test_every_hyper_of_a_chain(chain: str, seed: int) -> None:
    """Per model: what a hyper does to the total over all tensors counts too."""
    optimizer = CHAINS[chain]()
    own = [name for name, value in optimizer.declared.items() if value != 0]
    found = errors(optimizer.replace(**{name: still(optimizer.declared[name]) for name in own}), own, seed)
    assert max(found.values()) < DIFFERENCES, found


@pytest.mark.parametrize("memory", ["auto", "reverse"])
@pytest.mark.parametrize("per", ["model", "tensor", "row", "element"])
def test_a_total_of_raw_gradients_leaves_every_granularity(per: Any, memory: Any) -> None:
    optimizer = hn.clip_by_global_norm(hn.sgd(lr=still(0.1, per), momentum=0.9), max_norm=still(0.5, per))
    found = errors(optimizer, ["lr", "max_norm"], 3, memory)
    assert max(found.values()) < DIFFERENCES, found


@pytest.mark.parametrize(
    ("around", "without"),
    [
        (lambda adamw: hn.clip_by_global_norm(hn.centralize(adamw), 1.1), True),
        (lambda adamw: hn.coupled_decay(hn.clip_by_value(adamw, 0.7), 0.2, anchor="start"), True),
        (lambda adamw: hn.ema(adamw), True),
        (lambda adamw: hn.project(adamw, 0.3, saturation="exact"), False),
        (lambda adamw: hn.decoupled_decay(adamw, 0.2), False),
    ],
)
def test_what_adam_learns_without_memory_takes_none_inside_transforms_of_gradients(around: Any, without: bool) -> None:
    optimizer = around(hn.adamw(lr=still(0.05), eps=still(0.1), weight_decay=still(0.1)))
    params, _ = problem(0)
    memory = hn.Nested(optimizer).init(params)["memory"]
    assert all((each["sensitivity"] == {}) == without for each in memory.values())
    found = errors(optimizer, ["lr", "eps", "weight_decay"], 5)
    assert max(found.values()) < DIFFERENCES, found


def test_a_hyper_that_enters_the_total_is_learned_per_model_or_refused() -> None:
    params, _ = problem(0)

    def chain(per: Any) -> hn.Optimizer:
        return hn.coupled_decay(hn.clip_by_global_norm(hn.sgd(lr=0.1)), decay=still(0.1, per))

    hn.Nested(chain("model")).init(params)
    for optimizer, memory in ((chain("tensor"), "auto"), (chain("model"), "reverse")):
        with pytest.raises(ValueError, match=r"decay enters the sum over all tensors.*learn it per 'model'"):
            hn.Nested(optimizer, horizon=hn.OneStep(memory)).init(params)  # type: ignore[arg-type]


def test_the_total_is_over_all_groups_with_a_gradient() -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    opt = hn.HyperOptimizer([{"params": [a]}, {"params": [b, c], "lr": 0.5}], hn.clip_by_global_norm(hn.sgd(lr=1.0), max_norm=1.0))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    opt.step()
    assert torch.allclose(a, torch.tensor([-0.6, 0.0]), atol=1e-6)
    assert torch.allclose(b, torch.tensor([0.0, -0.4]), atol=1e-6)
    assert torch.equal(c, torch.zeros(2))


@hn.combinator(separable="element", global_reduce=lambda grad: grad.abs().sum())
def over_sum(param: Any, grad: Any, state: Any, step: Any, *, scale: Any = hn.Positive(1.0), reduced: Any) -> Any:
    return step(param, scale * grad / reduced), state


def test_each_combinator_has_its_own_total() -> None:
    grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([2.0]), "c": torch.tensor([-6.0])}
    divided = over_sum(hn.sgd(lr=1.0))
    nested = hn.Nested({"a": hn.clip_by_global_norm(hn.sgd(lr=1.0), max_norm=2.5), "b": divided, "c": divided})
    params = {name: torch.zeros_like(grad) for name, grad in grads.items()}
    new, _ = nested.step(params, grads, nested.init(params))
    for name, expected in {"a": [-1.5, -2.0], "b": [-0.25], "c": [0.75]}.items():
        torch.testing.assert_close(new[name], torch.tensor(expected), rtol=1e-6, atol=0)


def test_decoupled_decay_of_adam_is_adamw() -> None:
    params, loss = problem(1)
    ours, _ = run(hn.Nested(hn.decoupled_decay(hn.adam(lr=0.1), decay=0.3)), params, loss, 20)
    theirs, _ = run(hn.Nested(hn.adamw(lr=0.1, weight_decay=0.3)), params, loss, 20)
    assert max(relative_error(ours[name], theirs[name]) for name in params) < EXACT


def test_the_outermost_average_is_evaluated() -> None:
    params = {"w": torch.zeros(2), "bias": torch.zeros(1)}
    grads = {"w": torch.ones(2), "bias": torch.ones(1)}
    nested = hn.Nested({"w": hn.ema(hn.lookahead(hn.sgd(lr=1.0), k=2, alpha=0.5), decay=0.75), "bias": hn.sgd(lr=1.0)})
    state = nested.init(params)
    for fast, average in ((-1.0, -0.25), (-1.0, -0.4375), (-2.0, -0.828125)):
        params, state = nested.step(params, grads, state)
        assert torch.equal(params["w"], torch.full((2,), fast))
        assert torch.equal(nested.eval_params(params, state)["w"], torch.full((2,), average))
        assert nested.eval_params(params, state)["bias"] is params["bias"]


def test_evaluated_weights_of_an_optimizer_have_the_parameters_dtype() -> None:
    model = torch.nn.Linear(2, 1).to(torch.bfloat16)
    opt = hn.HyperOptimizer(model.named_parameters(), hn.ema(hn.sgd(lr=1.0), decay=0.5))
    start = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    opt.step()
    found = opt.eval_params()
    assert found["weight"].dtype == torch.bfloat16
    assert torch.allclose(found["weight"], start - 0.5, atol=0.02)
    assert found.keys() == {"weight", "bias"}


def test_combinators_are_checked() -> None:
    with pytest.raises(TypeError, match=r"optimizer=<rule sgd> .FunctionRule. must be an optimizer of this library"):
        hn.clip_by_value(hn.sgd)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has a hyper named 'decay' already; use l2_sp once"):
        hn.l2_sp(hn.coupled_decay(hn.sgd()))
    with pytest.raises(ValueError, match="one chain can have one"):
        over_sum(hn.clip_by_global_norm(hn.sgd()))
    with pytest.raises(ValueError, match="has a hyper named 'max_norm' already"):
        hn.clip_by_norm(hn.clip_by_global_norm(hn.sgd()))
    with pytest.raises(TypeError, match=r"decoupled_decay needs an optimizer with a hyper 'lr'; without_lr has none"):
        hn.decoupled_decay(without_lr())
    with pytest.raises(TypeError, match=r"lookahead has no argument 'every'; it has alpha, k$"):
        hn.lookahead(hn.sgd(), every=3)
    for optimizer, words in (
        (hn.lookahead(hn.sgd(), k=0), "k=0 must be an integer >= 1"),
        (hn.ema(hn.sgd(), decay=1.5), r"decay=1\.5 must be in \[0, 1\]"),
        (hn.l2_sp(hn.sgd(), anchor="middle"), "anchor='middle' must be 'start', 'zero' or a tensor"),
        (hn.l2_sp(hn.sgd(), anchor=torch.ones(3)), r"anchor has shape \(3,\), the parameter \(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            hn.Nested(optimizer).init({"w": torch.ones(2)})


@hn.rule(separable="element")
def without_lr(param: Any, grad: Any, state: Any) -> Any:
    return param - grad, state


def test_a_combinator_that_forgets_its_step_is_told() -> None:
    @hn.combinator
    def forgetful(param: Any, grad: Any, state: Any, step: Any) -> Any:
        return param, state

    nested = hn.Nested(forgetful(hn.sgd()))
    with pytest.raises(RuntimeError, match="forgetful called its step 0 times; it must call it once"):
        nested.step({"w": torch.ones(2)}, {"w": torch.ones(2)}, nested.init({"w": torch.ones(2)}))
    with pytest.raises(TypeError, match="`global_reduce=` and the parameter `reduced` need each other"):

        @hn.combinator(global_reduce=torch.sum)
        def halfway(param: Any, grad: Any, state: Any, step: Any) -> Any:
            return step(param, grad), state


def test_a_chain_can_be_pickled_and_copied() -> None:
    optimizer = CHAINS["all"]()
    params, loss = problem(2)
    expected, _ = run(hn.Nested(optimizer), params, loss, 3)
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        found, _ = run(hn.Nested(other), params, loss, 3)
        assert all(torch.equal(found[name], expected[name]) for name in params)
