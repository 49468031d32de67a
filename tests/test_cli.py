"""The command `hyperopt-nested`."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hyperopt_nested.cli import app
from hyperopt_nested.testing.registered import rows

ROOT = Path(__file__).parent.parent
RULE = """
import hyperopt_nested as hn


@hn.rule(hn.rules.zeros("average"), separable="element")
def {name}(param, grad, state, *, lr=hn.Positive(1e-2), beta=hn.UnitInterval(0.9)):
    average = beta * state["average"] + (1 - beta{detached}) * grad
    return param - lr * average, {{"average": average}}
"""


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_check_tells_right_from_wrong_by_its_status(tmp_path: Path) -> None:
    path = tmp_path / "rules.py"
    path.write_text(RULE.format(name="cli_right", detached=""))
    status, output = run("check", f"{path}:cli_right", "--examples", "5")
    assert status == 0
    assert "cli_right: every law holds" in output
    path.write_text(RULE.format(name="cli_wrong", detached=".detach()"))
    status, output = run("check", f"{path}:cli_wrong", "--examples", "10")
    assert status == 1
    assert output.startswith("cli_wrong: the hypergradient of beta is")
    assert "hn.testing.check_case(cli_wrong, case)" in output


def test_check_compares_backends_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperopt_nested.testing.programs._SHAPES", ((4, 3),))
    status, output = run("check", "centralize", "--examples", "3", "--backends", "foreach")
    assert status == 0
    assert "backend 'foreach': agrees with 'reference' in " in output
    status, output = run("check", "centralize", "--backends", "foreach,fussed")
    assert status == 2
    assert "must be a sequence of" in re.sub(r"[\s│]+", " ", output)


def test_check_takes_registered_names_and_explains_what_it_cannot_find(tmp_path: Path) -> None:
    assert run("check", "l2_sp", "--examples", "3")[0] == 0
    empty = tmp_path / "empty.py"
    empty.touch()
    for target, words in (("sgdd", "nor a registered name"), ("none.py:rule", "there is no file"), (f"{empty}:rule", "defines no 'rule'")):
        status, output = run("check", target)
        assert status == 2
        assert words in re.sub(r"[\s│]+", " ", output)


def test_rules_lists_every_hyper_with_its_domain() -> None:
    status, output = run("rules", "sgd", "ftp", "--examples", "5")
    assert status == 0
    for words in ("momentum", "NonNegative [0, inf)", "radius", "per model,"):
        assert words in output
    assert run("rules", "sgdd")[0] == 2


def test_the_table_in_the_documentation_is_what_the_command_prints() -> None:
    """Its rows are those of the registry; that each is verified, test_rules.py finds."""
    from ftp import ftp_rule  # noqa: F401  as the command loads it
    from hyperopt_nested import registry

    own = [name for name in registry.names() if registry.origin(name).split(".")[0] in ("hyperopt_nested", "ftp")]
    expected = [(row.rule, row.hyper, row.domain, row.default) for name in own for row in rows(name)]
    page = (ROOT / "docs" / "reference" / "rules.md").read_text(encoding="utf-8")
    table = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    assert [tuple(line[:4]) for line in table] == expected
    verified = {"per model, tensor, row, element", "per model", "derivative zero; learning is refused"}
    assert {line[4] for line in table if line[1]} <= verified


@pytest.mark.parametrize("page", ["docs/how-to/write-a-rule.md"])
def test_a_rule_pasted_from_the_documentation_passes(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    definition = next(block for block in blocks if "@hn.rule" in block)
    (tmp_path / "pasted.py").write_text(definition.replace("def ", "def pasted_", 1))
    name = re.search(r"def (\w+)\(", definition)
    assert name is not None
    status, output = run("check", f"{tmp_path / 'pasted.py'}:pasted_{name[1]}")
    assert status == 0, output
