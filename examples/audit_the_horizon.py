"""Which horizon? An audit of online hypergradients, and what becomes of training that learns from them, on scikit-learn's digits.

A small smooth network is trained by SGD with momentum, from a learning rate that is half of the best constant one. First, learning rates,
one a tensor, and the weight decay stay where they are, and online hypergradients are compared with the exact ones, through all steps so
far. Then the learning rate is learned with each horizon. Run it with `python examples/audit_the_horizon.py [picture.png [steps [decay]]]`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch.func import grad, jvp, vmap

import hyperopt_nested as hn

Tensors = dict[str, torch.Tensor]
RUNS, AUDITED, BATCH, LR = 16, 100, 32, 0.1
TRAINED = int(sys.argv[2]) if len(sys.argv) > 2 else 100  # steps
DECAY = float(sys.argv[3]) if len(sys.argv) > 3 else 1e-3
HORIZONS = [
    hn.OneStep(),
    *map(hn.Discounted, (0.9, 0.99, 1.0)),
    *(hn.Discounted(discount, curvature="exact") for discount in (0.9, 0.99, 1.0)),
]

torch.set_num_threads(1)  # the network is small
DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data / 16, dtype=torch.float32), torch.tensor(DIGITS.target)
TRAIN, TEST = torch.randperm(len(X), generator=torch.Generator().manual_seed(0)).split([1200, len(X) - 1200])


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 16, bias=False), torch.nn.Tanh(), torch.nn.Linear(16, 10, bias=False))


MODEL = hn.functional(network(0))
START = {name: p.detach() for name, p in torch.func.stack_module_state([network(seed) for seed in range(RUNS)])[0].items()}
BATCHES = list(TRAIN[torch.randint(len(TRAIN), (max(AUDITED, TRAINED), RUNS, BATCH), generator=torch.Generator().manual_seed(1))])


def loss(params: Tensors, rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(MODEL(params, X[rows]), Y[rows])


def train_loss(params: Tensors, rows: torch.Tensor) -> torch.Tensor:
    return vmap(loss)(params, rows).sum()  # runs of other initial weights and batches: hypergradients are summed over them


def outer_loss(params: Tensors, rows: torch.Tensor, hypers: object) -> torch.Tensor:  # noqa: ARG001
    return vmap(loss, (0, None))(params, rows).sum()


def audit() -> hn.typing.Audit:
    by = hn.sgd()
    optimizer = hn.sgd(lr=hn.learn(LR, by=by, per="tensor"), momentum=0.9, weight_decay=hn.learn(DECAY, by=by))
    marks = (1, 3, 10, 30, AUDITED)
    return hn.audit(optimizer, START, BATCHES[:AUDITED], train_loss, outer_loss, outer_batch=TRAIN, horizons=HORIZONS, steps=marks)


def train(lr: Any, horizon: hn.typing.Horizon = HORIZONS[0]) -> tuple[Tensors, torch.Tensor]:
    """Each run by itself, with its own learning rate: the tensors, and the learning rates at the end."""
    nested = hn.Nested(hn.sgd(lr=lr, momentum=0.9, weight_decay=DECAY), horizon=horizon)

    def step(params: Tensors, st: Any, rows: torch.Tensor) -> Any:
        slope: Callable[[Tensors], Tensors] = grad(lambda params: loss(params, rows))
        product = (lambda along: jvp(slope, (params,), (along,))[1]) if horizon.curvature == "exact" else None
        return nested.step(params, slope(params), st, hessian=product)

    params, st = START, vmap(nested.init)(START)
    for batch in BATCHES[:TRAINED]:
        params, st = vmap(step)(params, st, batch)
    return params, nested.hypers(st)["lr"]["model"] if nested.learned else torch.full((RUNS,), lr)


def main() -> None:
    found = audit()
    table = Table("hypergradient", "lr: cosine", "lr: magnitude", "decay: magnitude", title=f"Online over exact, after {AUDITED} steps")
    last = [row for row in found.rows if row.steps == AUDITED]
    for lr, decay in zip(last[::2], last[1::2], strict=True):
        table.add_row(lr.estimate, f"{lr.cosine:.2f}", f"{lr.magnitude:.3f}", f"{decay.cosine * decay.magnitude:.4f}")
    Console(width=100).print(table)
    table = Table("learning rate", "at the end", "training loss", "test loss", title=f"{TRAINED} steps of learning from {LR}, {RUNS} runs")
    learned = hn.learn(LR, by=hn.adam(lr=0.02), via="log")
    trained = {f"constant {lr:g}": train(lr) for lr in (LR, 2 * LR, 3 * LR)}
    trained |= {row.estimate: train(learned, row.horizon) for row in last[::2]}
    for name, (params, rates) in trained.items():
        losses = [vmap(loss, (0, None))(params, rows) for rows in (TRAIN, TEST)]
        table.add_row(name, f"{rates.mean():.2f}", *(f"{each.mean():.3f} ± {each.std() / RUNS**0.5:.3f}" for each in losses))
    Console(width=100).print(table)
    if len(sys.argv) > 1:
        found.figure().savefig(sys.argv[1])


if __name__ == "__main__":
    main()
