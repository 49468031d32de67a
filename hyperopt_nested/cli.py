"""The command `hyperopt-nested`: check a rule, list all rules."""

import importlib.util
import logging
import sys
import traceback
from collections.abc import Collection
from difflib import get_close_matches
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated, NoReturn

from hyperopt_nested import registry
from hyperopt_nested.checks import extra
from hyperopt_nested.combinators.base import Combinator
from hyperopt_nested.rule import FunctionRule, Optimizer

with extra("cli"):
    import typer
    from rich.console import Console
    from rich.table import Table

    from hyperopt_nested import testing
    from hyperopt_nested.testing.programs import check_names
    from hyperopt_nested.testing.registered import Row, rows

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
_log = logging.getLogger("hyperopt_nested")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hyperopt-nested {version('hyperopt-nested')}")
        raise typer.Exit


@app.callback()
def command(
    show: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")] = False,
) -> None:
    """Learn any hyper-parameter of any optimizer: check a rule, list all rules. Exit status 2: the arguments are wrong."""


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
        _refuse(str(error))
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
    wanted, found = names or registry.names(), list[Row]()
    for name in wanted:
        if name not in registry.names():
            _refuse(f"no rule is registered as {name!r}{_near(name, registry.names())}")
    for count, name in enumerate(wanted, 1):
        _log.info("verifying %s (%d of %d)", name, count, len(wanted))
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


def _loaded(target: str) -> testing.Checkable:
    """The rule that `target` names."""
    path, colon, name = target.rpartition(":")
    if not colon:
        if name not in registry.names():
            file = f"; name its rule too: {target}:RULE" if Path(target).is_file() else _near(name, registry.names())
            _refuse(f"{target!r} is neither path/to/file.py:rule nor a registered name{file}")
        return name
    if not Path(path).is_file():
        _refuse(f"there is no file {path!r}; give path/to/file.py:rule")
    entries = _run(path)
    known = {key: entry for key, entry in entries.items() if isinstance(entry, FunctionRule | Combinator | Optimizer)}
    if name not in entries:
        _refuse(f"{path!r} defines no {name!r}{_near(name, known)}")
    if name not in known:
        _refuse(f"{name!r} of {path!r} is no rule but a {type(entries[name]).__name__}: decorate its update with @hn.rule")
    return known[name]


def _run(path: str) -> dict[str, object]:
    """The names that a file defines."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        _refuse(f"{path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).parent))
    sys.modules[spec.name] = module  # torch.compile looks for the update's globals there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        where = f"{path}, line {lines[-1]}" if lines else path
        _refuse(f"{where}: {type(error).__name__}: {error}".splitlines()[0])
    return vars(module)


def _near(name: str, known: Collection[str]) -> str:
    """What may have been meant by an unknown name."""
    close = get_close_matches(name, known)
    return f"; did you mean {', '.join(close)}?" if close else f"; there are {', '.join(sorted(known)) or 'no rules'}"


def _refuse(message: str) -> NoReturn:
    """End with one line that says what is wrong with the arguments."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
