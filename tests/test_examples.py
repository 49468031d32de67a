"""Every example runs, with warnings as errors, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    quiet = ["-W", "error", "-W", "ignore:`torch.jit.script:DeprecationWarning"]
    done = subprocess.run([sys.executable, *quiet, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0.0" in done.stdout


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2
