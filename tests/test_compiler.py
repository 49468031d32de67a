"""Compiled kernels are kept where only the user can write, whole or not at all, and can be made by many at once."""

import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyperopt_nested.backends import compiler

SOURCE = 'extern "C" int run() { return NUMBER; }'
STEPS = """
    import warnings, torch, hyperopt_nested as hn
    from hyperopt_nested.backends import compiler, step
    step.WARM_UP = 0
    compiler.FLAGS = ("-O0",)
    w = torch.nn.Parameter(torch.ones(3, 2))
    opt = hn.HyperOptimizer([w], hn.sgd(lr=0.1))
    for _ in range(2):
        w.grad = torch.ones_like(w)
        opt.step()
    print(opt.backend, round(float(w.detach()[0, 0]), 6))
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own, and nothing loaded yet."""
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.setattr(compiler, "_libraries", {})
    monkeypatch.setattr(compiler, "FLAGS", ("-O0",))
    return tmp_path / "kernels"


def result(number: int) -> int:
    (library,) = compiler.load([SOURCE.replace("NUMBER", str(number))])
    return int(library.run())


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def test_programs_are_made_without_torchs_own_compiler(tmp_path: Path) -> None:
    """Its import takes a second, in which all threads wait."""
    heavy = "import sys; print(*(name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules))"
    done = run(textwrap.dedent(STEPS) + heavy, HYPEROPT_NESTED_CACHE=str(tmp_path))
    assert done.stdout.split() == ["fused", "0.8"], done


def test_the_first_compilation_says_one_line(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert (result(1), result(2)) == (1, 2)
    (line,) = caplog.messages
    for words in ("compiling optimizer kernels, once", str(kept), compiler.CACHE_VARIABLE, "backend='reference' avoids them"):
        assert words in line


def test_libraries_are_kept_for_the_user_alone(kept: Path) -> None:
    assert result(1) == 1
    (path,) = kept.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert not path.stat().st_mode & 0o077
    modified = path.stat().st_mtime_ns
    compiler._libraries.clear()
    assert result(1) == 1
    assert (path.stat().st_mtime_ns, len([*kept.iterdir()])) == (modified, 1)
    assert result(2) == 2
    assert len([*kept.iterdir()]) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: data[:500] + bytes(200) + data[700:], lambda _: b""])
def test_a_damaged_library_is_built_again(kept: Path, damage: Callable[[bytes], bytes]) -> None:
    assert result(3) == 3
    (path,) = kept.iterdir()
    other = kept / "other"  # not in place: this process has the library open
    other.write_bytes(damage(path.read_bytes()))
    other.replace(path)
    compiler._libraries.clear()
    assert result(3) == 3
    assert compiler._kept(path)


def test_what_others_can_write_is_not_loaded(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.mkdir(mode=0o777)
    kept.chmod(0o777)
    assert compiler.folder() is None
    with pytest.raises(compiler.CompileError, match=f"no folder for compiled kernels can be used: set {compiler.CACHE_VARIABLE}"):
        result(4)
    kept.chmod(0o700)
    assert result(4) == 4
    (path,) = kept.iterdir()
    path.chmod(0o702)  # others could have put anything there
    compiler._libraries.clear()
    assert result(4) == 4
    assert not path.stat().st_mode & 0o022
    link = tmp_path / "link"
    link.symlink_to(kept)
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(link))
    assert compiler.folder() is None
    if hasattr(os, "geteuid"):
        monkeypatch.setenv(compiler.CACHE_VARIABLE, str(kept))
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert compiler.folder() is None


@pytest.mark.parametrize("where", ["/proc/nothing/here", __file__])
def test_no_folder_means_no_compiler(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, where)
    assert compiler.folder() is None
    done = run(STEPS)
    assert (done.returncode, done.stdout) == (0, "foreach 0.8\n"), done.stderr


def test_a_compiler_that_fails_is_told_in_a_line(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run(STEPS, CXX=str(broken), HYPEROPT_NESTED_CACHE=str(tmp_path / "kernels"))
    assert (done.returncode, done.stdout) == (0, "foreach 0.8\n")
    (warned,) = [line for line in done.stderr.splitlines() if "UserWarning" in line]
    assert f"backend='fused' is not used for sgd: {broken} fails: fatal error: no headers" in warned
    assert len(warned) < 300
    assert [*(tmp_path / "kernels").iterdir()] == []


def test_many_at_once(tmp_path: Path) -> None:
    code = STEPS.replace("    print", "    assert opt.backend == 'fused'\n    print")
    environment = {**os.environ, "HYPEROPT_NESTED_CACHE": str(tmp_path / "kernels")}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    ended = [(process.communicate(timeout=300), process.returncode) for process in started]
    assert [(said[0], code) for said, code in ended] == [("fused 0.8\n", 0)] * 2, ended
    assert {path.suffix for path in (tmp_path / "kernels").iterdir()} == {".so"}


def test_threads_take_their_first_step_at_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    import torch

    import ftp

    ends: dict[int, Any] = {}

    def train(i: int) -> None:
        param = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        opt = ftp.AdamP([("w", param)], lr=0.1, backend="fused")
        for _ in range(3):
            param.grad = torch.cos(3 * param.detach())
            opt.step()
        ends[i] = param.detach()

    threads = [threading.Thread(target=train, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == 4
    assert all(torch.equal(end, ends[0]) for end in ends.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_steps() -> None:
    """Its parent's threads are not there, nor what they were doing."""
    code = """
        import os, signal, torch, hyperopt_nested as hn
        torch.set_num_threads(2)
        def make(size):
            w = torch.nn.Parameter(torch.ones(size, size))
            w.grad = torch.ones_like(w)  # torch's own operators hang in a child
            return w, hn.HyperOptimizer([w], hn.sgd(lr=0.1))
        def go(w, opt, steps):
            for _ in range(steps):
                opt.step()
        large, small = make(1100), make(3)
        go(*large, 2)
        go(*small, 2)  # its kernels are being compiled
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            go(*large, 2)
            go(*small, 20)
            os._exit(0 if small[1].backend == "fused" and abs(float(small[0].detach()[0, 0]) + 1.2) < 1e-5 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = run(code)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.usefixtures("compiled_ahead")
def test_the_switch_comes_at_a_fixed_step(kept: Path) -> None:
    """Short runs wait for no compiler, and a resumed run is the same, bit for bit."""
    import copy

    import torch

    import hyperopt_nested as hn
    from hyperopt_nested.backends import step

    def make() -> tuple[torch.nn.Parameter, hn.HyperOptimizer]:
        param = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        return param, hn.HyperOptimizer([("w", param)], hn.adamw(lr=hn.learn(0.01, by=hn.sgd(lr=1e-4))))

    def go(param: torch.nn.Parameter, opt: hn.HyperOptimizer, steps: int) -> None:
        for _ in range(steps):
            param.grad = torch.cos(3 * param.detach())
            opt.step()

    param, opt = make()
    prepared: Any = lambda opt: opt._program_step._last is not None  # noqa: E731
    go(param, opt, step.WARM_UP)
    assert not prepared(opt)
    assert opt.backend == "fused"
    saved, at = copy.deepcopy(opt.state_dict()), param.detach().clone()
    go(param, opt, 5)
    assert prepared(opt)
    for begin in (0, 10, step.WARM_UP):
        other, resumed = make()
        if begin == step.WARM_UP:
            other.data.copy_(at)
            resumed.load_state_dict(saved)
        else:
            go(other, resumed, begin)
            middle, position = copy.deepcopy(resumed.state_dict()), other.detach().clone()
            other, resumed = make()
            other.data.copy_(position)
            resumed.load_state_dict(middle)
        go(other, resumed, step.WARM_UP + 5 - begin)
        assert torch.equal(other, param)


def test_a_run_that_ends_soon_leaves_nothing_behind(tmp_path: Path) -> None:
    code = """
        import torch, hyperopt_nested as hn
        params = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
        opt = hn.HyperOptimizer(params, hn.adamw(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-6))))
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
    """
    done = run(code, HYPEROPT_NESTED_CACHE=str(tmp_path / "kernels"))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Error" not in done.stderr
    assert not [path for path in (tmp_path / "kernels").iterdir() if path.suffix != ".so"]
