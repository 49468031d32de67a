"""Train a small network on scikit-learn's digits, from learning rates that are far too low, and let them be learned.

Run it with `python examples/learn_the_learning_rate.py`.
"""

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

import hyperopt_nested as hn


def train(start: float, learned: bool, steps: int = 150) -> tuple[float, float]:
    """Accuracy on the second half of the digits, and the last learning rate."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    half = len(x) // 2
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    rate = hn.learn(start, by=hn.adam(lr=0.1), via="log") if learned else start  # Adam in the logarithm: 10% a step
    opt = hn.HyperOptimizer(model.named_parameters(), hn.sgd(lr=rate, momentum=0.9))
    for _ in range(steps):
        batch = torch.randint(half, (64,))
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        opt.step()
    accuracy = (model(x[half:]).argmax(1) == y[half:]).float().mean().item()
    return accuracy, opt.hypers()["lr"]["group 0"].item() if learned else start


def main() -> None:
    table = Table("start", "accuracy, fixed", "accuracy, learned", "learned to")
    for start in (1e-4, 1e-3, 1e-2):
        fixed, _ = train(start, learned=False)
        accuracy, last = train(start, learned=True)
        table.add_row(f"{start:g}", f"{fixed:.3f}", f"{accuracy:.3f}", f"{last:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
