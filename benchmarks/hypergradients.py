"""Peak memory and time of a hypergradient through many steps, against training alone; and its memory against the number of steps.

Adam, whose learning rate is the hyper, trains a smooth perceptron. Peaks are of tensors, above those there before the call, and exact.

Then the same, and with SGD, beside other programs that differentiate through training, where they are installed; that all find the same
hypergradient is seen in float64.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure import Allocations, compared, peak, report, seconds
from torch import Tensor

import hyperopt_nested as hn

ROUNDS = 3
BATCH = 64
STEPS, WIDTHS = 100, (128, 256, 128)
STREAMED, SMALL = (10, 100, 2_000), (128, 128)
SETTLE = 50  # steps between two settlements of what the allocator did
MB = 1e6

Batch = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]

OPTIMIZER = hn.adam(lr=hn.learn(1e-3, by=hn.sgd()))
METHODS: dict[str, dict[str, Any]] = {
    "reverse, full": {"memory": "full"},
    "reverse, sqrt": {"memory": "sqrt"},
    "reverse, 1": {"memory": 1},
    "forward": {"method": "forward"},
}
TRAINING = "training, torch.optim.Adam"

LENGTHS = 10, 100
RATES = {"sgd": 0.1, "adam": 1e-3}
EPS = 1e-30  # changes no digit: programs add it in different places
OURS = "ours, reverse, full"


def perceptron(widths: Sequence[int]) -> Tensors:
    return {f"layer {i}": torch.randn(a, b) / a**0.5 for i, (a, b) in enumerate(pairwise(widths))}


def loss(params: Tensors, batch: Batch, *_: Any) -> Tensor:
    found, wanted = batch
    for weight in params.values():
        found = torch.tanh(found @ weight)
    return (found - wanted).square().mean()


def draw(widths: Sequence[int]) -> Batch:
    return torch.randn(BATCH, widths[0]), torch.rand(BATCH, widths[-1])


def hypergradient(
    params: Tensors, batches: Iterable[Batch], held_out: Batch, optimizer: hn.Optimizer = OPTIMIZER, **how: Any
) -> hn.typing.Hypergradients:
    return hn.hypergradient(optimizer, params, batches, loss, loss, outer_batch=held_out, **how)


def train(params: Tensors, batches: Iterable[Batch]) -> None:
    params = {name: param.clone().requires_grad_() for name, param in params.items()}
    opt = torch.optim.Adam(params.values(), lr=1e-3)
    for batch in batches:
        opt.zero_grad()
        loss(params, batch).backward()
        opt.step()


def train_nested(params: Tensors, batches: Iterable[Batch]) -> None:
    nested = hn.Nested(OPTIMIZER)
    st = nested.init(params)
    rule = st["rule"]
    for batch in batches:
        params = {name: param.detach().requires_grad_() for name, param in params.items()}
        grads = torch.autograd.grad(loss(params, batch), list(params.values()))
        with torch.no_grad():
            params, rule = nested.update(params, dict(zip(params, grads, strict=True)), rule, st["hypers"])


def methods() -> list[dict[str, Any]]:
    params, batches, held_out = perceptron(WIDTHS), [draw(WIDTHS) for _ in range(STEPS)], draw(WIDTHS)
    candidates: dict[str, Callable[[], Any]] = {TRAINING: lambda: train(params, batches)}
    candidates["training, Nested.update"] = lambda: train_nested(params, batches)
    for name, how in METHODS.items():
        candidates[name] = lambda how=how: hypergradient(params, batches, held_out, **how)
    seconds(candidates, 1)  # what is done once, when first used, is not measured
    peaks, times = {name: peak(function) for name, function in candidates.items()}, seconds(candidates, ROUNDS)
    rows = []
    for name in candidates:
        low, middle, high = np.percentile(times[name] / times[TRAINING], [25, 50, 75])
        rows.append(
            {
                "method": name,
                "peak (MB)": peaks[name] / MB,
                "peak / full": peaks[name] / peaks["reverse, full"],
                "peak / training": peaks[name] / peaks[TRAINING],
                "time (s)": float(np.median(times[name])),
                "time / full": float(np.median(times[name] / times["reverse, full"])),
                "time / training": float(middle),
                "lower quartile": float(low),
                "upper quartile": float(high),
            }
        )
    return rows


def stream(steps: int, allocations: Allocations) -> Iterator[Batch]:
    for step in range(1, steps + 1):
        yield draw(SMALL)
        if step % SETTLE == 0:
            allocations.settle()


def streamed() -> list[dict[str, Any]]:
    params, held_out = perceptron(SMALL), draw(SMALL)
    rows = []
    for steps in STREAMED:
        with Allocations() as allocations:
            hypergradient(params, stream(steps, allocations), held_out, method="forward")
        rows.append({"steps": steps, "peak (MB)": allocations.peak / MB, "peak / first": 1.0})
    for row in rows:
        row["peak / first"] = row["peak (MB)"] / rows[0]["peak (MB)"]
    return rows


def with_ours(rule: str, params: Tensors, batches: Sequence[Batch], held_out: Batch, **how: Any) -> Tensor:
    lr = hn.learn(RATES[rule], by=hn.sgd())
    optimizer = hn.sgd(lr=lr) if rule == "sgd" else hn.adam(lr=lr, eps=EPS)
    return hypergradient(params, batches, held_out, optimizer, **how)["lr"]["model"]


def with_higher(rule: str, params: Tensors, batches: Sequence[Batch], held_out: Batch) -> Tensor:
    higher = import_module("higher")
    layers = [layer for w in params.values() for layer in (torch.nn.Linear(*w.shape, bias=False), torch.nn.Tanh())]
    model, lr = torch.nn.Sequential(*layers), torch.tensor(RATES[rule], requires_grad=True)
    with torch.no_grad():
        for param, start in zip(model.parameters(), params.values(), strict=True):
            param.copy_(start.T)
    opt: torch.optim.Optimizer = torch.optim.SGD(model.parameters())
    if rule == "adam":
        opt = torch.optim.Adam(model.parameters(), eps=EPS)
    with higher.innerloop_ctx(model, opt, override={"lr": [lr]}) as (changing, stepper):
        for x, y in batches:
            stepper.step((changing(x) - y).square().mean())
        x, y = held_out
        return torch.autograd.grad((changing(x) - y).square().mean(), lr)[0]


def with_torchopt(rule: str, params: Tensors, batches: Sequence[Batch], held_out: Batch) -> Tensor:
    torchopt = import_module("torchopt")
    lr = torch.tensor(RATES[rule], requires_grad=True)
    opt = torchopt.sgd(lr=lr) if rule == "sgd" else torchopt.adam(lr=lr, eps=EPS)
    params = {name: param.clone().requires_grad_() for name, param in params.items()}
    st = opt.init(params)
    for batch in batches:
        grads = torch.autograd.grad(loss(params, batch), list(params.values()), create_graph=True)
        updates, st = opt.update(dict(zip(params, grads, strict=True)), st, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return torch.autograd.grad(loss(params, held_out), lr)[0]


PROGRAMS: dict[str, Callable[..., Tensor]] = {
    OURS: partial(with_ours, memory="full", wrt_params=False),
    "ours, reverse, sqrt": partial(with_ours, memory="sqrt", wrt_params=False),
    "ours, forward": partial(with_ours, method="forward"),
    "higher": with_higher,
    "torchopt": with_torchopt,
}


def problem(steps: int) -> tuple[Tensors, list[Batch], Batch]:
    return perceptron(WIDTHS), [draw(WIDTHS) for _ in range(steps)], draw(WIDTHS)


def found(rule: str, steps: int) -> Mapping[str, float]:
    """In float64, what each program that is there, and runs, finds."""
    torch.set_default_dtype(torch.float64)
    given, values = problem(steps), {}
    for name, program in PROGRAMS.items():
        try:
            values[name] = float(program(rule, *given))
        except Exception as error:  # of one program; the others are measured
            if program in (with_higher, with_torchopt):
                print(f"*** SKIPPED: {name}, {rule}, {steps} steps: {type(error).__name__}: {error} ***", flush=True)
            else:
                raise
    torch.set_default_dtype(torch.float32)
    return values


def beside_others() -> list[dict[str, Any]]:
    rows = []
    for rule in RATES:
        for steps in LENGTHS:
            values, given = found(rule, steps), problem(steps)
            candidates = {name: partial(PROGRAMS[name], rule, *given) for name in values}
            seconds(candidates, 1)
            peaks, times = {name: peak(function) for name, function in candidates.items()}, seconds(candidates, ROUNDS)
            rows += [
                {
                    "rule": rule,
                    "steps": steps,
                    "program": name,
                    "hypergradient": value,
                    "difference from ours": abs(value / values[OURS] - 1),
                    "peak (MB)": peaks[name] / MB,
                    "peak / ours": peaks[name] / peaks[OURS],
                    **compared(times[name], times[OURS]),
                }
                for name, value in values.items()
            ]
    return rows


def known() -> float:
    """The peak, in tensors of one size, of a chain of ten of which autograd keeps all: 11 with the first."""

    def chain() -> None:
        last = torch.ones(1 << 18, requires_grad=True)
        for _ in range(10):
            last = last.exp()

    return peak(chain) / (4 << 18)


def main(out: Annotated[Path, typer.Option(help="Directory to save the tables in, as CSV.")] = Path("benchmarks/results")) -> None:
    """Print, and save, peak memory and time of hypergradients; fail if a requirement is not met."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = known()
    by_method, by_steps, by_program = methods(), streamed(), beside_others()
    report(f"{STEPS} steps, perceptron {'-'.join(map(str, WIDTHS))}", by_method, out / "hypergradient_methods.csv")
    report(f"forward, batches from a stream, perceptron {'-'.join(map(str, SMALL))}", by_steps, out / "hypergradient_steps.csv")
    title = f"through {LENGTHS[0]} and {LENGTHS[-1]} steps, ratios to ours, reverse, full; perceptron {'-'.join(map(str, WIDTHS))}"
    report(title, by_program, out / "hypergradient_programs.csv")
    sqrt = next(row["peak / full"] for row in by_method if row["method"] == "reverse, sqrt")
    change = abs(by_steps[-1]["peak / first"] - 1)
    requirements = [
        ("peak of sqrt / peak of full", sqrt, "< 0.25", sqrt < 0.25),
        (f"change of forward's peak from {STREAMED[0]} to {STREAMED[-1]:,} steps", change, "< 0.05", change < 0.05),
        ("measured peak of 11 tensors, in tensors", tensors, "= 11", tensors == 11),
    ]
    rows = [dict(zip(("requirement", "measured", "bound", "met"), each, strict=True)) for each in requirements]
    report("requirements", rows, out / "hypergradient_requirements.csv")
    raise typer.Exit(0 if all(row["met"] for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
