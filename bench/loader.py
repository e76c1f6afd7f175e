"""Tokens/s of the data loader with one reader thread and cached files.

The check reads the full batches of one epoch. The error is the number of sequences that repeat an earlier one or are
not a chunk of a training row, sliced with numpy. The exit status is 1 unless it is 0.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch.utils.benchmark import Timer

from acceleron.data import Loader, Shards

from .command import parse, run_entries
from .rows import Results, Row, progress

VOCAB_SIZE = 50304
SHARDS, ROWS, ROW_LENGTH = 4, 1000, 2048
BATCH_SIZE, SEQ_LENS = 32, (2048, 256)


def wrong_sequences(loader: Loader, directory: Path, seq_len: int) -> int:
    """Count the sequences in an epoch that are wrong or repeated."""
    train_rows = ROWS * 99 // 100  # the rest is held out
    rows = np.concatenate([np.load(path)[:train_rows] for path in directory.glob("*.npy")])
    chunks = {chunk.tobytes() for chunk in rows.astype(np.int64).reshape(-1, seq_len)}
    found = [row.tobytes() for _ in range(len(chunks) // BATCH_SIZE) for row in next(loader).numpy()]
    return len(found) - len(chunks.intersection(found))


def entry(directory: Path, seq_len: int) -> Iterator:
    """Yield an entry for `run_entries`."""
    case = {"seq_len": seq_len, "batch_size": BATCH_SIZE}
    row = Row("loader", f"Loader, seq_len {seq_len}", case, "tokens/s", group=f"loader, {seq_len}")
    yield row
    timed, checked = (Loader(Shards(directory), **case, vocab_size=VOCAB_SIZE, seed=0) for _ in range(2))
    timer = Timer("next(loader)", globals={"loader": timed})
    yield lambda: BATCH_SIZE * seq_len / timer.blocked_autorange(min_run_time=0.5).mean
    row.check, row.allowed = "sequences that are wrong or repeated", 0
    row.error = wrong_sequences(checked, directory, seq_len)


def main():
    arguments = parse(__doc__, {"device": ("cpu",)}, device="cpu", rounds=5)
    results = Results(arguments.output, arguments.device)
    with tempfile.TemporaryDirectory() as name:
        for shard in progress(range(SHARDS), "shards"):
            ids = np.random.default_rng(shard).integers(VOCAB_SIZE, size=(ROWS, ROW_LENGTH), dtype=np.int32)
            np.save(f"{name}/shard_{shard:05d}.npy", ids)
        entries = [entry(Path(name), seq_len) for seq_len in SEQ_LENS]
        run_entries(entries, arguments.rounds, results, ours=len(entries))
