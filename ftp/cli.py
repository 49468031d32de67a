"""The command line: `python -m ftp --help`."""

import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _checked(path: Path) -> Path:
    """Refuse what the figure could not be written to, before anything is trained."""
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{str(path)!r} must end in .png")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"{str(path)!r} cannot be written to")
    return path


@app.callback()
def ftp() -> None:
    """Fast Trainable Projection: robust fine-tuning that learns how far each layer may move."""


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ...")] = 3,
    out: Annotated[Path, typer.Option(dir_okay=False, callback=_checked, help="Where to write the figure, a PNG.")] = Path("demo.png"),
) -> None:
    """Fine-tune on a few handwritten digits with AdamP, SGDP and others, and test under shifts that training never saw."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ftp.demo import report
    from ftp.demo.train import Steps, run

    torch.set_num_threads(1)  # more gain nothing on tensors so small, and lose minutes where another program is running
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=Steps().total(seeds))
        outcomes = run(range(seeds), advance=lambda: progress.advance(task))
    console.print(report.table(outcomes))
    report.save(outcomes, out)
    console.print(f"Figure: {out}")


@app.command()
def finetune(
    data: Annotated[Path, typer.Argument(help="Folder of images: train/, val/, test*/, each with a folder a class; or these alone.")],
    model: Annotated[str, typer.Option(help="Name of a model of timm or torchvision, or module:factory.")],
    method: Annotated[str, typer.Option(help="full, linear-probe, lp-ft, l2-sp, wise-ft, tpgm, spd, digrap, ftp, ...")] = "ftp",
    compare: Annotated[str, typer.Option(help="Several methods in place of one, at equal budget: full,l2-sp,ftp.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of results. A run that was stopped goes on there.")] = Path("finetuned"),
    test: Annotated[list[str] | None, typer.Option(help="NAME=DIR: a further folder of test images. May be repeated.")] = None,
    corruptions: Annotated[
        str, typer.Option(help="Corruptions of test images, at five severities: all, none, or names: fog,contrast.")
    ] = "all",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to start from: safetensors, or a state dict of torch.")] = None,
    head: Annotated[str | None, typer.Option(help="Module that makes the logits, where it is not found.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Parameters without an anchor besides the head: names or patterns.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, or sgd with Nesterov momentum.")] = "adamw",
    lr: Annotated[float | None, typer.Option(help="Learning rate. [default: 1e-4 of adamw, 1e-2 of sgd]")] = None,
    head_lr: Annotated[float | None, typer.Option(help="Learning rate of the head. [default: 10 times that]")] = None,
    strength: Annotated[float | None, typer.Option(help="Number of the method, such as FTP's k. [default: the method's]")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    steps_per_epoch: Annotated[int | None, typer.Option(help="Steps of an epoch, in place of a pass.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images of a step.")] = 64,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which learning rates rise.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Decoupled in adamw, coupled in sgd.")] = 0.0,
    momentum: Annotated[float, typer.Option(help="Of sgd; of adamw, the decay rate of the first moment.")] = 0.9,
    held_out: Annotated[float, typer.Option(help="Share of training images that TPGM and learned WiSE-FT learn from instead.")] = 0.2,
    freeze_norm: Annotated[bool, typer.Option(help="Leave statistics of batch normalization as they are.")] = True,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    patience: Annotated[int | None, typer.Option(help="Epochs without a better one after which training stops.")] = None,
    seed: Annotated[int, typer.Option(help="Of splits, the new head, batches, augmentation and dropout.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, with seeds from --seed on.")] = 1,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of images. [default: the model's]")] = None,
    flip: Annotated[bool, typer.Option(help="Mirror half of the training images.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto is a GPU if there is one.")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode images.")] = 4,
) -> None:
    """Fine-tune a pre-trained model on a folder of images, test it under shifts and corruptions, and write a report.

    The folder of results holds the weights (model.safetensors), a line an epoch (epochs.csv), the result (result.json) and report.html.
    """
    given = dict(locals())
    from rich.console import Console
    from rich.markup import escape

    from ftp.finetuning.command import Command, run
    from ftp.finetuning.settings import Settings

    console = Console()
    try:
        run(
            Command(
                data=data,
                model=model,
                methods=tuple(name.strip() for name in compare.split(",")) if compare else (method,),
                settings={field.name: given[field.name] for field in fields(Settings)},
                out=out,
                tests=dict(_named(entry) for entry in test or []),
                corruptions=corruptions,
                seeds=seeds,
                exclude=tuple(exclude or ()),
                head=head,
                checkpoint=checkpoint,
                size=size,
                flip=flip,
                device=device,
                workers=workers,
                line=shlex.join(["python", "-m", "ftp", *sys.argv[1:]]),
            ),
            console,
        )
    except (ImportError, OSError, TypeError, ValueError) as error:
        console.print(f"[bold red]Error:[/] {escape(_message(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        console.print("Stopped. The same command goes on from there.")
        raise typer.Exit(130) from error


def _named(entry: str) -> tuple[str, Path]:
    name, equals, folder = entry.partition("=")
    if not equals or not folder:
        raise ValueError(f"--test {entry!r} must be NAME=DIR")
    return name, Path(folder)


def _message(error: Exception) -> str:
    """What an error says, without the number before the messages of this package."""
    return error.strerror if isinstance(error, OSError) and error.strerror and error.filename is None else str(error)
