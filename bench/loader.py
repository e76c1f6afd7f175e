"""Tokens/s of the data loader with one reader thread, files cached.

python -m bench loader [--batch_size 32] [--rounds 5] [--output DIR]

Rows of loader.jsonl: provider, seq_len, batch_size; `rounds`, tokens/s of half a second each; their median
`tokens_per_second`, `tokens_per_second_p20` and `_p80`; group. Checked is as much of an epoch as there are full
batches: the error is the number of its sequences that are no chunk of a training row as numpy slices them, or came
before.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from acceleron.data import Loader, Shards
from acceleron.errors import InputError

from .results import Results
from .rounds import print_race, rates

VOCAB_SIZE = 50304
SHARDS, ROWS, ROW_LENGTH = 4, 1000, 2048
TRAINING_ROWS = 990  # of a shard; a hundredth is held out
SEQ_LENS = (2048, 1024, 256)


def wrong_sequences(directory: Path, seq_len: int, batch_size: int) -> int:
    """The check's error, of the loader of the directory's shards."""
    chunks = set()
    for path in sorted(directory.glob("*.npy")):
        rows = np.load(path)[:TRAINING_ROWS].astype(np.int64)
        chunks |= {row[i : i + seq_len].tobytes() for row in rows for i in range(0, ROW_LENGTH, seq_len)}
    loader = Loader(Shards(directory), seq_len=seq_len, batch_size=batch_size, vocab_size=VOCAB_SIZE, seed=0)
    wrong = 0
    for _ in range(max(1, len(chunks) // batch_size)):
        for sequence in next(loader).numpy():
            key = sequence.tobytes()
            wrong += key not in chunks
            chunks.discard(key)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round")
    parser.add_argument("--output", help="directory for loader.jsonl (default bench/results/<date>-<device>)")
    arguments = parser.parse_args()
    if not 1 <= arguments.batch_size <= SHARDS * TRAINING_ROWS:
        raise InputError(f"--batch_size {arguments.batch_size}: must be 1 to {SHARDS * TRAINING_ROWS}, an epoch's rows")
    if arguments.rounds < 1 or not 0 < arguments.seconds < 1e6:
        raise InputError("--rounds must be at least 1, and --seconds above 0")
    results, rows = Results(arguments.output, "loader", torch.device("cpu")), []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for shard in range(SHARDS):
            ids = np.random.default_rng(shard).integers(VOCAB_SIZE, size=(ROWS, ROW_LENGTH), dtype=np.int32)
            np.save(directory / f"shard_{shard:05d}.npy", ids)
        for seq_len in tqdm(SEQ_LENS, desc="sequence lengths", leave=False, disable=None):
            settings = dict(seq_len=seq_len, batch_size=arguments.batch_size, vocab_size=VOCAB_SIZE, seed=0)
            loader = Loader(Shards(directory), **settings)
            next(loader)
            seconds, per_round = [], arguments.batch_size * seq_len
            for _ in range(arguments.rounds):
                start, batches = time.perf_counter(), 0
                while not batches or time.perf_counter() - start < arguments.seconds:
                    next(loader)
                    batches += 1
                seconds.append((time.perf_counter() - start) / batches)
            row = {"provider": f"Loader, seq_len {seq_len}", "seq_len": seq_len, "batch_size": arguments.batch_size}
            row |= {"group": "loader"} | rates(seconds, per_round)
            row |= {
                "check": "sequences that are no chunk of the shards, or came twice",
                "check_error": wrong_sequences(directory, seq_len, arguments.batch_size),
                "check_allowed": 0,
            }
            results.write(row)
            rows.append(row)
    print_race(rows)


if __name__ == "__main__":
    main()
