"""Train from 256 learning rates at once, as one batched program, and draw how the learned ones come together.

Run it with `python examples/many_learning_rates.py [picture.png]`. The picture is that of "Gradient Descent: The Ultimate Optimizer"
(Chandra et al. 2022, arXiv 1909.13371): a learned learning rate makes training robust to where it starts.
"""

import sys

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import hyperopt_nested as hn

RUNS, STEPS = 256, 150


def train(learned: bool) -> hn.typing.Sweep:
    """A small network on scikit-learn's digits."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = hn.functional(torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)))

    def loss(params: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(params, x[batch]), y[batch])

    learner = hn.adam(lr=0.1 if learned else 0.0)  # in the logarithm: 10% a step
    optimizer = hn.sgd(lr=hn.learn(0.1, by=learner, via="log"), momentum=0.9)
    batches = [torch.randint(len(x), (64,)) for _ in range(STEPS)]
    return hn.sweep(optimizer, model.params, batches, loss, starts={"lr": torch.logspace(-5, 1, RUNS)})


def draw(path: str, learned: hn.typing.Sweep, fixed: hn.typing.Sweep) -> None:
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(learned.hypers["lr"]["model"], color="tab:blue", alpha=0.1)
    left.set(xlabel="step", ylabel="learning rate", title=f"{RUNS} starts")
    starts = learned.hypers["lr"]["model"][0]
    for name, found in (("fixed", fixed), ("learned", learned)):
        right.loglog(starts, found.losses[-20:].mean(0).nan_to_num(posinf=10, nan=10).clamp(max=10), label=name)
    right.set(xlabel="learning rate at the start", ylabel="loss, mean of the last 20 steps")
    right.legend()
    figure.savefig(path)


def main() -> None:
    learned, fixed = train(learned=True), train(learned=False)
    table = Table("start", "loss, fixed", "loss, learned", "learned to")
    starts, ends = fixed.hypers["lr"]["model"][0], learned.hypers["lr"]["model"][-1]
    for run in range(0, RUNS, 51):
        losses = [f"{found.losses[-20:, run].mean():.3f}" for found in (fixed, learned)]
        table.add_row(f"{starts[run]:.6f}", *losses, f"{ends[run]:.3f}")
    Console().print(table)
    if len(sys.argv) > 1:
        draw(sys.argv[1], learned, fixed)


if __name__ == "__main__":
    main()
