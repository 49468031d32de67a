"""One gradient entry that is NaN, infinite or huge: learned values, learners and counts stay finite, and learning goes on."""

import copy
import functools
import math
import re
import warnings
from typing import Any

import pytest
import torch
from cases import ROWLESS

import ftp
import hyperopt_nested as hn
from hyperopt_nested import registry
from hyperopt_nested.testing.subject import losses

BACKENDS = ["reference"]
RULES = [name for name in hn.names() if registry.origin(name).split(".")[0] in ("hyperopt_nested", "ftp") and name != "identity"]
HORIZONS = {"discount": hn.Discounted(0.9), **{memory: hn.OneStep(memory) for memory in ("auto", "kept", "reverse")}}  # type: ignore[arg-type]
BAD = (math.nan, math.inf, -math.inf, 1e30)
ROWS, STEPS, AT = 5, 6, 2

Params = dict[str, torch.nn.Parameter]


def tensors() -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (ROWS, 4), "b": (3, 2)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32)) for name, shape in shapes.items()}


def fits(optimizer: hn.Optimizer, how: str) -> bool:
    """Whether its hypers can be learned so."""
    try:
        hn.Nested(optimizer, horizon=HORIZONS[how]).init(dict(tensors()))
    except ValueError:
        return False
    return True


def taught(optimizer: hn.Optimizer, hypers: list[str], per: Any) -> hn.Optimizer:
    rates = {hyper: 1e-4 * (abs(optimizer.declared[hyper]) or 0.1) for hyper in hypers}
    return optimizer.replace(**{hyper: hn.learn(optimizer.declared[hyper], by=hn.adam(lr=rate), per=per) for hyper, rate in rates.items()})


@functools.cache
def hypers_of(name: str, how: str) -> list[str]:
    """The hypers of the entry of that name that can be learned per tensor, and are not learned already, as FTP's radius is."""
    made = registry.example(name, lambda: hn.sgd(lr=0.05, momentum=0.9))
    per = "model" if made.rule.reduction else "tensor"
    free = [hyper for hyper in made.settings if hyper not in made.learned and hyper not in made.rule.loss_names]
    return [hyper for hyper in free if fits(taught(made, [hyper], per), how)]


def learning(name: str, per: Any, how: str) -> hn.Optimizer:
    """The entry of that name, with all hypers learned that can be."""
    made = registry.example(name, lambda: hn.sgd(lr=0.05, momentum=0.9))
    every = taught(made, hypers_of(name, how), per)
    return every if fits(every, how) else taught(made, [each for each in hypers_of(name, how) if fits(taught(made, [each], per), how)], per)


def started(optimizer: hn.Optimizer, backend: Any, horizon: hn.typing.Horizon) -> tuple[hn.HyperOptimizer, Params]:
    params = tensors()
    return hn.HyperOptimizer(list(params.items()), optimizer, backend=backend, horizon=horizon), params


def go(opt: hn.HyperOptimizer, params: Params, bad: float, row: int) -> list[Any]:
    """Some steps, in one of which one entry of a gradient is bad; the learned values after each."""
    seen = []
    for step in range(STEPS):
        for name, p in params.items():
            p.grad = torch.cos(p.detach().nan_to_num(0, 0, 0) + (name == "b"))
        if step == AT:
            params["a"].grad[row, 1] = bad  # type: ignore[index]
        opt.step(loss=1.0)
        seen.append(opt.hypers())
    return seen


def run(
    optimizer: hn.Optimizer, backend: Any, horizon: hn.typing.Horizon, bad: float, row: int
) -> tuple[hn.HyperOptimizer, Params, list[Any]]:
    opt, params = started(optimizer, backend, horizon)
    return opt, params, go(opt, params, bad, row)


def spoilt(opt: hn.HyperOptimizer) -> list[str]:
    """What belongs to learned values and is not finite: the values, their learners, and counts."""
    parts = ("hypers.", "learners.", "nonfinite.", "pinned.")
    return [key for state in opt.state.values() for key, leaf in state.items() if key.startswith(parts) and not torch.isfinite(leaf).all()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", HORIZONS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.filterwarnings("ignore:the learned value")
def test_learned_values_stay_finite_and_learn_on(name: str, how: str, backend: str) -> None:
    pers: Any = ("tensor", "model") if how == "discount" else ("tensor", "row", "model", "element")
    rows = (0, ROWS // 2, ROWS - 1)
    for i, bad in enumerate(BAD if how in ("auto", "reverse") else BAD[::3], start=RULES.index(name)):  # granularities and rows take turns
        per, row = pers[i % len(pers)], rows[i % len(rows)]
        optimizer = learning(name, per, how)
        opt, params, seen = run(optimizer, backend, HORIZONS[how], bad, row)
        case = f"{per}, {bad}, row {row}"
        assert not spoilt(opt), f"{case}: {spoilt(opt)}"
        lost = int((~torch.isfinite(params["a"])).sum())
        if math.isfinite(bad):
            continue
        if optimizer.rule.separable in ("element", "row") and not optimizer.rule.reduction and "centralize" not in optimizer.rule.name:
            assert lost <= 1, f"{case}: {lost} weights are lost"
            a = [(values[key], seen[AT][hyper][key]) for hyper, values in seen[-1].items() for key in values if key != "b"]
            assert any((now != then).any() for now, then in a) or not optimizer.learned, case
        if not optimizer.rule.reduction:
            assert torch.isfinite(params["b"]).all(), case
        counts = {key: int(count) for key, count in opt.nonfinite_counts().items()}
        numel = 1 if per in ("tensor", "model") else params["a"].numel()
        assert all(count <= numel * (STEPS - AT) for count in counts.values()), f"{case}: {counts}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", HORIZONS)
@pytest.mark.filterwarnings("ignore:the learned value")
def test_towers_stay_finite_at_every_height(how: str, backend: str) -> None:
    for bad, per, row in zip(BAD, ("tensor", "model", "row", "element"), (0, 2, 4, 1), strict=True):
        if how == "discount" and per in ("row", "element"):
            per = "tensor"
        height = hn.learn(1e-4, by=hn.adam(lr=1e-6), per=per)  # type: ignore[arg-type]
        made = hn.adamw(lr=hn.learn(0.01, by=hn.adam(lr=height), per=per), weight_decay=0.1)  # type: ignore[arg-type]
        opt, _, seen = run(made, backend, HORIZONS[how], bad, row)
        assert not spoilt(opt), f"{per}, {bad}: {spoilt(opt)}"
        if not math.isfinite(bad):
            for path in ("lr", "lr.lr"):
                moved = [(seen[-1][path][key] != value).any() for key, value in seen[AT][path].items()]
                assert any(moved), f"{per}, {bad}: {path} learns no more"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["entry", "everywhere"])
def test_training_goes_on_after_weights_are_put_back(where: str, bad: float, backend: Any) -> None:
    """AdamP keeps its radii, and once weights and moments are mended it trains as if nothing had been."""
    params = tensors()
    opt = ftp.AdamP(list(params.items()), lr=1e-2, backend=backend)
    for step in range(8):
        if step == 3:
            radii = {name: value.item() for name, value in opt.hypers()["radius"].items()}
        for name, p in params.items():
            p.grad = torch.cos(p.detach().nan_to_num(0, 0, 0) + (name == "b"))
        if step == 3:
            saved = {name: p.detach().clone() for name, p in params.items()}
            grad = params["a"].grad
            assert grad is not None
            grad[(1, 2) if where == "entry" else ...] = bad  # type: ignore[index]
        opt.step()
        if step == 3:
            assert int((~torch.isfinite(params["a"])).sum()) <= (1 if where == "entry" else params["a"].numel())
            with torch.no_grad():
                for name, p in params.items():
                    p.copy_(saved[name])
                    for key in ("rule.base.exp_avg", "rule.base.exp_avg_sq"):
                        opt.state[p][key].nan_to_num_(0, 0, 0)
            now = {name: value.item() for name, value in opt.hypers()["radius"].items()}
            assert now["a"] >= 0.5 * radii["a"], (now, radii)
        assert not spoilt(opt)
    assert all(torch.isfinite(p).all() for p in params.values())
    assert all(not torch.equal(p, saved[name]) for name, p in params.items())


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.filterwarnings("ignore:the learned value")
def test_programs_lose_and_count_what_the_engine_does(name: str) -> None:
    backends: Any = ("foreach", "fused")
    pers: Any = ("tensor", "row", "model", "element")
    at = RULES.index(name)
    optimizer = learning(name, pers[at % len(pers)], "auto")
    if optimizer.rule.reduction or name in ROWLESS:
        for backend in backends:
            with pytest.raises(ValueError, match=f"backend={backend!r} cannot be used"):
                run(optimizer, backend, hn.OneStep(), BAD[0], 0)
        return
    made = {each: started(optimizer, each, hn.OneStep()) for each in (*backends, "reference")}
    begin = {each: copy.deepcopy(opt.state_dict()) for each, (opt, _) in made.items()}

    def again(each: str, bad: float, row: int, noise: float = 0.0) -> tuple[hn.HyperOptimizer, Params]:
        """The run from its begin, by the programs that were made for the first one."""
        opt, params = made[each]
        opt.load_state_dict(copy.deepcopy(begin[each]))
        with torch.no_grad():
            for key, p in tensors().items():
                params[key].copy_(p * (1 + noise))
        go(opt, params, bad, row)
        return opt, params

    def counts(opt: hn.HyperOptimizer) -> dict[str, int]:
        return {key: int(count) for key, count in opt.nonfinite_counts().items()}

    for i, bad in enumerate(BAD, start=at):
        row = (0, ROWS // 2, ROWS - 1)[i % 3]
        engine, expected = again("reference", bad, row)
        finite, wanted = {key: torch.isfinite(p) for key, p in expected.items()}, counts(engine)
        for backend in backends:
            case = f"{backend}, {bad}, row {row}"
            opt, params = again(backend, bad, row)
            assert opt.backend == backend
            assert not spoilt(opt), f"{case}: {spoilt(opt)}"
            for key, p in params.items():
                assert torch.equal(torch.isfinite(p), finite[key]), f"{case}: other weights are lost"
            if counts(opt) != wanted:  # but where products overflow or not by rounding alone
                moved, _ = again("reference", bad, row, noise=1e-6)
                assert counts(moved) != wanted, f"{case}: {counts(opt)}, not {wanted}"


@pytest.mark.parametrize("how", HORIZONS)
def test_a_bad_entry_in_memory_is_left_out_and_no_more(how: str) -> None:
    """With a bad element in the last update, the hypergradient is that of the other elements."""
    nested = hn.Nested(hn.adam(lr=hn.learn(0.1, by=hn.sgd(lr=0.0))), horizon=HORIZONS[how])
    grads = {"w": torch.tensor([1.0, -2.0, 3.0])}
    bad = {"w": torch.tensor([1.0, math.nan, 3.0])}
    found = []
    for steps, chosen in (([grads, bad], [0, 1, 2]), ([grads, grads], [0, 2])):
        params = {"w": torch.ones(3)[chosen]}
        st = nested.init(params)
        for each in steps:
            params, st = nested.step(params, {"w": each["w"][chosen]}, st)
        found.append(nested.hypergradients(params, {"w": grads["w"][chosen]}, st)["lr"]["model"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:the learned value")
def test_a_bound_that_is_not_finite_is_none() -> None:
    for end in (math.nan, math.inf, -math.inf):

        def bound(state: Any, end: float = end) -> torch.Tensor:
            return torch.tensor(end)

        for bounds in ((None, bound), (bound, None), (bound, bound)):
            rate = hn.learn(0.1, by=hn.sgd(lr=0.01), bounds=bounds)
            nested = hn.Nested(hn.sgd(lr=rate))
            params = {"w": torch.ones(2)}
            st = nested.init(params)
            for _ in range(2):
                params, st = nested.step(params, {"w": torch.ones(2)}, st)
            assert float(nested.hypers(st)["lr"]["model"]) == pytest.approx(0.12)


def test_counters_follow_no_default_dtype_and_do_not_saturate() -> None:
    torch.set_default_dtype(torch.bfloat16)
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.float32))
    opt = hn.HyperOptimizer([("w", w)], hn.adamw(lr=hn.learn(0.1, by=hn.sgd(lr=0.01)), weight_decay=hn.learn(0.1, by=hn.sgd(), per="row")))
    for _ in range(300):
        w.grad = torch.full((2,), math.nan, dtype=torch.float32)
        opt.step()
    assert {key: int(count) for key, count in opt.nonfinite_counts().items()} == {"lr": 299, "weight_decay": 299}
    assert {leaf.dtype for key, leaf in opt.state[w].items() if "step" in key or "nonfinite" in key} == {torch.float64}
    for count in (2.0**24, 2.0**30):
        opt.state[w]["rule.step"].fill_(count)
        opt.state[w]["nonfinite.lr"].fill_(count)
        opt.step()
        assert opt.state[w]["rule.step"].item() == count + 1
        assert opt.nonfinite_counts()["lr"].item() == count + 1


@pytest.mark.parametrize("name", RULES)
def test_states_do_not_depend_on_the_default_dtype(name: str) -> None:
    params = {"a": torch.ones(3, 2, dtype=torch.float32)}
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        optimizer = learning(name, "tensor", "auto")
        nested = hn.Nested(optimizer, horizon=hn.OneStep("reverse"))
        st = nested.init(params)
        new, st = nested.step(params, {"a": torch.full((3, 2), 0.5, dtype=torch.float32)}, st, losses(optimizer, params))
        found.append(([(path, leaf.dtype) for path, leaf in leaves(st)], new["a"].dtype))
        steps = [(path, leaf.dtype) for path, leaf in leaves(st) if path.endswith(".step")]
        assert all(kept == torch.float64 for _, kept in steps)
    assert found[0] == found[1] == found[2]
    assert found[0][1] == torch.float32


def leaves(tree: Any, prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [each for key, branch in tree.items() for each in leaves(branch, f"{prefix}.{key}")]


def test_a_counter_of_a_scalar_is_not_narrowed() -> None:
    nested = hn.Nested(hn.adam(), state_dtype=torch.bfloat16)
    st = nested.init({"s": torch.ones((), dtype=torch.float32), "w": torch.ones(2, dtype=torch.float32)})
    assert st["rule"]["s"]["step"].dtype == torch.float64
    assert st["rule"]["w"]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("horizon", [hn.OneStep(), hn.Discounted(0.5), hn.OneStep("reverse"), hn.Discounted(0.5, "exact")])
def test_a_step_without_gradients_does_nothing(horizon: hn.typing.Horizon) -> None:
    nested = hn.Nested(hn.adamw(lr=hn.learn(0.1, by=hn.sgd(lr=1e-3))), horizon=horizon)
    params = {"w": torch.ones(3)}
    st = nested.init(params)
    hessian = {"hessian": lambda v: v} if horizon.curvature == "exact" else {}
    params, st = nested.step(params, {"w": torch.ones(3)}, st, **hessian)
    new, after = nested.step(params, {}, st, **hessian)
    assert torch.equal(new["w"], params["w"])
    before = dict(leaves(st))
    assert all(torch.equal(leaf, before[path]) for path, leaf in leaves(after))
    assert len(leaves(after)) == len(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("curvature", ["none", "exact"])
def test_a_horizon_keeps_its_structure(curvature: Any, dtype: torch.dtype) -> None:
    for make in (lambda lr: hn.adamw(lr=lr), lambda lr: hn.sgd(lr=lr, momentum=0.9), lambda lr: hn.schedule_free_sgd(lr=lr)):
        nested = hn.Nested(make(hn.learn(0.1, by=hn.sgd(lr=1e-3))), horizon=hn.Discounted(0.9, curvature))
        params = {"w": torch.ones(3, dtype=dtype)}
        st = nested.init(params)
        form = [(path, leaf.dtype, leaf.shape) for path, leaf in leaves(st)]
        hessian: Any = {"hessian": lambda v: v} if curvature == "exact" else {}
        for _ in range(2):
            params, st = nested.step(params, {"w": torch.ones(3, dtype=dtype)}, st, **hessian)
            assert [(path, leaf.dtype, leaf.shape) for path, leaf in leaves(st)] == form


def pinned(make: Any, steps: int = 6) -> tuple[dict[str, int], list[str]]:
    """Counts of pinned values, and what is told, for w^2 / 2 from 10."""
    w = torch.nn.Parameter(torch.tensor([10.0]))
    opt = hn.HyperOptimizer([("w", w)], make())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            w.grad = w.detach().clone()
            opt.step()
    return {key: int(count) for key, count in opt.pinned().items()}, [str(each.message) for each in told]


def rate(value: float, by: float, **how: Any) -> hn.Learn:
    return hn.learn(value, by=hn.sgd(lr=by), **how)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hn.sgd(lr=rate(0.9, 1.0, via="log")), r"learned value lr was stopped at an end .*NonNegative \[0, inf\).*2\.2.*e-308"),
        (lambda: hn.sgd(lr=rate(0.1, 1.0, bounds=(0.01, 0.3))), r"bounds=\(0\.01, 0\.3\).*0\.3"),
        (lambda: hn.sgd(lr=rate(0.1, 1.0, bounds=(None, 0.3), via="softplus")), r"bounds=\(-inf, 0\.3\)"),
        (lambda: hn.sgd(lr=0.1, momentum=rate(0.5, 10.0)), r"learned value momentum was stopped.*NonNegative"),
        (lambda: hn.schedule_free_sgd(lr=0.1, momentum=rate(0.5, 10.0, per="element")), "momentum"),
        (lambda: hn.sgd(lr=rate(0.1, rate(1.0, 1.0, bounds=(0.5, 1.5)))), r"learned value lr\.lr was stopped"),
    ],
)
def test_a_pinned_value_is_told_once_and_counted(make: Any, words: str) -> None:
    counts, told = pinned(make)
    assert sum(counts.values()) > 0
    found = [message for message in told if "pinned() counts" in message]
    assert len(found) == len([count for count in counts.values() if count])
    assert any(re.search(words, message) for message in found), found


@pytest.mark.parametrize(
    "make",
    [
        lambda: hn.sgd(lr=rate(0.1, 1e-4)),
        lambda: hn.sgd(lr=0.1, weight_decay=rate(0.0, 0.1)),  # starts at that end
        lambda: hn.sgd(lr=rate(0.1, 10.0, bounds=(0.1, None))),
        lambda: ftp.ftp_rule(hn.sgd(lr=0.1)),  # its bound reads the state, and it starts at the floor
    ],
)
def test_where_nothing_is_pinned_nothing_is_told(make: Any) -> None:
    assert pinned(make) == (dict.fromkeys(pinned(make)[0], 0), [])
