"""The command `hyperopt-nested`."""

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hyperopt_nested as hn
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


def started(*command: str) -> subprocess.Popen[str]:
    """A process without a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


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


def test_check_takes_registered_names_and_explains_what_it_cannot_find(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hyperopt_nested"):
        assert run("check", "l2_sp", "--examples", "3")[0] == 0
    assert {f"checking l2_sp: {what}" for what in ("purity", "compile", "hypergradients", "derivatives")} <= set(caplog.messages)
    empty = tmp_path / "empty.py"
    empty.touch()
    for target, words in (("sgdd", "nor a registered name"), ("none.py:rule", "there is no file"), (f"{empty}:rule", "defines no 'rule'")):
        status, output = run("check", target)
        assert status == 2
        assert words in re.sub(r"[\s│]+", " ", output)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("broken", "def rule(:", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("unfinished", "rule = (", "SyntaxError: '(' was never closed (unfinished.py, line 1)"),
        ("importing", "import sys\nimport no_such_module", ", line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("script", "import sys\nsys.exit()", ", line 2: SystemExit:"),
        ("taken", RULE.format(name="adam", detached=""), ", line 5: ValueError: name='adam' is registered already, by hyperopt_nested"),
        ("function", "def rule(param, grad): ...", "'rule' of 'function.py' is no rule but a function: decorate its update with @hn.rule"),
        ("module", "import math as rule", "'rule' of 'module.py' is no rule but a module"),
        ("typo", RULE.format(name="ruler", detached=""), "'typo.py' defines no 'rule'; did you mean ruler?"),
    ],
)
def test_a_file_that_has_no_rule_gives_one_line(name: str, code: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.py").write_text(code)
    status, output = run("check", f"{name}.py:rule")
    assert status == 2
    (line,) = output.splitlines()
    assert line.startswith("Error: ")
    assert words in line


def test_unknown_names_are_followed_by_close_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    for arguments, words in (
        (["check", "adamww"], "; did you mean adamw, "),
        (["rules", "adamww"], "no rule is registered as 'adamww'; did you mean adamw, "),
        (["check", f"{tmp_path}/mine.py"], "; name its rule too: "),
        (["check", "sgd", "--example", "3"], "--examples"),
        (["chek"], "Did you mean 'check'?"),
    ):
        status, output = run(*arguments)
        assert status == 2
        assert words in re.sub(r"[\s│]+", " ", output)


def test_the_module_is_the_command() -> None:
    process = started("-m", "hyperopt_nested", "--version")
    assert process.communicate() == (f"hyperopt-nested {hn.__version__}\n", "")
    assert process.returncode == 0


def test_a_missing_package_gives_one_line_that_says_what_to_install() -> None:
    process = started("-c", "import sys; sys.modules['typer'] = None; from hyperopt_nested.__main__ import main; main()")
    assert process.communicate() == ("", 'typer is not installed: pip install "hyperopt-nested[cli]"\n')
    assert process.returncode == 1


def test_progress_goes_to_stderr_without_a_terminal() -> None:
    process = started("-m", "hyperopt_nested", "rules", "centralize", "centralize", "--markdown", "--examples", "1")
    table, progress = process.communicate()
    assert progress == "verifying centralize (1 of 2)\nverifying centralize (2 of 2)\n"
    assert {line[0] for line in table.splitlines()} == {"|"}


STUBBORN = """
import sys
import time

print("verifying nothing", file=sys.stderr, flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""


@pytest.mark.parametrize("arguments", [["rules"], ["check", "stubborn.py:rule"]], ids=" ".join)
def test_an_interrupt_ends_the_command_at_once(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stubborn.py").write_text(STUBBORN)
    with started("-m", "hyperopt_nested", *arguments) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("verifying")
            process.send_signal(signal.SIGINT)
            assert process.wait(2) == -signal.SIGINT
        finally:
            process.kill()


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
