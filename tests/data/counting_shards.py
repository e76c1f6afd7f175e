"""Shards where each token id equals its position in the data, so an id identifies its origin."""

import numpy as np
import torch

from acceleron.data import Loader, Shards

ROW_LENGTH = 16
# Unequal shards. The single-row shard holds out nothing; the others hold out 1% of their rows, rounded up.
ROWS = (130, 1, 205, 7)
HELD_OUT = (2, 0, 3, 1)
VOCAB_SIZE = sum(ROWS) * ROW_LENGTH


def write_shards(directory, rows=ROWS, row_length=ROW_LENGTH):
    directory.mkdir(exist_ok=True)
    ids = np.arange(sum(rows) * row_length, dtype=np.int32).reshape(-1, row_length)
    for index, shard in enumerate(np.split(ids, np.cumsum(rows)[:-1])):
        np.save(directory / f"shard_{index:05d}.npy", shard)
    return Shards(directory)


def make_loader(shards, **changes):
    settings = {"seq_len": ROW_LENGTH, "batch_size": 5, "vocab_size": VOCAB_SIZE, "seed": 1} | changes
    return Loader(shards, **settings)


def all_rows():
    """Return (training rows, validation rows), computed only from the constants above."""
    blocks = np.split(np.arange(VOCAB_SIZE).reshape(-1, ROW_LENGTH), np.cumsum(ROWS)[:-1])
    cuts = [len(block) - held for block, held in zip(blocks, HELD_OUT, strict=True)]
    training = np.concatenate([block[:cut] for block, cut in zip(blocks, cuts, strict=True)])
    return training, np.concatenate([block[cut:] for block, cut in zip(blocks, cuts, strict=True)])


def as_set(chunks):
    return {tuple(chunk) for chunk in np.asarray(chunks).tolist()}


def shards_of(chunks):
    """Return the shard index of each chunk."""
    return np.searchsorted(np.cumsum(ROWS) * ROW_LENGTH, np.asarray(chunks)[..., 0], side="right")


def make_validation(shards, **changes):
    """Return the loader of the held-out split and its number of batches."""
    loader = make_loader(shards, **{"seq_len": ROW_LENGTH // 4} | changes).held_out()
    return loader, loader.end // loader.batch_size


def held_out_order(seq_len):
    """Return the held-out chunks in validation order, computed without the loader."""
    chunks = all_rows()[1].reshape(-1, seq_len)
    return torch.from_numpy(chunks[np.random.default_rng([0, 0]).permutation(len(chunks))])
