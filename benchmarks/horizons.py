"""Time of whole steps of training, forward and backward too, with each horizon, and the memory that each keeps.

A smooth perceptron is trained; every round times each optimizer once, in turn, and ratios are to plain training in the same round. Kept are
the numbers in the optimizer's state, over those of the model. All is on one thread: with more, a busy machine slows tensors this small down
by factors.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import compared, report, seconds

import hyperopt_nested as hn
from hyperopt_nested.backends.choice import WARM_UP

WIDTHS, BATCH = (64, 256, 256, 10), 128
WARM = WARM_UP + 4  # steps before those that are timed
RATE = hn.adamw(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-7)))
BOTH = hn.adamw(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-7)), weight_decay=hn.learn(1e-2, by=hn.sgd(lr=1e-7)))
DISCOUNTED, EXACT = hn.Discounted(0.9), hn.Discounted(0.9, curvature="exact")
PLAIN, ONE_STEP, VALIDATION = "torch.optim.AdamW", "lr learned, one step", "lr learned, one step, from a validation loss"

HORIZONS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    PLAIN: torch.optim.AdamW,
    "nothing learned": lambda params: hn.HyperOptimizer(params, hn.adamw()),
    ONE_STEP: lambda params: hn.HyperOptimizer(params, RATE),
    "lr learned, discount 0.9": lambda params: hn.HyperOptimizer(params, RATE, horizon=DISCOUNTED),
    "lr learned, discount 0.9, exact curvature": lambda params: hn.HyperOptimizer(params, RATE, horizon=EXACT),
    VALIDATION: lambda params: hn.HyperOptimizer(params, RATE, learn_from="validation"),
    "lr and decay learned, one step": lambda params: hn.HyperOptimizer(params, BOTH),
    "lr and decay learned, discount 0.9": lambda params: hn.HyperOptimizer(params, BOTH, horizon=DISCOUNTED),
    "lr and decay learned, discount 0.9, exact curvature": lambda params: hn.HyperOptimizer(params, BOTH, horizon=EXACT),
}


def training(name: str) -> tuple[Callable[[], None], float]:
    """One step of training, and the numbers that its optimizer keeps, over those of the model."""
    layers = [layer for a, b in pairwise(WIDTHS) for layer in (torch.nn.Linear(a, b), torch.nn.Tanh())]
    model, x, y = torch.nn.Sequential(*layers[:-1]), torch.randn(BATCH, WIDTHS[0]), torch.randint(WIDTHS[-1], (BATCH,))
    opt: Any = HORIZONS[name](list(model.parameters()))

    def closure() -> Any:
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        if "exact" not in name:  # which differentiates the loss itself
            loss.backward()
        return loss

    def step() -> None:
        opt.step(closure)
        if name == VALIDATION:  # a batch of the same size
            closure()
            opt.hyper_step()

    step()
    numbers = sum(leaf.numel() for state in opt.state.values() for leaf in state.values())
    return step, numbers / sum(p.numel() for p in model.parameters())


def main(
    rounds: int = 15,
    out: Annotated[Path, typer.Option(help="Directory to save the table in, as CSV.")] = Path("benchmarks/results"),
) -> None:
    """Print, and save, what a step of training takes with each horizon."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = {name: training(name) for name in HORIZONS}
    steps = {name: step for name, (step, _) in made.items()}
    seconds(steps, WARM)
    times = seconds(steps, rounds)
    rows = []
    for name, values in times.items():
        over_one_step = compared(values, times[ONE_STEP])["ratio"]
        rows.append({"AdamW": name, **compared(values, times[PLAIN]), "ratio to one step": over_one_step, "kept / model": made[name][1]})
    report(f"training, perceptron {'-'.join(map(str, WIDTHS))}, batches of {BATCH}", rows, out / "horizons.csv")


if __name__ == "__main__":
    typer.run(main)
