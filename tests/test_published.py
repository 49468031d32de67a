"""Rules and combinators from the literature are the programs that others published: 50 steps, to rounding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import torch
from cases import EXACT, SHAPES, Tensors, examples, gradients, problem, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st
from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hyperopt_nested as hn

Params = list[torch.nn.Parameter]
Settings = dict[str, Any]
STEPS = 50
START = {**SHAPES, "zero": (2, 3), "empty": (0, 3)}
NEGLIGIBLE = 1e-30  # an eps that changes no digit

lr = st.floats(1e-3, 0.3)
beta = st.floats(0.01, 0.999)  # others compute 1 - (1 - beta), which has no digits of a tiny one
of_squares = st.floats(0.3, 0.999)  # where squares are hardly remembered, a small one next to eps magnifies rounding
decay = st.floats(1e-3, 0.5)
eps = st.sampled_from([1e-8, 1e-3, 1e-1])
MAY_VANISH = ("lr", "momentum", "beta1", "weight_decay")


class Reference:
    """Another program: what it does to some tensors, and which weights it evaluates with."""

    def __init__(self, optimizer: Any, evaluated: Callable[[], list[torch.Tensor]] | None = None, before: Callable[[], None] | None = None):
        self.optimizer, self.evaluated, self.before = optimizer, evaluated, before

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.before is not None:
            self.before()
        self.optimizer.step()


@dataclass
class Pair:
    """Settings to draw, our optimizer with them, and the other program with them."""

    settings: st.SearchStrategy[Settings]
    ours: Callable[..., hn.Optimizer]
    theirs: Callable[[Params, Settings], Reference]
    tensors: tuple[str, ...] = tuple(START)
    lr_moves: bool = True
    never_zero: str = ""


def betas(settings: Settings) -> Settings:
    """The settings, with beta1, beta2, ... as a tuple."""
    found = {key: value for key, value in settings.items() if not key.startswith("beta")}
    return {**found, "betas": tuple(value for key, value in sorted(settings.items()) if key.startswith("beta"))}


def lamb_reference(params: Params, settings: Settings) -> Reference:
    """Without bias correction: that is the same if the decay is scaled alike, since LAMB scales directions, but those at zero."""
    optimizer: Any = pytorch_optimizer.Lamb(params, **betas(settings), weight_decouple=False, adam_debias=True)
    optimizer.clamp = float("inf")  # the paper bounds no norm
    group = optimizer.param_groups[0]

    def scale_decay() -> None:
        step = group.get("step", 0) + 1
        correction = (1 - settings["beta2"] ** step) ** 0.5 / (1 - settings["beta1"] ** step)
        group["weight_decay"] = settings["weight_decay"] / correction

    return Reference(optimizer, before=scale_decay)


def schedule_free_reference(optimizer: Any, params: Params) -> Reference:
    def evaluated() -> list[torch.Tensor]:
        optimizer.eval()
        found = [p.detach().clone() for p in params]
        optimizer.train()
        return found

    optimizer.train()
    return Reference(optimizer, evaluated)


def lookahead_reference(params: Params, settings: Settings) -> Reference:
    sgd = torch.optim.SGD(params, lr=settings["lr"], momentum=settings["momentum"])
    optimizer = pytorch_optimizer.Lookahead(sgd, k=settings["k"], alpha=settings["alpha"])
    return Reference(optimizer, lambda: [optimizer.state[p]["slow_params"] for p in params])


def ema_reference(params: Params, settings: Settings) -> Reference:
    model = torch.nn.ParameterList(params)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings["decay"]))
    average.update_parameters(model)  # the first call copies the start
    optimizer = torch.optim.AdamW(params, lr=settings["lr"])
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    return Reference(optimizer, lambda: [p.detach() for p in average.parameters()])


def sgd_reference(params: Params, settings: Settings, change_gradients: Callable[[], Any]) -> Reference:
    return Reference(torch.optim.SGD(params, lr=settings["lr"], momentum=settings["momentum"]), before=change_gradients)


def around_sgd(combinator: Any) -> Callable[..., hn.Optimizer]:
    return lambda lr, momentum, **more: combinator(hn.sgd(lr=lr, momentum=momentum), **more)


def around_adam(combinator: Any) -> Callable[..., hn.Optimizer]:
    return lambda weight_decay, **adam: combinator(hn.adam(**adam), decay=weight_decay)


def clip_each(params: Params, max_norm: float) -> None:
    for p in params:
        torch.nn.utils.clip_grad_norm_([p], max_norm)


def centralize_each(params: Params) -> None:
    for p in params:
        assert p.grad is not None
        centralize_gradient(p.grad)


drawn = st.fixed_dictionaries
adam_like = {"lr": lr, "beta1": beta, "beta2": of_squares, "eps": eps, "weight_decay": decay}
momentum_like = {"lr": lr, "momentum": st.floats(0.1, 0.99)}
averaging = {
    "lr": lr,
    "weight_decay": decay,
    "r": st.sampled_from([0.0, 0.5, 2.0]),
    "weight_lr_power": st.sampled_from([0.0, 0.5, 2.0]),
    "warmup_steps": st.sampled_from([0, 1, 7]),
}
interpolation = st.floats(0.1, 0.999)  # schedulefree divides by it
max_norm = st.floats(0.1, 10.0)

PAIRS: dict[str, Pair] = {
    "lion": Pair(
        drawn({"lr": lr, "beta1": beta, "beta2": beta, "weight_decay": decay}),
        hn.lion,
        lambda params, s: Reference(pytorch_optimizer.Lion(params, **betas(s))),
    ),
    # Without eps; vectors it leaves to SGD; it multiplies by lr after the momentum, the paper before.
    "lars": Pair(
        drawn({**momentum_like, "trust_coefficient": st.floats(1e-3, 1.0), "weight_decay": decay, "eps": st.just(NEGLIGIBLE)}),
        hn.lars,
        lambda params, s: Reference(pytorch_optimizer.LARS(params, **{key: value for key, value in s.items() if key != "eps"})),
        tensors=("weight", "kernel", "zero", "empty"),
        lr_moves=False,
    ),
    # It adds eps to a norm, too; see the reference for a tensor that is zero.
    "lamb": Pair(
        drawn({**adam_like, "eps": st.just(NEGLIGIBLE)}), hn.lamb, lamb_reference, tensors=("scalar", "bias", "weight", "kernel", "empty")
    ),
    "adabelief": Pair(
        drawn({**adam_like, "eps": st.sampled_from([1e-16, 1e-8, 1e-2])}),
        hn.adabelief,
        lambda params, s: Reference(pytorch_optimizer.AdaBelief(params, **betas(s))),
    ),
    "adan": Pair(
        drawn({**adam_like, "beta2": beta, "beta3": of_squares, "no_prox": st.booleans()}),
        hn.adan,
        lambda params, s: Reference(
            pytorch_optimizer.Adan(params, **betas({k: v for k, v in s.items() if k != "no_prox"}), weight_decouple=s["no_prox"])
        ),
    ),
    "mada, yogi": Pair(
        drawn({**adam_like, "beta2": of_squares}),
        lambda **s: hn.mada(yogi=1.0, **s),
        lambda params, s: Reference(pytorch_optimizer.Yogi(params, initial_accumulator=0.0, adam_debias=False, **betas(s))),
    ),
    "schedule_free_sgd": Pair(
        drawn({**averaging, "momentum": interpolation}),
        hn.schedule_free_sgd,
        lambda params, s: schedule_free_reference(schedulefree.SGDScheduleFree(params, **s), params),
        never_zero="momentum",
    ),
    "schedule_free_adamw": Pair(
        drawn({**averaging, "beta1": interpolation, "beta2": of_squares, "eps": eps}),
        hn.schedule_free_adamw,
        lambda params, s: schedule_free_reference(schedulefree.AdamWScheduleFree(params, **betas(s)), params),
        never_zero="beta1",
    ),
    "prodigy": Pair(
        drawn(
            {
                **adam_like,
                "beta2": of_squares,
                "d_coef": st.floats(0.1, 3.0),
                "d0": st.sampled_from([1e-6, 1e-2]),
                "beta3": st.sampled_from([None, 0.8]),
                "growth_rate": st.sampled_from([1.1, float("inf")]),
                **{option: st.booleans() for option in ("decouple", "use_bias_correction", "safeguard_warmup")},
            }
        ),
        hn.prodigy,
        lambda params, s: Reference(
            prodigyopt.Prodigy(params, beta3=s["beta3"], **betas({key: value for key, value in s.items() if key != "beta3"}))
        ),
        never_zero="lr beta1",
    ),
    "lookahead": Pair(
        drawn({**momentum_like, "k": st.integers(1, 7), "alpha": st.floats(0.0, 0.99)}), around_sgd(hn.lookahead), lookahead_reference
    ),
    "ema": Pair(drawn({"lr": lr, "decay": beta}), lambda lr, decay: hn.ema(hn.adamw(lr=lr), decay=decay), ema_reference),
    "clip_by_global_norm": Pair(
        drawn({**momentum_like, "max_norm": max_norm}),
        around_sgd(hn.clip_by_global_norm),
        lambda params, s: sgd_reference(params, s, lambda: torch.nn.utils.clip_grad_norm_(params, s["max_norm"])),
    ),
    "clip_by_norm": Pair(
        drawn({**momentum_like, "max_norm": max_norm}),
        around_sgd(hn.clip_by_norm),
        lambda params, s: sgd_reference(params, s, lambda: clip_each(params, s["max_norm"])),
    ),
    "clip_by_value": Pair(
        drawn({**momentum_like, "max_value": st.floats(0.1, 3.0)}),
        around_sgd(hn.clip_by_value),
        lambda params, s: sgd_reference(params, s, lambda: torch.nn.utils.clip_grad_value_(params, s["max_value"])),
    ),
    "centralize": Pair(
        drawn(momentum_like), around_sgd(hn.centralize), lambda params, s: sgd_reference(params, s, lambda: centralize_each(params))
    ),
    "coupled_decay": Pair(
        drawn(adam_like), around_adam(hn.coupled_decay), lambda params, s: Reference(torch.optim.Adam(params, **betas(s)))
    ),
    "decoupled_decay": Pair(
        drawn(adam_like), around_adam(hn.decoupled_decay), lambda params, s: Reference(torch.optim.AdamW(params, **betas(s)))
    ),
}


def compare(pair: Pair, settings: Settings, seed: int) -> float:
    """Largest difference over all steps of tensors, and of weights to evaluate with, relative to the tensor's largest entry so far.

    Gradients have exact zeros, one tensor starts at zero, and the learning rate falls and rises again.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: START[key] for key in pair.tensors}
    ours: Tensors = {key: randn(shape, generator) * (key != "zero") for key, shape in shapes.items()}
    theirs = {key: torch.nn.Parameter(p.clone()) for key, p in ours.items()}
    nested = hn.Nested(pair.ours(**settings))
    state = nested.init(ours)
    reference = pair.theirs(list(theirs.values()), settings)
    errors: list[float] = []
    largest = dict.fromkeys(shapes, 0.0)
    for step in range(STEPS):
        rate = settings["lr"] * (0.5 if pair.lr_moves and 20 <= step < 35 else 1.5 if pair.lr_moves and step >= 35 else 1.0)
        grads = {key: randn(shape, generator) * (torch.rand(shape, generator=generator) > 0.2) for key, shape in shapes.items()}
        ours, state = nested.step(ours, grads, state, {key: {"lr": rate} for key in shapes})
        for key, p in theirs.items():
            p.grad = grads[key].clone()
        reference.step(rate)
        found = [(ours, [p.detach() for p in theirs.values()])]
        if reference.evaluated is not None and step % 5 == 0:
            found.append((nested.eval_params(ours, state), reference.evaluated()))
        for own, other in found:
            for (key, size), expected in zip(largest.items(), other, strict=True):
                largest[key] = max(size, expected.abs().amax().item() if expected.numel() else 0.0)
                errors.append(relative_error(own[key], expected, largest[key]))
    return torch.tensor(errors).max().item()  # NaN if one is


@pytest.mark.parametrize("name", PAIRS)
@given(data=st.data(), seed=st.integers(0, 2**31))
@examples(8)
def test_rules_are_the_published_programs(name: str, data: st.DataObject, seed: int) -> None:
    pair = PAIRS[name]
    settings = data.draw(pair.settings)
    vanishing = data.draw(st.sampled_from([None, *(key for key in settings if key in MAY_VANISH and key not in pair.never_zero.split())]))
    settings = {key: 0.0 if key == vanishing else value for key, value in settings.items()}
    assert compare(pair, settings, seed) < EXACT, settings


def trajectory(optimizer: hn.Optimizer) -> list[Tensors]:
    """Tensors after each of some steps."""
    generator = torch.Generator().manual_seed(0)
    params = {key: randn(shape, generator) for key, shape in START.items()}
    nested, seen = hn.Nested(optimizer), []
    state = nested.init(params)
    for _ in range(STEPS):
        grads = {key: randn(shape, generator) * (torch.rand(shape, generator=generator) > 0.2) for key, shape in START.items()}
        params, state = nested.step(params, grads, state)
        seen.append(params)
    return seen


@pytest.mark.parametrize(
    ("corner", "expected"),
    [
        (hn.mada(0.1), hn.adam(0.1)),
        (hn.mada(0.1, weight_decay=0.2), hn.adamw(0.1, weight_decay=0.2)),
        (hn.mada(0.1, amsgrad=1.0, weight_decay=0.2, beta2=0.9), hn.adamw(0.1, amsgrad=True, weight_decay=0.2, beta2=0.9)),
        (hn.mada(0.1, betas=(0.98, 0.99, 0.92)), hn.adan(0.1)),
        (hn.mada(0.1, betas=(0.8, 0.9, 0.7), weight_decay=0.2), hn.adan(0.1, betas=(0.8, 0.7, 0.9), weight_decay=0.2, no_prox=True)),
    ],
)
def test_corners_of_mada_are_other_rules(corner: hn.Optimizer, expected: hn.Optimizer) -> None:
    for found, wanted in zip(trajectory(corner), trajectory(expected), strict=True):
        for key, value in wanted.items():
            assert relative_error(found[key], value) < EXACT


def test_averages_and_maxima_in_mada_by_hand() -> None:
    """Gradients 2, 1 and 0 with beta1 = 0 and beta2 = 1/2: second moments 2, 3/2 and 3/4, without their bias 4, 2 and 6/7."""
    for settings, second in (({"avgrad": 1.0}, 3.0), ({"avgrad": 0.5}, 2.5), ({"avgrad": 0.5, "amsgrad": 0.5}, (7 / 3 + 3) / 2)):
        nested = hn.Nested(hn.mada(0.1, betas=(0.0, 0.5, 0.0), eps=NEGLIGIBLE, **settings))
        before, params = {}, {"w": torch.tensor(0.0, dtype=torch.float64)}
        state = nested.init(params)
        for grad in (2.0, 1.0):
            before, (params, state) = params, nested.step(params, {"w": torch.tensor(grad, dtype=torch.float64)}, state)
        assert (before["w"] - params["w"]).item() == pytest.approx(0.1 / second**0.5, rel=EXACT)


def test_layerwise_rules_by_hand() -> None:
    """What the comparison leaves out: eps, and LAMB from zero. Its first direction, after bias correction, is g / (|g| + eps)."""
    w, g = torch.tensor([[3.0, -4.0]]), torch.tensor([[0.6, 0.8]])
    direction = g / (g.abs() + 0.1)
    decayed = direction + 0.2 * w
    for optimizer, start, moved in [
        (hn.lars(lr=0.5, trust_coefficient=0.01, weight_decay=0.2, eps=0.1), w, 0.5 * 0.01 * 5.0 / (1.0 + 0.2 * 5.0 + 0.1) * (g + 0.2 * w)),
        (hn.lamb(lr=0.5, weight_decay=0.2, eps=0.1), w, 0.5 * 5.0 / decayed.norm() * decayed),
        (hn.lamb(lr=0.5, weight_decay=0.2, eps=0.1), 0 * w, 0.5 * direction),
    ]:
        nested = hn.Nested(optimizer)
        new, _ = nested.step({"w": start}, {"w": g}, nested.init({"w": start}))
        torch.testing.assert_close(new["w"], start - moved, rtol=EXACT, atol=0.0)


@pytest.mark.parametrize("make", [hn.schedule_free_sgd, hn.schedule_free_adamw])
def test_schedule_free_starts_where_the_first_step_does(make: Callable[..., hn.Optimizer]) -> None:
    """As published: weights may be loaded after the optimizer has been made."""
    params, loss = problem(2)
    nested = hn.Nested(make(lr=0.1))
    states = nested.init(params), nested.init({key: torch.zeros_like(p) for key, p in params.items()})
    (expected, _), (found, _) = (nested.step(params, gradients(loss, params), state) for state in states)
    assert all(torch.equal(found[key], expected[key]) for key in params)


@pytest.mark.parametrize("make", [hn.sgd_hd, hn.adam_hd])
def test_hypergradient_descent_is_the_published_algorithm(make: Callable[..., hn.Optimizer]) -> None:
    """The learning rate grows by hyper_lr times the inner product of the gradient with the last direction, and is never negative."""
    params, loss = problem(1)
    rate, hyper_lr = 0.01, 1e-3
    nested = hn.Nested(make(lr=rate, hyper_lr=hyper_lr))
    state = nested.init(params)
    direction = {key: torch.zeros_like(p) for key, p in params.items()}
    for _ in range(STEPS):
        grads = gradients(loss, params)
        rate += hyper_lr * sum((grads[key] * direction[key]).sum().item() for key in grads)
        new, state = nested.step(params, grads, state)
        assert nested.hypers(state)["lr"]["model"].item() == pytest.approx(rate, rel=EXACT)
        params, direction = new, {key: (p - new[key]) / rate for key, p in params.items()}
    _, state = nested.step(params, {key: -1e6 * each for key, each in direction.items()}, state)
    assert nested.hypers(state)["lr"]["model"].item() == 0.0
