"""What foreach could reach at best: the fewest of torch's operators that SGDP needs, again and again on one piece.

Nothing is fetched from memory, and of Python, calls alone are counted, so a step can not take less. As a ratio to a step of
torch's fused SGD, which has everything to fetch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure import report, seconds
from sets import SETS, SGD_FUSED, Params, drawn, sgd_like

from hyperopt_nested.backends import foreach

COLUMNS = 768
CALLS = 20  # of an operator, at a time
SIZES = {"in the caches of cores": 1 << 17, "as large as foreach's pieces": foreach.PIECE}  # elements


def chain(rows: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Operators of a step of SGDP, with momentum and without decay, whose rows are all projected; arithmetic is in float32."""
    shape = rows, COLUMNS
    grad, param, moment, anchor, moved = (torch.randn(shape) for _ in range(5))
    kept, new, step = torch.randn(shape).to(dtype), torch.empty(shape, dtype=dtype), torch.empty(shape)
    scale, norm = torch.rand(rows, 1), torch.empty(rows, 1)  # two, so that no value grows from call to call
    read = {f"read {name}": lambda: step.copy_(kept) for name in ("gradient", "displacement", "parameter", "momentum", "anchor")}
    write = {f"write {name}": lambda: new.copy_(step) for name in ("parameter", "momentum", "displacement")}
    arithmetic: dict[str, Callable[[], Any]] = {
        "radius's gradient": lambda: torch.dot(grad.view(-1), moved.view(-1)),
        "momentum": lambda: torch.add(grad, moment, alpha=0.9, out=moment),
        "step": lambda: torch.add(param, moment, alpha=-0.1, out=step),
        "displacement": lambda: torch.sub(step, anchor, out=moved),
        "absolute": lambda: torch.abs(moved, out=step),
        "row norm": lambda: torch.sum(step, -1, keepdim=True, out=norm),
        "projection": lambda: torch.addcmul(anchor, moved, scale, out=param),
        "scaled displacement": lambda: torch.mul(moved, scale, out=step),
    }
    return {**read, **arithmetic, **write} if dtype != torch.float32 else arithmetic


def compare(params: Params, rounds: int) -> list[dict[str, Any]]:
    """A row an operator, and one for all: on pieces of each size, as a ratio to fused SGD's step of all parameters."""
    count, dtype = sum(param.numel() for param in params), params[0].dtype
    base = sgd_like([])[SGD_FUSED].make(params).step
    base()
    columns: dict[str, dict[str, float]] = {}
    for title, size in SIZES.items():
        rows = size // COLUMNS
        operators = {name: lambda run=run: [run() for _ in range(CALLS)] for name, run in chain(rows, dtype).items()}
        times = seconds({SGD_FUSED: base, **operators}, rounds)
        ratios = {name: times[name] / times[SGD_FUSED] * count / (rows * COLUMNS * CALLS) for name in operators}
        ratios["all"] = np.sum([*ratios.values()], axis=0)
        columns[title] = {name: float(np.median(ratio)) for name, ratio in ratios.items()}
    return [{"operator": name, **{title: column[name] for title, column in columns.items()}} for name in ratios]


def main(
    sets: Annotated[list[str], typer.Option("--set", help=f"Parameters: {', '.join(SETS)}.")] = ["vit_b", "resnet50"],  # noqa: B006
    rounds: int = 15,
    threads: int = 2,
    out: Annotated[Path, typer.Option(help="Directory to save tables, as CSV, in.")] = Path("benchmarks/results"),
) -> None:
    """Print, and save, what each operator takes, as a ratio to fused SGD's step."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for of in sets:
        for short in ("float32", "bfloat16"):
            rows = compare(drawn(SETS[of](), getattr(torch, short)), rounds)
            report(f"{of}, {short}: of a step of fused SGD", rows, out / f"operators_{of}_{short}.csv")


if __name__ == "__main__":
    typer.run(main)
