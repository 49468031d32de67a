"""The command `python -m ftp finetune`: from a folder of images to results and a report."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ftp.finetuning import comparison, folders, models
from ftp.finetuning.batches import Data
from ftp.finetuning.corruptions import CORRUPTIONS, SEVERITIES, corruption
from ftp.finetuning.files import package, writable
from ftp.finetuning.heads import Preprocessing
from ftp.finetuning.images import Images, corrupted
from ftp.finetuning.report import write_report
from ftp.finetuning.result import Result
from ftp.finetuning.run import Progress, Report
from ftp.finetuning.settings import Settings
from ftp.finetuning.training import finetune


@dataclass(frozen=True)
class Command:
    """What the command is given; see `python -m ftp finetune --help`.

    Attributes:
        data: folder of images.
        model: name of a model, or "module:factory".
        methods: to run, at equal budget.
        settings: of all runs, but for method and seed.
        out: folder of results.
        tests: further folders of test images, by name.
        corruptions: names of corruptions of each test set, or "all" or "none".
        seeds: how many runs a method.
        exclude: what has no anchor, besides the head.
        head: name of the module that makes the logits.
        checkpoint: weights to start from.
        size: height and width of the images, if not the model's own.
        flip: whether training images may be mirrored.
        device: where to compute; "auto" is a GPU if there is one.
        workers: threads that decode images.
        line: the command as it was typed.
    """

    data: Path
    model: str
    methods: tuple[str, ...]
    settings: Mapping[str, Any]
    out: Path
    tests: Mapping[str, Path] = field(default_factory=dict)
    corruptions: str = "all"
    seeds: int = 1
    exclude: tuple[str, ...] = ()
    head: str | None = None
    checkpoint: Path | None = None
    size: int | None = None
    flip: bool = True
    device: str = "auto"
    workers: int = 4
    line: str = ""


def run(command: Command, console: Console) -> list[Result]:
    """Fine-tune by each method, evaluate, write the report, and print a table.

    Args:
        command: what to do.
        console: where to tell of it.

    Returns:
        The results, by method and seed.

    Raises:
        ValueError: an argument or an input is wrong. The message names it; nothing has been trained then.
        OSError: a file or folder cannot be read or written.
        ModuleNotFoundError: a package is missing. The message says what to install.
    """
    package("matplotlib")
    plan = _plan(command)
    writable(command.out)
    names = _corruptions(command.corruptions)
    first = plan[0][1].seed
    splits = folders.read(command.data, command.tests, first)
    device = _device(command.device)
    how: dict[str, Any] = {"checkpoint": command.checkpoint, "head": command.head, "size": command.size}
    pretrained = models.load(command.model, len(splits.classes), seed=first, **how)
    console.print(_summary(splits, pretrained, device))
    with _bar(console) as bar:
        sets = _images(splits, pretrained.preprocessing, command, bar)
        tests: dict[str, Data] = {name: images for name, images in sets.items() if name in splits.tests}
        tests |= corrupted([(name, sets[name]) for name in splits.tests], names, SEVERITIES)
        results = []
        for folder, settings in plan:
            model = copy.deepcopy(pretrained.model).to(device)
            task = bar.add_task(f"{settings.method}, seed {settings.seed}", total=None)
            result = finetune(
                model,
                sets["train"],
                sets["validation"],
                head=model.get_submodule(pretrained.head),
                exclude=command.exclude,
                tests=tests,
                classes=splits.classes,
                out=folder,
                command=command.line,
                progress=_shown(bar, task, len(tests) + 1),
                **settings.as_dict(),
            )
            bar.remove_task(task)
            results.append(result)
    report = command.out / "report.html"
    write_report(results, report)
    console.print(table(results))
    for result in results:
        if result.stopped:
            console.print(f"{result.method}, seed {result.seed}: {result.stopped}")
    console.print(f"Report: {report}\nWeights: {', '.join(str(folder / 'model.safetensors') for folder, _ in plan)}", soft_wrap=True)
    return results


def table(results: Sequence[Result]) -> Table:
    """Accuracies of each method in percent, with standard errors."""
    shown = Table(title="Accuracy, % ± standard error")
    shown.add_column("method")
    columns = comparison.columns(results)
    for column in columns:
        shown.add_column(column.heading, justify="right")
    for label, runs in comparison.by_method(results).items():
        estimates = [comparison.accuracy(runs, column.sets) for column in columns]
        shown.add_row(label, *(f"{100 * each.value:.1f} ± {100 * each.error:.1f}" if each else "" for each in estimates))
    return shown


def _plan(command: Command) -> list[tuple[Path, Settings]]:
    """Folders and settings of all runs."""
    seed = command.settings.get("seed", 0)
    plan = []
    for method in command.methods:
        for number in range(command.seeds):
            folder = command.out / method if len(command.methods) > 1 else command.out
            folder = folder / f"seed-{seed + number}" if command.seeds > 1 else folder
            plan.append((folder, Settings(**{**command.settings, "method": method, "seed": seed + number})))
    return plan


def _corruptions(chosen: str) -> list[str]:
    if chosen in ("all", "none"):
        return list(CORRUPTIONS) if chosen == "all" else []
    names = [name.strip() for name in chosen.split(",")]
    for name in names:
        corruption(name)  # raises ValueError for what there is not
    return names


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _summary(splits: folders.Splits, pretrained: models.Pretrained, device: torch.device) -> str:
    counts = {"train": splits.train, "validation": splits.validation, **splits.tests}
    images = ", ".join(f"{name} {len(labeled.files):,}" for name, labeled in counts.items())
    size, numbers = pretrained.preprocessing.size, sum(p.numel() for p in pretrained.model.parameters())
    return (
        f"{len(splits.classes)} classes; images: {images}\n"
        f"{type(pretrained.model).__name__}, {numbers:,} numbers, head {pretrained.head!r}, images of {size} x {size}, on {device}"
    )


def _images(splits: folders.Splits, preprocessing: Preprocessing, command: Command, bar: Bar) -> dict[str, Images]:
    """All sets, decoded."""
    labeled = {"train": splits.train, "validation": splits.validation, **splits.tests}
    task = bar.add_task("reading images", total=sum(len(each.files) for each in labeled.values()))
    how: dict[str, Any] = {"flip": command.flip, "workers": command.workers, "advance": lambda: bar.advance(task)}
    sets = {name: Images(each, preprocessing, augment=name == "train", **how) for name, each in labeled.items()}
    bar.remove_task(task)
    return sets


@contextmanager
def _bar(console: Console) -> Iterator[Bar]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=console, transient=True) as bar:
        yield bar


def _shown(bar: Bar, task: TaskID, sets: int) -> Report:
    """What shows the progress of a run."""
    (run,) = [each.description for each in bar.tasks if each.id == task]
    evaluated = itertools.count()

    def show(now: Progress) -> None:
        if now.evaluating:
            bar.update(task, description=f"{run}: {now.evaluating}", completed=next(evaluated), total=sets)
        else:
            accuracy = f"validation {100 * now.epoch.validation_accuracy:.1f} %"
            bar.update(task, description=f"{run}: epoch {now.epoch.epoch + 1}, {accuracy}", completed=now.step, total=now.steps)

    return show
