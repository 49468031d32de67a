"""Every example runs, with warnings as errors, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    quiet = ["-W", "error", "-W", "ignore:`torch.jit.script:DeprecationWarning"]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}  # tests run side by side, and threads that wait for a core are many times slower
    done = subprocess.run([sys.executable, *quiet, str(path)], capture_output=True, text=True, check=False, env=one_core)
    assert done.returncode == 0, done.stderr
    assert "0.0" in done.stdout


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2
