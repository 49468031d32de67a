"""What optimizers keep beside the model, and need for a moment in a step.

Memory is of tensors, as torch's allocator gives it out, and exact; in float32, so 4 bytes a number are one more tensor of the model's size.
"""

import gc
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from measure import Allocations, peak, report
from sets import Candidate, adam_like, drawn, load_published, made, sgd_like, size, vit_b

BLOCKS = 2
BACKENDS = "fused", "foreach", "compile"
STEPS = 2  # before a step is measured


def kept(candidate: Candidate) -> tuple[str, float, float]:
    """The backend; bytes a number that it keeps, and needs beyond that within a step."""
    shapes = vit_b(BLOCKS)
    params = drawn(shapes)
    with Allocations() as allocations:
        opt = made(candidate, params, STEPS)
    if opt is None:
        return "not there", np.nan, np.nan
    return getattr(opt, "backend", ""), allocations.kept / size(shapes), peak(opt.step) / size(shapes)


def main(
    published: Annotated[Path | None, typer.Option(help="The authors' FTP.py, to compare with.")] = None,
    threads: int = 2,
    out: Annotated[Path, typer.Option(help="Directory to save the table in, as CSV.")] = Path("benchmarks/results"),
) -> None:
    """Print, and save, the memory of each optimizer."""
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


if __name__ == "__main__":
    typer.run(main)
