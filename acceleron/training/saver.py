"""Checkpoints written while the training goes on."""

import errno
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint import checkpoint_path, list_checkpoints, tensor_bytes, verify_archive
from ..errors import InputError
from ..files import PARTIAL, replacing
from ..log import say


class Outcome(NamedTuple):
    """Of an attempt to save: `error` is None if the checkpoint is there, and whole."""

    path: Path
    step: int
    bytes: int
    seconds: float
    error: str | None


class Saver:
    """Copies a state to memory of its own, and writes it to checkpoint_<step>.pt in a thread.

    A checkpoint takes its name once it is on the disk and has been read back from there against its checksums. Only
    then are older ones deleted, but for the last `keep_last` whole ones (0: none are), of which one must be known to be
    good. An attempt that fails leaves all as it was.
    """

    def __init__(self, directory: Path, keep_last: int = 0, device: torch.device | None = None):
        """`device`: where the tensors are, if not on the CPU."""
        self.directory, self.keep_last, self.device = directory, keep_last, device
        self._buffers: dict[tuple, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._whole: set[Path] = set()  # that this process has written, or read in full
        for partial in directory.glob(f"checkpoint_*{PARTIAL}"):  # of a process that was killed
            partial.unlink()

    def save(self, contents: dict, good_step: int):
        """Begin to write a checkpoint; `contents` may change as soon as this returns. Waits for the one before.

        `good_step`: that of the newest model that is known to be good.
        """
        self.wait()
        self._outcome = None
        copied = self._copy(contents)
        ready = None
        if self.device is not None and self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.device))
        self._thread = threading.Thread(target=self._write, args=(copied, good_step, ready), name="checkpoint")
        self._thread.start()

    def _copy(self, value, key: tuple = ()):
        """The value with all tensors on the CPU; their memory is used again for the next checkpoint."""
        if isinstance(value, Tensor):
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[key] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {name: self._copy(item, (*key, name)) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, (*key, index)) for index, item in enumerate(value))
        return value

    def _write(self, contents: dict, good_step: int, ready: torch.cuda.Event | None):
        path, start, size, reason = checkpoint_path(self.directory, contents["step"]), time.perf_counter(), 0, None
        try:
            if ready:
                ready.synchronize()
            self.directory.mkdir(parents=True, exist_ok=True)  # it may have been moved away
            with replacing(path) as file:
                torch.save(contents, file)
                file.flush()
                os.fsync(file.fileno())
                # Out of the page cache, so that the disk is what is read back.
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                verify_archive(Path(file.name))
                size = file.tell()
            self._whole.add(path)
            self._delete_old(contents["step"], good_step)
        except Exception as error:
            # torch hides a failing write behind an error of its own, at what it left behind.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            reason = str(getattr(cause, "strerror", None) or cause).split("\n")[0]
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                with suppress(OSError):
                    needed, free = tensor_bytes(contents) / 1e6, shutil.disk_usage(self.directory).free / 1e6
                    reason += f": it takes {needed:,.1f} MB, and {free:,.1f} MB are free"
        self._outcome = Outcome(path, contents["step"], size, time.perf_counter() - start, reason)

    def _delete_old(self, newest: int, good_step: int):
        kept, good = 0, False
        for step, path in reversed(list_checkpoints(self.directory).items()):
            if not self.keep_last or step > newest:  # later ones were passed over on resuming, as damaged
                continue
            if kept < self.keep_last or not good:
                whole = self._is_whole(path)
                kept, good = kept + whole, good or (whole and step <= good_step)
                continue
            try:
                path.unlink()
            except OSError as error:
                say(f"warning: {path} could not be deleted ({error.strerror})")

    def _is_whole(self, path: Path) -> bool:
        """A damaged one must not count for one that is kept."""
        if path not in self._whole:
            try:
                verify_archive(path)
            except InputError:
                return False
            self._whole.add(path)
        return True

    def outcome(self) -> Outcome | None:
        """Of the last attempt, once it has ended; each is told once."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        return self._outcome

    def wait(self):
        """Until nothing is being written."""
        if self._thread:
            self._thread.join()
