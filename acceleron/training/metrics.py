"""Where a run's figures go: metrics.jsonl, TensorBoard, and a line in the terminal."""

import errno
import json
import math
import os
import threading
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig
from ..files import replacing
from ..log import say


def flops_per_token(config: ModelConfig, active_parameters: int, seq_len: int) -> int:
    """Of forward and backward: 6 · active matmul parameters + 6 · L · H·C · S, the causal half of attention.

    The embedding counts once, as the head. Recomputation does not count.
    """
    norms = (2 * config.num_layers + 1) * config.d_model
    return 6 * (active_parameters - norms) + 6 * config.num_layers * config.d_model * seq_len


def expert_health(tokens_per_expert_LE: Tensor) -> dict:
    """Of the assignments since the last log line: shares are of one layer's assignments, over all layers.

    Uniform routing has every share 1/E and entropy 1 (it is divided by log E). A dead expert got no token.
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
    """Appends one JSON object a line to metrics.jsonl, and the same to TensorBoard where it is installed.

    Lines of steps after `step`, from which the run now goes on, are dropped: they will come again. A line that can't be
    written, as the disk is full, is written with the next one. Raises OSError if the directory can't be written.
    """

    def __init__(self, directory: Path, step: int):
        path = directory / "metrics.jsonl"
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                with replacing(path) as file:
                    file.writelines(kept)
        self._file = path.open("ab", buffering=0)
        self._unwritten: list[bytes] = []
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        except ImportError:
            self._board = None
        self._hook, threading.excepthook = threading.excepthook, self._quietly

    @property
    def has_tensorboard(self) -> bool:
        return self._board is not None

    def write(self, record: dict):
        self._unwritten.append(json.dumps(record).encode() + b"\n")
        self.flush()
        try:
            if self._board:
                for name, value in record.items():
                    if name != "step" and value is not None:
                        self._board.add_scalar(name, value, record["step"])
        except OSError as error:
            self._board = None
            say(f"warning: {self._file.name}: TensorBoard's files can't be written ({error}), and are given up")

    def flush(self, to_disk: bool = False):
        """Write what could not be written before; with `to_disk` so that it outlives a power cut."""
        try:
            whole = self._file.seek(0, os.SEEK_END)
            try:
                lines = b"".join(self._unwritten)
                if self._file.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    self._file.truncate(whole)  # no half a line
                raise
            self._unwritten.clear()
            if to_disk:
                os.fsync(self._file.fileno())
        except OSError as error:
            say(f"warning: {self._file.name}: {error.strerror}; its lines will be written once that is possible")

    def _quietly(self, failure):
        """TensorBoard writes in a thread of its own; `write` hears of what fails there, and says so."""
        if not isinstance(failure.exc_value, OSError):
            self._hook(failure)

    def close(self):
        self.flush()
        self._file.close()
        if self._board:
            with suppress(OSError):
                self._board.close()
        threading.excepthook = self._hook


def _step_of(line: bytes) -> float:
    """Infinite for a line that is none, such as half of one."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def describe(record: dict, max_steps: int, seconds_left: float) -> str:
    """The record as a line for the terminal."""

    def number(name: str, form: str) -> str:
        return "none finite" if record[name] is None else format(record[name], form)

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
