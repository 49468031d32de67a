"""`hn.learn(1e-3)` and `hn.learn()`: the default recipes, on every rule, and a level under a shape."""

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch

import ftp
import hyperopt_nested as hn
from hyperopt_nested import registry
from hyperopt_nested.optim.level import shape
from hyperopt_nested.recipes import EPS, FACTOR, RATE, recipe
from hyperopt_nested.testing.subject import losses, subject
from hyperopt_nested.trees import flatten

INF = math.inf
NONE = -INF, INF
LEARNED = "hypers", "learners", "nonfinite", "pinned"


@pytest.mark.parametrize(
    ("hyper", "value", "via", "rate", "bounds"),
    [
        (hn.Positive(1e-3), 1e-3, "log", RATE, (1e-7, 10.0)),
        (hn.NonNegative(1e-3), 0.5, "log", RATE, (5e-5, 5e3)),
        (hn.NonNegative(0.0), 0.0, "projection", 1e-3, NONE),
        (hn.NonNegative(1e-2), 0.0, "projection", 1e-3, NONE),
        (hn.Interval(1.2, 1.0, INF), 1.2, "log", RATE, (1 + 2e-5, 2001.0)),
        (hn.UnitInterval(0.9), 0.9, "logit", RATE, (9e-4 / (1 + 9e-4), 9e4 / (1 + 9e4))),
        (hn.UnitInterval(0.9), 0.0, "projection", 0.01, NONE),
        (hn.Interval(0.5, 0.0, 2.0), 2.0, "projection", 0.02, NONE),
        (hn.Real(0.0), 0.0, "projection", 0.01, NONE),
        (hn.Real(-30.0), -30.0, "projection", 0.3, NONE),
        (hn.Interval(-0.8, -INF, 0.0), -0.8, "projection", 0.01, NONE),
        (hn.Positive(1e-3, via="softplus"), 1e-3, "softplus", RATE, (1e-7, 10.0)),
    ],
)
def test_the_recipe_goes_by_domain_and_start(hyper: Any, value: float, via: str, rate: float, bounds: tuple[float, float]) -> None:
    found = recipe(hyper, value, None)
    assert str(found.via) == via
    assert found.rate == pytest.approx(rate)
    assert found.bounds == pytest.approx(bounds)


def test_what_is_given_is_kept() -> None:
    optimizer = hn.adamw(lr=hn.learn(1e-3, via="projection"), beta1=hn.learn(0.5, bounds=(0, None)), eps=hn.learn(by=hn.sgd()))
    assert (optimizer.via("lr"), optimizer.learned["lr"].by.declared["lr"]) == (None, pytest.approx(RATE * 1e-3))
    assert (str(optimizer.via("beta1")), optimizer.learned["beta1"].bounds) == ("logit", (0, INF))
    assert (optimizer.via("eps"), optimizer.learned["eps"].bounds, optimizer.declared["eps"]) == (None, NONE, 1e-8)
    assert [hn.adamw(lr=hn.learn(1e-3, delayed=each)).learned["lr"].delayed for each in (None, False)] == [True, False]
    explicit = hn.learn(1e-3, hn.sgd(lr=1e-5), per="tensor")
    assert hn.adamw(lr=explicit).learned["lr"] is explicit
    assert hn.adamw(lr=hn.learn(1e-3, hn.sgd())).via("lr") is None
    with pytest.raises(ValueError, match=r"value=0\.001 is outside bounds=\(1, inf\)"):
        hn.adamw(lr=hn.learn(bounds=(1, None)))
    with pytest.raises(ValueError, match=r"adamw: lr=-1 is outside its domain"):
        hn.adamw(lr=hn.learn(-1))
    with pytest.raises(TypeError, match=r"learn: delayed=1 \(int\) must be True or False"):
        hn.learn(delayed=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"learn: value=sgd\(.*must be a number"):
        hn.learn(hn.sgd())  # type: ignore[arg-type]


def test_it_is_shown_as_it_was_written() -> None:
    assert repr([hn.learn(), hn.learn(0.1), hn.learn(per="row")]) == "[learn(), learn(0.1), learn(per='row')]"
    assert repr(hn.sgd(hn.learn(0.1, delayed=False)).learned) == "{'lr': learn(0.1, delayed=False)}"
    shown = "sgd(lr=learn(0.001), momentum=learn(0.5, per='tensor'), dampening=0.0, weight_decay=0.0)"
    assert repr(hn.sgd(hn.learn(), momentum=hn.learn(0.5, per="tensor"))) == shown


def test_one_object_is_one_learned_hyper() -> None:
    rate = hn.learn()
    assert hn.adamw(lr=rate).learned["lr"] is hn.adamw(lr=rate, weight_decay=0.1).learned["lr"]
    model = torch.nn.Linear(2, 1)
    opt = hn.HyperOptimizer(model.named_parameters(), lambda name, _: hn.adamw(lr=rate, amsgrad=name == "bias"))
    assert opt.learned() == {"lr": pytest.approx(1e-3)}
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": rate}]
    assert hn.optim.AdamW(groups, lr=rate).learned() == {"lr": pytest.approx(1e-3)}
    with pytest.raises(ValueError, match=r"adamw: beta1 and beta2 are one learn\(\.\.\.\) object"):
        hn.optim.AdamW(model.parameters(), betas=(rate, rate))
    with pytest.raises(ValueError, match=r"given to eps in Positive \(0, inf\) and to lr of sgd"):
        hn.Nested({"a": hn.adamw(eps=rate), "b": hn.sgd(lr=rate)})
    with pytest.raises(ValueError, match=r"hypers lr whose defaults differ, 0\.001 and 0\.01 of rmsprop: give it a start"):
        hn.Nested({"a": hn.adamw(lr=rate), "b": hn.rmsprop(lr=rate)})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copied", "pickled"])
def test_copies_go_on(copied: Any) -> None:
    rate = hn.learn(per="tensor")
    model, data = torch.nn.Linear(2, 1), torch.ones(3, 2)
    opt = hn.optim.AdamW(model.named_parameters(), lr=rate, total_steps=100)
    for _ in range(2):
        model(data).square().mean().backward()
        opt.step()
    again = copied(opt)
    assert again.learned() == opt.learned()
    for one in (opt, again):
        for p in one.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        one.step()
    assert again.learned() == opt.learned()


def test_a_start_that_is_missing_is_the_classs_default_then_the_rules() -> None:
    params = [torch.nn.Parameter(torch.ones(2, 2))]

    class Fast(hn.optim.DropIn, rule=hn.adamw, defaults={"lr": 0.5, "betas": (0.8, 0.9)}): ...

    assert Fast(params, lr=hn.learn(), betas=(hn.learn(), 0.7)).learned() == {"lr": pytest.approx(0.05), "beta1": pytest.approx(0.8)}
    assert Fast([{"params": params, "lr": hn.learn()}], lr=0.1).learned() == {"lr": pytest.approx(0.01)}
    opt = hn.optim.Adafactor(params, eps=(None, hn.learn()))
    assert opt.learned() == {"eps2": pytest.approx(1e-3)}
    opt = ftp.AdamP(params, weight_decay=hn.learn(), radius_lr=hn.learn())
    assert opt.learned()["weight_decay"] == 0
    assert [value for name, value in opt.learned().items() if name.startswith("radius.lr")] == [pytest.approx(1e-2)]
    for around, start in ((ftp.digrap, 0.1), (ftp.learned_spd, 0.01)):
        assert hn.HyperOptimizer(params, around(hn.sgd(), hn.learn())).learned()[f"{'strength' if start == 0.1 else 'decay'}.lr"] == (
            pytest.approx(start)
        )


def problem() -> tuple[dict[str, torch.Tensor], Any]:
    generator = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(3, 4, generator=generator)}
    data = torch.randn(8, 4, generator=generator)
    return params, lambda params: ((data @ params["a"]).tanh() @ params["b"] - data).square().mean()


def learnable(template: hn.Optimizer) -> list[str]:
    return [name for name, domain in template.rule.hypers.items() if name not in template.rule.nondifferentiable and not domain.is_loss]


def begun(nested: hn.Nested, params: dict[str, torch.Tensor]) -> Any:
    """The state before the first step; None if the rule has no use for a learned hyper, or sums it up over all tensors."""
    try:
        return nested.init(params)
    except ValueError as error:
        if "does not use it" in str(error) or "enters the sum over all tensors" in str(error):
            return None
        raise


@pytest.mark.parametrize("per", ["model", "row"])
@hn.testing.every_rule("hyperopt_nested", "ftp")
def test_every_hyper_of_every_rule(name: str, per: Any) -> None:
    """Values stay finite and in the domain; where a hypergradient was not zero, the value has moved."""
    template = subject(name).template
    for hyper in learnable(template):
        domain = template.rule.hypers[hyper]
        for learn in (hn.learn(per=per), hn.learn(template.declared[hyper] or 0.3 * (hyper != "weight_decay"), per=per)):
            params, loss = problem()
            nested = hn.Nested(template.replace(**{hyper: learn}))
            if (st := begun(nested, params)) is None:
                continue
            start, pulled = nested.hypers(st)[hyper], dict[str, torch.Tensor]()
            for _ in range(4):
                grads, values = torch.func.grad(loss)(params), losses(template, params)
                for key, grad in nested.hypergradients(params, nested.descended(grads), st)[hyper].items():
                    pulled[key] = pulled.get(key, 0) + grad.abs()
                params, st = nested.step(params, grads, st, values)
            assert all(param.isfinite().all() for param in params.values()), (hyper, params)
            for key, value in nested.hypers(st)[hyper].items():
                for each in value.flatten().tolist():
                    domain.check(hyper, each)
                was = nested.learned[hyper].hyper.to_value(nested.init(problem()[0])["hypers"][hyper][key], nested.learned[hyper].via)
                assert torch.equal(was, start[key])
                stays = (value == start[key]) & (pulled[key] > 0)
                at_end = torch.tensor([each in (domain.lower, domain.upper) for each in value.flatten().tolist()]).view_as(value)
                assert not (stays & ~at_end).any(), (hyper, learn, value, pulled)


@hn.testing.every_rule("hyperopt_nested", "ftp")
def test_a_delayed_step_moves_the_tensors_first(name: str) -> None:
    """By the values as they were; then the learners step with the hypergradients that they had before, if these are finite."""
    template = subject(name).template
    template = template.replace(**template.declared)
    for hyper in learnable(template):
        params, loss = problem()
        nested = hn.Nested(template.replace(**{hyper: hn.learn(template.declared[hyper] or 0.1, hn.adam(lr=0.01), delayed=True)}))
        if (st := begun(nested, params)) is None:
            continue
        for step in range(3):
            grads, values = torch.func.grad(loss)(params), losses(template, params)
            if step == 2:
                grads["a"][0] = math.nan
            wanted, moved = nested.step(params, grads, st, values, learn=False)
            learned = nested.hyper_step(params, grads, st, values)
            params, st = nested.step(params, grads, st, values)
            wanted = flatten({"params": wanted, **{part: (learned if part in LEARNED else moved)[part] for part in st}})
            for path, leaf in flatten({"params": params, **st}).items():
                torch.testing.assert_close(leaf, wanted[path], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", sorted({*hn.optim.__all__} - {"DropIn", "HyperOptimizer"}))
def test_every_class(name: str) -> None:
    params, loss = problem()
    tensors = [torch.nn.Parameter(param) for param in params.values()]
    opt = getattr(hn.optim, name)(tensors, **({} if name in ("SGDHD", "AdamHD") else {"lr": hn.learn()}), backend="reference")
    start = opt.learned()["lr"]
    for _ in range(4):
        opt.zero_grad()
        loss(dict(zip(params, tensors, strict=True))).backward()
        opt.step()
    assert opt.learned()["lr"] != start
    assert all(p.isfinite().all() for p in tensors)


def trained(steps: int, make: Any, scheduler: Any = None, begin: Any = None) -> tuple[Any, Any, list[dict[str, float]]]:
    """The optimizer, the tensors, and learned values after each step."""
    params, loss = problem()
    tensors = {name: torch.nn.Parameter(param) for name, param in params.items()}
    opt = make(tensors.values())
    schedule = scheduler(opt) if scheduler else None
    if begin is not None:
        opt.load_state_dict(copy.deepcopy(begin[0].state_dict()))
        for mine, theirs in zip(tensors.values(), begin[1].values(), strict=True):
            mine.data.copy_(theirs)
    values = []
    for _ in range(steps):
        opt.zero_grad()
        loss(tensors).backward()
        opt.step()
        if schedule:
            schedule.step()
        values.append(opt.learned())
    return opt, tensors, values


@pytest.mark.parametrize(("total", "decay"), [(None, hn.learn()), (40, hn.learn()), (40, 0.1)], ids=["none", "level", "settled"])
@pytest.mark.parametrize("backend", ["foreach", "fused"])
def test_backends_agree_and_resume(backend: Any, total: Any, decay: Any) -> None:
    def make(backend: Any) -> Any:
        return lambda params: hn.optim.AdamW(params, lr=hn.learn(1e-3), weight_decay=decay, backend=backend, total_steps=total)

    _, expected, values = trained(12, make("reference"))
    opt, found, others = trained(12, make(backend))
    assert opt.backend == backend
    for mine, theirs in zip(values, others, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-6)
    _, again, rest = trained(7, make(backend), begin=trained(5, make(backend)))
    assert rest == others[5:]
    assert all(torch.equal(again[name], p) for name, p in found.items())


def test_a_step_is_capped() -> None:
    """At twice the learner's rate, also where each gradient is far larger than all before."""
    params = {"w": torch.zeros((), dtype=torch.float64)}
    nested = hn.Nested(hn.coherent_adam(lr=1.0, eps=EPS))
    st, steps = nested.init(params), []
    for t in range(200):
        new, st = nested.step(params, {"w": torch.tensor(1e-12 * 1.1**t, dtype=torch.float64)}, st)
        steps.append(float((params["w"] - new["w"]).abs()))
        params = new
    assert steps[0] == pytest.approx(1, rel=1e-3)
    assert max(steps) == pytest.approx(2)


def test_a_learner_travels_where_gradients_agree_and_rests_where_they_do_not() -> None:
    for sign, low, high in ((0.0, 0.9, 1.1), (1.0, 0.0, 0.02)):
        params = {"w": torch.zeros((), dtype=torch.float64)}
        nested = hn.Nested(hn.coherent_adam(lr=0.1))
        st = nested.init(params)
        for t in range(100):
            params, st = nested.step(params, {"w": torch.tensor(-1.0 if t % 2 else 1.0 - 2 * (sign == 0), dtype=torch.float64)}, st)
        assert low <= abs(float(params["w"])) / 10 <= high


@pytest.mark.parametrize(("start", "first"), [(1e-5, 1e-5), (1e-3, 1e-3), (4e-3, 1e-3), (0.1, 0.01)])
def test_a_rate_above_the_default_begins_at_a_tenth(start: float, first: float) -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    opt = hn.optim.AdamW(params, lr=hn.learn(start))
    assert opt.learned() == {"lr": pytest.approx(first)}
    assert opt.param_groups[0]["lr"] == start
    opt.set_hyper("lr", 0.1)
    assert opt.learned()["lr"] == pytest.approx(0.1)
    for settings in ({"lr": hn.learn(start, by=hn.sgd())}, {"eps": hn.learn(start)}):
        assert [*hn.optim.AdamW(params, **settings).learned().values()] == [pytest.approx(start)]
    learned = ftp.AdamP(params, radius_lr=hn.learn(start)).learned()
    assert [value for name, value in learned.items() if name.startswith("radius.lr")] == [pytest.approx(start)]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_recipe_has_no_unit(scale: float) -> None:
    """Adam's step does not depend on the loss's scale, and neither does what it learns."""

    def values(scale: float) -> torch.Tensor:
        nested = hn.Nested(hn.adam(lr=hn.learn(), eps=1e-30))
        params = {"w": torch.tensor([2.0, -1.0], dtype=torch.float64)}
        st = nested.init(params)
        for _ in range(10):
            params, st = nested.step(params, {"w": scale * params["w"]}, st)
        return nested.hypers(st)["lr"]["model"]

    torch.testing.assert_close(values(scale), values(1.0), rtol=1e-6, atol=0)


def test_a_value_at_a_default_bound_is_told_with_the_remedy() -> None:
    w = torch.nn.Parameter(torch.zeros(1))
    opt = hn.HyperOptimizer([("w", w)], hn.sgd(lr=hn.learn(1e-3)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(210):
            w.grad = torch.ones(1)
            opt.step()
    assert opt.learned()["lr"] == pytest.approx(1e-3 * FACTOR)
    (message,) = [str(each.message) for each in told]
    assert "learned value lr was stopped at an end" in message
    assert "bounds=(1e-07, 10)" in message
    assert "These bounds are the default, a factor of 10000 about its start: start it nearer" in message


def test_the_shape_falls() -> None:
    assert [shape(t, 40) for t in (0, 1, 20, 39, 40, 99)] == [1, 39 / 40, 0.5, 1 / 40, 1 / 40, 1 / 40]
    assert [shape(t, 1) for t in (0, 1)] == [1, 1]
    assert all(0 < shape(t, total) <= 1 for total in range(1, 50) for t in range(60))


def test_a_level_is_learned_early_under_a_shape() -> None:
    opt, _, values = trained(44, lambda params: hn.optim.AdamW(params, lr=hn.learn(), weight_decay=hn.learn(), total_steps=40))
    levels = [each["lr"] / shape(t + 1, 40) for t, each in enumerate(values)]
    assert len(set(levels[:8])) == 8
    assert levels[8:] == pytest.approx([levels[7]] * 36)
    assert len({each["weight_decay"] for each in values}) > 30
    assert opt.hypers()["lr"]["group 0"].item() == values[-1]["lr"]
    assert opt.param_groups[0]["lr"] == 1e-3
    with torch.no_grad():
        opt.set_hyper("lr", 0.1)
    assert opt.learned()["lr"] == pytest.approx(0.1)


def test_a_level_is_a_learned_hyper_under_a_schedule() -> None:
    """The same as a schedule of one's own around the learner that it is made of."""
    by = hn.window(hn.coherent_adam(lr=0.15, eps=EPS), steps=8)

    def plain(params: Any) -> hn.HyperOptimizer:
        return hn.optim.AdamW(params, lr=hn.learn(1e-3, by=by, via="log", bounds=(1e-7, 10), delayed=True), backend="reference")

    def scheduler(opt: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda t: shape(t, 40))

    _, expected, values = trained(45, plain, scheduler)
    _, found, others = trained(45, lambda params: hn.optim.AdamW(params, lr=hn.learn(), total_steps=40, backend="reference"))
    assert [each["lr"] for each in others] == pytest.approx([each["lr"] for each in values])
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-6, atol=1e-7)


def test_nothing_is_pulled_back_when_all_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A settled level costs what a plain number does; what else is learned goes on."""
    calls: list[str] = []
    pull = hn.Nested.hypergradients
    monkeypatch.setattr(hn.Nested, "hypergradients", lambda nested, *args: calls.extend(nested.learned) or pull(nested, *args))
    for settings, count in (({}, 8), ({"weight_decay": hn.learn()}, 40)):
        calls.clear()
        trained(
            20, lambda params, settings=settings: hn.optim.AdamW(params, lr=hn.learn(), total_steps=40, backend="reference", **settings)
        )
        assert len(calls) == count


def test_schedulers_multiply_the_shape() -> None:
    def half(opt: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 0.5)

    opt, _, values = trained(3, lambda params: hn.optim.SGD(params, lr=hn.learn(), total_steps=40), half)
    raw = opt._nested.hypers(opt._store.st)["lr"]["model"].item()
    assert values[-1]["lr"] == pytest.approx(raw * 0.5 * shape(3, 40))


def test_only_the_default_learner_follows_total_steps() -> None:
    model = torch.nn.Linear(2, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": hn.learn(1e-2, by=hn.sgd())}]
    opt = hn.optim.AdamW(groups, lr=hn.learn(per="tensor"), total_steps=100)
    assert opt.learned() == pytest.approx({"lr/0.0": 1e-3 * shape(0, 100), "lr": 1e-2})
    for lr in (1e-3, hn.learn(1e-3, by=hn.sgd())):
        with pytest.raises(ValueError, match=r"total_steps=10, but no lr is learned by the default learner: give lr=hn\.learn"):
            hn.optim.AdamW(model.parameters(), lr=lr, total_steps=10)
    with pytest.raises(ValueError, match=r"total_steps=0 must be at least 1"):
        hn.optim.AdamW(model.parameters(), lr=hn.learn(), total_steps=0)
    with pytest.raises(TypeError, match=r"total_steps=1\.5 \(float\) must be an integer"):
        hn.optim.AdamW(model.parameters(), lr=hn.learn(), total_steps=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("horizon", [hn.OneStep(memory="kept"), hn.Discounted(0.9)], ids=str)
def test_a_level_over_other_horizons(horizon: Any) -> None:
    _, _, values = trained(12, lambda params: hn.optim.SGD(params, lr=hn.learn(), horizon=horizon, total_steps=20))
    levels = [each["lr"] / shape(t + 1, 20) for t, each in enumerate(values)]
    assert levels[0] != levels[2]
    assert levels[4:] == pytest.approx([levels[3]] * 8)


def test_a_level_that_validation_steps_learn() -> None:
    """The window counts steps of the learner, the shape those of the tensors."""
    params, loss = problem()
    tensors = {name: torch.nn.Parameter(param) for name, param in params.items()}
    opt = hn.optim.AdamW(tensors.values(), lr=hn.learn(), learn_from="validation", total_steps=20)
    levels = []
    for step in range(1, 13):
        loss(tensors).backward()
        opt.step()
        if step % 2 == 0:
            opt.hyper_step()
            levels.append(opt.learned()["lr"] / shape(step, 20))
    assert len(set(levels[:4])) == 4
    assert levels[4:] == pytest.approx([levels[3]] * 2)


def test_hypergradients_of_default_hypers_are_of_values() -> None:
    params, loss = problem()

    def pulled(**settings: Any) -> torch.Tensor:
        found = hn.hypergradient(hn.sgd(**settings), params, range(3), lambda params, *_: loss(params), lambda params, *_: loss(params))
        return found["lr"]["model"]

    torch.testing.assert_close(pulled(lr=hn.learn(0.1)), pulled(lr=hn.learn(0.1, by=hn.sgd())))


def test_registered_rules_are_all_tried() -> None:
    assert {"adamw", "muon", "project", "ftp", "window"} <= set(registry.names())


def test_the_default_keeps_no_tensor_of_the_shape_of_a_parameter() -> None:
    def size(lr: Any) -> int:
        model = torch.nn.Linear(30, 20)
        opt = hn.optim.AdamW(model.parameters(), lr=lr)
        model(torch.ones(2, 30)).square().sum().backward()
        opt.step()
        return sum(leaf.numel() for state in opt.state.values() for leaf in state.values() if isinstance(leaf, torch.Tensor) and leaf.ndim)

    assert size(hn.learn()) == size(1e-3) == 2 * (20 * 30 + 20)
