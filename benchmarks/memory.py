"""What optimizers keep beside the model, and need for a moment in a step; and how many kernels a step launches.

Memory is of tensors, as torch's allocator gives it out, and exact; in float32, so 4 bytes a number are one more tensor of the model's size.
Kernels that torch dispatches are counted as torch.profiler sees them: operators that no other operator called, but for those that move no
data. It does not see programs, which are counted where they are called: one of `fused` steps all tensors that it fits, one of inductor's,
which may consist of some kernels itself, steps one tensor.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from measure import Allocations, all_met, peak, report
from sets import ADAMW_FOREACH, PUBLISHED, Candidate, adam_like, drawn, load_published, made, sgd_like, size, small, vit_b
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from hyperopt_nested.backends import fused

BLOCKS = 2
BACKENDS = "fused", "foreach", "compile"
STEPS = 2  # before a step is measured
FEWER = 10
VIEWS = "detach detach_ view view_as as_strided reshape _reshape_alias flatten select slice narrow expand expand_as squeeze unsqueeze"
VIEWS += " transpose t permute alias unbind split split_with_sizes chunk contiguous to"
OTHERS = "empty empty_like empty_strided new_empty resize_ lift_fresh result_type item is_nonzero _local_scalar_dense"
STILL = {f"aten::{name}" for name in f"{VIEWS} {OTHERS}".split()}  # move no data, unless an operator that they call does


def kept(candidate: Candidate) -> tuple[str, float, float]:
    """The backend; bytes a number that it keeps, and needs beyond that within a step."""
    shapes = vit_b(BLOCKS)
    params = drawn(shapes)
    with Allocations() as allocations:
        opt = made(candidate, params)
        for _ in range(STEPS if opt is not None else 0):
            opt.step()
    if opt is None:
        return "not there", np.nan, np.nan
    return getattr(opt, "backend", ""), allocations.kept / size(shapes), peak(opt.step) / size(shapes)


def _moves(event: FunctionEvent) -> bool:
    return any(map(_moves, event.cpu_children)) if event.name in STILL else event.name.startswith("aten::")


def _is_kernel(event: FunctionEvent) -> bool:
    """Whether it moves data, and no other operator called it."""
    above = event.cpu_parent
    while above is not None and not above.name.startswith("aten::"):  # the profiler's own, such as "Optimizer.step"
        above = above.cpu_parent
    return above is None and _moves(event)


@contextmanager
def programs_called(called: list[str]) -> Iterator[None]:
    """Note each call of a program that torch does not see: inductor's only of those made inside the `with`."""
    run, compile_ = fused._Kernel.__call__, torch._inductor.compile

    def native(self: Any, *given: Any) -> Any:
        called.append("native")
        return run(self, *given)

    def compiling(*given: Any, **how: Any) -> Callable[..., Any]:
        program = compile_(*given, **how)

        def compiled(*arguments: Any) -> Any:
            called.append("inductor")
            return program(*arguments)

        return compiled

    with mock.patch.object(fused._Kernel, "__call__", native), mock.patch.object(torch._inductor, "compile", compiling):
        yield


def launches(candidate: Candidate) -> dict[str, Any]:
    """The backend, and by sort what one step launches."""
    called: list[str] = []
    with programs_called(called):
        opt = made(candidate, drawn(small()))
        if opt is None:
            return {"backend": "not there", **dict.fromkeys(("torch's", "native", "inductor's", "all"), np.nan)}
        for _ in range(STEPS):
            opt.step()
        called.clear()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            opt.step()
    torchs, native, inductors = sum(map(_is_kernel, recorded.events())), called.count("native"), called.count("inductor")
    return {
        "backend": getattr(opt, "backend", ""),
        "torch's": torchs,
        "native": native,
        "inductor's": inductors,
        "all": torchs + native + inductors,
    }


def main(
    published: Annotated[Path | None, typer.Option(help="The authors' FTP.py, to compare with.")] = None,
    threads: int = 2,
    out: Annotated[Path, typer.Option(help="Directory to save tables in, as CSV.")] = Path("benchmarks/results"),
) -> None:
    """Print, and save, the memory and the launches of each optimizer; fail if a requirement is not met."""
    import torch._inductor

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    program = load_published(published)
    candidates, rows = {**adam_like(BACKENDS, program), **sgd_like(BACKENDS, program)}, []
    for name, candidate in candidates.items():
        if name.startswith("AdamW") and name.endswith("compile"):  # a minute each, and no news
            continue
        backend, steady, more = kept(candidate)
        rows.append({"optimizer": name, "backend": backend, "keeps (bytes / number)": steady, "a step more (bytes / number)": more})
        gc.collect()
    report(f"memory beside parameters and gradients, float32, {BLOCKS} blocks of ViT-B", rows, out / "memory.csv")
    counts = {
        name: launches(candidates[name])
        for name in (f"AdamP, {PUBLISHED}", ADAMW_FOREACH, "AdamP, foreach", "AdamP, compile", "AdamP, fused")
        if name in candidates
    }
    title = f"kernels a step launches, {len(small())} tensors"
    report(title, [{"optimizer": name, **count} for name, count in counts.items()], out / "launches.csv")
    if program is None:
        print("*** NO REQUIREMENT IS CHECKED: they compare with the published program ***")
        return
    times = {name: counts[f"AdamP, {PUBLISHED}"]["all"] / counts[name]["all"] for name in ("AdamP, foreach", "AdamP, compile")}
    requirements = [(f"launches of the published / {name}", found, f">= {FEWER}", found >= FEWER) for name, found in times.items()]
    raise typer.Exit(0 if all_met(requirements, out / "launches_requirements.csv") else 1)


if __name__ == "__main__":
    typer.run(main)
