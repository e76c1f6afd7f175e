"""Metrics of a run, written to metrics.jsonl, TensorBoard and the terminal."""

import errno
import json
import math
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig
from ..files import atomic_write
from ..log import say


def flops_per_token(config: ModelConfig, active_parameters: int, seq_len: int) -> int:
    """Forward and backward FLOPs: 6 · active matmul parameters + 6 · L · H·C · S for causal attention.

    The embedding counts once, as the output head. Recomputation does not count.
    """
    norms = (2 * config.num_layers + 1) * config.d_model
    return 6 * (active_parameters - norms) + 6 * config.num_layers * config.d_model * seq_len


def expert_health(tokens_per_expert_LE: Tensor) -> dict:
    """Return the smallest and largest share of a layer's assignments, the mean entropy, and the number of dead experts.

    Uniform routing has shares of 1/E and entropy 1 (normalized by log E). A dead expert received no tokens.
    """
    shares = tokens_per_expert_LE.double() / tokens_per_expert_LE.sum(dim=-1, keepdim=True).clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=-1) / torch.tensor(shares.shape[1]).log()
    return {
        "expert_least_share": shares.min().item(),
        "expert_most_share": shares.max().item(),
        "expert_entropy": entropy.mean().item(),
        "dead_experts": int((tokens_per_expert_LE == 0).sum()),
    }


class Metrics:
    """Appends records to metrics.jsonl, one JSON object per line, and to TensorBoard if it is installed.

    Drops the lines after `step`, because the resumed run writes them again. If the disk is
    full, a line is written later, together with the next one. Raises OSError if the directory is not writable.
    """

    def __init__(self, directory: Path, step: int):
        path = directory / "metrics.jsonl"
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                with atomic_write(path) as file:
                    file.writelines(kept)
        self._file = path.open("ab", buffering=0)
        self._unwritten: list[bytes] = []
        self._board: Board | None = None
        with suppress(ImportError):
            self._board = Board(directory / "tensorboard", step)

    @property
    def has_tensorboard(self) -> bool:
        return self._board is not None

    def write(self, record: dict):
        self._unwritten.append(json.dumps(record).encode() + b"\n")
        self.flush()
        try:
            if self._board:
                self._board.write(record)
        except OSError as error:
            self._board = None
            say(f"warning: {self._file.name}: cannot write TensorBoard files ({error}); continuing without them")

    def flush(self, to_disk: bool = False):
        """Write all pending lines. With `to_disk`, they survive a power failure."""
        try:
            end = self._file.seek(0, os.SEEK_END)
            try:
                lines = b"".join(self._unwritten)
                if self._file.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    self._file.truncate(end)  # no partial line
                raise
            self._unwritten.clear()
            if to_disk:
                os.fsync(self._file.fileno())
        except OSError as error:
            say(f"warning: {self._file.name}: {error.strerror}; the pending lines will be written later")

    def close(self):
        self.flush()
        self._file.close()
        if self._board:
            self._board.close()


class Board:
    """Writes records to a TensorBoard file. Steps after `step` in older files of the directory are hidden.

    torch's SummaryWriter writes in a thread, where a full disk ends in a traceback. Raises ImportError without
    tensorboard, and OSError for a failed write.
    """

    def __init__(self, directory: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.Event, self.Summary = Event, Summary
        directory.mkdir(exist_ok=True)
        path = directory / f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self.records = RecordWriter(path.open("wb", buffering=0))
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields):
        self.records.write(self.Event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, record: dict):
        values = {name: value for name, value in record.items() if name != "step" and value is not None}
        scalars = [self.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=record["step"], summary=self.Summary(value=scalars))

    def close(self):
        self.records.close()


def _step_of(line: bytes) -> float:
    """Return the line's step, or infinity for a damaged or partial line."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def format_line(record: dict, max_steps: int, seconds_left: float) -> str:
    """Format the record as a log line for the terminal."""

    def number(name: str, form: str) -> str:
        return "not finite" if record[name] is None else format(record[name], form)

    parts = [
        f"step {record['step']}/{max_steps}",
        f"loss {number('loss', '.4f')}",
        f"grad {number('grad_norm', '.2f')}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"MFU {record['mfu']:.1%}",
        f"data wait {record['data_wait']:.1%}",
        f"{record['memory_bytes'] / 2**30:.2f} GiB",
    ]
    if "expert_entropy" in record:
        shares = f"{record['expert_least_share']:.1%}..{record['expert_most_share']:.1%}"
        parts.insert(2, f"z {number('z_loss', '.3f')} balance {number('balance_loss', '.3f')}")
        parts.append(f"experts {shares} entropy {record['expert_entropy']:.3f} dead {record['dead_experts']}")
    if record["skipped_steps"]:
        parts.append(f"skipped {record['skipped_steps']} steps")
    if record["skipped_rows"]:
        parts.append(f"skipped {record['skipped_rows']} rows so far")
    if "val_loss" in record:
        bits = f" ({number('val_bits_per_byte', '.3f')} bits/byte)" if "val_bits_per_byte" in record else ""
        parts.append(f"val_loss {number('val_loss', '.4f')}{bits}")
    minutes, seconds = divmod(round(seconds_left), 60)
    parts.append(f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    return " | ".join(parts)
