"""Files that are either there whole or not at all, and packages that only some functions need."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write(path: Path, save: Callable[[BinaryIO], object] | bytes) -> None:
    """Write a file so that, whatever happens, it holds afterwards what it held before, or all that is new.

    Args:
        path: of the file; its folder exists.
        save: the content, or what writes it to a file.

    Raises:
        OSError: it cannot be written, because the disk is full for example. The message says that the file is as it was.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            if isinstance(save, bytes):
                file.write(save)
            else:
                save(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # what torch.save raises when a write fails
        if isinstance(cause, OSError):
            why = cause.strerror or str(cause)
            raise OSError(
                cause.errno, f"{path} cannot be written: {why}. What was there before is whole: start again with the same arguments"
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Have the new name outlast a crash, where folders can be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def writable(folder: Path) -> Path:
    """Create a folder, unless it is there, and try to write in it.

    Raises:
        OSError: it cannot be created, or nothing can be written in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"out={str(folder)!r} cannot be written to: {error.strerror}. Give another folder") from error
    return folder


@contextmanager
def extra() -> Iterator[None]:
    """Name the extra to install where a package is missing that imports inside the context need.

    Raises:
        ModuleNotFoundError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        package = {"PIL": "pillow"}.get(name := (missing.name or "").partition(".")[0], name)
        raise ModuleNotFoundError(f'{package} is not installed: pip install "hyperopt-nested[finetune]"', name=missing.name) from missing


def package(name: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    with extra():
        return importlib.import_module(name)
