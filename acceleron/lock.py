"""A lock that prevents two runs from using the same save_dir."""

import errno
import fcntl
import json
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from .errors import InputError, file_error

NAME = "run.lock"

logger = logging.getLogger(__name__)


class DirectoryLock:
    """Locks `directory` for this process until `release` or the end of a `with` block. Creates it if necessary.

    The lock is an operating system lock on the file run.lock, so it always ends with the process. The file names the
    holder. A file without a lock is stale. `release` removes the file, and any directory that the lock created if it is
    still empty. Raises InputError if another process holds the lock (the message has its pid and host) or the directory
    is not writable.
    """

    def __init__(self, directory: Path):
        self._path = directory / NAME
        self._created = [path for path in (directory, *directory.parents) if not path.exists()]  # innermost first
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self._lock()
        except OSError as error:
            self._remove_created()
            raise file_error(f"--save_dir {directory}: cannot be written", error) from error
        stale = self._file.read()
        if stale:
            logger.info(f"note: {self._path} was left by {_describe(stale)}, which is no longer running")
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        with suppress(OSError):  # the lock also works on a full disk, but the file then does not name its holder
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(json.dumps(holder))
            self._file.flush()

    def _lock(self):
        while True:
            file = self._path.open("a+", encoding="utf-8", errors="replace")
            file.seek(0)
            try:
                # Use a record lock: unlike a flock, child processes do not inherit it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    logger.warning(
                        f"the file system of {self._path.parent} does not support locks ({error.strerror}): "
                        "do not start a second run there"
                    )
                    return file
                holder = _describe(file.read())
                raise InputError(
                    f"--save_dir {self._path.parent} is in use by {holder}: wait for it, stop it, or choose another"
                ) from error
            # The previous holder can remove the file between open and lockf. This lock would then be on a deleted file.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    return file
            file.close()

    def _remove_created(self):
        for path in self._created:
            with suppress(OSError):  # not empty, or never created
                path.rmdir()

    def release(self):
        with suppress(OSError):  # on a full or read-only disk, a stale file remains
            self._path.unlink()
        with suppress(OSError):
            self._file.close()
        self._remove_created()

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *_):
        self.release()


def _describe(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]}"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"
