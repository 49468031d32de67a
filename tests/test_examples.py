"""Every example runs, with warnings as errors, in processes of its own, and comes to the result that it is there to show."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import hooks
import nbformat
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
RESULTS = {
    "audit_the_horizon": r"discount 1, exact curvature +│ 1\.00 +│ 1\.000 +│ 1\.0000",  # nothing is neglected
    "finetune_folder": r"linear-probe .*\n│ full .*\n│ ftp +│ [89]\d\.\d ± \d\.\d │(.*\n)+Report: .*report\.html",
    "learn_a_schedule": r"Learned beat constant: .*\nLearned beat linear to zero: ",
    "learn_the_learning_rate": r"(│ 0\.0*1 +│ 0\.\d+ +│ 0\.9\d+ +│ 0\.[12]\d+ +│\n){3}",  # the same, from three starts
    "learn_weight_decays": r"start, 0\.01 +│ 0\.31\d+ (.*\n){2}│ learned per tensor +│ 0\.15\d+ ",
    "lora": r"0\.03 +│ AdamW .* 1\.[4-9]\d +│\n│ 0\.03 +│ FTP .* 0\.[234]\d +│(.*\n)+radius/.*\.qkv\.lora_A\.default\.weight [01]\.\d+",
    "maml": r"trained on all tasks .* 3\.\d+ ± .*│ 2\.\d+ ± (.*\n)│ meta-learned .* (2\.9|3\.0)\d ± \S+ │ 0\.[678]\d ± ",
    "many_learning_rates": r"0\.000010 +│ 2\.3\d+ +│ 0\.[01]\d+ +│ 0\.[12]\d+ ",
    "write_a_rule": r"step   0  loss 0\.79.*(\n.*){3}\nstep 200  loss 0\.10\d+  lr 0\.02\d+  beta 0\.85\d+  delta 0\.05\d+",
}

ARGUMENTS = {"audit_the_horizon": ["picture.png", "20"]}  # fewer steps of what is not compared

DISTRIBUTED = {  # in this order: the last goes on from where the one before has ended, with fewer processes
    "2 learn_the_rate_ddp.py": r"rate 0\.0003 learned to 0\.0[1-9]\d*, equal on 2 processes\ntest accuracy 0\.[89]",
    "2 tensor_parallel.py": r"test accuracy 0\.[89]\d+, 3 exchanges in a step",
    "2 fine_tune_fsdp.py --checkpoint {folder} --steps 14": r"steps 0 to 14 by 2: test accuracy 0\.[3-9]\d+, largest radius 0\.1\d+",
    "1 fine_tune_fsdp.py --checkpoint {folder} --steps 10": r"steps 14 to 24 by 1: test accuracy 0\.[4-9]\d+, largest radius 0\.2\d+",
}
DRIVER = """
import os, runpy, sys

os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each program has a store of its own
for command in sys.argv[1:]:
    os.environ["MASTER_PORT"], os.environ["WORLD_SIZE"], *sys.argv = command.split()
    if int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]):
        runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_example_is_here() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(RESULTS)


@pytest.mark.parametrize("name", RESULTS)
def test_example(name: str, tmp_path: Path) -> None:
    quiet = ["-W", "error", "-W", "ignore:`torch.jit.script"]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}  # tests run side by side, and threads that wait for a core are many times slower
    command = [sys.executable, *quiet, str(EXAMPLES / f"{name}.py"), *ARGUMENTS.get(name, [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_core, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(RESULTS[name], done.stdout), done.stdout


def test_distributed_examples(tmp_path: Path) -> None:
    """By one torchrun for all, since processes take seconds to start."""
    assert {key.split()[1] for key in DISTRIBUTED} == {path.name for path in (EXAMPLES / "distributed").glob("*.py")}
    (tmp_path / "driver.py").write_text(DRIVER)
    with contextlib.ExitStack() as free:
        sockets = [free.enter_context(socket.socket()) for _ in DISTRIBUTED]
        for each in sockets:
            each.bind(("localhost", 0))
        ports = [each.getsockname()[1] for each in sockets]
    commands = [key.format(folder=tmp_path / "checkpoints").split(" ", 1) for key in DISTRIBUTED]
    runs = [f"{port} {number} {EXAMPLES / 'distributed'}/{rest}" for port, (number, rest) in zip(ports, commands, strict=True)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "driver.py")]
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error,ignore:`torch.jit.script", "CXX": "none"}  # and no kernels to compile
    process = subprocess.Popen([*torchrun, *runs], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **quiet})
    try:
        output, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # and torchrun its processes
        output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    for key, result in DISTRIBUTED.items():
        assert re.search(result, output), (key, output)


def test_a_notebook_runs_in_jupyter(tmp_path: Path) -> None:
    """Its cells are the program's code, as those of all notebooks, which test_docs.py shows; and the programs run above."""
    file, example = tmp_path / "notebook.ipynb", "write_a_rule"
    file.write_text(hooks.notebook((EXAMPLES / f"{example}.py").read_text(encoding="utf-8")), encoding="utf-8")
    execute = [sys.executable, "-c", "from nbclient.cli import main; main()", "--inplace", str(file)]
    folders = {name: str(tmp_path) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    subprocess.run(execute, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **folders})
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert re.search(RESULTS[example], "".join(output.text for output in outputs if output.name == "stdout"))
