"""Compiled steps do what the engine does, for every rule; they are compiled once, and wait for no value of a tensor."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EXACT, Tensors, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import ftp
import hyperopt_nested as hn
from hyperopt_nested import program
from hyperopt_nested.testing.subject import subject

Make = Callable[[str], hn.HyperOptimizer]


def learned(value: float, per: Any = "tensor", by: float = 1e-4) -> hn.Learn:
    return hn.learn(value, by=hn.sgd(lr=by), per=per)


def all_learned(name: str) -> hn.Optimizer:
    """The entry of the registry with every hyper learned per tensor that can be."""
    checked = subject(name)
    found = checked.template
    chosen = {"lr": 0.05, "eps": 0.1, "eps1": 0.1, "eps2": 0.1, "d": 1.1}
    for hyper in checked.own:
        if hyper in found.rule.flat or hyper in found.learned:
            continue
        value = chosen.get(hyper, found.declared[hyper] or 0.1)
        trial = found.replace(**{hyper: learned(value, "model" if found.rule.measures else "tensor")})
        try:
            hn.Nested(trial).init({"w": torch.ones(4, 3)})
        except ValueError:  # not used with these options
            continue
        found = trial
    return found


class Problem:
    """Tensors, of one shape, that descend a smooth function under an optimizer with a schedule."""

    def __init__(self, optimizer: Any, backend: str, shape: tuple[int, ...] = (4, 3), **how: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name in ("a", "b")}
        self.offsets = {name: torch.randn(shape, generator=generator) for name in self.params}
        self.opt = hn.HyperOptimizer(list(self.params.items()), optimizer, backend=backend, **how)  # type: ignore[arg-type]
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, 20) if "lr" in self.opt.defaults else None

    def gradients(self) -> None:
        for name, p in self.params.items():
            p.grad = torch.cos(p.detach() + self.offsets[name])

    def run(self, steps: int) -> "Problem":
        for _ in range(steps):
            self.gradients()
            self.opt.step()
            if self.schedule is not None:
                self.schedule.step()
        return self

    def values(self) -> Tensors:
        hypers = {f"{hyper}/{key}": value for hyper, found in self.opt.hypers().items() for key, value in found.items()}
        return {**{name: p.detach() for name, p in self.params.items()}, **hypers}


def assert_same(found: Problem, expected: Problem) -> None:
    wanted = expected.values()
    assert found.values().keys() == wanted.keys()
    for name, value in found.values().items():
        assert relative_error(value, wanted[name]) < EXACT, name


@pytest.fixture
def as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are run as they are traced, without inductor's code, which takes long to make."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, examples: graph)


@pytest.mark.usefixtures("as_traced")
@hn.testing.every_rule("hyperopt_nested", "ftp")
def test_programs_do_what_the_engine_does(name: str) -> None:
    optimizer = all_learned(name)
    if optimizer.rule.measures:
        with pytest.raises(ValueError, match=r"backend='compile' can not be had: .* needs a total over all tensors"):
            Problem(optimizer, "compile")
        return
    found = Problem(optimizer, "compile").run(5)
    assert found.opt.backend == "compile"
    assert_same(found, Problem(optimizer, "reference").run(5))


@pytest.mark.parametrize("how", [{}, {"memory": "reverse"}], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "schedule_free_adamw", "ftp"])
def test_compiled_programs_do_what_the_engine_does(name: str, how: Any) -> None:
    optimizer = subject(name).template
    optimizer = optimizer.replace(lr=learned(0.05))
    assert_same(Problem(optimizer, "compile", **how).run(5), Problem(optimizer, "reference", **how).run(5))


def tower(per: Any) -> hn.Optimizer:
    top = hn.learn(1e-4, by=hn.sgd(lr=1e-6), per=per)
    return hn.adamw(
        lr=hn.learn(0.01, by=hn.adam(lr=top), per=per, via="log"), beta1=learned(0.8, "model"), weight_decay=learned(0.1, "row")
    )


@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        (tower("model"), {}),
        (tower("tensor"), {}),
        (tower("model"), {"memory": "reverse"}),
        (tower("tensor"), {"memory": "reverse"}),
        (tower("model"), {"discount": 0.9}),
        (hn.lamb(lr=learned(0.01, "row"), weight_decay=learned(0.1, "element")), {}),
        (hn.project(hn.sgd(lr=0.1), radius=hn.learn(0.1, by=hn.sgd(), bounds=(0.01, ftp.largest_norm))), {}),
    ],
    ids=["shared", "own", "shared, reverse", "own, reverse", "discount", "reverse", "bounds that read states"],
)
@pytest.mark.usefixtures("as_traced")
def test_towers_and_memories(optimizer: hn.Optimizer, how: Any) -> None:
    assert_same(Problem(optimizer, "compile", **how).run(5), Problem(optimizer, "reference", **how).run(5))


class Syncs(TorchDispatchMode):
    """Counts what would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_a_thousand_steps_compile_nothing_more_and_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    compiled = program.compiled
    monkeypatch.setattr("hyperopt_nested.compiled_step.compiled", lambda *args: made.append(args) or compiled(*args))
    problem = Problem(hn.adamw(lr=learned(0.01, "model", 1e-6)), "compile").run(1)
    assert len(made) == 3  # of both tensors together: pull, update, and the learner's
    with Syncs() as syncs:
        problem.run(1000)
    assert len(made) == 3
    assert syncs.count == 0
    assert problem.opt.hypers()["lr"]["group 0"] != 0.01


def test_a_gradient_now_and_then_and_frozen_tensors() -> None:
    ends = []
    for backend in ("compile", "reference"):
        problem = Problem(hn.adamw(lr=learned(0.01, "model"), weight_decay=learned(0.1)), backend)
        problem.params["b"].requires_grad_(False)
        for step in range(6):
            problem.gradients()
            if step in (1, 4):
                problem.params["a"].grad = None
            if step < 3:
                problem.params["b"].grad = None
            problem.opt.step()
        ends.append(problem)
    assert_same(*ends)


def test_values_that_were_read_stay() -> None:
    problem = Problem(hn.sgd(lr=learned(0.01, "model")), "compile").run(1)
    problem.schedule = None
    lr, rejected = problem.opt.hypers()["lr"]["group 0"], problem.opt.rejected()["lr"]
    before = float(lr)
    problem.run(1)
    assert float(lr) == before != float(problem.opt.hypers()["lr"]["group 0"])
    problem.params["a"].grad = torch.full((4, 3), float("nan"))
    problem.opt.step()
    assert (float(rejected), float(problem.opt.rejected()["lr"])) == (0, 1)


def test_nan_is_skipped_and_counted() -> None:
    ends = []
    for backend in ("compile", "reference"):
        problem = Problem(hn.sgd(lr=learned(0.01, "model"), weight_decay=learned(0.1)), backend).run(2)
        problem.gradients()
        problem.params["a"].grad[0, 0] = float("nan")  # type: ignore[index]
        problem.opt.step()
        ends.append(problem)
        assert {key: float(count) for key, count in problem.opt.rejected().items()} == {"lr": 1, "weight_decay": 1}
    assert torch.equal(ends[0].opt.hypers()["lr"]["group 0"], ends[1].opt.hypers()["lr"]["group 0"])


@pytest.mark.usefixtures("as_traced")
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint_or_a_copy() -> None:
    optimizer = tower("model")
    problem = Problem(optimizer, "compile").run(3)
    copied = copy.deepcopy(problem)
    file = io.BytesIO()
    torch.save([problem.opt.state_dict(), problem.schedule.state_dict(), problem.params], file)  # type: ignore[union-attr]
    file.seek(0)
    resumed = Problem(optimizer, "compile")
    state, schedule, params = torch.load(file, weights_only=False)
    with torch.no_grad():
        for name, p in resumed.params.items():
            p.copy_(params[name])
    resumed.opt.load_state_dict(state)
    resumed.schedule.load_state_dict(schedule)  # type: ignore[union-attr]
    expected = problem.run(3).values()
    for other in (copied, resumed):
        assert all(torch.equal(value, expected[name]) for name, value in other.run(3).values().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_tensors(dtype: torch.dtype) -> None:
    ends = []
    for backend in ("compile", "reference"):
        params = {"w": torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4).to(dtype))}
        opt = ftp.AdamP(list(params.items()), lr=1e-2, backend=backend)  # type: ignore[arg-type]
        for _ in range(5):
            params["w"].grad = torch.cos(params["w"].detach())
            opt.step()
        ends.append((params["w"].detach(), opt.hypers()["radius"]["w"]))
    torch.testing.assert_close(ends[0][0], ends[1][0])
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-5, atol=0)


def test_which_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1_000_000))
    assert hn.HyperOptimizer([small], hn.sgd()).backend == "reference"
    assert hn.HyperOptimizer([large], hn.sgd()).backend == "compile"
    assert hn.HyperOptimizer([large], hn.sgd(), backend="reference").backend == "reference"
    assert hn.HyperOptimizer([large], hn.clip_by_global_norm(hn.sgd())).backend == "reference"
    with pytest.raises(ValueError, match="backend='fast' must be one of 'auto', 'reference', 'compile'"):
        hn.HyperOptimizer([small], hn.sgd(), backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend='compile' can not be had: curvature='exact'"):
        hn.HyperOptimizer([small], hn.sgd(lr=learned(0.1)), backend="compile", discount=1.0, curvature="exact")

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patched:
        patched.setattr("hyperopt_nested.compiled_step.compiled", broken)
        large.grad = torch.ones_like(large)
        opt = hn.HyperOptimizer([large], hn.sgd(lr=0.5))
        with pytest.warns(UserWarning, match="can not be compiled, and runs by backend='reference': out of order"):
            opt.step()
        opt.step()
        assert opt.backend == "reference"
        assert float(large.detach()[0]) == 0.0
    monkeypatch.setattr("hyperopt_nested.compiled_step.compiler_for", lambda device: False)
    assert hn.HyperOptimizer([large], hn.sgd()).backend == "reference"
    with pytest.raises(ValueError, match=r"there is no compiler for cpu here; install one"):
        hn.HyperOptimizer([small], hn.sgd(), backend="compile")
