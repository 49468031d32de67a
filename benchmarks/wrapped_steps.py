"""Time of a step of FTP around torch's fused optimizers, against that optimizer alone and a copy of the bytes that FTP moves.

A projection reads the gradient and the last displacement for the radius, then parameter and anchor for the norms of rows, then both
again, and writes parameter and displacement: eight numbers a number. Rows that are short stay in the cache, so less may be moved.
Candidates take turns.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import all_met, compared, report, seconds
from sets import SETS, drawn, size, twins

from ftp import FTP, SGDP, AdamP

MOVED = 8
MOST = 1.4
PAIRS = {
    "AdamW": (partial(torch.optim.AdamW, lr=1e-3, fused=True), partial(AdamP, lr=1e-3)),
    "SGD": (partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True), partial(SGDP, lr=1e-3, momentum=0.9)),
}
WARM = 18


def main(
    models: list[str] = ["vit_b", "resnet50"],  # noqa: B006
    rounds: int = 11,
    threads: int = 0,
    out: Annotated[Path, typer.Option(help="Directory to save tables in, as CSV.")] = Path("benchmarks/results"),
) -> None:
    """Print, and save, what steps take; fail if FTP costs more than asked."""
    if threads:
        torch.set_num_threads(threads)
    rows, requirements = [], []
    for model in models:
        params = drawn(SETS[model]())
        source, target = torch.randn(MOVED // 2, size(SETS[model]())), torch.empty(MOVED // 2, size(SETS[model]()))
        for name, (inside, own) in PAIRS.items():
            opts = {name: inside(twins(params)), f"FTP({name})": FTP(inside(twins(params))), own.func.__name__: own(twins(params))}
            for opt in opts.values():
                for _ in range(WARM):
                    opt.step()
            copying = {"a copy of what FTP moves": lambda source=source, target=target: target.copy_(source)}
            times = seconds({**{each: opt.step for each, opt in opts.items()}, **copying}, rounds)
            base = times[name] + times["a copy of what FTP moves"]
            rows += [{"model": model, "what": each, **compared(taken, base)} for each, taken in times.items()]
            ratio = rows[-3]["ratio"]
            requirements.append((f"{model}, FTP({name}): step / ({name} + copy)", ratio, f"<= {MOST}", ratio <= MOST))
    report("a step, float32; ratios to the optimizer alone and the copy together", rows, out / "wrapped_steps.csv")
    raise typer.Exit(0 if all_met(requirements, out / "wrapped_requirements.csv") else 1)


if __name__ == "__main__":
    typer.run(main)
