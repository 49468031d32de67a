"""Time of one optimizer step, as a ratio to torch.optim's, measured side by side in one process.

The tensors are those of a small transformer (1.2 million numbers in 52 tensors). Every round times each optimizer once, in turn;
the table shows the median over rounds, and the interquartile range, of the ratio to `torch.optim.AdamW` (foreach) in the same round.
"""

from collections.abc import Callable

import numpy as np
import torch
from measure import seconds
from rich.console import Console
from rich.table import Table

import hyperopt_nested as hn
from ftp import SGDP, AdamP

ROUNDS = 15
SHAPES = [
    shape
    for _ in range(4)
    for shape in [(256, 128), (256,), (128, 256), (128,), (384, 128), (384,), (128, 128), (128,), (512, 256), (512,)]
]
SHAPES += [(1000, 128), (1000,), *[(128,)] * 10]

OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "torch AdamW (foreach)": lambda params: torch.optim.AdamW(params, foreach=True),
    "torch AdamW (fused)": lambda params: torch.optim.AdamW(params, fused=True),
    "torch AdamW (for loop)": lambda params: torch.optim.AdamW(params, foreach=False),
    "adamw, nothing learned": lambda params: hn.HyperOptimizer(params, hn.adamw()),
    "adamw, lr learned": lambda params: hn.HyperOptimizer(params, hn.adamw(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-7)))),
    "AdamP": lambda params: AdamP(params),
    "SGDP, momentum": lambda params: SGDP(params, momentum=0.9),
}


def main() -> None:
    torch.manual_seed(0)
    steps = {}
    for name, make in OPTIMIZERS.items():
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        for param in params:
            param.grad = torch.randn_like(param)
        steps[name] = make(params).step
    seconds(steps, 3)
    times = seconds(steps, ROUNDS)
    base = times["torch AdamW (foreach)"]
    table = Table(
        "optimizer",
        "ms / step",
        "ratio (median)",
        "quartiles",
        title=f"{sum(map(int, map(np.prod, SHAPES))):,} numbers, {len(SHAPES)} tensors",
    )
    for name, values in times.items():
        low, middle, high = np.percentile(values / base, [25, 50, 75])
        table.add_row(name, f"{1e3 * np.median(values):.2f}", f"{middle:.2f}", f"{low:.2f} - {high:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
