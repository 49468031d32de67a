"""Pre-training, fine-tuning and evaluation. All randomness comes from the seeds that are passed."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import process_time
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

import hyperopt_nested as hn
from ftp.demo.data import Examples, augment, fine_tuning, hold_out, pretraining, shifted
from ftp.demo.methods import METHODS, Method, Network

IN_DISTRIBUTION = "in distribution"

Trace = dict[str, dict[str, list[float]]]
"""Learned values after every step: by hyper ("radius"), by label ("backbone.conv1.weight")."""


@dataclass(frozen=True)
class Steps:
    """How long to train: steps of pre-training, once a seed, and of fine-tuning, once a seed and method."""

    pretrain: int = 600
    fine_tune: int = 100

    def total(self, seeds: int, methods: int = len(METHODS)) -> int:
        """All steps of `run`."""
        return seeds * (self.pretrain + methods * self.fine_tune)


@dataclass(frozen=True)
class Outcome:
    """What a method came to with one seed.

    Attributes:
        accuracy: share of right answers, in percent, by condition: `IN_DISTRIBUTION`, then each shift.
        trace: learned values over the steps; empty where nothing is learned.
        times: milliseconds of processor time of each step; they differ from run to run, and play no part in comparisons.
    """

    accuracy: dict[str, float]
    trace: Trace
    times: list[float] = field(compare=False)

    @property
    def shifts(self) -> float:
        """Mean accuracy over the shifts, in percent."""
        values = [value for name, value in self.accuracy.items() if name != IN_DISTRIBUTION]
        return sum(values) / len(values)


class FineTuned(NamedTuple):
    """A fine-tuned network.

    Attributes:
        network: the network.
        trace: what its optimizer learned.
        times: milliseconds of processor time of each step, from clearing the gradients to the new weights.
    """

    network: Network
    trace: Trace
    times: list[float]


def run(seeds: Sequence[int], steps: Steps = Steps(), advance: Callable[[], None] = lambda: None) -> dict[str, list[Outcome]]:
    """Pre-train once a seed, and fine-tune with every method.

    Args:
        seeds: of the initial weights, the order of images, what is trained on, and the noise.
        steps: how long to train.
        advance: called after every step of training.

    Returns:
        By method, an outcome a seed, on test images.
    """
    outcomes: dict[str, list[Outcome]] = {method.name: [] for method in METHODS}
    for seed in seeds:
        start = pretrain(seed, steps.pretrain, advance)
        digits = fine_tuning(seed)
        for method in METHODS:
            tuned = fine_tune(start, method, digits.train, seed, steps.fine_tune, advance)
            outcomes[method.name].append(Outcome(accuracies(tuned.network, digits.test, seed), tuned.trace, tuned.times))
    return outcomes


def pretrain(seed: int, steps: int, advance: Callable[[], None] = lambda: None) -> Network:
    """A network trained on augmented images of digits 0 to 4."""
    network = _network(seed)
    digits = pretraining()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for batch in _batches(len(digits.labels), 64, steps, generator):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(augment(digits.images[batch], generator)), digits.labels[batch]))
        optimizer.step()
        schedule.step()
        advance()
    return network


def fine_tune(
    start: Network, method: Method, train: Examples, seed: int, steps: int, advance: Callable[[], None] = lambda: None
) -> FineTuned:
    """A copy of `start` with a new head, trained on `train` as they are, but for what the method holds out of them."""
    network = copy.deepcopy(start)
    network.head.load_state_dict(_network(seed).head.state_dict())
    anchors = [p.detach().clone() for p in network.backbone.parameters()]
    optimizer = method.optimizer(network)
    tpgm = method.tpgm(network) if method.tpgm else None
    train, held_out = hold_out(train, seed) if tpgm else (train, train)
    trace: Trace = {}
    times: list[float] = []

    def validate() -> Tensor:
        loss = F.cross_entropy(network(held_out.images), held_out.labels)
        torch.autograd.backward(loss)
        return loss

    for step, batch in enumerate(_batches(len(train.labels), 25, steps, torch.Generator().manual_seed(seed)), start=1):
        started = process_time()
        optimizer.zero_grad()
        loss = F.cross_entropy(network(train.images[batch]), train.labels[batch])
        if method.alpha:
            moved = [(p - anchor).square().sum() for p, anchor in zip(network.backbone.parameters(), anchors, strict=True)]
            loss = loss + method.alpha / 2 * torch.stack(moved).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        if tpgm and (step % method.every == 0 or step == steps):
            tpgm.step(validate)
        times.append(1000 * (process_time() - started))
        if isinstance(optimizer, hn.HyperOptimizer):
            for hyper, values in optimizer.hypers().items():
                for label, value in values.items():
                    trace.setdefault(hyper, {}).setdefault(label, []).append(float(value))
        advance()
    return FineTuned(network, trace, times)


def accuracies(network: Network, examples: Examples, seed: int) -> dict[str, float]:
    """Accuracy in percent by condition: on the images as they are, and under each shift, drawn from `seed`."""
    conditions = {IN_DISTRIBUTION: examples.images, **shifted(examples.images, seed)}
    with torch.no_grad():
        return {name: _percent(network(images), examples.labels) for name, images in conditions.items()}


def _percent(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def _network(seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network()


def _batches(n: int, size: int, steps: int, generator: Generator) -> Iterator[Tensor]:
    """Indices of `steps` batches: the images in random order, again and again, without a rest."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(n, generator=generator)
        yield order[:size]
        order = order[size:]
