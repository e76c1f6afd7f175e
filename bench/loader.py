"""Tokens/s of the data loader from one process, files cached: python -m bench.loader [--seq_len 2048]."""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from acceleron.data import Loader, Shards

from .timing import print_machine

VOCAB_SIZE = 50304


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=32)
    arguments = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as directory:
        for shard in range(4):
            ids = np.random.default_rng(shard).integers(VOCAB_SIZE, size=(1000, 2048), dtype=np.int32)
            np.save(Path(directory) / f"shard_{shard:05d}.npy", ids)
        for seq_len in (2048, 1024, 256):
            settings = dict(seq_len=seq_len, batch_size=arguments.batch_size, vocab_size=VOCAB_SIZE, seed=0)
            loader = Loader(Shards(directory), **settings)
            rates = []
            for _ in range(5):
                start, tokens = time.perf_counter(), 0
                while time.perf_counter() - start < 0.5:
                    tokens += next(loader).numel()
                rates.append(tokens / (time.perf_counter() - start) / 1e6)
            rates.sort()
            print(f"seq_len {seq_len:4}: {rates[2]:.0f} ({rates[0]:.0f} .. {rates[-1]:.0f}) million tokens/s")


if __name__ == "__main__":
    main()
