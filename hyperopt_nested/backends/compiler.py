"""Compiles C++ and keeps the libraries, in a folder that only the user can write to, so that nothing else is ever loaded."""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

CACHE_VARIABLE = "HYPEROPT_NESTED_CACHE"
"""Environment variable that names the folder where compiled kernels are kept."""

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_ALWAYS = ("-std=c++17", "-fopenmp", "-fPIC", "-shared", "-pipe", "-w")
_MARK = b"hyperopt-nested:"
_log = logging.getLogger("hyperopt_nested")
_lock = threading.RLock()
_libraries: dict[str, ctypes.CDLL] = {}
_running: set[subprocess.Popen[str]] = set()


class CompileError(Exception):
    """A library can not be compiled or loaded; the message is one line that says why."""


def load(sources: Sequence[str]) -> list[ctypes.CDLL]:
    """Return one library for each C++ source: of this process, of the folder, or compiled now, all missing ones side by side."""
    found, where = compiler(), folder()
    if found is None:
        raise CompileError("there is no C++ compiler: install one, such as g++, or set CXX")
    if where is None:
        raise CompileError(f"no folder for compiled kernels can be used: set {CACHE_VARIABLE} to one that only you can write to")
    with _lock:
        keys = [_key(source, found) for source in sources]
        new = {key: source for key, source in zip(keys, sources, strict=True) if key not in _libraries}
        missing = [(key, source) for key, source in new.items() if not _kept(where / f"{key}.so")]
        if missing:
            _tell(where)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda item: _compile(found, where, *item), missing))
        try:
            _libraries.update({key: ctypes.CDLL(str(where / f"{key}.so")) for key in new})
        except OSError as error:
            raise CompileError(f"a compiled kernel can not be loaded: {_line(str(error))}") from error
        return [_libraries[key] for key in keys]


@cache
def _tell(where: Path) -> None:
    """Say, once, why the first steps take longer, and where libraries are kept."""
    _log.warning(
        "compiling optimizer kernels, once; they are kept in %s (%s moves them, backend='reference' avoids them)", where, CACHE_VARIABLE
    )


def compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler: the environment variable `CXX`, or the first of g++, clang++ and c++; None if there is none."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]:
        command = shlex.split(name)
        path = shutil.which(command[0]) if command else None
        if path:
            return path, *command[1:]
    return None


def folder() -> Path | None:
    """The folder where libraries are kept, created if need be; None if there is none that only the user can write to."""
    places = {"win32": ("LOCALAPPDATA", "~/AppData/Local"), "darwin": ("", "~/Library/Caches")}
    variable, place = places.get(sys.platform, ("XDG_CACHE_HOME", "~/.cache"))
    given = os.environ.get(CACHE_VARIABLE)
    try:
        path = Path(given) if given else Path(os.environ.get(variable) or place).expanduser() / "hyperopt-nested"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path if _is_own(path, stat.S_ISDIR) and os.access(path, os.W_OK | os.X_OK) else None
    except (OSError, RuntimeError, ValueError):
        return None


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether a path is of a kind, no link, belongs to the user, and nobody else may write to it."""
    found = os.lstat(path)
    mine = not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)
    return mine and is_kind(found.st_mode)


def _kept(path: Path) -> bool:
    """Whether a library is there, the user's own, and whole."""
    try:
        content = path.read_bytes() if _is_own(path, stat.S_ISREG) else b""
    except OSError:
        return False
    return content[-32 - len(_MARK) :] == _trailer(content[: -32 - len(_MARK)])


def _trailer(content: bytes) -> bytes:
    """What follows a library in its file, so that a damaged one is noticed."""
    return _MARK + hashlib.sha256(content).digest()


def _compile(command: tuple[str, ...], where: Path, key: str, source: str) -> None:
    """Compile a source into the folder, in one move."""
    try:
        with tempfile.TemporaryDirectory(dir=where, prefix="tmp-") as scratch:
            code, library = Path(scratch, "kernel.cpp"), Path(scratch, "kernel.so")
            code.write_text(source)
            call, environment = [*command, *_ALWAYS, *FLAGS, str(code), "-o", str(library)], {**os.environ, "TMPDIR": scratch}
            process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
            _running.add(process)
            said = process.communicate()[1]
            _running.discard(process)
            if process.returncode:
                raise CompileError(f"{command[0]} fails: {_line(said) or f'exit status {process.returncode}'}")
            content = library.read_bytes()
            library.write_bytes(content + _trailer(content))
            library.chmod(0o700)
            os.replace(library, where / f"{key}.so")
    except OSError as error:
        raise CompileError(f"kernels can not be compiled: {_line(str(error))}") from error


def _line(message: str) -> str:
    """The line of a message that says what is wrong, shortened."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "")[:160]


def _key(source: str, command: tuple[str, ...]) -> str:
    """Name of a library: equal for what would be compiled alike, and runs alike."""
    described = "\0".join([source, *command, *_ALWAYS, *FLAGS, _here(command[0])])
    return hashlib.sha256(described.encode()).hexdigest()[:32]


@cache
def _here(compiler: str) -> str:
    """What the compiler and the processor are."""
    found = os.stat(os.path.realpath(compiler))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described = sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")})
    except OSError:
        described = [platform.processor()]
    about = os.path.realpath(compiler), str(found.st_size), str(found.st_mtime_ns), platform.machine(), platform.system()
    return "\n".join([*about, *described])


def _forget() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()
    _running.clear()


@atexit.register
def _stop() -> None:
    for process in list(_running):
        process.kill()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
