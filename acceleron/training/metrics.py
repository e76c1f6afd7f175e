"""Metrics of a run, written to metrics.jsonl, TensorBoard and the terminal."""

import errno
import json
import logging
import math
import os
import platform
import time
from pathlib import Path

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from tqdm import tqdm

from ..config import ModelConfig
from ..files import atomic_write
from .options import TrainOptions

logger = logging.getLogger(__name__)


class Statistics:
    """Sums and times since the last log line. The tensors stay on the device until `read` is called.

    `steps` includes steps of the process that wrote the checkpoint; the times do not.
    """

    SAVED = ("losses", "micro_batches", "tokens_per_expert_LE", "grad_norm", "steps", "skipped_steps")

    def __init__(self, config: ModelConfig, device: torch.device):
        self.dense = config.dense
        self.losses = torch.zeros(3, dtype=torch.float64, device=device)  # cross-entropy, z-loss and balance loss
        self.micro_batches = torch.zeros((), dtype=torch.int64, device=device)  # with finite losses
        shape_LE = (config.num_layers - config.num_dense_layers, config.num_experts)
        self.tokens_per_expert_LE = torch.zeros(shape_LE, dtype=torch.int64, device=device)
        self.grad_norm = torch.zeros((), device=device)  # of the last step
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.steps = self.timed_steps = 0
        self.start = time.perf_counter()
        self.data_wait = self.save_wait = 0.0  # seconds

    def add(self, losses: Tensor, tokens_per_expert_LE: Tensor, micro_batches: int, grad_norm: Tensor, skipped: Tensor):
        """Add a step: the sums of its micro-batches. Non-finite losses are left out of the means."""
        finite = losses.isfinite().all()
        self.losses += torch.where(finite, losses, 0.0)
        self.micro_batches += finite * micro_batches
        self.tokens_per_expert_LE += tokens_per_expert_LE
        self.grad_norm = grad_norm
        self.skipped_steps += skipped
        self.steps += 1
        self.timed_steps += 1

    def read(self, tokens_per_step: int) -> dict:
        """Return the mean losses, the expert load and the speed. Synchronizes with the device.

        The losses are None if no step had a finite loss.
        """
        seconds = time.perf_counter() - self.start
        means = (self.losses / self.micro_batches).tolist() if self.micro_batches else [None] * 3
        record = dict(zip(("loss", "z_loss", "balance_loss"), means, strict=True))
        norm = self.grad_norm.item()
        record["grad_norm"] = norm if math.isfinite(norm) else None
        if not self.dense:
            record |= expert_health(self.tokens_per_expert_LE.cpu())
        record["tokens_per_second"] = self.timed_steps * tokens_per_step / (seconds - self.save_wait)
        record |= {"data_wait": self.data_wait / seconds, "save_wait": self.save_wait / seconds}
        return record | {"skipped_steps": self.skipped_steps.item()}


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
    """Appends records to metrics.jsonl, one JSON object per line, and to a TensorBoard file.

    Drops the lines after `step`, and hides these steps in older TensorBoard files, because the resumed run writes them
    again. If the disk is full, a line is written later, together with the next one. Raises OSError if the directory is
    not writable.
    """

    def __init__(self, directory: Path, step: int):
        path, board = directory / "metrics.jsonl", directory / "tensorboard"
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                with atomic_write(path) as file:
                    file.writelines(kept)
        self._file = path.open("ab", buffering=0)
        self._unwritten: list[bytes] = []
        board.mkdir(exist_ok=True)
        events = board / f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        # torch's SummaryWriter writes in a thread, where a full disk ends in a traceback.
        self._board: RecordWriter | None = RecordWriter(events.open("wb", buffering=0))
        self._write_event(file_version="brain.Event:2")
        self._write_event(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write_event(self, **fields):
        self._board.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, record: dict):
        self._unwritten.append(json.dumps(record).encode() + b"\n")
        self.flush()
        values = {name: value for name, value in record.items() if name != "step" and value is not None}
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        try:
            if self._board:
                self._write_event(step=record["step"], summary=summary)
        except OSError as error:
            self._board = None
            logger.warning(f"{self._file.name}: cannot write TensorBoard files ({error}); continuing without them")

    def flush(self, to_disk: bool = False):
        """Write all pending lines. With `to_disk`, they survive a power failure."""
        try:
            end, lines = self._file.seek(0, os.SEEK_END), b"".join(self._unwritten)
            if self._file.write(lines) < len(lines):
                self._file.truncate(end)  # no partial line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten.clear()
            if to_disk:
                os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning(f"{self._file.name}: {error.strerror}; the pending lines will be written later")

    def close(self):
        self.flush()
        self._file.close()
        if self._board:
            self._board.close()


def _step_of(line: bytes) -> float:
    """Return the line's step, or infinity for a damaged or partial line."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def format_line(record: dict, options: TrainOptions, tokens_per_step: int) -> str:
    """Format the record as a log line for the terminal."""

    def number(name: str, form: str) -> str:
        return "not finite" if record[name] is None else format(record[name], form)

    parts = [
        f"step {record['step']}/{options.max_steps}",
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
        parts.append(f"skipped steps: {record['skipped_steps']}")
    if record["skipped_rows"]:
        parts.append(f"skipped rows so far: {record['skipped_rows']}")
    if "val_loss" in record:
        bits = f" ({number('val_bits_per_byte', '.3f')} bits/byte)" if "val_bits_per_byte" in record else ""
        parts.append(f"val_loss {number('val_loss', '.4f')}{bits}")
    speed = record["tokens_per_second"] * (1 - record["save_wait"])
    if speed > 0:  # a resumed run can write its first line before its first step
        seconds = (options.max_steps - record["step"]) * tokens_per_step / speed
        parts.append(f"ETA {tqdm.format_interval(seconds)}")
    return " | ".join(parts)
