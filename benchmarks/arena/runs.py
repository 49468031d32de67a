"""Runs of one arm, as one batched program: cells that differ by their seeds, and by the rates of a grid."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hyperopt_nested as hn
from benchmarks.arena.arms import ARMS, BASES
from benchmarks.arena.tasks import TASKS, Batch, Tensors
from benchmarks.pool import device_name
from hyperopt_nested.optim.level import first_values


@dataclass(frozen=True)
class Cell:
    """Settings of a run.

    Attributes:
        task: of `TASKS`.
        base: of `BASES`.
        arm: of `ARMS`.
        rate: of the grid, or the start.
        seed: of the parameters and of the order of examples.
    """

    task: str
    base: str
    arm: str
    rate: float
    seed: int

    @property
    def study(self) -> str:
        """The name of its file of rows."""
        return self.task

    @property
    def key(self) -> tuple[str, ...]:
        """The settings as a CSV file has them."""
        return tuple(map(str, asdict(self).values()))


Group = tuple[Cell, ...]


def groups(tasks: Sequence[str], bases: Sequence[str], arms: Sequence[str], seeds: int) -> Iterator[Group]:
    """Cells that are one program: of a grid, all; else those of one start."""
    for task, base, arm in itertools.product(tasks, bases, arms):
        if base not in ARMS[arm].bases:
            continue
        rates = ARMS[arm].rates_of(base)
        for some in [rates] if ARMS[arm].rates != "starts" else [[rate] for rate in rates]:
            yield tuple(Cell(task, base, arm, rate, seed) for rate in some for seed in range(seeds))


def perform(group: Group, steps: int | None = None, device: str = "cpu") -> list[dict[str, object]]:
    """Train the cells of a group, and measure each.

    Args:
        group: cells of one task, base and arm; where a learner starts, of one rate.
        steps: fewer than the task's.
        device: of parameters and examples.

    Returns:
        Of each cell: the validation losses, the accuracy, the rate at the end, seconds, and the device.
    """
    started = time.perf_counter()
    first, task = group[0], TASKS[group[0].task]
    task = task if steps is None else replace(task, steps=min(steps, task.steps))
    arm = ARMS[first.arm]
    base, lr = BASES[first.base], arm.lr(first.rate)
    made = {rule: arm.make(rule, lr, task.steps) for rule in {*map(base.rule_of, task.shapes.values())}}
    nested = hn.Nested({name: made[base.rule_of(shape)] for name, shape in task.shapes.items()}, horizon=arm.horizon)
    rates = torch.tensor([cell.rate for cell in group], device=device)
    seeds = [cell.seed for cell in group]
    states = [task.init(seed) for seed in seeds]
    params = {name: torch.stack([state[name] for state in states]).to(device) for name in states[0]}
    by_seed = {seed: task.batches(seed, task.steps).to(device) for seed in set(seeds)}
    train, validation = (tuple(each.to(device) for each in part) for part in task.data())
    factors = torch.tensor([arm.shape(at, task.steps) for at in range(task.steps)], device=device)
    st = torch.func.vmap(lambda params: nested.init(params, first_values(nested)))(params)
    losses = torch.func.vmap(task.loss)
    before = _measure(task.loss, params, validation)

    def step(params: Tensors, grads: Tensors, st: Any, rate: Tensor, factor: Tensor, learn: bool) -> Any:
        return nested.step(params, grads, st, {name: {"lr": rate * factor} for name in params}, learn=learn)

    for at in range(task.steps):
        leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
        index = torch.stack([by_seed[seed][at] for seed in seeds])
        total = losses(leaves, tuple(each[index] for each in train)).sum()
        grads = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
        learn = arm.learn_until is None or at < arm.learn_until(task.steps)
        params, st = torch.func.vmap(step, in_dims=(0, 0, 0, 0, None, None))(params, grads, st, rates, factors[at], learn)
    ends = torch.func.vmap(nested.eval_params)(params, st)
    after = _measure(task.loss, ends, validation)
    accuracy = _measure(task.accuracy, ends, validation) if task.accuracy else None
    learned = nested.hypers(st).get("lr", {}).get("model", rates)
    seconds = (time.perf_counter() - started) / len(group)
    return [
        {"loss_0": f"{before[i].item():.6g}", "loss_1": f"{after[i].item():.6g}"}
        | {"accuracy": "" if accuracy is None else f"{accuracy[i].item():.4f}"}
        | {"rate_at_end": f"{learned[i].item():.4g}", "seconds": f"{seconds:.2f}", "device": device_name(device)}
        for i in range(len(group))
    ]


@torch.no_grad()
def _measure(of: Any, params: Tensors, validation: Batch) -> Tensor:
    """A mean over the validation examples, by cell; in parts that fit into memory."""
    count, size = len(validation[0]), 500
    parts = [tuple(each[i : i + size] for each in validation) for i in range(0, count, size)]
    found = [torch.func.vmap(of, in_dims=(0, None))(params, part) * len(part[0]) for part in parts]
    return torch.stack(found).sum(0) / count
