"""Checkpoints, written in the background while training continues."""

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
from ..files import PARTIAL, atomic_write
from ..log import say


class SaveResult(NamedTuple):
    """The result of a save attempt. `error` is None if the checkpoint is on disk and valid."""

    path: Path
    step: int
    bytes: int
    seconds: float
    error: str | None


class CheckpointManager:
    """Copies a training state to CPU buffers and writes it to checkpoint_<step>.pt in a thread.

    A checkpoint gets its name only after it has been written to disk, read back and verified against its checksums.
    Then older checkpoints are deleted, except for the last `keep_last` valid ones (0 keeps all). At least one kept
    checkpoint is good: the step after it was not skipped. A failed attempt changes nothing.
    """

    def __init__(self, directory: Path, keep_last: int = 0, device: torch.device | None = None):
        """device: the tensors' device, if it is not the CPU."""
        self.directory, self.keep_last, self.device = directory, keep_last, device
        self._buffers: dict[tuple, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._result: SaveResult | None = None
        self._valid: set[Path] = set()  # checkpoints that this process has written or verified
        for partial in directory.glob(f"checkpoint_*{PARTIAL}"):  # left by a killed process
            partial.unlink()

    def save(self, contents: dict, good_step: int):
        """Start writing a checkpoint once the previous one is finished. `contents` can change after this returns.

        good_step: the newest step whose checkpoint is good.
        """
        self.wait()
        self._result = None
        copied = self._copy(contents)
        ready = None
        if self.device is not None and self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.device))
        self._thread = threading.Thread(target=self._write, args=(copied, good_step, ready), name="checkpoint")
        self._thread.start()

    def _copy(self, value, key: tuple = ()):
        """Return the value with all tensors copied to CPU buffers. The next checkpoint reuses them."""
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
        path = checkpoint_path(self.directory, contents["step"])
        start = time.perf_counter()
        size = 0
        reason = None
        try:
            if ready:
                ready.synchronize()
            self.directory.mkdir(parents=True, exist_ok=True)  # the user may have moved it
            with atomic_write(path) as file:
                torch.save(contents, file)
                file.flush()
                os.fsync(file.fileno())
                # Drop the page cache, so the file is read back from the disk.
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                verify_archive(Path(file.name))
                size = file.tell()
            self._valid.add(path)
            self._delete_old(contents["step"], good_step)
        except Exception as error:
            # torch.save raises an error about the unfinished archive, with the OSError as its context.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            reason = str(getattr(cause, "strerror", None) or cause).split("\n")[0]
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                with suppress(OSError):
                    needed, free = tensor_bytes(contents) / 1e6, shutil.disk_usage(self.directory).free / 1e6
                    reason += f": it needs {needed:,.1f} MB, and {free:,.1f} MB are free"
        self._result = SaveResult(path, contents["step"], size, time.perf_counter() - start, reason)

    def _delete_old(self, newest: int, good_step: int):
        kept, good = 0, False
        for step, path in reversed(list_checkpoints(self.directory).items()):
            if not self.keep_last or step > newest:  # the run did not resume from newer ones, so they are damaged
                continue
            if kept < self.keep_last or not good:
                valid = self._is_valid(path)
                kept, good = kept + valid, good or (valid and step <= good_step)
                continue
            try:
                path.unlink()
            except OSError as error:
                say(f"warning: {path} could not be deleted ({error.strerror})")

    def _is_valid(self, path: Path) -> bool:
        if path not in self._valid:
            try:
                verify_archive(path)
            except InputError:
                return False
            self._valid.add(path)
        return True

    def result(self) -> SaveResult | None:
        """Return the result of the last attempt, once. Returns None while the attempt is running."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        return self._result

    def wait(self):
        """Wait for the write in progress, if any."""
        if self._thread:
            self._thread.join()
