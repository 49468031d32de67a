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
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CACHE_VARIABLE = "HYPEROPT_NESTED_CACHE"  # the environment variable that names the folder where compiled kernels are kept

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_ALWAYS = ("-std=c++14", "-fopenmp", "-fPIC", "-shared", "-pipe", "-w")
_MARK = b"hyperopt-nested:"
_log = logging.getLogger("hyperopt_nested")
_lock = threading.RLock()
_libraries: dict[str, ctypes.CDLL] = {}
_running: set[subprocess.Popen[bytes]] = set()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
stopping = threading.Event()  # set when Python is about to end


class CompileError(Exception):
    """A library cannot be compiled or loaded; the message is one line that says why."""


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
        missing = {key: source for key, source in new.items() if not _kept(where / f"{key}.so")}
        if missing:
            _tell(where)
            _compile(found, where, missing)
        try:
            _libraries.update({key: ctypes.CDLL(str(where / f"{key}.so")) for key in new})
        except OSError as error:
            raise CompileError(f"a compiled kernel cannot be loaded: {_line(str(error))}") from error
        return [_libraries[key] for key in keys]


@cache
def _tell(where: Path) -> None:
    """Say, once, why the first steps take longer, and where libraries are kept."""
    said = "compiling optimizer kernels, once; they are kept in %s (%s moves them, backend='reference' avoids them)"
    _log.warning(said, where, CACHE_VARIABLE)


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


def _compile(command: tuple[str, ...], where: Path, sources: Mapping[str, str]) -> None:
    """Compile sources, by key, into the folder: as many at a time as there are processors, and each library in one move."""
    keys, many = list(sources), os.cpu_count() or 1
    try:
        with tempfile.TemporaryDirectory(dir=where, prefix="tmp-") as scratch:
            for now in (keys[begin : begin + many] for begin in range(0, len(keys), many)):
                started = {path: _started(command, path, sources[path.name]) for path in (Path(scratch, key) for key in now)}
                for process in started.values():
                    process.wait()
                    _running.discard(process)
                for path, process in started.items():
                    _finish(command[0], process.returncode, path, where / f"{path.name}.so")
    except OSError as error:
        raise CompileError(f"kernels cannot be compiled: {_line(str(error))}") from error


def _started(command: tuple[str, ...], path: Path, source: str) -> subprocess.Popen[bytes]:
    """The compiler, at work on a source."""
    code, environment = path.with_suffix(".cpp"), {**os.environ, "TMPDIR": str(path.parent)}
    code.write_text(source)
    with path.with_suffix(".said").open("wb") as said:
        call = [*command, *_ALWAYS, *FLAGS, str(code), "-o", str(path)]
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=said, env=environment)
    _running.add(process)
    if stopping.is_set():
        process.kill()
    return process


def _finish(name: str, status: int, path: Path, to: Path) -> None:
    """Move what the compiler has made to where it is kept."""
    if status:
        said = path.with_suffix(".said").read_text(errors="replace")
        raise CompileError(f"{name} fails: {_line(said) or f'exit status {status}'}")
    content = path.read_bytes()
    path.write_bytes(content + _trailer(content))
    path.chmod(0o700)
    os.replace(path, to)


def in_background(work: Callable[[], None]) -> threading.Thread:
    """Start a thread that compiles ahead. What fails there fails again where it is needed; when Python ends, it is stopped first."""

    def quietly() -> None:
        with suppress(Exception):
            work()

    thread = threading.Thread(target=quietly, daemon=True, name="hyperopt-nested-compiler")
    _threads.add(thread)
    thread.start()
    return thread


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
    """What the compiler, the processor and the library are."""
    found = os.stat(os.path.realpath(compiler))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described = sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")})
    except OSError:
        described = [platform.processor()]
    with suppress(PackageNotFoundError):
        described.append(version("hyperopt-nested"))
    about = os.path.realpath(compiler), str(found.st_size), str(found.st_mtime_ns), platform.machine(), platform.system()
    return "\n".join([*about, *described])


def _forget() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()
    _running.clear()
    _threads.clear()


@atexit.register
def _stop() -> None:
    """When Python ends: a thread that goes on then can end the process with an error."""
    stopping.set()
    for process in list(_running):
        process.kill()
    for thread in list(_threads):
        thread.join(30)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
