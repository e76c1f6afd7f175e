"""Batch shapes of the training benchmarks."""

import argparse

from acceleron.data.shards import ROW_LENGTH
from acceleron.errors import InputError

NANO_VOCAB = 2048
SEQ_LEN = 2048
# Sequences per micro-batch on a GPU: 128, or as many as fit on an H100 (see `python -m bench roofline`). The limit is
# 70 of 79 GiB, for a contender's peak and the idle contender's state (12 bytes per parameter, 22 GiB for large's MoE).
# The peaks are 63, 60, 47 and 66 GiB from tiny to large; 128 sequences of small would take 113, 32 of medium 77, 16 of
# large 73.
MICRO_BATCH = {"nano": 128, "tiny": 128, "small": 64, "medium": 16, "large": 12}
STEP_SEQUENCES = 128  # per optimizer step on a GPU: 262,144 tokens, as in the predecessor's command
CPU_BATCH, CPU_SEQ_LEN = {"nano": 8, "tiny": 4, "small": 2, "medium": 1, "large": 1}, 512


def batch_shape(size: str, on_gpu: bool, arguments: argparse.Namespace) -> tuple[int, int, int]:
    """Return (batch_size, grad_accum, seq_len) from the flags, with defaults by size and device.

    Raises InputError for an invalid flag.
    """
    for name in ("batch_size", "grad_accum", "seq_len"):
        value = getattr(arguments, name)
        if value is not None and (value < 1 or (name == "seq_len" and (value < 2 or ROW_LENGTH % value))):
            expected = f"a divisor of {ROW_LENGTH} above 1" if name == "seq_len" else "at least 1"
            raise InputError(f"--{name} {value}: expected {expected}")
    batch_size = arguments.batch_size or (MICRO_BATCH if on_gpu else CPU_BATCH)[size]
    grad_accum = arguments.grad_accum or (max(1, STEP_SEQUENCES // batch_size) if on_gpu else 1)
    return batch_size, grad_accum, arguments.seq_len or (SEQ_LEN if on_gpu else CPU_SEQ_LEN)
