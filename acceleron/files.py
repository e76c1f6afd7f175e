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
    """Yield a directory to fill. At the end, its files move to `path`, which must be new or empty.

    An error leaves nothing. Raises InputError if `path` is not empty or cannot be written, and RunFailed if the disk is
    full.
    """
    partial = path / PARTIAL
    try:
        if partial.exists():
            raise InputError(f"{partial} exists: another export is writing it, or was killed; then remove it")
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a broken link: choose a new directory")
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} is not empty: choose a new directory")
        created = [directory for directory in (path, *path.parents) if not directory.exists()]
        partial.mkdir(parents=True)
    except OSError as error:
        raise file_error(f"{path}: cannot be written", error) from error
    moved = []
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # last: it makes a model
            moved.append(path / file.name)
            file.replace(path / file.name)
        partial.rmdir()
        sync_directory(path)
        if path in created:
            sync_directory(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for file in moved:
            file.unlink(missing_ok=True)
        with suppress(OSError):  # another process can have used them
            for directory in created:
                directory.rmdir()
        if isinstance(error, OSError):
            raise file_error(f"{path}: cannot be written", error) from error
        raise


def sync_directory(directory: Path):
    """Flush the directory's entries to disk. Without this, a power cut can undo a rename."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
