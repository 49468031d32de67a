"""Lightning, the Trainer of transformers, Accelerate, peft and timm fine-tune small networks, save, and go on bit by bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*names: str) -> None:
    """Run functions of `trainers.py` in a process of their own: these packages share their imports, which take most of the time."""
    call = [sys.executable, "-W", "ignore", "tests/trainers.py", *names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert [name for name in ended.stdout.splitlines() if name in names] == [*names], ended.stdout + ended.stderr


def test_trainers_fine_tune_and_go_on_bitwise() -> None:
    run("lightning", "trainer", "accelerate", "peft")


def test_timm_fine_tunes_and_goes_on_bitwise() -> None:
    if not (Path(sys.prefix) / "no-deps" / "timm").exists():
        pytest.skip("timm is not installed: make test does it")
    run("timm")
