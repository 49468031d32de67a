"""Time of one optimizer step, as a ratio to torch.optim's, measured side by side in one process.

The tensors are those of a small transformer (1.2 million numbers in 52 tensors). Every round times each optimizer once, in turn;
the table shows the median over rounds, and the interquartile range, of the ratio to `torch.optim.AdamW` (foreach) in the same round. All
is on one thread: with more, a busy machine slows tensors this small down by factors.

A second table has whole steps of training, forward and backward too, of a smooth perceptron with each horizon, as ratios
to a horizon of one step; and the numbers that the optimizer keeps from step to step, over those of the model.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

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
LEARNED = hn.adamw(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-7)))

OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "torch AdamW (foreach)": lambda params: torch.optim.AdamW(params, foreach=True),
    "torch AdamW (fused)": lambda params: torch.optim.AdamW(params, fused=True),
    "torch AdamW (for loop)": lambda params: torch.optim.AdamW(params, foreach=False),
    **{
        f"{name}, {backend}": partial(make, backend=backend)
        for backend in ("reference", "compile")
        for name, make in {
            "adamw, nothing learned": partial(hn.HyperOptimizer, optimizer=hn.adamw()),
            "adamw, lr learned": partial(hn.HyperOptimizer, optimizer=LEARNED),
            "adamw, lr learned, discount 0.9": partial(hn.HyperOptimizer, optimizer=LEARNED, discount=0.9),
            "AdamP": AdamP,
            "SGDP, momentum": partial(SGDP, momentum=0.9),
        }.items()
    },
}

WIDTHS, BATCH = (64, 256, 256, 10), 128
TWO = hn.adamw(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-7)), weight_decay=hn.learn(1e-2, by=hn.sgd(lr=1e-7)))
ONE_STEP, VALIDATION = "lr learned, one step", "lr learned, one step, from a validation loss"
HORIZONS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "torch.optim.AdamW": torch.optim.AdamW,
    "nothing learned": lambda params: hn.HyperOptimizer(params, hn.adamw()),
    ONE_STEP: lambda params: hn.HyperOptimizer(params, LEARNED),
    "lr learned, discount 0.9": lambda params: hn.HyperOptimizer(params, LEARNED, discount=0.9),
    "lr learned, discount 0.9, exact curvature": lambda params: hn.HyperOptimizer(params, LEARNED, discount=0.9, curvature="exact"),
    VALIDATION: lambda params: hn.HyperOptimizer(params, LEARNED, learn_from="validation"),
    "lr and decay learned, one step": lambda params: hn.HyperOptimizer(params, TWO),
    "lr and decay learned, discount 0.9": lambda params: hn.HyperOptimizer(params, TWO, discount=0.9),
    "lr and decay learned, discount 0.9, exact curvature": lambda params: hn.HyperOptimizer(params, TWO, discount=0.9, curvature="exact"),
}


def optimizer_steps() -> None:
    steps = {}
    for name, make in OPTIMIZERS.items():
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        for param in params:
            param.grad = torch.randn_like(param)
        steps[name] = make(params).step
    title = f"{sum(map(int, map(np.prod, SHAPES))):,} numbers, {len(SHAPES)} tensors"
    compare(steps, "torch AdamW (foreach)", title, "optimizer")


def training_steps() -> None:
    steps, kept = {}, {}
    for name, make in HORIZONS.items():
        layers = [layer for a, b in pairwise(WIDTHS) for layer in (torch.nn.Linear(a, b), torch.nn.Tanh())]
        model, x, y = torch.nn.Sequential(*layers[:-1]), torch.randn(BATCH, WIDTHS[0]), torch.randint(WIDTHS[-1], (BATCH,))
        opt = make(list(model.parameters()))

        def closure(model: Any = model, opt: Any = opt, x: Any = x, y: Any = y, exact: bool = "exact" in name) -> Any:
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            if not exact:  # which differentiates the loss itself
                loss.backward()
            return loss

        def step(opt: Any = opt, closure: Callable[[], Any] = closure, then: bool = name == VALIDATION) -> None:
            opt.step(closure)
            if then:  # a batch of the same size
                closure()
                opt.hyper_step()

        steps[name] = step
        step()
        numbers = sum(leaf.numel() for state in opt.state.values() for leaf in state.values())
        kept[name] = numbers / sum(p.numel() for p in model.parameters())
    compare(steps, ONE_STEP, f"training, perceptron {'-'.join(map(str, WIDTHS))}, batches of {BATCH}", "AdamW", kept)


def compare(steps: dict[str, Callable[[], Any]], base: str, title: str, kind: str, kept: dict[str, float] | None = None) -> None:
    seconds(steps, 3)
    times = seconds(steps, ROUNDS)
    table = Table(kind, "ms / step", "ratio (median)", "quartiles", *(["kept / model"] if kept else []), title=title)
    for name, values in times.items():
        low, middle, high = np.percentile(values / times[base], [25, 50, 75])
        more = [f"{kept[name]:.1f}"] if kept else []
        table.add_row(name, f"{1e3 * np.median(values):.2f}", f"{middle:.2f}", f"{low:.2f} - {high:.2f}", *more)
    Console(width=max(Console().width, 120)).print(table)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    optimizer_steps()
    training_steps()


if __name__ == "__main__":
    main()
