"""Sharded and replicated training by two processes (gloo), compared with one: what `processes.py` does."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("processes", Path(__file__).with_name("processes.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


processes = _load()
TIMEOUT = 400  # seconds, for all cells: after that, what has not ended hangs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes have written; before, one process writes the checkpoints that they load. All workers share one run."""
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    try:
        made.mkdir()
    except FileExistsError:  # another worker has begun
        end = time.monotonic() + TIMEOUT
        while not (made / "ended").exists() and time.monotonic() < end:
            time.sleep(0.5)
        return made
    for kind in processes.OPTIMIZERS:
        processes.checkpoint(made / f"one {kind}", *processes.by_one_process(kind, 3), load=False, no_dist=True)
    with (made / "output").open("w") as output:
        port = random.Random().randint(20000, 50000)
        command = [sys.executable, processes.__file__, str(made), str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    (made / "ended").touch()
    return made


@pytest.fixture(scope="session")
def rows(folder: Path) -> list[dict[str, str]]:
    """By process, the error of each cell; none where that is empty."""
    files = [folder / f"{rank}.jsonl" for rank in range(processes.PROCESSES)]
    return [dict(map(json.loads, file.read_text().splitlines())) if file.exists() else {} for file in files]


@pytest.mark.parametrize("cell", processes.CELLS)
def test_processes_do_what_one_does(cell: str, rows: list[dict[str, str]], folder: Path) -> None:
    for errors in rows:
        assert cell in errors, f"it did not end: {(folder / 'output').read_text()[-3000:]}"
        assert not errors[cell], errors[cell]


@pytest.mark.parametrize("kind", processes.OPTIMIZERS)
def test_one_process_goes_on_from_what_two_have_saved(kind: str, folder: Path) -> None:
    network = processes.model()
    optimizer = processes.OPTIMIZERS[kind](network.named_parameters(), "foreach")
    processes.checkpoint(folder / f"two {kind}", network, optimizer, load=True, no_dist=True)
    processes.train(network, optimizer, range(3, 5))
    one, alone = processes.by_one_process(kind, 5)
    for own, other in zip(network.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    values, expected = optimizer.learned(), alone.learned()
    assert values == pytest.approx(expected, rel=1e-12)


def test_a_step_exchanges_at_most_three_vectors(folder: Path) -> None:
    counts: dict[str, dict[str, Any]] = json.loads((folder / "exchanges.json").read_text())
    by_kind = {tuple(kind.split(", ")): count for kind, count in counts["FSDP2"].items()}
    few, many = sorted({int(size.split()[0]) for _, size in by_kind})
    assert many == 4 * few
    for kind in processes.OPTIMIZERS:
        assert by_kind[kind, f"{few} tensors"] == by_kind[kind, f"{many} tensors"] <= 3
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "scale-out.md").read_text(encoding="utf-8")
    for kind, row in {"nothing learned": "nothing learned", "learned": "AdamW, a learned lr", "AdamP": "`AdamP`, `SGDP`, `FTP`"}.items():
        (total,) = re.findall(rf"^\| {row} \|.* (\d) \|$", page, re.MULTILINE)
        assert by_kind[kind, f"{many} tensors"] == int(total)
