"""Variants of FTP's radii, and anchors that move: against plain loops, on all backends, with derivatives by finite differences."""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import DIFFERENCES, EXACT, Tensors, by_differences, examples, gradients, problem, relative_error, replaced, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ftp
import hyperopt_nested as hn
from ftp import FLOOR, FTP, SGDP, AdamP, Radius, ftp_rule

SHAPES = {"kernel": (3, 2, 2), "weight": (4, 3), "bias": (3,), "scalar": ()}
RATES = [0.5, 1.0, 0.8, 0.3, 0.0, 0.2, 1.2, 0.7]
"""Of the learning rate, over the declared one, in successive steps."""

RADII = [
    Radius(*each)
    for each in itertools.product(
        ("tensor", "row", "model"), (None, "log"), (None, "tensor", "row"), (FLOOR, 0.01, "displacement"), (False, True)
    )
    if not (each[0] == "model" and each[4])
]
SOME = [
    Radius(),
    Radius(via="log", start="displacement"),
    Radius(relative="tensor", start=0.01),
    Radius("row", relative="row", scheduled=True),
    Radius("row", "log", "tensor", "displacement", scheduled=True),
    Radius("model", relative="row", start="displacement"),
]


def rows(x: Tensor) -> Tensor:
    """Row sums of absolute values, one a row."""
    return x.abs().sum(tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else x.abs().sum(tuple(range(x.ndim)), keepdim=True)


def loop(
    params: dict[str, Tensor],
    grads_of: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    radius: Radius,
    *,
    lr: float = 0.1,
    decay: float = 1.0,
    saturation: str = "straight-through",
    k: float = 1.0,
    radius_lr: float = 1e-2,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """SGD with a variant of FTP, in plain torch; the weights and the radii after steps with `RATES`."""
    by_row, exact = radius.per == "row", saturation == "exact"
    group = dict.fromkeys(params, "model") if radius.per == "model" else {name: name for name in params}
    anchors, units = dict(params), dict[str, Any]()
    for name, p in params.items():
        norms = rows(p)
        units[name] = {None: 1.0, "tensor": norms.max(), "row": norms}[radius.relative]
    start = math.inf if radius.start == "displacement" else FLOOR if radius.start is None else radius.start
    radii = {g: torch.full_like(rows(params[name]), start) if by_row else torch.tensor(start).double() for name, g in group.items()}
    first, second = ({g: torch.zeros_like(r) for g, r in radii.items()} for _ in range(2))
    last: dict[str, Tensor] = {}
    for t, rate in enumerate(RATES, start=1):
        grads = grads_of(params)
        for g, r in radii.items():
            slope = torch.zeros_like(r)
            for name in last:
                product = grads[name] * last[name]
                part = product.sum(tuple(range(1, product.ndim)), keepdim=True) if by_row and product.ndim > 1 else product.sum()
                slope = slope + part if group[name] == g else slope
            slope = torch.where(slope > 0, k * slope, slope)
            first[g], second[g] = 0.9 * first[g] + 0.1 * slope, 0.999 * second[g] + 0.001 * slope**2
            move = radius_lr * (rate if radius.scheduled else 1.0) * first[g] / (1 - 0.9**t) / ((second[g] / (1 - 0.999**t)).sqrt() + 1e-8)
            radii[g] = (r * (-move).exp() if radius.via == "log" else r - move).clamp(min=FLOOR)
        reached: dict[str, list[Tensor]] = {}
        for name, p in params.items():
            new = p - lr * rate * grads[name]
            moved, reach = new - anchors[name], radii[group[name]] * units[name]
            norms, reach = rows(moved), reach.expand(rows(moved).shape)
            active = norms > reach
            direction = moved / (norms + 1e-8)
            projected = torch.where(active, anchors[name] + direction * reach, new)
            last[name] = direction * units[name] * (active if exact else 1.0) * (radii[group[name]] if radius.via == "log" else 1.0)
            last[name] = torch.where(torch.isfinite(last[name]), last[name], 0)  # the first step, from an infinite radius
            top = norms / units[name] + 1e-8
            reached.setdefault(group[name], []).append(top if by_row else top.max())
            params = {**params, name: projected}
            anchors[name] = decay * anchors[name] + (1 - decay) * projected
        radii = {g: r.clamp(min=FLOOR).minimum(functools.reduce(torch.maximum, reached[g])).clamp(min=FLOOR) for g, r in radii.items()}
    return params, radii


def optimized(
    params: dict[str, Tensor],
    grads_of: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `loop` returns, by an optimizer of declared rate 0.1."""
    weights = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    opt: Any = make(list(weights.items()))
    for rate in RATES:
        for group in opt.param_groups:
            group["lr"] = 0.1 * rate
        for name, grad in grads_of({name: p.detach() for name, p in weights.items()}).items():
            weights[name].grad = grad
        opt.step()
    return {name: p.detach() for name, p in weights.items()}, opt.hypers()["radius"]


def assert_equal(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        for name, value in one.items():
            assert relative_error(value, other.get(name, other.get("model")).reshape(value.shape)) < tolerance, name


@given(st.sampled_from(RADII), st.integers(0, 2**31), st.sampled_from([1.0, 0.9, 0.0]), st.sampled_from(["straight-through", "exact"]))
@examples(25)
def test_every_combination_is_its_equations(radius: Radius, seed: int, decay: float, saturation: Any) -> None:
    params, loss = problem(seed, SHAPES)
    how: dict[str, Any] = {"k": 0.5, "saturation": saturation}
    make = functools.partial(SGDP, lr=0.1, radius=radius, anchor_decay=decay, backend="reference", **how)
    grads_of = functools.partial(gradients, loss)
    assert_equal(optimized(params, grads_of, make), loop(params, grads_of, radius, decay=decay, **how))


@pytest.mark.parametrize("backend", ["foreach", "fused"])
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("radius", SOME, ids=str)
@pytest.mark.usefixtures("quick_programs")
def test_programs_do_the_same(radius: Radius, decay: float, backend: Any) -> None:
    params, loss = problem(3, SHAPES)
    grads_of = functools.partial(gradients, loss)

    def make(named: Any) -> torch.optim.Optimizer:
        opt = SGDP(named, lr=0.1, radius=radius, anchor_decay=decay, backend=backend)
        assert opt.backend == backend
        return opt

    assert_equal(optimized(params, grads_of, make), loop(params, grads_of, radius, decay=decay))


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("radius", SOME, ids=str)
def test_around_an_optimizer_of_torch_they_are_the_same(radius: Radius, decay: float) -> None:
    params, loss = problem(3, SHAPES)
    grads_of = functools.partial(gradients, loss)

    def make(named: Any) -> torch.optim.Optimizer:
        return FTP(torch.optim.SGD(named, lr=0.1), radius=radius, anchor_decay=decay)

    assert_equal(optimized(params, grads_of, make), loop(params, grads_of, radius, decay=decay), EXACT * 100)


@pytest.mark.parametrize("radius", SOME, ids=str)
def test_variants_pass_the_kit(radius: Radius) -> None:
    rule = ftp_rule(hn.sgd(lr=0.1, momentum=0.9), radius=radius, anchor_decay=0.8, saturation="exact")
    hn.testing.check_rule(rule, examples=5)


ANCHORED: dict[str, Callable[..., hn.Optimizer]] = {
    "coupled_decay": functools.partial(hn.coupled_decay, anchor="start"),
    "decoupled_decay": functools.partial(hn.decoupled_decay, anchor="start"),
    "l2_sp": hn.l2_sp,
    "spd": hn.spd,
    "digrap": functools.partial(ftp.digrap, derivative="exact"),
    "learned_spd": ftp.learned_spd,
}


@pytest.mark.parametrize("name", ANCHORED)
def test_moving_anchors_pass_the_kit(name: str) -> None:
    hn.testing.check_rule(ANCHORED[name](hn.sgd(lr=0.1, momentum=0.9), anchor_decay=0.8), examples=5)


def _sides(nested: hn.Nested, params: Tensors, grads: Tensors, state: Any) -> tuple[bool, ...]:
    """On which side of each of its kinks a step is."""
    with hn.rules.watch_kinks() as kinks:
        nested.step(params, grads, state)
    return tuple(side for kink in kinks for side in (kink > 0).flatten().tolist())


@given(
    st.integers(0, 2**31),
    st.sampled_from(["model", "tensor", "row"]),
    st.sampled_from([None, "log"]),
    st.sampled_from([None, "tensor", "row"]),
    st.sampled_from([1.0, 0.7]),
    st.floats(0.02, 0.3),
)
@examples(15)
def test_learned_radii_against_finite_differences(seed: int, per: Any, via: Any, relative: Any, decay: float, radius: float) -> None:
    learned = hn.learn(radius, by=hn.sgd(lr=0.0), per=per, via=via)
    base = hn.sgd(lr=0.1, momentum=0.9)
    nested = hn.Nested(hn.project(base, radius=learned, relative=relative, anchor_decay=decay, saturation="exact"))
    params, loss = problem(seed, {"weight": (3, 2), "bias": (3,)})
    params, state = run(nested, params, loss, 2)
    grads = gradients(loss, params)
    new, after = nested.step(params, grads, state)
    for key, raw in state["hypers"]["radius"].items():
        if len({_sides(nested, params, grads, replaced(state, ("hypers", "radius", key), raw * factor)) for factor in (0.98, 1, 1.02)}) > 1:
            return  # a kink is as near as differences reach
    for key in state["hypers"]["radius"]:
        wanted = by_differences(nested, params, grads, state, ("hypers", "radius", key), loss)
        found = nested.hypergradients(new, gradients(loss, new), after)["radius"][key]
        assert relative_error(found, wanted, 1e-2) < DIFFERENCES


def follow(step: Callable[[Tensor, Tensor, int], Tensor], start: Tensor, decay: float, count: int = 6) -> tuple[Tensor, Tensor]:
    """Weights and anchor after some steps; a step takes weights, anchor and count, and returns weights."""
    weights, anchor = start, start
    for t in range(count):
        weights = step(weights, anchor, t)
        anchor = decay * anchor + (1 - decay) * weights
    return weights, anchor


GRADS = [torch.randn(3, 2, generator=torch.Generator().manual_seed(t), dtype=torch.float64) for t in range(6)]
STEPS: dict[str, tuple[Callable[[hn.Optimizer, float], hn.Optimizer], Callable[[Tensor, Tensor, int], Tensor]]] = {
    "l2_sp": (
        lambda base, decay: hn.l2_sp(base, decay=0.5, anchor_decay=decay),
        lambda w, a, t: w - 0.1 * (GRADS[t] + 0.5 * (w - a)),
    ),
    "decoupled_decay": (
        lambda base, decay: hn.decoupled_decay(base, decay=0.5, anchor="start", anchor_decay=decay),
        lambda w, a, t: w - 0.1 * GRADS[t] - 0.1 * 0.5 * (w - a),
    ),
    "project": (
        lambda base, decay: hn.project(base, radius=0.05, onto=hn.frobenius, anchor_decay=decay),
        lambda w, a, t: a + (w - 0.1 * GRADS[t] - a) * (0.05 / ((w - 0.1 * GRADS[t] - a).norm() + 1e-8)).clamp(max=1),
    ),
}


@pytest.mark.parametrize("backend", ["reference", "foreach", "fused"])
@pytest.mark.parametrize("decay", [1.0, 0.75, 0.0])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.usefixtures("quick_programs")
def test_anchors_follow_the_weights(name: str, decay: float, backend: Any) -> None:
    make, step = STEPS[name]
    weight = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    opt = hn.HyperOptimizer([("weight", weight)], make(hn.sgd(lr=0.1), decay), backend=backend)
    for grad in GRADS:
        weight.grad = grad
        opt.step()
    expected, anchor = follow(step, torch.ones(3, 2, dtype=torch.float64), decay)
    assert relative_error(weight.detach(), expected) < EXACT
    assert relative_error(opt.state[weight]["rule.anchor"], anchor) < EXACT


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: Iterable[int] = range(5)) -> None:
    for step in steps:
        opt.zero_grad()
        (model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))) - 1).square().mean().backward()
        opt.step()


def test_anchors_that_move_are_kept_in_float32() -> None:
    model = network().to(torch.bfloat16)
    for decay, dtype in ((1.0, torch.bfloat16), (0.999, torch.float32)):
        opt = AdamP(model.named_parameters(), anchor_decay=decay)
        assert opt.state[model[0].weight]["rule.anchor"].dtype == dtype


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("wrap", [False, True], ids=["AdamP", "FTP"])
def test_anchors_are_set_anew_between_tasks(wrap: bool, backend: Any) -> None:
    model = network()
    given = {name: p + 0.5 for name, p in model.state_dict().items()}
    opt: Any = AdamP(model.named_parameters(), lr=0.05, anchor=given, exclude="2.bias", backend=backend)
    opt = FTP(torch.optim.AdamW(model.named_parameters(), lr=0.05), exclude="2.bias", backend=backend) if wrap else opt
    projection = opt.projection if wrap else opt
    train(model, opt)
    opt.reset_anchor()
    anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(5, 10):
        train(model, opt, [step])
        for name, p in model.named_parameters():
            if name == "2.bias":
                assert "rule.anchor" not in projection.state[p]
                continue
            assert torch.equal(projection.state[p]["rule.anchor"], anchors[name])
            radius = float(opt.hypers()["radius"][name])
            assert hn.mars.norm(p.detach() - anchors[name]) <= radius * (1 + 1e-5) + 1e-6
            assert radius > 1e-3


@pytest.mark.parametrize("radius", SOME, ids=str)
def test_resuming_is_not_stopping(radius: Radius) -> None:
    model = network()
    make = functools.partial(AdamP, lr=0.05, radius=radius, anchor_decay=0.9, backend="reference")
    opt = make(model.named_parameters())
    train(model, opt)
    other = copy.deepcopy(model)
    resumed = make(other.named_parameters())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for net, each in ((model, opt), (other, resumed)):
        train(net, each, range(5, 10))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_radii_are_relative_to_weights_that_are_loaded_after_construction() -> None:
    model = network()
    opt = SGDP(model.named_parameters(), lr=0.1, radius=Radius(relative="row"))
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[0].weight[1].zero_()
        model[2].bias.zero_()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, opt, [0])
    norms = before["0.weight"].abs().sum(1, keepdim=True)
    norms[1] = norms.max()  # a row of zeros has the size of the largest
    torch.testing.assert_close(opt.state[model[0].weight]["rule.anchor_norm"], norms)
    assert opt.state[model[2].bias]["rule.anchor_norm"].tolist() == [1.0]


def test_radii_follow_the_schedule_of_the_learning_rate() -> None:
    """Adam moves a radius by its rate at most: once the schedule has ended at zero, no radius moves."""
    for make in (
        lambda model, radius: AdamP(model.named_parameters(), lr=0.05, radius=radius),
        lambda model, radius: FTP(torch.optim.AdamW(model.parameters(), lr=0.05, fused=True), radius=radius),
    ):
        for scheduled in (False, True):
            model = network()
            opt = make(model, Radius(scheduled=scheduled))
            scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: max(0.0, 1 - step / 5))
            for step in range(8):
                before = {**opt.learned()}
                train(model, opt, [step])
                bound = 1e-2 * (max(0.0, 1 - step / 5) if scheduled else 1.0)
                assert all(value - before[name] <= bound * 1.5 + 1e-12 for name, value in opt.learned().items())
                scheduler.step()


def test_the_learning_rate_that_schedules_are_relative_to_is_that_before_warm_up() -> None:
    model = network()
    inside = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LinearLR(inside, start_factor=0.1)
    opt = FTP(inside, radius=Radius(scheduled=True))
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)
    bindings = opt.projection._nested.bindings
    assert bindings["0.0"].factor("lr", {"lr": 0.01}) == pytest.approx(0.1)


def test_a_rate_of_radii_that_is_learned_follows_the_schedule_too() -> None:
    model = network()
    radius_lr = hn.learn(1e-2, by=hn.sgd(lr=1e-6))
    opt = AdamP(model.named_parameters(), lr=0.05, radius_lr=radius_lr, radius=Radius(scheduled=True))
    assert opt.backend == "reference"  # programs step shared values without the numbers of a group
    opt.param_groups[0]["lr"] = 0.0
    train(model, opt)
    assert all(value == FLOOR for name, value in opt.learned().items() if name.startswith("radius/"))
    with pytest.raises(ValueError, match="the learner of radius, which is scheduled, shares values between tensors"):
        AdamP(model.named_parameters(), radius_lr=radius_lr, radius=Radius(scheduled=True), backend="foreach")


class Bare(torch.optim.Optimizer):
    """Without a learning rate."""

    def step(self, closure: Any = None) -> Any: ...


@hn.rule(separable="element")
def paced(param: Tensor, grad: Tensor, state: Any, *, rate: Tensor = hn.Positive(0.1)) -> tuple[Tensor, Any]:
    """Without a hyper of that name."""
    return param - rate * grad, state


def made(**settings: Any) -> AdamP:
    return AdamP(network().named_parameters(), **settings)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Radius(per="element"), "per='element' of a radius must be 'model' or 'tensor' or 'row'"),  # type: ignore[arg-type]
        (lambda: Radius(via="logit"), "via='logit' of a radius must be None or 'log'"),  # type: ignore[arg-type]
        (lambda: Radius(relative="layer"), "relative='layer' of a radius must be 'tensor' or 'row' or None"),  # type: ignore[arg-type]
        (lambda: Radius(start=0.0), r"start=0\.0 must be between ftp\.FLOOR and 1e\+20, None or 'displacement'"),
        (lambda: Radius(start=True), r"start=True \(bool\) must be a number, None or 'displacement'"),
        (lambda: Radius(scheduled=1), r"scheduled=1 \(int\) must be True or False"),  # type: ignore[arg-type]
        (lambda: Radius(per="model", scheduled=True), "scheduled=True needs per='tensor' or 'row'"),
        (lambda: made(radius=0.1), r"radius=0\.1 \(float\) must be an ftp\.Radius"),
        (
            lambda: made(anchor="zero", radius=Radius(relative="row")),
            "relative='row' needs an anchor that has a norm; anchor='zero' has none",
        ),
        (lambda: made(anchor="zero", anchor_decay=0.9), r"anchor_decay=0\.9 moves the anchor, but anchor='zero' is not kept"),
        (lambda: made(anchor_decay=1.1), r"anchor_decay=1\.1 must be in \[0, 1\]"),
        (lambda: ftp_rule(paced(), radius=Radius(scheduled=True)), "radius is learned with scheduled_by='lr', which is no hyper"),
        (
            lambda: FTP(Bare([nn.Parameter(torch.ones(2))], {}), radius=Radius(scheduled=True)),
            "scheduled=True of radius needs groups with 'lr'; group 0 of the optimizer has params",
        ),
        (lambda: hn.learn(0.1, by=hn.sgd(), scheduled_by="lr"), "all tensors share the value, and may have several schedules"),
        (lambda: hn.learn(0.1, by=paced(), per="row", scheduled_by="lr"), "has no lr to multiply"),
        (
            lambda: hn.Nested(hn.project(hn.sgd(), onto=hn.linf, relative="row")).init({"w": torch.ones(2)}),
            "relative='row' needs a ball that goes by row, hn.mars or hn.row_l2; onto is linf",
        ),
    ],
)
def test_what_does_not_go_together_is_named(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()
