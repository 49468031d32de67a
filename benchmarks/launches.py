"""What one step of many small tensors launches: operators of torch, native kernels and inductor's programs; and how many calls in Python.

Operators are those that torch dispatches, but for what moves no data: views, fresh memory, a number for Python. One that takes a list
counts once, as does a native kernel, which steps all tensors that it fits; a program of inductor's, which may consist of some kernels
itself, steps one tensor.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from measure import all_met, report
from sets import ADAMW_FOREACH, PUBLISHED, RATE, Candidate, adam_like, drawn, load_published, made, small
from torch.utils._python_dispatch import TorchDispatchMode

from hyperopt_nested.backends.fused import Kernel
from hyperopt_nested.backends.inductor import Inductor

BACKENDS = "fused", "foreach", "compile"
STEPS = 2  # before one is counted
MOST, FEWER = 20, 10
STILL = {"_local_scalar_dense", "empty", "empty_like", "empty_strided", "new_empty"}


class Operators(TorchDispatchMode):
    """Counts operators that move data."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.overloadpacket.__name__ not in STILL
        return func(*args, **kwargs or {})


def counted(candidate: Candidate) -> dict[str, Any] | None:
    """The backend, and by sort what one step calls; None where there is no such backend."""
    opt = made(candidate, drawn(small()), STEPS)
    if opt is None:
        return None
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        calls[event] += 1
        if event == "call" and frame.f_code is Kernel.__call__.__code__:
            calls["native"] += 1
        if event == "call" and frame.f_code is Inductor.__call__.__code__:
            calls["inductor"] += len(frame.f_locals["batch"].rows)

    sys.setprofile(note)
    try:
        opt.step()
    finally:
        sys.setprofile(None)
    with Operators() as operators:
        opt.step()
    launched = operators.count, calls["native"], calls["inductor"]
    columns = "operators", "native kernels", "inductor's programs"
    names = {"backend": getattr(opt, "backend", ""), **dict(zip(columns, launched, strict=True)), "all": sum(launched)}
    return {**names, "Python functions called": calls["call"], "C functions called": calls["c_call"]}


def main(
    published: Annotated[Path | None, typer.Option(help="The authors' FTP.py, to compare with.")] = None,
    out: Annotated[Path, typer.Option(help="Directory to save the table in, as CSV.")] = Path("benchmarks/results"),
) -> None:
    """Print, and save, what a step of each optimizer launches; fail if a requirement is not met."""
    torch.manual_seed(0)
    candidates = adam_like(BACKENDS, load_published(published))
    ours = [f"{what}, {backend}" for what in ("AdamP", RATE) for backend in BACKENDS]
    ours.remove(f"{RATE}, compile")  # minutes, and no news
    names = [name for name in (f"AdamP, {PUBLISHED}", ADAMW_FOREACH, *ours) if name in candidates]
    counts = {name: found for name in names if (found := counted(candidates[name]))}
    rows = [{"optimizer": name, **found} for name, found in counts.items()]
    report(f"one step, {len(small())} tensors", rows, out / "launches.csv")
    requirements = [
        (f"{what}, fused: launches", count, f"< {MOST}", count < MOST)
        for what in ("AdamP", RATE)
        if (count := counts.get(f"{what}, fused", {}).get("all")) is not None
    ]
    if published and "AdamP, compile" in counts:
        times = counts[f"AdamP, {PUBLISHED}"]["all"] / counts["AdamP, compile"]["all"]
        requirements.append(("launches of the published AdamP / of compile", times, f">= {FEWER}", times >= FEWER))
    raise typer.Exit(0 if all_met(requirements, out / "launches_requirements.csv") else 1)


if __name__ == "__main__":
    typer.run(main)
