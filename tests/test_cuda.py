"""On a GPU: every rule does on every backend what it does on the CPU, no step waits for the device, and what stands around a step works.

The bodies need a GPU for nothing but what is said there: TESTS_OF_CUDA_ON=cpu runs them on the CPU, to find mistakes in themselves.
"""

import copy
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ROWLESS, Tensors, relative_error
from problem import Problem, all_learned, learned, tower
from torch import Tensor, nn
from torch.nn import functional as F

import ftp
import hyperopt_nested as hn

DEVICE = torch.device(os.environ.get("TESTS_OF_CUDA_ON", "cuda"))
ON_GPU = DEVICE.type == "cuda"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: without it, cuBLAS is not deterministic

if ON_GPU and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:the learned value")  # which some of these rates take to an end
on_gpu = pytest.mark.skipif(not ON_GPU, reason="about CUDA itself")

BACKENDS: list[Any] = ["reference", "foreach", "compile"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 3e-2}  # relative to the largest entry; steps amplify rounding

Params = list[tuple[str, nn.Parameter]]
Make = Callable[[Params, Any], Any]


def assert_close(found: Tensors, expected: Tensors, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        error = relative_error(value.cpu().double(), expected[name].cpu().double())
        assert error < tolerance, f"{name} is off by {error:.2g}"


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Whatever waits for the device raises."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Rules


@pytest.mark.parametrize("backend", BACKENDS)
@hn.testing.every_rule("hyperopt_nested", "ftp")
def test_every_rule_does_what_it_does_on_the_cpu(name: str, backend: str) -> None:
    optimizer = all_learned(name)
    if backend != "reference" and (optimizer.rule.reduction or (backend == "foreach" and name in ROWLESS)):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot be used"):
            Problem(optimizer, backend, device=DEVICE).run(1)
        return
    single = backend != "compile" or name in ("adamw", "ftp", "lion", "muon", "sgd")  # other programs take long to compile
    for dtype in (torch.float64, torch.float32)[: 1 + single]:
        found = Problem(optimizer, backend, device=DEVICE, dtype=dtype).run(5)
        assert found.opt.backend == backend
        assert all(value.device.type == DEVICE.type for value in found.values().values())
        assert_close(found.values(), Problem(optimizer, "reference", dtype=dtype).run(5).values(), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        (tower("model"), {}),
        (tower("tensor"), {}),
        (hn.adamw(lr=learned(0.01, "row"), weight_decay=learned(0.1, "element")), {}),
        (tower("model"), {"horizon": hn.OneStep("reverse")}),
        (tower("model"), {"horizon": hn.Discounted(0.9)}),
        (hn.lamb(lr=learned(0.01, "row"), weight_decay=learned(0.1, "element")), {}),
        (hn.project(hn.sgd(lr=0.1), radius=hn.learn(0.1, by=hn.sgd(), bounds=(0.01, ftp.largest_norm))), {}),
        (hn.sgd(lr=hn.learn(0.01)), {"total_steps": 20}),
    ],
    ids=["shared", "own", "rows and elements", "reverse", "discount", "reverse, rows", "bounds that read states", "level"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_towers_and_memories(optimizer: hn.Optimizer, how: Any, backend: str) -> None:
    found, expected = (Problem(optimizer, each, device=at, **how).run(8) for each, at in ((backend, DEVICE), ("reference", "cpu")))
    assert_close(found.values(), expected.values(), TOLERANCE[torch.float64])


def test_exact_curvature() -> None:
    ends = []
    for device in (DEVICE, torch.device("cpu")):
        problem = Problem(hn.sgd(lr=learned(0.05, "model")), "auto", device=device, horizon=hn.Discounted(1.0, curvature="exact"))
        for _ in range(4):
            problem.opt.step(lambda problem=problem: sum((p + problem.offsets[name]).cos().sum() for name, p in problem.params.items()))
        ends.append(problem.values())
    assert_close(*ends, TOLERANCE[torch.float64])


# Tensors of all kinds

SHAPES: list[tuple[int, ...]] = [(4, 3), (4, 3), (7, 3), (3, 2, 2, 2), (5,), (5,), (40,), (), (1, 6), (300, 50)]


def tensors(device: Any, dtype: torch.dtype) -> Params:
    """Tensors of many shapes, and some that do not lie row after row."""
    generator = torch.Generator().manual_seed(0)
    drawn = {f"{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(SHAPES)}
    drawn["channels last"] = torch.randn(3, 2, 4, 4, generator=generator).to(memory_format=torch.channels_last)
    drawn["transposed"] = torch.randn(4, 6, generator=generator).t()
    drawn["every other"] = torch.randn(4, 6, generator=generator)[:, ::2]
    at = {name: torch.empty_strided(each.shape, each.stride(), dtype=dtype, device=device).copy_(each) for name, each in drawn.items()}
    return [(name, nn.Parameter(each)) for name, each in at.items()]


def descend(params: Params, opt: Any, steps: int, *, odd: bool = True) -> None:
    """Steps on a smooth function; if odd, gradients of some tensors lie otherwise than these."""
    for _ in range(steps):
        for name, p in params:
            p.grad = torch.cos(p.detach() * (1 + len(name)))
            if odd and name == "2":
                p.grad = p.grad.t().contiguous().t()
            if odd and name == "6":
                p.grad = torch.ones(1, dtype=p.dtype, device=p.device).expand(40)
        opt.step()


def values(params: Params, opt: Any) -> Tensors:
    hypers = {f"{hyper}/{key}": value for hyper, by in opt.hypers().items() for key, value in by.items()}
    return {**{name: p.detach() for name, p in params}, **hypers}


@pytest.mark.filterwarnings("ignore:backend='compile' is not used")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_all_shapes_and_layouts(backend: Any, dtype: torch.dtype) -> None:
    ends = []
    for each, device in ((backend, DEVICE), ("reference", "cpu")):
        params = tensors(device, dtype)
        base = hn.adamw(lr=learned(1e-2, "model"), weight_decay=learned(0.1))
        opt = ftp.FTPOptimizer(params, base, exclude=["1", "5"], backend=each)
        descend(params, opt, 4)
        ends.append(values(params, opt))
    assert_close(*ends, TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:backend='compile' is not used")
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_tensors_on_two_devices_in_one_optimizer(backend: Any) -> None:
    ends = []
    for device in (DEVICE, torch.device("cpu")):
        params = [
            (name, nn.Parameter(p.detach().to("cpu" if i % 2 else device))) for i, (name, p) in enumerate(tensors("cpu", torch.float64)[:6])
        ]
        opt = ftp.FTPOptimizer(params, hn.adamw(lr=learned(1e-2, "model"), weight_decay=learned(0.1)), backend=backend)
        descend(params, opt, 4)
        ends.append(values(params, opt))
        assert [p.device.type for _, p in params] == ["cpu" if i % 2 else device.type for i in range(6)]
    assert_close(*ends, TOLERANCE[torch.float64])


def test_anchors_on_the_cpu() -> None:
    ends = []
    for device, where in ((DEVICE, "cpu"), (torch.device("cpu"), None)):
        params = tensors(device, torch.float64)[:6]
        opt = ftp.AdamP(params, lr=1e-2, anchor_device=where)
        descend(params, opt, 4)
        assert all(opt.state[p]["rule.anchor"].device.type == "cpu" for _, p in params)
        ends.append(values(params, opt))
    assert_close(*ends, TOLERANCE[torch.float64])


def test_what_is_chosen() -> None:
    small, large = nn.Parameter(torch.ones(3, device=DEVICE)), nn.Parameter(torch.ones(1000, 1000, device=DEVICE))
    chosen = [hn.HyperOptimizer([each], hn.sgd()).backend for each in (small, large)]
    assert chosen == 2 * ["foreach" if ON_GPU else "fused"]
    assert hn.HyperOptimizer([small], hn.clip_by_global_norm(hn.sgd())).backend == "reference"
    if ON_GPU:
        with pytest.raises(ValueError, match=r"backend='fused' cannot be used: it is for the CPU, and there are tensors on cuda"):
            hn.HyperOptimizer([small], hn.sgd(), backend="fused")


# FTP


@pytest.mark.parametrize(
    ("inside", "same"),
    [
        (lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, fused=True), ftp.AdamP),
        (lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, foreach=True), ftp.AdamP),
        (lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, capturable=ON_GPU, foreach=True), ftp.AdamP),
        (lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-2, device=DEVICE), weight_decay=0.1, fused=True), ftp.AdamP),
        (lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1, fused=True), ftp.SGDP),
        (lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=True), ftp.SGDP),
        (lambda params: hn.optim.AdamW(params, lr=1e-2, weight_decay=0.1), ftp.AdamP),
    ],
    ids=["AdamW fused", "AdamW foreach", "AdamW capturable", "AdamW tensor lr", "SGD fused", "SGD foreach", "ours"],
)
def test_ftp_around_optimizers_on_the_device(inside: Any, same: Any) -> None:
    """Not of gradients that lie otherwise than their tensors, which torch's fused optimizers misread."""
    momentum = {"momentum": 0.9} if same is ftp.SGDP else {}
    ends = []
    for device in (DEVICE, "cpu"):
        params = tensors(device, torch.float64)[:-1]
        ours = same(params, lr=1e-2, weight_decay=0.1, **momentum, backend="auto" if device == DEVICE else "reference")
        descend(params, ours, 6, odd=False)
        ends.append(values(params, ours))
    params = tensors(DEVICE, torch.float64)[:-1]
    wrapped = ftp.FTP(inside([p for _, p in params]), named_parameters=params)
    descend(params, wrapped, 6, odd=False)
    assert_close(ends[0], ends[1], TOLERANCE[torch.float64])
    assert_close(values(params, wrapped), ends[1], 1e-8)  # torch's own kernels round otherwise


def learn_from_validation(params: Params, opt: ftp.TPGM | ftp.WiSEFT) -> None:
    def validation() -> Tensor:
        loss = torch.stack([(p - 0.1).square().sum() for _, p in params]).sum()
        loss.backward()
        return loss

    opt.step(validation)


@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_tpgm(norm: Any) -> None:
    ends = []
    for device in (DEVICE, "cpu"):
        params = tensors(device, torch.float64)
        tpgm = ftp.TPGM(params, norm=norm, updates=3)
        descend(params, torch.optim.AdamW([p for _, p in params], lr=1e-2), 3)
        learn_from_validation(params, tpgm)
        ends.append(values(params, tpgm))
    assert_close(*ends, TOLERANCE[torch.float64])


def test_wise_ft_learned_from_validation() -> None:
    ends = []
    for device in (DEVICE, "cpu"):
        params = tensors(device, torch.float64)
        wise = ftp.WiSEFT(params, updates=3)
        descend(params, torch.optim.SGD([p for _, p in params], lr=1e-2), 3)
        learn_from_validation(params, wise)
        ends.append(values(params, wise))
    assert_close(*ends, TOLERANCE[torch.float64])


# Steps

MAKES: dict[str, Make] = {
    "nothing learned": lambda params, backend: hn.optim.AdamW(params, lr=1e-3, backend=backend),
    "lr per model": lambda params, backend: hn.optim.AdamW(params, lr=learned(1e-3, "model", 1e-8), backend=backend),
    "lr per tensor": lambda params, backend: hn.optim.SGD(params, lr=learned(1e-3, "tensor", 1e-8), momentum=0.9, backend=backend),
    "tower": lambda params, backend: hn.HyperOptimizer(params, tower("model"), backend=backend),
    "level": lambda params, backend: hn.HyperOptimizer(params, hn.adamw(lr=hn.learn(1e-3)), total_steps=200, backend=backend),
    "AdamP": lambda params, backend: ftp.AdamP(params, lr=1e-3, backend=backend),
    "SGDP, radii per row": lambda params, backend: ftp.SGDP(params, lr=1e-3, radius=ftp.Radius(per="row"), backend=backend),
    "global norm": lambda params, backend: hn.HyperOptimizer(
        params, hn.clip_by_global_norm(hn.sgd(lr=learned(1e-3, "model"))), backend="reference" if backend != "auto" else backend
    ),
    "FTP of fused AdamW": lambda params, backend: ftp.FTP(torch.optim.AdamW(params, lr=1e-3, fused=True), backend=backend),
    "FTP of capturable AdamW": lambda params, backend: ftp.FTP(
        torch.optim.AdamW(params, lr=1e-3, foreach=True, capturable=ON_GPU), backend=backend
    ),
}  # fmt: skip


def network(device: Any, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(288, 5)
    return nn.Sequential(*layers).to(device, dtype)


def batch(device: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 8, 8, generator=generator).to(device, dtype), torch.randint(5, (16,), generator=generator).to(device)


def train(model: nn.Module, opt: Any, steps: int, first: int = 0, scheduler: Any = None) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        x, y = batch(DEVICE, step, dtype)
        opt.zero_grad()
        F.cross_entropy(model(x).to(torch.promote_types(dtype, torch.float32)), y).backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKES)
def test_no_step_waits_for_the_device(name: str, backend: Any) -> None:
    model, (x, y) = network(DEVICE), batch(DEVICE)
    opt = MAKES[name](list(model.named_parameters()) if "FTP" not in name else list(model.parameters()), backend)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50)
    train(model, opt, 3, scheduler=schedule)
    with nothing_waits():
        for _ in range(4):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
            schedule.step()
            opt.learned_tensors() if hasattr(opt, "learned_tensors") else None
    assert all(torch.isfinite(p).all() for p in model.parameters())


@on_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_keep_no_memory(backend: Any) -> None:
    model = network(DEVICE)
    opt = ftp.FTPOptimizer(model.named_parameters(), hn.adamw(lr=learned(1e-3, "model", 1e-8)), backend=backend)
    train(model, opt, 4)
    before = torch.cuda.memory_allocated()
    train(model, opt, 10)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["lr per model", "lr per tensor", "AdamP", "FTP of fused AdamW"])
def test_a_scaler_skips_a_step_that_overflows(name: str, backend: Any) -> None:
    model, (x, y) = network(DEVICE), batch(DEVICE)
    opt = MAKES[name](list(model.named_parameters()) if "FTP" not in name else list(model.parameters()), backend)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=4)
    for step in range(9):
        if step == 5:
            kept = copy.deepcopy((model.state_dict(), [*model.buffers()], opt.state_dict()))
        opt.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            loss = F.cross_entropy(model(x * (1e30 if step == 5 else 1)), y) if step != 6 else F.cross_entropy(model(x), y)
        scaler.scale(loss * (1e30 if step == 5 else 1)).backward()
        scaler.step(opt)
        scaler.update()
        if step == 5:
            weights = {key: value for key, value in model.state_dict().items() if "running" not in key and "tracked" not in key}
            torch.testing.assert_close(weights, {key: kept[0][key] for key in weights}, rtol=0, atol=0)
            assert repr(opt.state_dict()["state"]) == repr(kept[2]["state"])
            for buffer, value in zip(model.buffers(), kept[1], strict=True):  # running statistics, which the bad batch has spoiled
                buffer.copy_(value)
    assert scaler.get_scale() < 2.0**11
    assert all(torch.isfinite(value).all() for value in [*model.state_dict().values(), *map(torch.as_tensor, opt.learned().values())])


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["lr per model", "AdamP"])
def test_bfloat16_parameters(name: str, backend: Any) -> None:
    model = network(DEVICE, torch.bfloat16)
    opt = MAKES[name](list(model.named_parameters()), backend)
    losses = []
    for _ in range(20):
        train(model, opt, 1)
        x, y = batch(DEVICE, 0, torch.bfloat16)
        losses.append(F.cross_entropy(model(x).float(), y).item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.filterwarnings("ignore:the weights of '0':UserWarning")
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["lr per model", "lr per tensor", "AdamP"])
def test_gradients_that_are_not_finite_poison_nothing_that_is_learned(name: str, backend: Any) -> None:
    params = tensors(DEVICE, torch.float32)[:6]
    opt = MAKES[name](params, backend)
    descend(params, opt, 2)
    before = opt.learned()
    for _, p in params:
        p.grad = torch.full_like(p, torch.nan)
    kept = [p.detach().clone() for _, p in params]
    opt.step()
    assert all(map(torch.isfinite, opt.learned_tensors().values()))
    assert opt.learned().keys() == before.keys()
    assert all(float(count) > 0 for count in opt.nonfinite_counts().values())
    with torch.no_grad():
        for (_, p), value in zip(params, kept, strict=True):
            p.copy_(value)
    descend(params, opt, 2)
    assert all(map(torch.isfinite, opt.learned_tensors().values()))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["lr per model", "lr per tensor", "tower", "AdamP", "FTP of fused AdamW"])
def test_a_state_goes_to_the_cpu_and_back_bitwise(name: str, backend: Any) -> None:
    def begun() -> tuple[nn.Module, Any, Any]:
        model = network(DEVICE, torch.float64)
        opt = MAKES[name](list(model.named_parameters()) if "FTP" not in name else list(model.parameters()), backend)
        return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)

    model, opt, schedule = begun()
    train(model, opt, 3, 0, schedule)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in (model, opt, schedule)], file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    other, others_opt, others_schedule = begun()
    for each, state in zip((other, others_opt, others_schedule), saved, strict=True):
        each.load_state_dict(state)
    devices = {key: value.device.type for entries in others_opt.state.values() for key, value in entries.items()}
    assert {key for key, device in devices.items() if device != DEVICE.type} <= {
        "steps",
        "step",
        *(key for key in devices if "declared." in key),
    }
    for entry, again in zip(opt.state.values(), others_opt.state.values(), strict=True):
        torch.testing.assert_close(again, entry, rtol=0, atol=0)
    copied = copy.deepcopy((model, opt)) if "FTP" not in name else None
    with deterministic():
        train(model, opt, 4, 3, schedule)
        train(other, others_opt, 4, 3, others_schedule)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert others_opt.learned() == opt.learned()
    assert copied is None or copied[1].learned().keys() == opt.learned().keys()


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@on_gpu
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["lr per model", "lr per tensor", "AdamP", "FTP of capturable AdamW"])
def test_a_training_step_as_a_graph(name: str, backend: Any) -> None:
    """Programs write in place, so a captured step can be replayed; the engine itself says that it cannot."""
    ends = []
    for captured in (True, False):
        model, (x, y) = network(DEVICE), batch(DEVICE)
        opt = MAKES[name](list(model.named_parameters()) if "FTP" not in name else list(model.parameters()), backend)

        def step(model: nn.Module = model, opt: Any = opt, x: Tensor = x, y: Tensor = y) -> None:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            if backend == "reference":
                with pytest.raises(RuntimeError, match="backend='reference' cannot be captured"), torch.cuda.graph(graph):
                    step()
                return
            with torch.cuda.graph(graph):
                step()
            for _ in range(4):
                graph.replay()
        else:
            for _ in range(4):
                step()
        torch.cuda.synchronize()
        ends.append({**{name: p.detach().double() for name, p in model.named_parameters()}, **opt.learned_tensors()})
    assert_close(*ends, 1e-4)


# Through many steps


def problem_of_steps(device: Any, dropout: float = 0.0) -> tuple[Tensors, list[tuple[Tensor, Tensor]], Any, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
    params = {name: (torch.randn(shape, generator=generator) / 2).to(device) for name, shape in shapes.items()}
    batches = [
        (torch.randn(8, 4, generator=generator).to(device), torch.randint(3, (8,), generator=generator).to(device)) for _ in range(7)
    ]

    def train_loss(params: Tensors, batch: Any) -> Tensor:
        x = torch.tanh(F.linear(batch[0], params["0.weight"], params["0.bias"]))
        return F.cross_entropy(F.linear(F.dropout(x, dropout), params["2.weight"], params["2.bias"]), batch[1])

    def outer_loss(params: Tensors, batch: Any, hypers: Any = None) -> Tensor:
        x = torch.tanh(F.linear(batch[0], params["0.weight"], params["0.bias"]))
        return F.cross_entropy(F.linear(x, params["2.weight"], params["2.bias"]), batch[1])

    return params, batches, train_loss, outer_loss


@pytest.mark.parametrize("how", [{}, {"memory": "sqrt"}, {"method": "forward"}, {"horizon": 3}], ids=repr)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_hypergradients_through_steps(name: str, how: Any) -> None:
    rate = {
        "sgd": hn.sgd(lr=learned(0.1, "model"), momentum=learned(0.5, "row")),
        "adamw": hn.adamw(lr=learned(0.05), weight_decay=learned(0.1)),
    }
    ends = []
    for device in (DEVICE, "cpu"):
        params, batches, train_loss, outer_loss = problem_of_steps(device)
        found = hn.hypergradient(rate[name], params, batches, train_loss, outer_loss, outer_batch=batches[0], **how)
        ends.append({f"{hyper}/{key}": value for hyper, by in found.items() for key, value in by.items()})
    assert all(value.device.type == DEVICE.type for value in ends[0].values())
    assert_close(*ends, TOLERANCE[torch.float64])


def test_implicit_hypergradients() -> None:
    ends = []
    for device in (DEVICE, "cpu"):
        target = torch.linspace(-1, 1, 12, device=device).reshape(3, 4)
        loss = lambda params, batch, hypers=None: (params["w"] - target).square().sum() / 2  # noqa: B023, E731
        decay = hn.sgd(lr=0.1, weight_decay=learned(0.5, "model"))
        params = {"w": target / 1.5}
        found = hn.hypergradient(decay, params, [None], loss, lambda params, *_: params["w"].square().sum(), method="implicit")
        ends.append({f"{hyper}/{key}": value for hyper, by in found.items() for key, value in by.items()})
    assert_close(*ends, TOLERANCE[torch.float64])


def test_dropout_draws_the_same_masks_again() -> None:
    """Steps that are done again draw from the device's generator what they drew before, and leave it where it was."""
    params, batches, train_loss, outer_loss = problem_of_steps(DEVICE, dropout=0.4)
    found, drawn = [], []
    hows: list[dict[str, Any]] = [{}, {"memory": "sqrt"}, {"memory": 1}, {"method": "forward"}]
    for how in hows:
        torch.manual_seed(1)
        optimizer = hn.adamw(lr=learned(0.05, "model"))
        found.append(hn.hypergradient(optimizer, params, batches, train_loss, outer_loss, outer_batch=batches[0], **how)["lr"]["model"])
        drawn.append(torch.rand(1, device=DEVICE))
    assert all(relative_error(each, found[0]) < 1e-9 for each in found)
    assert all(torch.equal(each, drawn[0]) for each in drawn)


def test_sweeps_and_audits() -> None:
    ends = []
    for device in (DEVICE, "cpu"):
        params, batches, train_loss, _ = problem_of_steps(device)
        optimizer = hn.sgd(lr=learned(0.1, "model"))
        swept = hn.sweep(optimizer, params, batches, train_loss, starts={"lr": torch.tensor([0.05, 0.1, 0.2])})
        ends.append(dict(swept.params))
    assert_close(*ends, TOLERANCE[torch.float64])


# Fine-tuning


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = pytest.importorskip("PIL.Image")
    base = tmp_path_factory.mktemp("images")
    for part, count in (("train", 8), ("val", 4), ("test", 4)):
        for label, shade in enumerate((60, 200)):
            (base / part / f"{'ab'[label]}").mkdir(parents=True)
            for i in range(count):
                noise = random.Random(f"{part} {label} {i}")
                pixels = bytes(min(255, max(0, shade + noise.randint(-50, 50))) for _ in range(12 * 12 * 3))
                image.frombytes("RGB", (12, 12), pixels).save(base / part / "ab"[label] / f"{i}.png")
    return base


class StoppedError(Exception):
    """A run is stopped."""


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["ftp", "tpgm"])
def test_fine_tuning_goes_on_bitwise(method: str, precision: Any, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from ftp.finetuning import folders
    from ftp.finetuning.heads import Preprocessing
    from ftp.finetuning.images import Images

    splits, how = folders.read(folder), Preprocessing(size=8, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3))
    sets = [Images(each, how, augment=each is splits.train) for each in (splits.train, splits.validation)]

    def tune(out: Path | None, stop: int = 0) -> tuple[nn.Module, Any]:
        def progress(now: Any) -> None:
            if now.step == stop:
                raise StoppedError

        torch.manual_seed(0)
        stem = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()
        model = nn.Sequential(*stem, nn.Linear(288, 2)).to(DEVICE)
        arguments: dict[str, Any] = {"head": model[5], "lr": 1e-2, "epochs": 3, "batch_size": 4, "save_every": 2}
        result = ftp.finetune(
            model, sets[0], sets[1], tests={"test": sets[1]}, method=method, precision=precision, out=out, progress=progress, **arguments
        )
        return model, result

    torch.set_default_dtype(torch.float32)
    with deterministic():
        model, result = tune(None)
        with pytest.raises(StoppedError):
            tune(tmp_path / "run", stop=7)
        resumed, again = tune(tmp_path / "run")
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert all(p.device.type == DEVICE.type for p in resumed.parameters())
    assert [each.validation_loss for each in again.epochs] == [each.validation_loss for each in result.epochs]
    assert max(each.validation_accuracy for each in result.epochs) == 1.0
