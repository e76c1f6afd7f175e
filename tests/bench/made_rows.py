"""Rows of results as the commands write them, with figures of the tests' choice."""

import json
import statistics
from pathlib import Path

ABOUT = {
    "command": "python -m bench throughput --size tiny", "date": "2026-11-22T10:00:00+00:00", "commit": "abc1234",
    "device": "Some GPU 80GB", "versions": "python 3.12.0, torch 2.11.0",
    "check": "gradients against float64", "check_error": 0.001, "check_allowed": 0.002,
}  # fmt: skip


def rates(rounds: list[float]) -> dict:
    middle = statistics.median(rounds)
    low, high = sorted(rounds)[len(rounds) // 5], sorted(rounds)[-1 - len(rounds) // 5]
    return {
        "rounds": rounds, "tokens_per_second": middle, "tokens_per_second_p20": low, "tokens_per_second_p80": high,
    }  # fmt: skip


def throughput(rounds: list[float], model: str = "moe", **fields) -> dict:
    row = {
        "size": "tiny", "model": model, "kernels": "triton", "compiled": True, "checkpointing": False, "batch_size": 32,
        "grad_accum": 1, "seq_len": 2048, "dtype": "bf16", "routing": "learned" if model == "moe" else None,
        "group": "compiled", **rates(rounds), "mfu": 0.437, "peak_memory_bytes": 12 * 2**30,
    }  # fmt: skip
    return ABOUT | row | fields


def quality(model: str, seed: int, val_loss: float, **fields) -> dict:
    curve = [[1000, 10.0, val_loss + 1], [2000, 20.0, val_loss]]
    row = {
        "size": "nano", "model": model, "seed": seed, "lr": 3e-3, "purpose": "final", "tokens": 2000, "dtype": "fp32",
        "val_loss": val_loss, "seconds": 20.0, "tokens_per_second": 100.0, "curve": curve, "tuning": "three rates each",
    }  # fmt: skip
    return ABOUT | row | fields


def op(provider: str, seconds: float, **fields) -> dict:
    row = {
        "op": "expert_mlp", "shape": "tiny", "sizes": {"T": 65536, "D": 512}, "pass": "forward", "provider": provider,
        "dtype": "bf16", "seconds": seconds, "seconds_p20": 0.99 * seconds, "seconds_p80": 1.01 * seconds,
        "samples": 50, "flops": 1e12, "bytes": 1e9, "rate": 1e12 / seconds, "bound": "compute",
        "share_of_ceiling": 0.5, "ceiling_flops": 8e14, "ceiling_bytes": 3e12,
    }  # fmt: skip
    return ABOUT | row | fields


def kernel(**fields) -> dict:
    row = {
        "op": "rope", "shape": "small", "sizes": {"T": 8}, "pass": "forward", "provider": "triton", "dtype": "fp16",
        "checked_only": True,
    }  # fmt: skip
    return ABOUT | row | fields


def memory(size_in_bytes: int, **fields) -> dict:
    row = {
        "what": "saved", "size": "tiny", "part": "moe layer", "provider": "MoE triton", "model": "moe",
        "kernels": "triton", "tokens": 65536, "dtype": "bf16", "checkpointing": False, "compiled": False,
        "bytes": size_in_bytes, "bytes_per_token_per_layer": size_in_bytes / 65536,
        "formula_bytes": size_in_bytes // 2,
    }  # fmt: skip
    return ABOUT | row | fields


def race(provider: str, rounds: list[float], **fields) -> dict:
    return ABOUT | {"provider": provider, "size": "tiny", "dtype": "bf16", "group": "all", **rates(rounds)} | fields


def checkpoints(ratios: list[float], **fields) -> dict:
    middle, (low, *_, high) = statistics.median(ratios), sorted(ratios)
    row = {
        "size": "nano", "dtype": "bf16", "compiled": True, "batch_size": 8, "seq_len": 512, "interval": 100,
        "rounds": ratios, "ratio": middle, "ratio_p20": low, "ratio_p80": high, "interval_seconds": 31.7,
        "blocked_seconds": 0.0123, "write_seconds": 0.456, "bytes": 25 * 2**20,
    }  # fmt: skip
    return ABOUT | row | fields


def write(directory: Path, **files: list[dict]) -> Path:
    """A results directory with a file for each keyword."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
