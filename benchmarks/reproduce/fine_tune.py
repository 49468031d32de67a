"""One run: a pre-trained network is fine-tuned by `ftp.finetune`, and tested."""

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ftp
from benchmarks.pool import device_name
from benchmarks.reproduce import data, networks, tasks
from benchmarks.reproduce.data import Examples
from benchmarks.reproduce.plan import CORRUPTED_IMAGES, EPOCHS, Scale
from benchmarks.reproduce.rows import Run
from benchmarks.reproduce.tasks import Digits


def perform(run: Run, scale: Scale, device: str = "cpu") -> dict[str, object]:
    """Do a run.

    Args:
        run: its settings.
        scale: of the plan.
        device: of the network and the images.

    Returns:
        Columns of its row: accuracies in percent on validation images and, unless the run is one of tuning, on each test set; seconds of
        training; versions; and the device.
    """
    _set_up(device)
    numbers = _continual(run, scale, device) if run.study == "continual" else _classify(run, scale, device)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    return {**numbers, **versions, "device": device_name(device)}


@dataclass(frozen=True)
class Pretraining:
    """A network that runs begin with; see `networks.pretrained`."""

    network: str
    task: str
    seed: int

    def name(self, scale: Scale) -> str:
        """The name by which the cache has it."""
        return networks.name_of(self.network, tasks.TASKS[self.task], self.seed, scale.pretraining_steps)


def pretrain(pretraining: Pretraining, scale: Scale, device: str = "cpu") -> None:
    """Train a network, unless the cache has it, and put it there."""
    _set_up(device)
    networks.pretrained(pretraining.network, tasks.TASKS[pretraining.task], pretraining.seed, scale.pretraining_steps, device)


def pretrainings(runs: Iterable[Run], scale: Scale) -> list[Pretraining]:
    """What is missing in the cache of networks that runs, and the tests that are chosen by them, begin with."""
    seeds = (scale.network_seed,) if scale.one_network else (scale.network_seed, *scale.seeds)
    needed = [
        Pretraining(network, task, seed) for network, task in dict.fromkeys((run.network, run.task) for run in runs) for seed in seeds
    ]
    return [each for each in needed if not data.stored(each.name(scale)).exists()]


def _set_up(device: str) -> None:
    """One thread, float32 as on the CPU, and the same result each time."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True


def network(run: Run, scale: Scale, device: str = "cpu") -> nn.Module:
    """The pre-trained network of a run: of its own for each seed of a test, and another one for tuning."""
    seed = scale.network_seed if run.stage == "tune" or scale.one_network else run.seed
    return networks.pretrained(run.network, tasks.TASKS[run.task], seed, scale.pretraining_steps, device)


def replace_head(model: nn.Module, classes: int, seed: int) -> None:
    """Give the model a new head, initialized from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        old, device = model.head, next(model.parameters()).device
        new = nn.Conv2d(old.in_channels, classes, 1) if isinstance(old, nn.Conv2d) else nn.Linear(old.in_features, classes)
        model.head = new.to(device)


def _classify(run: Run, scale: Scale, device: str) -> dict[str, object]:
    task = tasks.TASKS[run.task]
    model = network(run, scale, device)
    replace_head(model, task.classes, run.seed)
    tests: Mapping[str, Examples] = {}
    if run.stage == "test" and run.study == "corruptions":
        tests = tasks.DIGITS[run.task].corrupted(min(CORRUPTED_IMAGES, scale.test_images or CORRUPTED_IMAGES))
    elif run.stage == "test":
        tests = task.tests(scale.test_images)
    result = _finetune(model, task.training(run.per_class, run.seed), task.validation(scale.test_images), run, tests)
    score = _overlap if task.dense else _accuracy
    numbers = {name: f"{100 * score(evaluation):.2f}" for name, evaluation in result.evaluations.items()}
    return {**numbers, "seconds": f"{sum(epoch.seconds for epoch in result.epochs):.2f}"}


def _accuracy(evaluation: ftp.finetuning.Evaluation) -> float:
    return evaluation.accuracy


def _overlap(evaluation: ftp.finetuning.Evaluation) -> float:
    """Intersection over union of class 1."""
    labels, predictions = evaluation.labels == 1, evaluation.predictions == 1
    return float((labels & predictions).sum() / (labels | predictions).sum())


def _finetune(model: nn.Module, train: Examples, validation: Examples, run: Run, tests: Mapping[str, Examples]) -> ftp.finetuning.Result:
    device = str(next(model.parameters()).device)
    train, validation = train.to(device), validation.to(device)
    on_device = {name: examples.to(device) for name, examples in tests.items()}
    return ftp.finetune(
        model,
        (train.images, train.labels),
        (validation.images, validation.labels),
        head="head.*",
        tests={name: (examples.images, examples.labels) for name, examples in on_device.items()},
        method=run.method,
        optimizer=run.optimizer,
        lr=run.lr,
        strength=run.strength,
        epochs=EPOCHS,
        steps_per_epoch=run.steps // EPOCHS,
        batch_size=tasks.BATCH,
        seed=run.seed,
    )


PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
"""The tasks of class-incremental learning, in turn."""


def _continual(run: Run, scale: Scale, device: str) -> dict[str, object]:
    """Learn pairs of digits in turn, without the images of former ones; the anchor of each task is what the one before left.

    A task trains a head of its own. Of an image of any digit seen until then, the class is the largest of all heads' logits.
    """
    model = network(run, scale, device)
    heads: list[nn.Module] = []
    after: list[list[float]] = []
    seconds = 0.0
    for index, digits in enumerate(PAIRS):
        task = Digits((), digits, 0, 0)
        replace_head(model, 2, 10 * run.seed + index)
        result = _finetune(model, task.training(run.per_class, run.seed), task.validation(scale.test_images), run, {})
        seconds += sum(epoch.seconds for epoch in result.epochs)
        heads.append(model.head)
        after.append([_of_all(model, heads, seen, scale.test_images, device) for seen in PAIRS[: index + 1]])
    last = after[-1]
    forgotten = [max(row[task] for row in after[task:-1]) - last[task] for task in range(len(PAIRS) - 1)]
    return {
        "accuracy": f"{sum(last) / len(last):.2f}",
        "forgetting": f"{sum(forgotten) / len(forgotten):.2f}",
        **{f"task {index + 1}": f"{value:.2f}" for index, value in enumerate(last)},
        "seconds": f"{seconds:.2f}",
    }


def _of_all(model: nn.Module, heads: Sequence[nn.Module], digits: Sequence[int], limit: int | None, device: str) -> float:
    """Percent of test images of `digits` that get their own class, among those of all heads."""
    all_of_them = data.select(data.mnist("t10k"), digits)
    examples = all_of_them[torch.arange(len(all_of_them))[:limit]].to(device)
    own, model.head = model.head, nn.Identity()
    with torch.no_grad():
        features: Tensor = model.eval()(examples.images)
        classes = torch.cat([head(features) for head in heads], 1).argmax(1)
    model.head = own
    return 100 * float((classes == examples.labels + digits[0]).double().mean())
