"""Programs do what the engine does, for every rule; they are made once, and wait for no value of a tensor."""

import copy
import gc
import io
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EXACT, ROWLESS, relative_error
from problem import Problem, all_learned, learned, tower
from torch.utils._python_dispatch import TorchDispatchMode

import ftp
import hyperopt_nested as hn
from hyperopt_nested.backends import choice, compiler, foreach, fused, inductor, step
from hyperopt_nested.backends.program import Batch
from hyperopt_nested.backends.trace import trace
from hyperopt_nested.optim.pinned import PinnedValues
from hyperopt_nested.testing.subject import subject

pytestmark = pytest.mark.filterwarnings("ignore:the learned value")  # which some of these rates take to an end

BACKENDS = ["foreach", "compile", "fused"]


def assert_same(found: Problem, expected: Problem) -> None:
    wanted = expected.values()
    assert found.values().keys() == wanted.keys()
    for name, value in found.values().items():
        assert relative_error(value, wanted[name]) < EXACT, name


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("backend", BACKENDS)
@hn.testing.every_rule("hyperopt_nested", "ftp")
def test_programs_do_what_the_engine_does(name: str, backend: str) -> None:
    optimizer = all_learned(name)
    if optimizer.rule.reduction:
        with pytest.raises(ValueError, match=rf"backend='{backend}' cannot be used: .* needs a total over all tensors"):
            Problem(optimizer, backend)
        return
    if backend != "compile" and name in ROWLESS:
        with pytest.raises(ValueError, match=rf"backend='{backend}' cannot be used for \w+: an update (makes a tensor of shape|calls)"):
            Problem(optimizer, backend).run(1)
        return
    found = Problem(optimizer, backend).run(5)
    assert found.opt.backend == backend
    assert_same(found, Problem(optimizer, "reference").run(5))


@pytest.mark.parametrize(
    ("name", "backend", "memory"),
    [
        *(("adamw", "compile", "reverse"), ("muon", "compile", "auto"), ("ftp", "compile", "auto")),  # inductor takes long
        *((name, "fused", memory) for name in ("adamw", "lamb", "ftp") for memory in ("auto", "reverse")),
    ],
)
def test_optimized_programs_do_what_the_engine_does(name: str, backend: str, memory: Any) -> None:
    optimizer, how = subject(name).template, {"horizon": hn.OneStep(memory)}
    optimizer = optimizer.replace(lr=learned(0.05))
    assert_same(Problem(optimizer, backend, **how).run(5), Problem(optimizer, "reference", **how).run(5))


@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        (tower("model"), {}),
        (tower("tensor"), {}),
        (tower("model"), {"horizon": hn.OneStep("reverse")}),
        (tower("tensor"), {"horizon": hn.OneStep("reverse")}),
        (tower("model"), {"horizon": hn.Discounted(0.9)}),
        (hn.lamb(lr=learned(0.01, "row"), weight_decay=learned(0.1, "element")), {}),
        (hn.project(hn.sgd(lr=0.1), radius=hn.learn(0.1, by=hn.sgd(), bounds=(0.01, ftp.largest_norm))), {}),
        (hn.adamw(lr=hn.learn(), weight_decay=hn.learn(per="tensor")), {}),
        (hn.adamw(lr=hn.learn(), weight_decay=hn.learn(per="tensor")), {"horizon": hn.OneStep("reverse")}),
        (hn.adamw(lr=hn.learn(), weight_decay=hn.learn(per="row"), beta1=learned(0.9)), {"horizon": hn.Discounted(0.9)}),
        (hn.project(hn.sgd(lr=hn.learn(0.1, delayed=False)), radius=hn.learn(0.1, bounds=(0.01, ftp.largest_norm))), {}),
    ],
    ids=[
        *("shared", "own", "shared, reverse", "own, reverse", "discount", "reverse", "bounds that read states"),
        *("delayed", "delayed, reverse", "delayed or not, discount", "delayed or not, bounds that read states"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("quick_programs")
def test_towers_and_memories(optimizer: hn.Optimizer, how: Any, backend: str) -> None:
    assert_same(Problem(optimizer, backend, **how).run(5), Problem(optimizer, "reference", **how).run(5))


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("quick_programs")
def test_a_step_with_delayed_values_is_one_program(backend: str, delayed: bool) -> None:
    prepared = Problem(hn.adamw(lr=hn.learn(delayed=delayed)), backend).run(2).opt._program_step._last
    assert {name: len(rows) for name, rows in prepared.rows.items()} == dict.fromkeys("ab", 1 if delayed else 2)
    assert (len(prepared.pulls), len(prepared.updates)) == (0 if delayed else 1, 1)


SHAPES = [(4, 3), (4, 3), (7, 3), (3, 2, 2, 2), (5,), (5,), (40,), (), (1, 6), (6, 1), (0, 3), (300, 50)]


def layouts() -> dict[str, torch.nn.Parameter]:
    """Tensors of many shapes, and some that do not lie row after row."""
    generator = torch.Generator().manual_seed(0)
    found = {f"{i}": torch.nn.Parameter(torch.randn(shape, generator=generator)) for i, shape in enumerate(SHAPES)}
    image = torch.randn(3, 2, 4, 4, generator=generator)
    found["channels last"] = torch.nn.Parameter(image.to(memory_format=torch.channels_last))
    found["transposed"] = torch.nn.Parameter(torch.randn(4, 6, generator=generator).t())
    found["every other"] = torch.nn.Parameter(torch.randn(4, 6, generator=generator)[:, ::2])
    return found


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((backend, dtype) for backend in ("foreach", "auto") for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        ("compile", torch.float32),  # whose programs are traced tensor by tensor
    ],
)
@pytest.mark.usefixtures("quick_programs")
def test_tensors_of_all_shapes_and_layouts_together(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "_AT_ONCE", 64)
    monkeypatch.setattr(step, "WARM_UP", 2)
    ends = []
    for each in (backend, "reference"):
        strided = {name: torch.empty_strided(p.shape, p.stride(), dtype=dtype).copy_(p.detach()) for name, p in layouts().items()}
        params = {name: torch.nn.Parameter(tensor) for name, tensor in strided.items()}
        base = hn.adamw(lr=learned(1e-2, "model"), weight_decay=learned(0.1))
        opt = ftp.FTPOptimizer(list(params.items()), base, exclude=["1", "5"], backend=each)  # type: ignore[arg-type]
        for _ in range(4):
            for name, p in params.items():
                p.grad = torch.cos(p.detach() * (1 + len(name)))
            params["2"].grad = params["2"].grad.t().contiguous().t()  # type: ignore[union-attr]
            params["6"].grad = torch.ones(1, dtype=dtype).expand(40)
            opt.step()
        assert opt.backend == {"auto": "fused+reference", "compile": "compile+reference"}.get(each, each)
        values = {f"{hyper}/{key}": value for hyper, found in opt.hypers().items() for key, value in found.items()}
        ends.append({**{name: p.detach() for name, p in params.items()}, **values})
    tolerance = {torch.float64: EXACT, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for name, value in ends[0].items():
        assert relative_error(value, ends[1][name]) < tolerance, name


@pytest.mark.parametrize("backend", ["foreach", "fused"])
@pytest.mark.usefixtures("quick_programs")
def test_what_is_remembered_is_what_was_before(backend: str) -> None:
    """Reverse memory copies what the same step overwrites."""
    optimizer = hn.adamw(lr=learned(0.05), beta1=learned(0.8))
    found = Problem(optimizer, backend, (12, 5), horizon=hn.OneStep("reverse")).run(5)
    assert_same(found, Problem(optimizer, "reference", (12, 5), horizon=hn.OneStep("reverse")).run(5))


def test_kernels_split_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a tensor, and several tensors a batch."""
    code = fused.code

    def small(graph: Any) -> str:
        source, sizes = code(graph), {"BLOCK": 64, "BATCH": 300}
        for constant in sizes:
            source = re.sub(rf"int64_t {constant} = \d+", f"int64_t {constant} = {sizes[constant]}", source)
        return source

    monkeypatch.setattr(fused, "code", small)
    monkeypatch.setattr(compiler, "FLAGS", ("-O0",))
    ends = []
    for backend in ("fused", "reference"):
        params = {f"{i}": torch.nn.Parameter(torch.randn(shape)) for i, shape in enumerate([(30, 7), (5, 100), (200,), (3, 3), (9, 9)])}
        opt = ftp.AdamP(list(params.items()), lr=1e-2, weight_decay=0.1, backend=backend)  # type: ignore[arg-type]
        for _ in range(4):
            for p in params.values():
                p.grad = torch.cos(p.detach())
            opt.step()
        ends.append(({name: p.detach() for name, p in params.items()}, opt.hypers()["radius"]))
        torch.manual_seed(0)
    for name, value in ends[0][0].items():
        assert relative_error(value, ends[1][0][name]) < EXACT, name
        assert relative_error(ends[0][1][name], ends[1][1][name]) < EXACT, name


@pytest.mark.parametrize(("at", "bad"), [(0, math.nan), (127, math.inf), (128, 1e308), (449, math.nan)])
@pytest.mark.parametrize("where", ["grad", "param", "exp_avg", "exp_avg_sq"])
def test_a_chunk_with_what_is_not_finite_is_done_again(where: str, at: int, bad: float) -> None:
    """Kernels take the elements of a chunk to be finite, and look afterwards: at its begin, its end, and in the last one."""
    ends = {}
    for backend in ("fused", "reference"):
        param = torch.nn.Parameter(torch.linspace(0.5, 1.5, 450).reshape(3, 150))
        opt = hn.optim.AdamW([("w", param)], lr=hn.learn(1e-3), weight_decay=hn.learn(1e-2), backend=backend)  # type: ignore[arg-type]
        for at_step in range(4):
            param.grad = torch.cos(param.detach() + at_step)
            if at_step == 2:
                entry = {"grad": param.grad, "param": param.data}.get(where)
                entry = opt.state[param][f"rule.{where}"] if entry is None else entry
                entry.view(-1)[at] = bad
            opt.step()
        ends[backend] = [
            param.detach(),
            *opt.learned_tensors().values(),
            *(opt.state[param][f"rule.{key}"] for key in ("exp_avg", "exp_avg_sq")),
        ]
        ends[backend] += [torch.tensor(sum(map(float, opt.nonfinite_counts().values())))]
    for found, expected in zip(*ends.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=100 * EXACT, atol=0, equal_nan=True)  # entries grow to thousands in a step


class Calls(TorchDispatchMode):
    """Counts operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.of[name] = self.of.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


SYNCS = "_local_scalar_dense", "is_nonzero", "equal"
"""Operators that wait for a device."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_steps_make_nothing_more_and_wait_for_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    name = {"compile": "Inductor", "fused": "Kernel", "foreach": "Interpreter"}[backend]
    make = getattr(choice, name)
    monkeypatch.setattr(choice, name, lambda *args: made.append(args) or make(*args))
    monkeypatch.setattr(PinnedValues, "look", lambda *_: None)  # which looks at a device in every hundredth step only
    problem = Problem(hn.adamw(lr=learned(0.01, "model", 1e-6)), backend).run(1)
    assert len(made) == 3  # of both tensors together: pull, update, and the learner's
    with Calls() as calls:
        problem.run(1000)
    assert len(made) == 3
    assert not calls.of.keys() & set(SYNCS)
    assert problem.opt.hypers()["lr"]["group 0"] != 0.01


@pytest.mark.parametrize("backend", ["foreach", "fused"])
@pytest.mark.usefixtures("quick_programs")
def test_steps_keep_the_memory_of_states_and_nothing_else(backend: Any) -> None:
    """No gradients that are set to None, and nothing as large as tensors that are concatenated."""

    def kept() -> int:
        gc.collect()
        storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        return sum({each.data_ptr(): each.nbytes() for each in storages}.values())

    before = kept()
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(100, 1000)] * 5 + [(5, 1000), (4000,), (7, 2)]]
    opt = hn.optim.AdamW(params, lr=learned(1e-3, "model", 1e-8), backend=backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.cos(p.detach())
        opt.step()
        opt.zero_grad()
    assert opt.backend == backend
    state = 3 * sum(p.numel() * p.element_size() for p in params)  # parameters and moments
    assert state <= kept() - before < state + 10_000


def test_large_tensors_are_not_concatenated() -> None:
    def chunks(device: str, *sizes: int) -> list[list[int]]:
        return foreach._chunks([torch.empty(size, device=device) for size in sizes])

    assert chunks("cpu", 10, 20, 100_000, 30, 40, 100_000, 100_000, 50) == [[0, 1], [2], [3, 4], [5], [6], [7]]
    assert chunks("meta", 10, 20, 100_000, 30, 20_000_000, 40) == [[0, 1, 2, 3], [4], [5]]
    assert [len(chunk) for chunk in chunks("cpu", *[100] * 2000)] == [655, 655, 656, 34]


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("name", ["adamw", "ftp"])
def test_one_program_steps_all_tensors_of_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted here on the CPU: what is called in a step does not grow with the number of tensors."""
    monkeypatch.setattr(inductor, "TOGETHER", {"cpu"})
    calls: list[int] = []

    def compiled(graph: Any, examples: list[torch.Tensor]) -> Any:
        return lambda *given: calls.append(len(given)) or graph(*given)

    monkeypatch.setattr("torch._inductor.compile", compiled)
    shapes = [(4, 3), (3,), (2, 3, 2, 2)] * 20
    ends = []
    for backend in ("compile", "reference"):
        params = [torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(shapes)]
        named = [(f"p{i}", p) for i, p in enumerate(params)]
        base = hn.adamw(lr=learned(0.01, "model"), weight_decay=0.1)
        opt = hn.HyperOptimizer(named, base if name == "adamw" else ftp.ftp_rule(base), backend=backend)  # type: ignore[arg-type]
        for _ in range(3):
            for p in params:
                p.grad = torch.cos(p.detach())
            calls.clear()
            opt.step()
        ends.append([p.detach() for p in params])
        assert opt.backend == backend
        if backend == "compile":
            assert 0 < len(calls) < 20
            assert max(calls) > 60
    for found, expected in zip(*ends, strict=True):
        assert relative_error(found, expected) < EXACT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("quick_programs")
def test_a_gradient_now_and_then_and_frozen_tensors(backend: str) -> None:
    ends = []
    for each in (backend, "reference"):
        problem = Problem(hn.adamw(lr=learned(0.01, "model"), weight_decay=learned(0.1)), each)
        problem.params["b"].requires_grad_(False)
        for at in range(6):
            problem.gradients()
            if at in (1, 4):
                problem.params["a"].grad = None
            if at < 3:
                problem.params["b"].grad = None
            problem.opt.step()
        ends.append(problem)
    assert_same(*ends)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("quick_programs")
def test_tensors_that_are_called_as_parts_of_the_state(backend: str) -> None:
    """What is counted is found by where it is, not by how a tensor is called."""
    ends = []
    for each in (backend, "reference"):
        names = ["nonfinite", "pinned", "learners", "hypers", "memory"]
        params = {name: torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4)) for name in names}
        rate = hn.learn(0.01, by=hn.adam(lr=learned(1e-3)), per="tensor")
        opt = hn.HyperOptimizer(list(params.items()), hn.adamw(lr=rate), horizon=hn.OneStep("reverse"), backend=each)  # type: ignore[arg-type]
        for _ in range(3):
            for param in params.values():
                param.grad = torch.cos(param.detach())
            opt.step()
        ends.append(torch.stack([param.detach() for param in params.values()]))
    assert relative_error(ends[0], ends[1]) < EXACT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("quick_programs")
def test_values_that_were_read_stay(backend: str) -> None:
    problem = Problem(hn.sgd(lr=learned(0.01, "model")), backend).run(1)
    problem.schedule = None
    lr, rejected = problem.opt.hypers()["lr"]["group 0"], problem.opt.nonfinite_counts()["lr"]
    before = float(lr)
    problem.run(1)
    assert float(lr) == before != float(problem.opt.hypers()["lr"]["group 0"])
    problem.params["a"].grad = torch.full((4, 3), float("nan"))
    problem.opt.step()
    assert (float(rejected), float(problem.opt.nonfinite_counts()["lr"])) == (0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("quick_programs")
def test_nan_is_skipped_and_counted(backend: str) -> None:
    ends = []
    for each in (backend, "reference"):
        problem = Problem(hn.sgd(lr=learned(0.01, "model"), weight_decay=learned(0.1)), each).run(2)
        problem.gradients()
        problem.params["a"].grad[0, 0] = float("nan")  # type: ignore[index]
        problem.opt.step()
        ends.append(problem)
        assert {key: float(count) for key, count in problem.opt.nonfinite_counts().items()} == {"lr": 1, "weight_decay": 1}
    assert torch.equal(ends[0].opt.hypers()["lr"]["group 0"], ends[1].opt.hypers()["lr"]["group 0"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("quick_programs")
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint_or_a_copy(backend: str) -> None:
    optimizer = tower("model")
    problem = Problem(optimizer, backend).run(3)
    copied = copy.deepcopy(problem)
    file = io.BytesIO()
    torch.save([problem.opt.state_dict(), problem.schedule.state_dict(), problem.params], file)  # type: ignore[union-attr]
    file.seek(0)
    resumed = Problem(optimizer, backend)
    state, schedule, params = torch.load(file, weights_only=False)
    with torch.no_grad():
        for name, p in resumed.params.items():
            p.copy_(params[name])
    resumed.opt.load_state_dict(state)
    resumed.schedule.load_state_dict(schedule)  # type: ignore[union-attr]
    expected = problem.run(3).values()
    for other in (copied, resumed):
        assert all(torch.equal(value, expected[name]) for name, value in other.run(3).values().items())


def test_which_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1_000_000))
    assert hn.HyperOptimizer([small], hn.sgd()).backend == "fused"
    assert hn.HyperOptimizer([large], hn.sgd()).backend == "fused"
    assert hn.HyperOptimizer([large], hn.sgd(), backend="reference").backend == "reference"
    assert hn.HyperOptimizer([large], hn.clip_by_global_norm(hn.sgd())).backend == "reference"
    with pytest.raises(ValueError, match="backend='fast' must be one of 'auto', 'reference', 'foreach', 'compile', 'fused'"):
        hn.HyperOptimizer([small], hn.sgd(), backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend='compile' cannot be used: curvature='exact'"):
        hn.HyperOptimizer([small], hn.sgd(lr=learned(0.1)), backend="compile", horizon=hn.Discounted(1.0, curvature="exact"))
    with pytest.raises(ValueError, match="backend='fused' cannot be used: it is for the CPU, and there are tensors on meta"):
        choice.chosen("fused", hn.Nested(hn.sgd()), {"w": torch.empty(1, device="meta"), "v": small})
    monkeypatch.setattr(choice, "compiler_for", lambda device: True)
    elsewhere = torch.empty(1_000_000, device="meta")
    assert choice.chosen("auto", hn.Nested(hn.sgd()), {"w": elsewhere}) == "foreach"
    assert choice.chosen("auto", hn.Nested(hn.sgd()), {"w": elsewhere, "v": small}) == "foreach"
    assert choice.chosen("compile", hn.Nested(hn.sgd()), {"w": elsewhere}) == "compile"
    monkeypatch.setattr(choice, "compiler_for", lambda device: False)
    monkeypatch.setattr(compiler, "compiler", lambda: None)
    assert hn.HyperOptimizer([large], hn.sgd()).backend == "foreach"
    for backend in ("compile", "fused"):
        with pytest.raises(ValueError, match=rf"backend='{backend}' cannot be used: there is no .*compiler .*here; install one"):
            hn.HyperOptimizer([small], hn.sgd(), backend=backend)  # type: ignore[arg-type]


def test_auto_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for fails, before anything is changed; what is chosen is replaced, with a warning."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(choice, "Inductor", broken)
    monkeypatch.setattr(choice, "Kernel", broken)
    for backend in ("fused", "compile"):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        opt = hn.HyperOptimizer([param], hn.sgd(lr=0.5), backend=backend)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot be used for sgd: out of order. Use backend='auto'"):
            opt.step()
        assert torch.equal(param.detach(), torch.ones(3))
    monkeypatch.setattr(step, "WARM_UP", 0)
    opt = hn.HyperOptimizer([param], hn.sgd(lr=0.5))
    with pytest.warns(UserWarning, match="out of order") as warned:
        opt.step()
    assert [str(each.message) for each in warned] == ["backend='fused' is not used for sgd: out of order"]
    opt.step()
    assert opt.backend == "foreach"
    assert float(param.detach()[0]) == 0.0


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.usefixtures("quick_programs")
def test_what_is_kept_in_narrow_dtypes(backend: Any) -> None:
    """Displacements and anchors in bfloat16 are rounded to it, and to nothing else."""
    ends = {}
    for dtype in (torch.bfloat16, torch.float64):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4).to(torch.bfloat16).to(torch.float64))  # so is the anchor
        opt = ftp.AdamP([("w", param)], lr=1e-2, backend=backend, displacement_dtype=dtype, anchor_dtype=dtype)
        for _ in range(20):
            param.grad = torch.cos(3 * param.detach())
            opt.step()
        kept = {key: leaf.dtype for key, leaf in opt.state[param].items() if leaf.shape == param.shape}
        assert {key for key, found in kept.items() if found == torch.bfloat16} == (
            {"rule.anchor", "memory.sensitivity.radius"} if dtype == torch.bfloat16 else set()
        )
        ends[dtype] = opt.hypers()["radius"]["w"]
    error = relative_error(ends[torch.bfloat16], ends[torch.float64])
    assert 0 < error < 1e-2


def test_anchors_on_a_device_of_their_own_stay_there() -> None:
    param = torch.nn.Parameter(torch.ones(3, 4, device="meta"))
    opt = ftp.AdamP([("w", param)], anchor={"w": torch.ones(3, 4)}, anchor_device="cpu")
    opt.hypers()
    assert opt.state[param]["rule.anchor"].device.type == "cpu"
    assert {leaf.device.type for key, leaf in opt.state[param].items() if key not in ("rule.anchor", "steps", "declared.radius")} == {
        "meta"
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: hn.OneStep(dtype=torch.int8), "dtype=torch.int8 must be a real floating-point dtype"),
        (lambda p: hn.HyperOptimizer([p], hn.sgd(), state_dtype=torch.int8), "state_dtype=torch.int8 must be a real floating-point dtype"),
        (lambda p: ftp.AdamP([p], anchor_dtype=torch.int8), r"anchor_dtype=torch\.int8 must be a real floating-point dtype"),
    ],
)
def test_dtypes_that_cannot_be(make: Callable[[torch.nn.Parameter], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(torch.nn.Parameter(torch.ones(3)))


def drawn_function(seed: int) -> Callable[..., list[Any]]:
    """A function of three matrices and two numbers, to what is to be written to them, with choices by rows and by numbers."""
    draw = random.Random(seed)
    picks = [(draw.randrange(9), *(draw.random() for _ in range(3))) for _ in range(12)]
    ends = [draw.random() for _ in range(3)]

    def function(grad: torch.Tensor, one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor, bound: torch.Tensor) -> list[Any]:
        found = [grad, one, other]
        rows = [each.abs().sum(1, keepdim=True) > bound for each in (grad, one)]
        for op, *where in picks:
            x, y, z = (found[int(at * len(found))] for at in where)
            made = [
                lambda x, y, z: x * scale + y,
                lambda x, y, z: x - y * z,
                lambda x, y, z: y - (x / (z.abs() + 1)) * scale,
                lambda x, y, z: torch.where(rows[0], x, y),
                lambda x, y, z: torch.where(rows[1], x + y * z, y),
                lambda x, y, z: torch.where(scale > 0, x, y + z),
                lambda x, y, z: x * y.abs().sum(1, keepdim=True).add(1).reciprocal(),
                lambda x, y, z: z + (x * scale) * y,
                lambda x, y, z: torch.where(scale > 0, z, 0.0) + x.clamp(min=0).sqrt(),
            ]
            found.append(made[op](x, y, z))
        return [None, *(0.5 * found[-1 - int(at * 8)] for at in ends[:2]), None, found[-1 - int(ends[2] * 8)].abs().sum()]

    return function


@pytest.mark.parametrize("at_once", [6, 1 << 16], ids=["alone", "together"])
@pytest.mark.parametrize("seed", range(25))
def test_what_is_chosen_is_written_to_where_it_belongs(seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that choose one way, the other, or both; numbers that choose; results that are written over what is read."""
    monkeypatch.setattr(foreach, "_AT_ONCE", at_once)
    function, generator = drawn_function(seed), torch.Generator().manual_seed(seed)

    def arguments(scale: float) -> list[torch.Tensor]:
        size = torch.tensor([0.1, 0.1, 0.1, 10.0, 10.0, 10.0, 0.1]).unsqueeze(1)  # pieces are of two rows
        matrices = [size * torch.randn(7, 3, generator=generator) for _ in range(3)]
        return [*matrices, torch.tensor(scale), torch.tensor(3.0)]

    program = foreach.Interpreter(trace(function, arguments(1.0), torch.zeros(7, 3)))
    for scales in ((0.5, 0.7), (-0.5, -0.7), (0.5, -0.7)):
        batch = [arguments(scale) for scale in scales]
        wanted = [function(*given) for given in batch]
        program(Batch(batch))
        for given, expected in zip(batch, wanted, strict=True):
            for found, value in zip(given, expected, strict=True):
                assert value is None or relative_error(found, value) < EXACT


@pytest.mark.parametrize("columns", [1024, 999])
def test_tensors_that_no_cache_holds(columns: int) -> None:
    """What is only written goes past the cache then, whole lines at a time."""
    ends = {}
    for backend in ("fused", "reference"):
        param = torch.nn.Parameter(torch.randn(1200, columns, generator=torch.Generator().manual_seed(0)))
        opt = ftp.SGDP([("w", param)], lr=1e-2, momentum=0.9, backend=backend)  # type: ignore[arg-type]
        for _ in range(3):
            param.grad = torch.cos(param.detach())
            opt.step()
        ends[backend] = param.detach(), opt.hypers()["radius"]["w"], opt.state[param]["memory.sensitivity.radius"]
    for found, expected in zip(*ends.values(), strict=True):
        assert relative_error(found, expected) < EXACT


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_moments_in_a_dtype_of_their_own(backend: Any) -> None:
    ends = {}
    for dtype in (torch.float32, None):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        opt = ftp.SGDP([("w", param)], lr=1e-2, momentum=0.9, backend=backend, state_dtype=dtype)
        for _ in range(20):
            param.grad = torch.cos(3 * param.detach())
            opt.step()
        kept = {key: leaf.dtype for key, leaf in opt.state[param].items() if leaf.shape == param.shape}
        assert {key for key, found in kept.items() if found == torch.float32} == ({"rule.base.momentum_buffer"} if dtype else set())
        ends[dtype] = param.detach()
    assert 0 < relative_error(ends[torch.float32], ends[None]) < 1e-6


@pytest.mark.parametrize("columns", [1, 2, 33])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32], ids=["narrow", "mixed"])
def test_kernels_round_to_bfloat16_as_torch_does(kept: torch.dtype, columns: int) -> None:
    """To the nearest, ties to even; and a NaN stays one, whatever bits it has."""

    def function(grad: torch.Tensor, param: torch.Tensor, state: torch.Tensor, scale: torch.Tensor) -> list[Any]:
        largest = grad.float().amax(1, keepdim=True)
        return [None, (state.float() * scale).to(param.dtype), torch.where(largest > 1, param.float() * scale, grad.float()).to(kept), None]

    def arguments() -> list[torch.Tensor]:
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
        grad, param, state = (every[torch.randperm(len(every), generator=generator)][: 900 * columns] for _ in range(3))
        odd = torch.tensor([0x7FFFFFFF, -1, -0x800000, 0x7F800000], dtype=torch.int32).view(torch.float32)
        kinds = [param, grad, state] if kept == torch.bfloat16 else [param, grad, torch.cat([odd, state.float()[4:]])]
        return [*(each.reshape(900, columns).clone() for each in kinds), torch.tensor(1 + 2.0**-8)]

    generator = torch.Generator().manual_seed(0)
    given = arguments()
    wanted = function(*given)
    program = fused.Kernel(trace(function, given, given[1]))
    program(Batch([given]))
    for found, value in zip(given, wanted, strict=True):
        if value is not None:
            torch.testing.assert_close(found, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("columns", [1, 64, 4001])
def test_kernels_of_bfloat16_alone(columns: int) -> None:
    """They go two neighbours at a time, and keep what a row's other loops need."""
    ends = {}
    for backend in ("fused", "reference"):
        start = torch.randn(700, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        param = torch.nn.Parameter(start)
        opt = ftp.SGDP([("w", param)], lr=0.1, momentum=0.9, backend=backend, state_dtype=torch.bfloat16)  # type: ignore[arg-type]
        for _ in range(4):
            param.grad = torch.cos(param.detach())
            opt.step()
        ends[backend] = param.detach() - start, opt.hypers()["radius"]["w"], opt.state[param]["rule.base.momentum_buffer"]
    for found, expected in zip(*ends.values(), strict=True):
        assert relative_error(found, expected) < 1e-2


def test_arguments_that_change_places() -> None:
    function = lambda grad, one, other, third: [None, other, third, one]  # noqa: E731
    given = [torch.randn(3, 4) for _ in range(4)]
    wanted = [given[i].clone() for i in (0, 2, 3, 1)]
    foreach.Interpreter(trace(function, given, given[1]))(Batch([given]))
    assert all(map(torch.equal, given, wanted))


def test_kernels_find_what_the_maximum_is_of() -> None:
    """The derivative of a maximum compares with it what a later sweep computes again, where instructions may round otherwise."""
    ends = {}
    for backend in ("fused", "reference"):
        param = torch.nn.Parameter(torch.randn(13, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        optimizer = hn.project(hn.rmsprop(lr=hn.learn(0.01, by=hn.sgd(lr=1e-4))), radius=0.3)
        opt = hn.HyperOptimizer([("w", param)], optimizer, horizon=hn.Discounted(0.7), backend=backend)  # type: ignore[arg-type]
        for _ in range(5):
            param.grad = torch.cos(param.detach())
            opt.step()
        ends[backend] = [param.detach(), *(leaf for leaf in opt.state[param].values() if leaf.is_floating_point())]
    for found, expected in zip(ends["fused"], ends["reference"], strict=True):
        assert relative_error(found, expected) < EXACT


def test_vectors_are_stepped_as_rows_only_where_the_rule_does_that():
    """`centralize` leaves a vector as it is, and subtracts the mean of a row."""
    params = {}
    for backend in ("reference", "foreach"):
        torch.manual_seed(0)
        params[backend] = [torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16)) for shape in ((3, 2), (6, 1), (4,), (1,))]
        opt = hn.HyperOptimizer(params[backend], hn.centralize(hn.sgd(lr=1e-3)), backend=backend)
        for _ in range(3):
            for p in params[backend]:
                p.grad = torch.ones_like(p)
            opt.step()
    for reference, found in zip(*params.values(), strict=True):
        assert torch.equal(reference, found)
