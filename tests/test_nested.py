"""The pure engine: transforms, purity, missing and non-finite gradients, sharing, schedules."""

import math
import threading
from typing import Any

import pytest
import torch
from cases import EXACT, gradients, problem, relative_error, run
from torch.utils._python_dispatch import TorchDispatchMode

import hyperopt_nested as hn
from ftp import ftp_rule
from hyperopt_nested.engine.sensitivity import nothing_transforms


def leaves(tree: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: leaf for key, branch in tree.items() for path, leaf in leaves(branch, f"{prefix}/{key}").items()}


def tower() -> hn.Optimizer:
    """Two learned hypers, one of them by a tower."""
    rate = hn.learn(1e-2, by=hn.sgd(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-5))))
    return hn.adamw(lr=rate, weight_decay=hn.learn(0.1, by=hn.adam(lr=1e-3), per="tensor"))


OPTIMIZERS = {
    "delayed": lambda: hn.adamw(lr=hn.learn(1e-2), weight_decay=hn.learn(0.1, by=hn.sgd(lr=hn.learn(1e-2)), per="row")),
    "tower": tower,
    "ftp": lambda: ftp_rule(hn.sgd(lr=0.1, momentum=0.9)),
    "reverse": lambda: hn.project(hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=1e-3), per="element")), onto=hn.mars, radius=0.2),
}


@pytest.mark.parametrize("name", ["tower", "reverse"])
def test_vmap_over_64_learning_rates_is_the_loop(name: str) -> None:
    nested = hn.Nested(OPTIMIZERS[name]())
    params, loss = problem(1)

    def trained(rate: torch.Tensor) -> tuple[Any, Any]:
        return run(nested, params, loss, 4, nested.init(params, {"lr": rate}))

    rates = torch.logspace(-4, -1, 64)
    batched = leaves(torch.func.vmap(trained)(rates)[0]), leaves(torch.func.vmap(trained)(rates)[1])
    for i, rate in enumerate(rates):
        for found, expected in zip(batched, map(leaves, trained(rate)), strict=True):
            assert found.keys() == expected.keys()
            for path, leaf in expected.items():
                value = found[path] if found[path].ndim == leaf.ndim else found[path][i]
                assert relative_error(value, leaf) < EXACT, path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_is_eager_and_compiles_once(name: str) -> None:
    torch._dynamo.reset()
    nested = hn.Nested(OPTIMIZERS[name]())
    params, loss = problem(1, {"bias": (3,), "weight": (3, 2)})
    eager = compiled = (params, nested.init(params))
    step = torch.compile(nested.step, fullgraph=True, backend="inductor" if name == "tower" else "aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(4):
            values = {key: {"lr": torch.tensor(0.1 / (i + 1))} for key in params}
            eager = nested.step(eager[0], gradients(loss, eager[0]), eager[1], values)
            compiled = step(compiled[0], gradients(loss, compiled[0]), compiled[1], values)
            for found, expected in zip(map(leaves, compiled), map(leaves, eager), strict=True):
                assert found.keys() == expected.keys()
                assert max(relative_error(found[path], leaf) for path, leaf in expected.items()) < 1e-11


def test_the_whole_program_can_be_differentiated() -> None:
    """The derivative of a final loss with respect to the start of a learned learning rate, through steps that learn it."""
    nested = hn.Nested(hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=1e-2)), momentum=0.5))
    params, loss = problem(4)

    def final(rate: torch.Tensor) -> torch.Tensor:
        return loss(run(nested, params, loss, 3, nested.init(params, {"lr": rate}))[0])

    h, rate = 1e-4, torch.tensor(0.1)
    expected = (final(rate + h) - final(rate - h)) / (2 * h)
    assert relative_error(torch.func.grad(final)(rate), expected) < 1e-6
    _, forward = torch.func.jvp(final, (rate,), (torch.ones(()),))
    assert relative_error(forward, expected) < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_is_pure_and_keeps_the_structure(name: str) -> None:
    nested = hn.Nested(OPTIMIZERS[name]())
    params, loss = problem(2)
    _, state = run(nested, params, loss, 2)
    grads = gradients(loss, params)
    before = {path: leaf.clone() for path, leaf in leaves([params, grads, state][2]).items()}
    kept = {key: value.clone() for key, value in params.items()}
    new, after = nested.step(params, grads, state)
    assert all(torch.equal(leaf, before[path]) for path, leaf in leaves(state).items())
    assert all(torch.equal(params[key], kept[key]) for key in params)
    assert {p: (x.shape, x.dtype) for p, x in leaves(after).items()} == {
        p: (x.shape, x.dtype) for p, x in leaves(nested.init(params)).items()
    }
    assert all(new[key].data_ptr() != params[key].data_ptr() for key in params if params[key].numel())


def test_a_tensor_without_gradient_is_left_alone_and_so_is_its_hyper() -> None:
    nested = hn.Nested(ftp_rule(hn.adamw(lr=0.1)))
    params, loss = problem(3, {"a": (3, 2), "b": (3, 2)})
    params, state = run(nested, params, loss, 3)
    new, after = nested.step(params, {"a": gradients(loss, params)["a"]}, state)
    assert torch.equal(new["b"], params["b"])
    for part in ("rule", "memory"):
        assert all(torch.equal(leaf, leaves(state[part]["b"])[path]) for path, leaf in leaves(after[part]["b"]).items())
    assert torch.equal(after["hypers"]["radius"]["b"], state["hypers"]["radius"]["b"])
    assert not torch.equal(after["hypers"]["radius"]["a"], state["hypers"]["radius"]["a"])
    alone, _ = hn.Nested(ftp_rule(hn.adamw(lr=0.1))), None
    only_a = {"a": params["a"]}
    assert torch.equal(alone.step(only_a, {"a": gradients(loss, params)["a"]}, pick(state, "a"))[0]["a"], new["a"])


def pick(state: Any, name: str) -> Any:
    """The part of an FTP state that belongs to one tensor."""
    inner = state["learners"]["radius"]
    learner = {**inner, "rule": {name: inner["rule"][name]}, "memory": {name: inner["memory"][name]}}
    return {
        **state,
        "rule": {name: state["rule"][name]},
        "memory": {name: state["memory"][name]},
        "hypers": {"radius": {name: state["hypers"]["radius"][name]}},
        "learners": {"radius": learner},
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("per", ["model", "element"])
def test_a_hypergradient_that_is_not_finite_is_skipped_and_counted(per: Any, bad: float) -> None:
    nested = hn.Nested(hn.sgd(lr=hn.learn(0.1, by=hn.adam(lr=1e-2), per=per)))
    params = {"w": torch.ones(3)}
    good = {"w": torch.ones(3)}
    _, state = nested.step(params, good, nested.init(params))
    _, state = nested.step(params, good, state)
    _, after = nested.step(params, {"w": torch.tensor([1.0, bad, 1.0])}, state)
    key = "model" if per == "model" else "w"
    old, new = state["hypers"]["lr"][key], after["hypers"]["lr"][key]
    assert float(after["nonfinite"]["lr"]) == 1
    assert bool(torch.isfinite(new).all())
    moments = after["learners"]["lr"]["rule"][key]
    if per == "model":
        assert torch.equal(new, old)
        assert all(torch.equal(moments[part], state["learners"]["lr"]["rule"][key][part]) for part in moments)
    else:
        assert (new != old).tolist() == [True, False, True]
        assert bool(torch.isfinite(moments["exp_avg"]).all())
    _, later = nested.step(params, good, nested.step(params, good, after)[1])
    assert bool((later["hypers"]["lr"][key] != new).all())


def test_one_learn_is_one_hyper_and_two_are_two() -> None:
    shared, own = hn.learn(0.1, by=hn.sgd(lr=0.01)), hn.learn(0.1, by=hn.sgd(lr=0.01))
    nested = hn.Nested({"a": hn.sgd(lr=shared), "b": hn.sgd(lr=shared, momentum=0.9), "c": hn.adam(lr=own)})
    params = {name: torch.ones(2) for name in "abc"}
    state = nested.init(params)
    assert {key: list(values) for key, values in nested.hypers(state).items()} == {"lr": ["model"], "lr#2": ["model"]}
    grads = {name: torch.ones(2) for name in "abc"}
    for _ in range(2):
        params, state = nested.step(params, grads, state)
    assert float(nested.hypers(state)["lr"]["model"]) == pytest.approx(0.1 + 0.01 * 4)


def test_a_schedule_scales_what_is_learned_and_replaces_what_is_not() -> None:
    nested = hn.Nested(hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.0)), weight_decay=0.5))
    params = {"w": torch.tensor([2.0])}
    new, _ = nested.step(params, {"w": torch.tensor([1.0])}, nested.init(params, {"lr": 0.3}), {"w": {"lr": 0.05, "weight_decay": 0.25}})
    assert float(new["w"]) == pytest.approx(2.0 - 0.3 * 0.5 * (1 + 0.25 * 2))
    zero = hn.Nested(hn.sgd(lr=hn.learn(0.0, by=hn.sgd(lr=0.1))))
    with pytest.raises(ValueError, match=r"lr was declared as learn\(0.0, ...\), which cannot be scaled"):
        zero.step(params, params, zero.init(params), {"w": {"lr": 0.5}})


def test_bounds_that_read_the_state_are_the_widest_of_the_tensors() -> None:
    bounds = (0.02, lambda state: state["largest_norm"])
    radius = hn.learn(0.02, by=hn.sgd(lr=1.0), bounds=bounds)  # type: ignore[arg-type]
    nested = hn.Nested(hn.project(hn.sgd(lr=0.1), onto=hn.mars, radius=radius))
    params = {"a": torch.zeros(2), "b": torch.zeros(3)}
    state, grads = nested.init(params), {"a": torch.ones(2), "b": torch.ones(3)}
    params, state = nested.step(params, grads, state)
    params, state = nested.step(params, grads, state)  # the radius would become 0.02 + 2
    largest = max(float(state["rule"][name]["largest_norm"]) for name in params)
    assert float(state["hypers"]["radius"]["model"]) == pytest.approx(largest)
    _, state = nested.step(params, {name: -10 * grad for name, grad in grads.items()}, state)
    assert float(state["hypers"]["radius"]["model"]) == 0.02


def test_one_learn_is_for_one_name_and_one_domain() -> None:
    shared = hn.learn(0.8, by=hn.sgd())
    with pytest.raises(ValueError, match=r"adam: lr and beta1 are one learn\(\.\.\.\) object: give each a learn"):
        hn.adam(lr=shared, beta1=shared)
    with pytest.raises(ValueError, match=r"given to lr in NonNegative \[0, inf\) and to beta1 of adam in UnitInterval \[0, 1\)"):
        hn.Nested({"a": hn.sgd(lr=shared), "b": hn.adam(beta1=shared)})
    with pytest.raises(ValueError, match="given to momentum"):  # one name, and two domains
        hn.Nested({"a": hn.sgd(momentum=shared), "b": hn.schedule_free_sgd(momentum=shared)})
    choose = {"a": hn.sgd(lr=shared), "b": hn.adam(lr=shared)}
    assert list(hn.Nested(choose).learned) == ["lr"]


def test_maximize_ascends_at_every_height() -> None:
    params, loss = problem(5)
    for up, sign in ((True, -1), (False, 1)):
        nested = hn.Nested(hn.adam(lr=hn.learn(0.1, by=hn.sgd(lr=0.01)), maximize=up))
        new, state = run(nested, params, lambda p, sign=sign: sign * loss(p), 3)  # type: ignore[misc]
        if up:
            kept = new, state
    assert all(torch.equal(kept[0][name], new[name]) for name in new)
    assert torch.equal(kept[1]["hypers"]["lr"]["model"], state["hypers"]["lr"]["model"])


def test_values_of_tensors_learn_together_as_each_alone() -> None:
    """Learners of single values step them as one vector: the results are those of learners that have one value each."""
    learn = hn.learn(0.1, by=hn.nadam(lr=1e-2), per="tensor", bounds=(0.09, 1.0))
    nested = hn.Nested(hn.adamw(lr=learn, weight_decay=0.1))
    params, loss = problem(3)
    alone = {name: ({name: param}, nested.init({name: param})) for name, param in params.items()}
    st = nested.init(params)
    for step in range(5):
        grads = gradients(loss, params)
        if step == 2:
            del grads["weight"]
        if step == 4:
            grads["bias"] = torch.full_like(grads["bias"], torch.nan)
        params, st = nested.step(params, grads, st)
        for name, grad in grads.items():
            alone[name] = nested.step(alone[name][0], {name: grad}, alone[name][1])
    for name, (one, own) in alone.items():
        torch.testing.assert_close(params[name], one[name], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(st["hypers"]["lr"][name], own["hypers"]["lr"][name])
        states = [leaves(each["learners"]["lr"]["rule"][name]) for each in (st, own)]
        assert all(torch.equal(leaf, states[1][path]) for path, leaf in states[0].items())
    for part in ("nonfinite", "pinned"):
        assert st[part]["lr"] == sum(own[part]["lr"] for _, own in alone.values())


def test_granularities_have_the_shapes_they_promise() -> None:
    params = {"scalar": torch.ones(()), "bias": torch.ones(3), "weight": torch.ones(3, 2), "kernel": torch.ones(4, 3, 2, 2)}
    shapes = {
        "tensor": {"scalar": (), "bias": (), "weight": (), "kernel": ()},
        "row": {"scalar": (), "bias": (1,), "weight": (3, 1), "kernel": (4, 1, 1, 1)},
        "element": {name: tuple(p.shape) for name, p in params.items()},
    }
    for per, expected in shapes.items():
        nested = hn.Nested(hn.sgd(lr=hn.learn(0.1, by=hn.sgd(), per=per)))  # type: ignore[arg-type]
        assert {key: tuple(v.shape) for key, v in nested.hypers(nested.init(params))["lr"].items()} == expected


def test_bad_calls_are_named() -> None:
    nested = hn.Nested(hn.sgd(lr=hn.learn(0.1, by=hn.sgd())))
    with pytest.raises(ValueError, match="start names 'momentum', which is not learned; learned are: lr"):
        nested.init({"w": torch.ones(1)}, {"momentum": 0.5})
    with pytest.raises(ValueError, match=r"start: lr=-0\.5 is outside its domain"):
        nested.init({"w": torch.ones(1)}, {"lr": -0.5})
    with pytest.raises(ValueError, match=r"anchor has shape \(2,\), the parameter \(3,\)"):
        hn.Nested(hn.project(hn.sgd(), onto=hn.mars, radius=1.0, anchor=torch.ones(2))).init({"w": torch.ones(3)})
    with pytest.raises(TypeError, match=r"params\['w'\] has dtype torch.int64"):
        nested.init({"w": torch.ones(1, dtype=torch.int64)})
    with pytest.raises(ValueError, match="memory='backward' must be one of"):
        hn.OneStep("backward")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_late_hypers_take_no_memory(dtype: torch.dtype) -> None:
    """Adam's rate and decoupled decay are learned, as they are with memory, from what the update left."""
    values = {}
    for memory in ("auto", "kept"):
        params, loss = problem(3)
        params = {name: p.to(dtype) for name, p in params.items()}
        lr, decay = (hn.learn(value, by=hn.sgd(lr=1e-3)) for value in (0.05, 0.2))
        nested = hn.Nested(hn.adamw(lr=lr, weight_decay=decay), horizon=hn.OneStep(memory))  # type: ignore[arg-type]
        st = nested.init(params)
        for _ in range(5):
            grads = {name: g.to(dtype) for name, g in gradients(loss, {name: p.double() for name, p in params.items()}).items()}
            params, st = nested.step(params, grads, st)
        kept = sum(leaf.numel() for each in st["memory"].values() for leaf in each["sensitivity"].values())
        assert kept == (0 if memory == "auto" else 2 * sum(p.numel() for p in params.values()))
        values[memory] = torch.stack([nested.hypers(st)[key]["model"] for key in ("lr", "weight_decay")])
    start = torch.tensor([0.05, 0.2])
    moved = (values["kept"] - start).abs()
    assert (moved > 0).all()
    assert ((values["auto"] - values["kept"]).abs() < (1e-5 if dtype == torch.float32 else 0.05) * moved).all()


def test_a_thread_that_traces_changes_no_other() -> None:
    """Updates are differentiated by autograd where no transform is at work in this thread, whatever others do."""
    entered, done = threading.Event(), threading.Event()

    def trace() -> None:
        with TorchDispatchMode():
            entered.set()
            done.wait()

    thread = threading.Thread(target=trace)
    thread.start()
    entered.wait()
    assert nothing_transforms()
    with TorchDispatchMode():
        assert not nothing_transforms()
        done.set()
        thread.join()
    assert nothing_transforms()


def test_update_takes_values_as_step_does():
    nested, params, grads = hn.Nested(hn.sgd(lr=0.1)), {"w": torch.ones(2)}, {"w": torch.ones(2)}
    st = nested.init(params)
    values = {"w": {"lr": torch.tensor(0.25)}}
    new, _ = nested.update(params, grads, st["rule"], st["hypers"], values)
    assert torch.equal(new["w"], torch.full((2,), 0.75))
    assert torch.equal(new["w"], nested.step(params, grads, st, values)[0]["w"])
