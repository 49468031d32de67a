"""Steps on a GPU: time, kernel launches, memory, first step; of torch's optimizers and ours, on each backend, and as CUDA graphs.

Each candidate that has to be compiled has a process of its own, so that they compile at the same time; a lock lets one of them measure.
What is not ready in time has the row "not ready". Beside single steps: whole training steps of AdamP and of TPGM, which evaluates a
validation batch in each step; and hypergradients through K steps.
"""

import argparse
import contextlib
import csv
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sets import Params, Shapes, drawn, resnet50, small, vit_b
from torch import Tensor, nn
from torch.nn import functional as F

import hyperopt_nested as hn
from ftp import FTP, SGDP, TPGM, AdamP

Make = Callable[[Params], torch.optim.Optimizer]
Row = dict[str, Any]
LR, DECAY, MOMENTUM = 1e-3, 0.01, 0.9
RATE = "AdamW, lr learned"
COLUMNS = (
    "what", "tensors", "optimizer", "backend", "ms", "wall ms", "graph ms", "launches", "state MB", "peak MB", "first step s", "note",
)  # fmt: skip
COMPILED = "compile"
SETS: dict[str, Callable[[], Shapes]] = {"resnet50": resnet50, "vit_b": vit_b, "resnet50, first 20": lambda: resnet50()[:20]}


def rate() -> hn.Learn:
    """A learning rate that is learned, and stays where it is."""
    return hn.learn(LR, by=hn.sgd(lr=1e-9))


def torch_adamw(**how: bool) -> Make:
    return lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, **how)


def torch_sgd(**how: bool) -> Make:
    return lambda params: torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, **how)


def candidates(backend: Any) -> dict[str, Make]:
    """Ours, by name."""
    how: Mapping[str, Any] = {"backend": backend}
    return {
        "AdamW, nothing learned": lambda params: hn.optim.AdamW(params, lr=LR, weight_decay=DECAY, **how),
        RATE: lambda params: hn.optim.AdamW(params, lr=rate(), weight_decay=DECAY, **how),
        "AdamP": lambda params: AdamP(params, lr=LR, weight_decay=DECAY, **how),
        "SGDP": lambda params: SGDP(params, lr=LR, momentum=MOMENTUM, **how),
        "FTP of torch's fused AdamW": lambda params: FTP(torch_adamw(fused=True)(params), **how),
    }


TORCH: dict[str, Make] = {
    "torch AdamW, fused": torch_adamw(fused=True),
    "torch AdamW, foreach": torch_adamw(foreach=True),
    "torch AdamW, foreach, capturable": torch_adamw(foreach=True, capturable=True),
    "torch SGD, fused": torch_sgd(fused=True),
    "torch SGD, foreach": torch_sgd(foreach=True),
}


class Device:
    """What is measured on: a GPU; or the CPU, to try this program out.

    Args:
        name: "cuda" or "cpu".
        lock: a file that is locked while something is measured.
    """

    def __init__(self, name: str, lock: Path) -> None:
        self.name, self._lock = name, lock

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process measures."""
        with self._lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def wait(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def milliseconds(self, function: Callable[[], Any], rounds: int) -> float:
        """The median, by events on the device."""
        if self.name != "cuda":
            return 1e3 * statistics.median(self.seconds(function) for _ in range(rounds))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        self.wait()
        for event in events[:-1]:
            event.record()
            function()
        events[-1].record()
        self.wait()
        return statistics.median(one.elapsed_time(other) for one, other in pairwise(events))

    def memory(self) -> int:
        return torch.cuda.memory_allocated() if self.name == "cuda" else 0

    def peak(self, function: Callable[[], Any]) -> float:
        """MB that are allocated at most during a call, above those before it."""
        if self.name != "cuda":
            return 0.0
        self.wait()
        before = self.memory()
        torch.cuda.reset_peak_memory_stats()
        function()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def launches(self, function: Callable[[], Any]) -> int:
        """Kernels that a call starts; copies and fills of memory are not counted."""
        if self.name != "cuda":
            return 0
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiled:
            function()
            self.wait()
        on_device = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)

    def graph(self, function: Callable[[], Any]) -> Callable[[], None]:
        """A call as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay


def step(device: Device, what: str, name: str, backend: str, make: Make, rounds: int) -> Row:
    """A row: single steps of an optimizer."""
    torch.manual_seed(0)
    shapes = SETS[what]() if device.name == "cuda" else small()[:20]
    params = drawn(shapes)
    for param in params:
        param.data, param.grad = param.data.to(device.name), param.grad.to(device.name)  # type: ignore[union-attr]
    before = device.memory()
    opt = make(params)
    row: Row = {"what": f"step, {what}", "tensors": len(shapes), "optimizer": name, "backend": backend}
    row["first step s"] = device.seconds(opt.step)
    for _ in range(4):
        opt.step()
    used = getattr(getattr(opt, "projection", opt), "backend", backend)
    row["note"] = "" if used == backend else f"runs on {used}"
    row["state MB"] = (device.memory() - before) / 1e6
    with device.alone():
        row["ms"] = device.milliseconds(opt.step, rounds)
        row["wall ms"] = 1e3 * statistics.median(device.seconds(opt.step) for _ in range(rounds))
        row["peak MB"] = device.peak(opt.step)
        row["launches"] = device.launches(opt.step)
        if backend in ("foreach", COMPILED) or name.endswith("capturable"):
            try:
                row["graph ms"] = device.milliseconds(device.graph(opt.step), rounds) if device.name == "cuda" else 0.0
            except Exception as error:
                row["note"] += f"graph: {' '.join(str(error).split())[:150]}"
    return row


class Image(nn.Module):
    """ResNet-50 of torchvision, or, without that or on the CPU, a small convolutional network."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.size = 224 if device == "cuda" else 8
        try:
            from torchvision.models import resnet50  # type: ignore[import-not-found, unused-ignore]

            if device != "cuda":
                raise ImportError
            self.body, self.title = resnet50(), "resnet50"
        except ImportError:
            layers = (
                nn.Conv2d(3, 64, 3, stride=2),
                nn.BatchNorm2d(64),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(64, 1000),
            )
            self.body, self.title = nn.Sequential(*layers), "small network"

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return result


def training(device: Device, name: str, backend: Any, rounds: int, count: int = 64) -> Row:
    """A row: whole training steps, in bfloat16 by autocast."""
    torch.manual_seed(0)
    model = Image(device.name).to(device.name, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = [
        (
            torch.randn(count, 3, model.size, model.size, device=device.name).to(memory_format=torch.channels_last),
            torch.randint(1000, (count,), device=device.name),
        )
        for _ in range(2)
    ]
    params = list(model.named_parameters())

    def loss(index: int) -> Tensor:
        with torch.autocast(device.name, torch.bfloat16):
            value = F.cross_entropy(model(batches[index][0]), batches[index][1])
        value.backward()
        return value

    tpgm = TPGM(params, updates=1) if name.endswith("TPGM") else None
    opt = AdamP(params, lr=1e-5, backend=backend) if name == "AdamP" else torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def train() -> None:
        opt.zero_grad()
        loss(0)
        opt.step()
        if tpgm is not None:
            tpgm.step(lambda: loss(1))

    row: Row = {"what": f"training, {model.title}, batch {count}", "tensors": len(params), "optimizer": name, "backend": backend}
    row["first step s"] = device.seconds(train)
    for _ in range(4):
        train()
    with device.alone():
        row["ms"] = device.milliseconds(train, rounds)
        row["wall ms"] = 1e3 * statistics.median(device.seconds(train) for _ in range(rounds))
        row["peak MB"] = device.peak(train)
        row["launches"] = device.launches(train)
    return row


def through_steps(device: Device, rule: str, steps: int, how: Mapping[str, Any]) -> Row:
    """A row: one hypergradient of a perceptron 784-1024-1024-10, batches of 256."""
    generator = torch.Generator().manual_seed(0)
    widths = (784, 1024, 1024, 10) if device.name == "cuda" else (8, 8, 8, 10)
    shapes = {f"{i}": pair for i, pair in enumerate(pairwise(widths))}
    params = {name: (torch.randn(shape, generator=generator) / shape[0] ** 0.5).to(device.name) for name, shape in shapes.items()}
    x = torch.randn(steps, 256, widths[0], generator=generator).to(device.name)
    y = torch.randint(10, (steps, 256), generator=generator).to(device.name)

    def loss(params: Mapping[str, Tensor], batch: Any, hypers: Any = None) -> Tensor:  # noqa: ARG001
        hidden = torch.tanh(torch.tanh(batch[0] @ params["0"]) @ params["1"])
        return F.cross_entropy(hidden @ params["2"], batch[1])

    learned = hn.learn(1e-2, by=hn.sgd())
    optimizer = hn.sgd(lr=learned) if rule == "SGD" else hn.adam(lr=learned)

    def run() -> None:
        hn.hypergradient(optimizer, params, list(zip(x, y, strict=True)), loss, loss, outer_batch=(x[0], y[0]), **how)

    shown = ", ".join(f"{key}={value}" for key, value in how.items())
    row: Row = {"what": f"hypergradient, K = {steps}, {shown}", "tensors": 3, "optimizer": rule, "backend": "reference"}
    row["first step s"] = device.seconds(run)
    with device.alone():
        row["wall ms"] = 1e3 * statistics.median(device.seconds(run) for _ in range(3))
        row["peak MB"] = device.peak(run)
    return row


def tasks() -> dict[str, list[Callable[[Device, int], Row]]]:
    """What each process measures, by name; what is compiled begins first."""
    found: dict[str, list[Callable[[Device, int], Row]]] = {}

    def of(what: str, name: str, backend: str, make: Make) -> Callable[[Device, int], Row]:
        return lambda device, rounds: step(device, what, name, backend, make, rounds if backend != "reference" else 5)

    def training_of(name: str, backend: str) -> Callable[[Device, int], Row]:
        return lambda device, rounds: training(device, name, backend, rounds // 2)

    def hypergradient_of(rule: str, steps: int, how: Mapping[str, Any]) -> Callable[[Device, int], Row]:
        return lambda device, _: through_steps(device, rule, steps, how)

    compiled = candidates(COMPILED)
    for what, names in {"resnet50": [*compiled], "vit_b": [RATE, "AdamP"], "resnet50, first 20": [RATE, "AdamP"]}.items():
        found |= {f"{COMPILED}, {what}, {name}": [of(what, name, COMPILED, compiled[name])] for name in names}
    for what in ("resnet50", "vit_b"):
        found[f"torch, {what}"] = [of(what, name, "", make) for name, make in TORCH.items()]
        found[f"foreach, {what}"] = [of(what, name, "foreach", make) for name, make in candidates("foreach").items()]
    found["reference"] = [of("resnet50", name, "reference", candidates("reference")[name]) for name in (RATE, "AdamP")]
    for name, backend in (("AdamW", ""), ("AdamW and TPGM", ""), ("AdamP", "foreach")):
        found[f"training, {name}"] = [training_of(name, backend)]
    hows: list[tuple[str, int, dict[str, Any]]] = [(rule, 10, {"memory": "full"}) for rule in ("SGD", "Adam")]
    hows += [("Adam", 100, {"memory": "full"}), ("Adam", 100, {"memory": "sqrt"}), ("Adam", 10, {"method": "forward"})]
    found["hypergradients"] = [hypergradient_of(*how) for how in hows]
    return found


def one(name: str, device: Device, rounds: int, out: Path) -> None:
    """Measure what one process measures; a line of JSON a row."""
    with out.open("a") as file:
        for measure in tasks()[name]:
            try:
                row = measure(device, rounds)
            except Exception as error:
                traceback.print_exc()
                row = {"what": name, "note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            file.write(json.dumps(row) + "\n")
            file.flush()
            if device.name == "cuda":
                torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="directory to save the table in, as CSV")
    parser.add_argument("--seconds", type=float, default=600, help="after which what is not ready is left out")
    parser.add_argument("--rounds", type=int, default=30, help="how often each candidate is timed")
    parser.add_argument("--device", default="cuda", help="cuda; or cpu, to try this program out on small tensors")
    parser.add_argument("--only", nargs="+", default=[""], help="measure only what has one of these in its name")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        os.nice(10 if given.one.startswith(COMPILED) else 0)  # what is measured meanwhile is not to wait for the processor
        one(given.one, Device(given.device, given.folder / "lock"), given.rounds, given.folder / f"{list(tasks()).index(given.one)}.json")
        return
    end = time.monotonic() + given.seconds
    version = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if given.device == "cuda" else "CPU"}
    given.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in tasks() if any(part in name for part in given.only)]
    with tempfile.TemporaryDirectory() as temporary, (given.out / "gpu.log").open("w") as log:
        folder = Path(temporary)
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--rounds", str(given.rounds), "--device", given.device, "--folder", temporary, "--one"]
        started = [subprocess.Popen([*command, name], env=environment, stdout=log, stderr=log) for name in names]
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        late = {name for name, process in zip(names, started, strict=True) if process.poll() is None}
        for process in started:
            process.kill()
            process.wait()
        rows = []
        for name in names:
            file = folder / f"{list(tasks()).index(name)}.json"
            rows += [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            rows += [{"what": name, "note": f"not ready after {given.seconds:.0f} s"}] if name in late else []
    with (given.out / "gpu.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, [*COLUMNS, *version])
        writer.writeheader()
        writer.writerows({**row, **version} for row in rows)
    for row in rows:
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items() if value not in ("", None)}
        print("; ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


if __name__ == "__main__":
    main()
