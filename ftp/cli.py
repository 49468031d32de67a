"""The command line: `python -m ftp --help`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def ftp() -> None:
    """Fast Trainable Projection: robust fine-tuning that learns how far each layer may move."""


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ...")] = 3,
    out: Annotated[Path, typer.Option(dir_okay=False, help="Where to write the figure, a PNG.")] = Path("demo.png"),
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
