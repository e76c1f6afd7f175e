"""One run at a time in a save_dir."""

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from ..errors import InputError, file_error
from ..log import say

NAME = "run.lock"


class DirectoryLock:
    """Holds `directory`, which is made if need be, for this process until `release`, or for the length of a `with`.

    The lock is the operating system's on the file run.lock, so that it ends with the process however that ends; the
    file says who holds it, and one without a lock on it is stale. `release` removes the file, and the directories that
    were made if nothing else came into them. Raises InputError if another process holds it, naming its pid and host,
    or if the directory can't be written.
    """

    def __init__(self, directory: Path):
        self._path = directory / NAME
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]  # innermost first
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self._lock()
        except OSError as error:
            self._remove_made()
            raise file_error(f"--save_dir {directory}: cannot be written", error) from error
        stale = self._file.read()
        if stale:
            say(f"note: {self._path} was left by {_describe(stale)}, which is no longer running")
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        with suppress(OSError):  # on a full disk the lock holds all the same, only that nobody learns whose it is
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(json.dumps(holder))
            self._file.flush()

    def _lock(self):
        while True:
            file = self._path.open("a+", encoding="utf-8", errors="replace")
            file.seek(0)
            try:
                # A record lock: unlike flock's, no child process that outlives this one inherits it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    say(
                        f"warning: nothing keeps a second run out of {self._path.parent}: its file system has no locks "
                        f"({error.strerror})"
                    )
                    return file
                holder = _describe(file.read())
                raise InputError(
                    f"--save_dir {self._path.parent} is in use by {holder}: wait for it, stop it, or name another"
                ) from error
            # Its holder may have removed the file between the two calls: then this lock is on a file that is gone.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    return file
            file.close()

    def _remove_made(self):
        for path in self._made:
            with suppress(OSError):  # it holds something, or was never made
                path.rmdir()

    def release(self):
        with suppress(OSError):  # the disk may be full, or have become read-only; a lock that stays is stale
            self._path.unlink()
        with suppress(OSError):
            self._file.close()
        self._remove_made()

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *_):
        self.release()


def _describe(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"the process {int(holder['pid'])} on {str(holder['host'])[:100]}"
    except (ValueError, KeyError, TypeError):
        return "a process that could not say which"
