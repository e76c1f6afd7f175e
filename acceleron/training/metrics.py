"""Where a run's figures go: metrics.jsonl, TensorBoard, and a line in the terminal."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig


def flops_per_token(config: ModelConfig, active_parameters: int, seq_len: int) -> int:
    """Of forward and backward: 6 · active matmul parameters + 6 · L · H·C · S, the causal half of attention.

    The embedding counts once, as the head. Recomputation does not count.
    """
    norms = (2 * config.num_layers + 1) * config.d_model
    return 6 * (active_parameters - norms) + 6 * config.num_layers * config.d_model * seq_len


def expert_health(counts_LE: Tensor) -> dict:
    """Of the assignments since the last log line: shares are of one layer's assignments, over all layers.

    Uniform routing has every share 1/E and entropy 1 (it is divided by log E). A dead expert got no token.
    """
    shares = counts_LE.double() / counts_LE.sum(dim=-1, keepdim=True).clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=-1) / torch.tensor(shares.shape[1]).log()
    return {
        "expert_least_share": shares.min().item(),
        "expert_most_share": shares.max().item(),
        "expert_entropy": entropy.mean().item(),
        "dead_experts": int((counts_LE == 0).sum()),
    }


class Metrics:
    """Appends one JSON object a line to metrics.jsonl, and the same to TensorBoard where it is installed."""

    def __init__(self, directory: Path):
        self._file = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"))
        except ImportError:
            self._board = None

    @property
    def has_tensorboard(self) -> bool:
        return self._board is not None

    def write(self, record: dict):
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def close(self):
        self._file.close()
        if self._board:
            self._board.close()


def describe(record: dict, max_steps: int, seconds_left: float) -> str:
    """The record as a line for the terminal."""
    parts = [
        f"step {record['step']}/{max_steps}",
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.2f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"MFU {record['mfu']:.1%}",
        f"{record['memory_bytes'] / 2**30:.2f} GiB",
    ]
    if "expert_entropy" in record:
        shares = f"{record['expert_least_share']:.1%}..{record['expert_most_share']:.1%}"
        parts.insert(2, f"z {record['z_loss']:.3f} balance {record['balance_loss']:.3f}")
        parts.append(f"experts {shares} entropy {record['expert_entropy']:.3f} dead {record['dead_experts']}")
    if "val_loss" in record:
        bits = f" ({record['val_bits_per_byte']:.3f} bits/byte)" if "val_bits_per_byte" in record else ""
        parts.append(f"val_loss {record['val_loss']:.4f}{bits}")
    minutes, seconds = divmod(round(seconds_left), 60)
    parts.append(f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    return " | ".join(parts)
