"""Time of a step, and of the first one, for small models; as ratios to torch's default AdamW, a loop over tensors.

Candidates of a model take turns, on the same gradients; ratios are of the same round. First steps are each in a process of their own, where
nothing has been traced, with a folder for compiled kernels that is empty at first. Without a compiler means that `CXX` names none. All is
on one thread: with more, a busy machine slows tensors this small down by factors.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure import all_met, compared, report, seconds
from sets import Params, Shapes, drawn, size, twins

import hyperopt_nested as hn
from ftp import AdamP
from hyperopt_nested.backends.choice import WARM_UP
from hyperopt_nested.backends.compiler import CACHE_VARIABLE

Make = Callable[[Params], torch.optim.Optimizer]
Rows = list[dict[str, Any]]

CNN: Shapes = [(16, 3, 3, 3), (16,), (16,), (32, 16, 3, 3), (32,), (32,), (40, 512), (40,), (10, 40), (10,)]
MODELS: dict[str, Shapes] = {"CNN": CNN, "MLP": [(64, 64)] * 100}
TORCH, RATE, FTP = "torch AdamW", "AdamW, lr learned", "AdamP"
EAGER = "reference, kept memory"
LR = 1e-3
AS_IN_TORCH: Make = partial(torch.optim.AdamW, lr=LR)
STEPS, WARM = 5, WARM_UP + 4  # steps timed at once; steps before that
SLOWEST, FIRST, FROM_DISK = 1.2, 2.0, 0.1  # times torch's step; seconds
BEFORE = {("CNN", RATE): 17.5 / 0.66, ("CNN", FTP): 13.3 / 0.66, ("MLP", RATE): 115 / 3.8}  # times torch's step, with the engine of 1b91621
FASTER = 5  # than that, without a compiler
NO_COMPILER = "no-such-compiler"


def optimizers(backend: Any, **how: Any) -> dict[str, Make]:
    by = hn.coherent_adam(lr=1e-9)  # as by default, but for the rate: values stay where they are
    optimizer = hn.adamw(lr=hn.learn(LR, by, via="log", delayed=True))
    return {
        RATE: lambda params: hn.HyperOptimizer(params, optimizer, backend=backend, **how),
        FTP: partial(AdamP, lr=LR, backend=backend),
    }


def steps(model: str, candidates: dict[str, Make], rounds: int) -> Rows:
    """A row a candidate; the first is torch's."""
    params = drawn(MODELS[model])
    made = {name: make(twins(params)) for name, make in {TORCH: AS_IN_TORCH, **candidates}.items()}
    for opt in made.values():
        for _ in range(WARM):
            opt.step()
    times = seconds({name: lambda opt=opt: [opt.step() for _ in range(STEPS)] for name, opt in made.items()}, rounds)
    return [
        {"model": model, "optimizer": name, "backend": getattr(opt, "backend", ""), **compared(times[name] / STEPS, times[TORCH] / STEPS)}
        for name, opt in made.items()
    ]


def eager_steps(model: str, rounds: int) -> Rows:
    """As `steps`, of what needs no compiler."""
    return steps(model, {**optimizers("auto"), f"{RATE}, {EAGER}": optimizers("reference", horizon=hn.OneStep("kept"))[RATE]}, rounds)


def first_steps(model: str, optimizer: str, backend: str) -> list[float]:
    """Seconds to make the optimizer; of its first step; and of the longest of those that follow until all programs are in use."""
    params = drawn(MODELS[model])
    moments = [time.perf_counter()]
    opt = {TORCH: AS_IN_TORCH, **optimizers(backend)}[optimizer](params)
    for _ in range(1 + WARM):
        moments.append(time.perf_counter())
        opt.step()
    made, first, *others = np.diff([*moments, time.perf_counter()]).tolist()
    return [made, first, max(others)]


def in_new_process(function: Callable[..., Any], *given: Any, threads: int, **environment: str) -> Any:
    """What a function of this module returns there."""
    call = f"torch.set_num_threads({threads}); print(json.dumps({function.__name__}{given!r}))"
    command = [sys.executable, "-W", "error", "-c", f"from small_models import *; {call}"]
    found = subprocess.run(command, cwd=Path(__file__).parent, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True)
    return json.loads(found.stdout)


def all_first_steps(threads: int) -> Rows:
    rows = []
    for model in MODELS:
        for optimizer, backend in [(TORCH, ""), *product(optimizers("auto"), ("auto", "fused"))]:
            with TemporaryDirectory() as folder:
                for kernels in ("none", "on disk") if backend else ("",):
                    found = in_new_process(first_steps, model, optimizer, backend, threads=threads, **{CACHE_VARIABLE: folder})
                    times = dict(zip(("made (s)", "first step (s)", "longest later (s)"), found, strict=True))
                    rows.append({"model": model, "optimizer": optimizer, "backend": backend, "kernels": kernels, **times})
    return rows


def main(
    rounds: int = 25,
    threads: int = 1,
    out: Annotated[Path, typer.Option(help="Directory to save tables in, as CSV.")] = Path("benchmarks/results"),
) -> None:
    """Print, and save, what steps take; fail if a requirement is not met."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    requirements: list[tuple[str, float, str, bool]] = []

    def at_most(what: str, found: float, bound: float) -> None:
        requirements.append((what, found, f"<= {bound:.3g}", found <= bound))

    about = ", ".join(f"{name}: {size(shapes)} numbers in {len(shapes)} tensors" for name, shapes in MODELS.items())
    rows = [row for model in MODELS for row in steps(model, optimizers("auto"), rounds)]
    report(f"a step, float32 ({about})", rows, out / "small_steps.csv")
    for row in rows:
        if row["optimizer"] != TORCH:
            at_most(f"{row['model']}, {row['optimizer']}: step / torch's", row["ratio"], SLOWEST)

    rows = [row for model in MODELS for row in in_new_process(eager_steps, model, rounds, threads=threads, CXX=NO_COMPILER)]
    for row in rows:
        before = BEFORE.get((row["model"], row["optimizer"].removesuffix(f", {EAGER}")), np.nan)
        row["before / now"] = before / row["ratio"]
        if before == before and not row["optimizer"].endswith(EAGER):  # what "auto" takes
            at_most(f"{row['model']}, {row['optimizer']}, no compiler: step / torch's", row["ratio"], before / FASTER)
    report("a step without a compiler", rows, out / "small_steps_without_compiler.csv")

    rows = all_first_steps(threads)
    report("first steps, in new processes", rows, out / "small_first_steps.csv")
    for row in rows:
        what = f"{row['model']}, {row['optimizer']}, {row['backend']}: first step, kernels {row['kernels']} (s)"
        if row["kernels"] == "none":
            at_most(what, row["first step (s)"], FIRST)
        elif row["backend"] == "auto":
            at_most(what, row["first step (s)"], FROM_DISK)
    raise typer.Exit(0 if all_met(requirements, out / "small_requirements.csv") else 1)


if __name__ == "__main__":
    typer.run(main)
