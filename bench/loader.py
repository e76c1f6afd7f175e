"""Tokens/s of the data loader with one reader thread, files cached.

Checked is as much of an epoch as there are full batches: the error is the number of its sequences that are no chunk of
a training row as numpy slices it, or came before. The exit status is 1 if there are any.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer

from acceleron.data import Loader, Shards
from acceleron.errors import InputError

from .command import compete, parse
from .rows import Results, Row, progress

VOCAB_SIZE = 50304
SHARDS, ROWS, ROW_LENGTH = 4, 1000, 2048
TRAINING_ROWS = 990  # of a shard; a hundredth is held out
SEQ_LENS = (2048, 1024, 256)


def make_loader(directory: Path, seq_len: int, batch_size: int) -> Loader:
    return Loader(Shards(directory), seq_len=seq_len, batch_size=batch_size, vocab_size=VOCAB_SIZE, seed=0)


def wrong_sequences(directory: Path, seq_len: int, batch_size: int) -> int:
    """The check's error."""
    chunks = set()
    for path in directory.glob("*.npy"):
        rows = np.load(path)[:TRAINING_ROWS].astype(np.int64)
        chunks |= {chunk.tobytes() for chunk in rows.reshape(-1, seq_len)}
    loader, wrong = make_loader(directory, seq_len, batch_size), 0
    for _ in range(max(1, len(chunks) // batch_size)):
        for sequence in next(loader).numpy():
            wrong += sequence.tobytes() not in chunks
            chunks.discard(sequence.tobytes())
    return wrong


def entry(directory: Path, seq_len: int, batch_size: int, seconds: float) -> Iterator:
    case = {"seq_len": seq_len, "batch_size": batch_size}
    row = Row("loader", f"Loader, seq_len {seq_len}", case, "tokens/s", group=f"loader, {seq_len}")

    yield row
    timer = Timer("next(loader)", globals={"loader": make_loader(directory, seq_len, batch_size)})
    yield lambda: batch_size * seq_len / timer.blocked_autorange(min_run_time=seconds).mean
    row.check, row.allowed = "sequences that are no chunk of the shards, or came before", 0
    row.error = wrong_sequences(directory, seq_len, batch_size)


def main():
    arguments = parse(__doc__, batch_size=32, rounds=5, seconds=0.5)
    results, most = Results(arguments.output, torch.device("cpu")), SHARDS * TRAINING_ROWS
    if arguments.batch_size > most:
        raise InputError(f"--batch_size {arguments.batch_size}: expected at most {most}, the rows of an epoch")
    with tempfile.TemporaryDirectory() as name:
        for shard in progress(range(SHARDS), "shards"):
            ids = np.random.default_rng(shard).integers(VOCAB_SIZE, size=(ROWS, ROW_LENGTH), dtype=np.int32)
            np.save(f"{name}/shard_{shard:05d}.npy", ids)
        entries = [entry(Path(name), seq_len, arguments.batch_size, arguments.seconds) for seq_len in SEQ_LENS]
        compete(entries, arguments.rounds, results, ours=len(entries))
