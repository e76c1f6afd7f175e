"""Atomic writes of files and directories."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, file_error

PARTIAL = ".partial"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` after it is complete and synced. An error leaves `path` unchanged.

    A killed process also leaves `path` unchanged, with `path` + PARTIAL next to it.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # keep the original error
            partial.unlink()
        raise
    sync_directory(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a directory to fill, and rename it to `path` at the end. An error leaves nothing.

    Raises InputError if `path` is not empty, or if a killed process left its unfinished directory.
    """
    path = path.absolute()  # "." has no name
    try:
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} is not empty: choose a new directory")
        partial = path.with_name(path.name + PARTIAL)
        parents = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        if isinstance(error, FileExistsError) and error.filename == str(partial):
            raise InputError(f"{partial} is left from a process that was killed: remove it") from error
        raise file_error(f"{path}: cannot be written", error) from error
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        sync_directory(partial)
        partial.replace(path)  # also replaces an empty directory
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # another process can have used them
            for parent in parents:
                parent.rmdir()
        if isinstance(error, OSError):
            raise file_error(f"{path}: cannot be written", error) from error
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path):
    """Flush the directory's entries to disk. Without this, a power cut can undo a rename."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
