"""Shards that count up: each token's id is its position in the data, so that an id says where it is from."""

import numpy as np
import torch

from acceleron.data import Loader, Shards, validation_loader

ROW_LENGTH = 16
# Unequal shards, one of a single row, which can spare none. 1% of the others' rows, rounded up, validates: 2, 0, 3, 1.
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
    """(training rows, validation rows), from the constants above alone."""
    blocks = np.split(np.arange(VOCAB_SIZE).reshape(-1, ROW_LENGTH), np.cumsum(ROWS)[:-1])
    cuts = [len(block) - held for block, held in zip(blocks, HELD_OUT, strict=True)]
    training = np.concatenate([block[:cut] for block, cut in zip(blocks, cuts, strict=True)])
    return training, np.concatenate([block[cut:] for block, cut in zip(blocks, cuts, strict=True)])


def as_set(chunks):
    return {tuple(chunk) for chunk in np.asarray(chunks).tolist()}


def shards_of(chunks):
    """The shard that each chunk is from."""
    return np.searchsorted(np.cumsum(ROWS) * ROW_LENGTH, np.asarray(chunks)[..., 0], side="right")


def make_validation(shards, **changes):
    settings = {"seq_len": ROW_LENGTH // 4, "batch_size": 5, "vocab_size": VOCAB_SIZE} | changes
    return validation_loader(shards, **settings)


def held_out_order(seq_len):
    """The held-out chunks as validation takes them, computed without the loader."""
    chunks = all_rows()[1].reshape(-1, seq_len)
    return torch.from_numpy(chunks[np.random.default_rng([0, 0]).permutation(len(chunks))])
