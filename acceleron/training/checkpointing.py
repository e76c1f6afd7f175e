"""Checkpoints, written in the background while training continues."""

import errno
import logging
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint import checkpoint_path, list_checkpoints, save_checkpoint, tensor_bytes, verify_archive
from ..distributed import Ranks, full_tensor
from ..errors import InputError, RunFailed
from ..files import PARTIAL
from .signals import POLL_SECONDS

# Wait before retrying a failed save.
RETRY_SECONDS = 60.0
# The final save is attempted at least FINAL_ATTEMPTS times, for up to FINAL_TIMEOUT seconds or until a stop request.
# The wait between attempts doubles from FINAL_RETRY_SECONDS up to RETRY_SECONDS.
FINAL_ATTEMPTS, FINAL_RETRY_SECONDS, FINAL_TIMEOUT = 3, 3.0, 900.0

logger = logging.getLogger(__name__)


class SaveResult(NamedTuple):
    """The result of a save attempt. `error` is None if the checkpoint is on disk and valid."""

    path: Path
    step: int
    good_step: int
    bytes: int
    seconds: float
    error: str | None


class CheckpointManager:
    """Writes checkpoint_<step>.pt in a thread, repeats failed attempts, and deletes old checkpoints.

    A checkpoint gets its name only after it has been written to disk, read back and verified against its checksums.
    Then older checkpoints are deleted, except for the last `keep_last` valid ones (0 keeps all). At least one kept
    checkpoint is good: the step after it was not skipped. A failed attempt changes nothing.

    With several ranks, all call `due`, `save`, `is_saved`, `finish` and `rename_diverged` together. Only rank 0 writes;
    sharded tensors are gathered to it, one at a time.

    In all methods, `good_step` is the newest step whose checkpoint is good.
    """

    def __init__(
        self, directory: Path, interval: int = 1, keep_last: int = 0, *,
        before_save: Callable[[], None] = lambda: None, step: int = 0, saved: bool = True,
        resumed_from: Path | None = None, ranks: Ranks | None = None,
    ):  # fmt: skip
        """step, saved: the run's step, and whether it has a checkpoint. Step 0 needs none."""
        self.directory, self.interval, self.keep_last = directory, interval, keep_last
        self.before_save, self.resumed_from, self.ranks = before_save, resumed_from, ranks or Ranks()
        self.written: dict[int, Path] = {}  # by this process; the keys are steps
        self.saved_step, self.attempted_step = step if saved else -1, step
        self.retry_at = math.inf
        self._valid: set[Path] = set()  # checkpoints that this process has written or verified
        self._buffers: dict[tuple, Tensor] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write_in_progress: Future[SaveResult] | None = None
        if self.ranks.is_first:
            for partial in directory.glob(f"checkpoint_*{PARTIAL}"):  # left by a killed process
                partial.unlink()

    def due(self, step: int) -> bool:
        """Return whether to save now: once per interval, and RETRY_SECONDS after a failed attempt."""
        self.poll()
        regular = step // self.interval > self.attempted_step // self.interval
        return bool(self.ranks.max(regular or time.monotonic() >= self.retry_at))

    def save(self, contents: dict, good_step: int):
        """Start writing a checkpoint once the previous one is finished. `contents` can change after this returns."""
        self.ranks.from_first(lambda: bool(self.poll(wait=True)))  # waits for the disk
        self.attempted_step = contents["step"]
        copied, ready = self._copy(contents)
        if self.ranks.is_first:
            self._start_writing(copied, good_step, ready)

    def _start_writing(self, copied: dict, good_step: int, ready: torch.cuda.Event | None):
        self.before_save()
        self.retry_at = math.inf
        self._write_in_progress = self._executor.submit(self._write, copied, good_step, ready)

    def poll(self, wait: bool = False, quiet: bool = False) -> SaveResult | None:
        """Log and return the result of the last write, once, if it has ended. quiet: do not log a failure."""
        if self._write_in_progress is None or not (wait or self._write_in_progress.done()):
            return None
        result, self._write_in_progress = self._write_in_progress.result(), None
        if result.error is None:
            self.saved_step, self.written[result.step] = result.step, result.path
            logger.info(f"saved {result.path}: {result.bytes / 1e6:,.1f} MB in {result.seconds:.2f} s")
        else:
            self.retry_at = time.monotonic() + RETRY_SECONDS
        if result.error and not quiet:
            last_good = self._last_good(result.good_step)
            logger.warning(f"{result.path} could not be written ({result.error}); {last_good}")
        return result

    def is_saved(self, step: int) -> bool:
        return self.ranks.from_first(lambda: self.saved_step == step)

    def finish(self, contents: dict, good_step: int, should_stop: Callable[[], bool]) -> str:
        """Save `contents` unless they are saved, and return where they are. Repeats a failed attempt.

        Raises RunFailed after FINAL_TIMEOUT seconds, or earlier if `should_stop` returns true on rank 0.
        """
        step = contents["step"]
        self.poll(wait=True)
        if not self.is_saved(step):
            self.attempted_step = step
            copied, ready = self._copy(contents)
            self.ranks.from_first(lambda: self._write_repeatedly(copied, good_step, ready, should_stop))
        path = self.ranks.from_first(lambda: str(self.written.get(step, self.resumed_from or "")))
        return f"everything is saved in {path}" if path else "there is nothing to save yet"

    def _write_repeatedly(self, copied: dict, good_step: int, ready, should_stop: Callable[[], bool]):
        step, give_up = copied["step"], time.monotonic() + FINAL_TIMEOUT
        for attempts in count(1):
            self._start_writing(copied, good_step, ready)
            if self.poll(wait=True, quiet=attempts > 1).error is None:
                return
            if attempts >= FINAL_ATTEMPTS and (should_stop() or time.monotonic() > give_up):
                raise RunFailed(
                    f"step {step} could not be saved in {attempts} attempts; {self._last_good(good_step)}: free space "
                    "or repair the disk, then continue with --resume auto"
                )
            if attempts == 1:
                seconds = f"{FINAL_RETRY_SECONDS:.0f} to {RETRY_SECONDS:.0f} s"
                logger.info(f"retrying for {FINAL_TIMEOUT / 60:.0f} minutes, every {seconds}")
            seconds, start = min(FINAL_RETRY_SECONDS * 2 ** (attempts - 1), RETRY_SECONDS), time.monotonic()
            while time.monotonic() < start + (min(seconds, FINAL_RETRY_SECONDS) if should_stop() else seconds):
                time.sleep(POLL_SECONDS)

    def rename_diverged(self, good_step: int) -> str:
        """Rename this run's checkpoints that are not good. Return which checkpoint is the last good one."""
        return self.ranks.from_first(lambda: self._rename_diverged(good_step))

    def _rename_diverged(self, good_step: int) -> str:
        self.poll(wait=True)
        for path in (path for step, path in self.written.items() if step > good_step):
            try:
                path.replace(path.with_name(path.name + ".diverged"))
                logger.warning(f"no good step followed {path}: renamed to {path.name}.diverged")
            except OSError as error:
                logger.warning(f"no good step followed {path}, but it cannot be renamed ({error.strerror})")
        return self._last_good(good_step)

    def close(self):
        """Wait for the write in progress, if any."""
        self._executor.shutdown()

    def _last_good(self, good_step: int) -> str:
        newest = max((step for step in self.written if step <= good_step), default=None)
        path = self.written.get(newest, self.resumed_from)
        return f"the last good checkpoint is {path}" if path else "there is no good checkpoint yet"

    def _copy(self, contents: dict) -> tuple[dict, torch.cuda.Event | None]:
        """Return the contents in CPU buffers, and the event after which the buffers are complete. A collective."""
        copied, ready = self._copy_value(contents, ()), None
        device = next(iter(contents["model"].values())).device
        if device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
        return copied, ready

    def _copy_value(self, value, key: tuple):
        """Return the value with all tensors copied to CPU buffers on rank 0. The next checkpoint reuses them."""
        if isinstance(value, Tensor):
            value = full_tensor(value.detach())
            if not self.ranks.is_first:
                return None
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[key] = buffer
            return buffer.copy_(value, non_blocking=True)
        if isinstance(value, dict):
            return {name: self._copy_value(item, (*key, name)) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy_value(item, (*key, index)) for index, item in enumerate(value))
        return value

    def _write(self, contents: dict, good_step: int, ready: torch.cuda.Event | None) -> SaveResult:
        path = checkpoint_path(self.directory, contents["step"])
        start, size, reason = time.perf_counter(), 0, None
        try:
            if ready:
                ready.synchronize()
            self.directory.mkdir(parents=True, exist_ok=True)  # the user may have moved it
            size = save_checkpoint(contents, path)
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
        return SaveResult(path, contents["step"], good_step, size, time.perf_counter() - start, reason)

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
                logger.warning(f"{path} could not be deleted ({error.strerror})")

    def _is_valid(self, path: Path) -> bool:
        if path not in self._valid:
            try:
                verify_archive(path)
            except InputError:
                return False
            self._valid.add(path)
        return True
