"""Time of one optimizer step, as a ratio to that of torch's fused one; the bytes that it has to touch, and how fast it does.

Every candidate takes turns with the base, on tensors that share its gradients; ratios are of the same round. Bytes are counted, not
measured: gradient, parameter, state and anchor, each read or written once for each pass that needs it. The first step traces and compiles;
nothing has been compiled before.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from measure import all_met, bars, compared, report, seconds
from sets import (
    ALIKE,
    BOTH,
    BOTH_BY_TENSOR,
    DEFAULT,
    NOTHING,
    SETS,
    Candidate,
    Params,
    adam_like,
    drawn,
    load_published,
    made,
    sgd_like,
    twins,
)

from hyperopt_nested.backends import compiler

WARM = 2  # steps after the first
BOUNDS = {
    **{f"{name}, auto": 2.2 for name in ("AdamP", f"AdamP, {ALIKE}", "SGDP")},
    f"{DEFAULT}, auto": 1.5,
    f"{BOTH}, auto": 1.6,
    f"{BOTH_BY_TENSOR}, auto": 1.6,
}
COLUMNS = "ms", "ratio", "lower quartile", "upper quartile"

Rows = list[dict[str, Any]]


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """As in a new process, on a machine where no kernel has been compiled."""
    loaded = mock.patch.dict(compiler._libraries, clear=True)
    with TemporaryDirectory() as folder, mock.patch.dict(os.environ, {compiler.CACHE_VARIABLE: folder}), loaded:
        yield


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(params: Params, candidates: Mapping[str, Candidate], rounds: int) -> Rows:
    """A row a candidate; the first is the base."""
    dtype, count = params[0].dtype, sum(param.numel() for param in params)

    def row(name: str, backend: str, times: Mapping[str, float], first: float) -> dict[str, Any]:
        touched = candidates[name].touched(dtype)
        speed = touched * count / times["ms"] / 1e6
        return {"optimizer": name, "backend": backend, **times, "bytes / number": touched, "GB/s": speed, "first step (s)": first}

    (name, candidate), *others = candidates.items()
    base = candidate.make(params)
    base_first, base_times, rows = timed(base.step), [], []
    for other, candidate in others:
        opt = made(candidate, twins(params))
        if opt is None:
            rows.append(row(other, "not there", dict.fromkeys(COLUMNS, np.nan), np.nan))
            continue
        with nothing_compiled():
            first = timed(opt.step)
        steps = {name: base.step, other: opt.step}
        seconds(steps, WARM)
        times = seconds(steps, rounds)
        base_times.append(times[name])
        rows.append(row(other, getattr(opt, "backend", ""), compared(times[other], times[name]), first))
        del opt, steps
        gc.collect()
    times = np.concatenate(base_times)
    return [row(name, "", compared(times, times), base_first), *rows]


def warm_up(backends: list[str]) -> None:
    """Import what traces and compiles."""
    for backend in backends:
        opt = made(adam_like([backend])[f"{NOTHING}, {backend}"], drawn([(1 << 20,)]))
        if opt is not None:
            opt.step()


def main(
    published: Annotated[Path | None, typer.Option(help="The authors' FTP.py, to compare with in float32.")] = None,
    sets: Annotated[list[str], typer.Option("--set", help=f"Parameters: {', '.join(SETS)}.")] = ["vit_b", "resnet50"],  # noqa: B006
    dtypes: Annotated[list[str], typer.Option("--dtype")] = ["float32", "bfloat16"],  # noqa: B006
    backends: Annotated[list[str], typer.Option("--backend", help="Also there: reference, compile, fused.")] = ["auto", "foreach"],  # noqa: B006
    rounds: int = 15,
    threads: int = 2,
    out: Annotated[Path, typer.Option(help="Directory to save tables, as CSV, and the figure in.")] = Path("benchmarks/results"),
) -> None:
    """Print, and save, what a step of each optimizer takes; fail if a requirement is not met."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    program = load_published(published)
    warm_up(backends)
    panels, requirements = {}, []
    for of in sets:
        for short in dtypes:
            dtype = getattr(torch, short)
            params = drawn(SETS[of](), dtype)
            title = f"{of}, {short}, {sum(p.numel() for p in params) / 1e6:.3g} million numbers, {len(params)} tensors"
            for kind, family in (("AdamW", adam_like), ("SGD", sgd_like)):
                rows = compare(params, family(backends, program if dtype == torch.float32 else None, dtype), rounds)
                report(title, rows, out / f"optimizer_steps_{of}_{short}_{kind.lower()}.csv")
                ratios = {row["optimizer"]: row["ratio"] for row in rows}
                panels[f"{of}, {short}: over fused {kind}"] = ratios
                for name, ratio in ratios.items():
                    if name in BOUNDS:
                        met = bool(ratio <= BOUNDS[name])
                        requirements.append((f"{of}, {short}: {name} / fused {kind}", ratio, f"<= {BOUNDS[name]}", met))
            del params
            gc.collect()
    bars(panels, "time of a step, as a ratio", out / "optimizer_steps.png")
    raise typer.Exit(0 if all_met(requirements, out / "optimizer_steps_requirements.csv") else 1)


if __name__ == "__main__":
    typer.run(main)
