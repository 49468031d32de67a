"""The command `hyperopt-nested`: check a rule, list all rules."""

import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

from hyperopt_nested import registry
from hyperopt_nested.checks import extra

with extra("cli"):
    import typer
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from hyperopt_nested import testing
    from hyperopt_nested.testing.programs import check_names
    from hyperopt_nested.testing.registered import Row, rows

app = typer.Typer(no_args_is_help=True, help="Learn any hyper-parameter of any optimizer.", pretty_exceptions_enable=False)


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="path/to/file.py:rule, or the name of a registered rule")],
    examples: Annotated[int, typer.Option(min=1, help="examples of each law")] = 30,
    backends: Annotated[str, typer.Option(help="backends to compare with the reference, such as fused,foreach")] = "",
) -> None:
    """Check a rule's derivatives against finite differences, and the laws that it must obey. Exit status 1: it breaks one."""
    _load_plugins()
    rule = _loaded(target)
    names = [name.strip() for name in backends.split(",") if name.strip()]
    try:
        check_names(names)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        typer.echo(testing.check_rule(rule, examples=examples, backends=names))
    except testing.RuleError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error


@app.command()
def rules(
    names: Annotated[list[str] | None, typer.Argument(help="entries of the registry; all by default")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table")] = False,
    examples: Annotated[int, typer.Option(min=1, help="examples by which each rule is verified")] = 10,
) -> None:
    """List every hyper of every registered rule with its domain, and verify its hypergradient. Exit status 1: one is wrong."""
    _load_plugins()
    unknown = [name for name in names or [] if name not in registry.names()]
    if unknown:
        raise typer.BadParameter(f"no rule is registered as {unknown[0]!r}; registered are {', '.join(registry.names())}")
    progress = Console(stderr=True)
    found: list[Row] = []
    for name in track(names or registry.names(), "verifying", console=progress, transient=True, disable=not progress.is_terminal):
        found += rows(name, examples)
    if markdown:
        typer.echo("| rule | hyper | domain | default | verified |\n| --- | --- | --- | --- | --- |")
        for row in found:
            typer.echo(f"| `{row.rule}` | {f'`{row.hyper}`' if row.hyper else ''} | {row.domain} | {row.default} | {row.verified} |")
    else:
        table = Table("rule", "hyper", "domain", "default", "verified")
        for row in found:
            table.add_row(row.rule, row.hyper, row.domain.replace("[", r"\["), row.default, row.verified)
        Console().print(table)
    if any(row.wrong for row in found):
        raise typer.Exit(1)


def _load_plugins() -> None:
    """Import the packages that register rules: those with an entry point in the group `hyperopt_nested.rules`."""
    for entry in entry_points(group="hyperopt_nested.rules"):
        entry.load()


def _loaded(target: str) -> Any:
    path, colon, name = target.rpartition(":")
    if not colon:
        if name not in registry.names():
            raise typer.BadParameter(f"{target!r} is neither path/to/file.py:rule nor a registered name")
        return name
    if not Path(path).is_file():
        raise typer.BadParameter(f"there is no file {path!r}; give path/to/file.py:rule")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise typer.BadParameter(f"{path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).parent))
    sys.modules[spec.name] = module  # torch.compile looks for the update's globals there
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise typer.BadParameter(f"{path!r} defines no {name!r}")
    return getattr(module, name)
