"""What foreach could reach at best: the fewest of torch's operators that SGDP needs, on pieces that stay in the cache.

Nothing is fetched from memory and no Python is counted but the calls themselves, so a step can not take less. As a ratio to a step of
torch's fused SGD, which has everything to fetch.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure import report, seconds
from sets import SETS, SGD_FUSED, drawn, sgd_like

from hyperopt_nested.backends import foreach

COLUMNS = 768
CALLS = 20  # of an operator, at a time


def chain(rows: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Operators of a step of SGDP, with momentum and without decay, whose rows are all projected; arithmetic is in float32."""
    shape = rows, COLUMNS
    grad, param, moment, anchor, moved = (torch.randn(shape) for _ in range(5))
    kept, new, step = torch.randn(shape).to(dtype), torch.empty(shape, dtype=dtype), torch.empty(shape)
    norm = torch.rand(rows, 1)
    read = {f"read {name}": lambda: step.copy_(kept) for name in ("gradient", "displacement", "parameter", "momentum", "anchor")}
    write = {f"write {name}": lambda: new.copy_(step) for name in ("parameter", "momentum", "displacement")}
    arithmetic: dict[str, Callable[[], Any]] = {
        "radius's gradient": lambda: torch.dot(grad.view(-1), moved.view(-1)),
        "momentum": lambda: torch.add(grad, moment, alpha=0.9, out=moment),
        "step": lambda: torch.add(param, moment, alpha=-0.1, out=step),
        "displacement": lambda: torch.sub(step, anchor, out=moved),
        "absolute": lambda: torch.abs(moved, out=step),
        "row norm": lambda: torch.sum(step, -1, keepdim=True, out=norm),
        "projection": lambda: torch.addcmul(anchor, moved, norm, out=param),
        "scaled displacement": lambda: torch.mul(moved, norm, out=step),
    }
    return {**read, **arithmetic, **write} if dtype != torch.float32 else arithmetic


def main(
    of: Annotated[str, typer.Option("--set", help=f"Parameters: {', '.join(SETS)}.")] = "vit_b",
    rounds: int = 15,
    threads: int = 2,
    out: Annotated[Path, typer.Option(help="Directory to save tables, as CSV, in.")] = Path("benchmarks/results"),
) -> None:
    """Print, and save, what each operator takes, as a ratio to fused SGD's step."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = {"in the caches of cores": 1 << 17, "as large as foreach's pieces": foreach.PIECE}
    for dtype in (torch.float32, torch.bfloat16):
        params = drawn(SETS[of](), dtype)
        count = sum(param.numel() for param in params)
        base = sgd_like([])[SGD_FUSED].make(params)
        base.step()
        columns: dict[str, dict[str, float]] = {}
        for title, size in sizes.items():
            rows = math.ceil(size / COLUMNS)
            operators = chain(rows, dtype)
            candidates = {name: lambda run=run: [run() for _ in range(CALLS)] for name, run in operators.items()}
            times = seconds({"fused SGD": base.step, **candidates}, rounds)
            whole = {name: each * count / (rows * COLUMNS * CALLS) for name, each in times.items() if name != "fused SGD"}
            whole["all"] = np.sum(list(whole.values()), axis=0)
            columns[title] = {name: float(np.median(each / times["fused SGD"])) for name, each in whole.items()}
        table = [{"operator": name, **{title: column[name] for title, column in columns.items()}} for name in next(iter(columns.values()))]
        short = str(dtype).split(".")[1]
        report(f"{of}, {short}: of a step of fused SGD", table, out / f"operators_{of}_{short}.csv")


if __name__ == "__main__":
    typer.run(main)
