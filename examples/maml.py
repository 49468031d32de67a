"""Learn initial weights from which one gradient step suffices: MAML (Finn et al. 2017, arXiv 1703.03400), on sine waves.

A task is a wave of random amplitude and phase, of which ten points are seen. `hn.hypergradient(...).params` is the derivative of the loss
after adaptation with respect to the initial weights; one learning rate a tensor is learned with them, as in Meta-SGD (Li et al. 2017,
arXiv 1707.09835). Run it with `python examples/maml.py`.
"""

import torch
from rich.console import Console
from rich.table import Table

import hyperopt_nested as hn

Tensors, Points = dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
TASKS, SHOTS, META_STEPS = 25, 10, 500
TESTED = [0, 1, 2, 5, 10]  # steps of adaptation

torch.set_num_threads(1)  # the network is small
torch.manual_seed(0)
LAYERS = [torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1)]
MODEL = hn.functional(torch.nn.Sequential(*LAYERS))


def tasks(number: int, unseen: int, generator: torch.Generator) -> tuple[Points, Points]:
    """Inputs and targets of the points to adapt to, and of others: (number, points, 1) each."""
    amplitude, phase, place = (torch.rand(number, size, 1, generator=generator) for size in (1, 1, SHOTS + unseen))
    x = 10 * place - 5
    y = (0.1 + 4.9 * amplitude) * torch.sin(x - torch.pi * phase)
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])


def losses(params: Tensors, points: Points) -> torch.Tensor:
    """The loss of each task, with its own tensors."""
    return torch.func.vmap(lambda params, x, y: (MODEL(params, x) - y).square().mean())(params, *points)


def loss(params: Tensors, points: Points, hypers: object = None) -> torch.Tensor:  # noqa: ARG001
    return losses(params, points).sum()


def learn(steps: int) -> tuple[Tensors, Tensors]:
    """Initial weights and learning rates for so many steps of adaptation. For none, that is training on all tasks as if they were one."""
    generator, inner = torch.Generator().manual_seed(1), hn.sgd(lr=hn.learn(0.01, by=hn.sgd(), per="tensor"))
    start = {name: p.clone() for name, p in MODEL.params.items()}
    logs = {name: torch.tensor(0.01).log() for name in start}
    adam = torch.optim.Adam([{"params": list(start.values()), "lr": 3e-3}, {"params": list(logs.values()), "lr": 1e-2}])
    for _ in range(META_STEPS):
        seen, unseen = tasks(TASKS, SHOTS, generator)
        params = {name: p.expand(TASKS, *p.shape) for name, p in start.items()}  # every task starts there
        rates = {name: log.exp() for name, log in logs.items()}
        found = hn.hypergradient(inner, params, [seen] * steps, loss, loss, outer_batch=unseen, hypers={"lr": rates})
        for name in start:
            start[name].grad = found.params[name].mean(0)
            logs[name].grad = found["lr"][name].float() * rates[name] / TASKS
        adam.step()
    return start, {name: log.exp() for name, log in logs.items()}


def adapted(params: Tensors, rates: Tensors, seed: int) -> torch.Tensor:
    """Loss at unseen points of each of 500 fresh tasks, after each step of adaptation."""
    (seen, unseen), found = tasks(500, 100, torch.Generator().manual_seed(seed)), []
    params = {name: p.expand(500, *p.shape) for name, p in params.items()}
    for _ in range(max(TESTED) + 1):
        found.append(losses(params, unseen).nan_to_num(torch.inf))
        slopes = torch.func.grad(loss)(params, seen)
        params = {name: p - rates[name] * slopes[name] for name, p in params.items()}
    return torch.stack(found)


if __name__ == "__main__":
    rows, grid = {}, [dict.fromkeys(MODEL.params, rate) for rate in torch.logspace(-4, -1, 10)]
    for name, start in {"untrained": MODEL.params, "trained on all tasks": learn(0)[0]}.items():
        tried = [adapted(start, rates, seed=2)[1].mean() for rates in grid]
        rows[name] = start, grid[tried.index(min(tried))]  # best after one step, on other tasks
    table = Table("initial weights", "learning rates", *(f"after {step}" for step in TESTED), title="Test loss after steps of adaptation")
    for name, (start, rates) in {**rows, "meta-learned": learn(1)}.items():
        cells = [f"{each.mean():.2f} ± {each.std() / len(each) ** 0.5:.2f}" for each in adapted(start, rates, seed=3)[TESTED]]
        table.add_row(name, f"{min(rates.values()):.4f} to {max(rates.values()):.4f}", *cells)
    Console(width=120).print(table)
