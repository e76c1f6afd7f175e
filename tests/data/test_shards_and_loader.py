"""Every training chunk is read exactly once an epoch, and a resumed run goes on with the very next batch.

The shards of these tests count up: each token's id is its position in the data, so that an id says where it is from.
"""

import json
import pickle
import time
from itertools import islice

import numpy as np
import pytest
import torch

from acceleron.data import Loader, Shards, validation_batches
from acceleron.errors import InputError

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


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def make_loader(shards, **changes):
    settings = {"seq_len": ROW_LENGTH, "batch_size": 5, "vocab_size": VOCAB_SIZE, "seed": 1} | changes
    return Loader(shards, **settings)


def all_rows():
    """(training rows, validation rows), told from the constants above alone."""
    blocks = np.split(np.arange(VOCAB_SIZE).reshape(-1, ROW_LENGTH), np.cumsum(ROWS)[:-1])
    cuts = [len(block) - held for block, held in zip(blocks, HELD_OUT, strict=True)]
    training = np.concatenate([block[:cut] for block, cut in zip(blocks, cuts, strict=True)])
    return training, np.concatenate([block[cut:] for block, cut in zip(blocks, cuts, strict=True)])


def as_set(chunks):
    return {tuple(chunk) for chunk in np.asarray(chunks).tolist()}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seq_len", [ROW_LENGTH, ROW_LENGTH // 4])
def test_an_epoch_delivers_every_training_chunk_exactly_once(shards, seq_len, world_size, num_workers):
    expected = all_rows()[0].reshape(-1, seq_len)
    size = len(expected)
    # 337 rows and batches of 5: on one to three ranks, batches straddle the epochs' boundary.
    steps = -(-2 * size // (5 * world_size))
    ranks = [
        islice(make_loader(shards, seq_len=seq_len, num_workers=num_workers, rank=rank, world_size=world_size), steps)
        for rank in range(world_size)
    ]
    delivered = np.concatenate([batch for step in zip(*ranks, strict=True) for batch in step])
    first, second = delivered[:size], delivered[size : 2 * size]
    assert as_set(first) == as_set(second) == as_set(expected)  # as many chunks as expected, so none came twice
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, expected)


def test_the_seed_fixes_the_order(shards):
    def epoch(seed):
        return np.concatenate(list(islice(make_loader(shards, seed=seed), 60)))

    assert np.array_equal(epoch(1), epoch(1))
    assert not np.array_equal(epoch(1), epoch(2))


@pytest.mark.parametrize("seq_len", [ROW_LENGTH, ROW_LENGTH // 4])
def test_validation_is_the_rows_that_training_leaves_out(shards, seq_len):
    batches = list(validation_batches(shards, seq_len=seq_len, batch_size=2, vocab_size=VOCAB_SIZE))
    assert as_set(np.concatenate(batches)) == as_set(all_rows()[1].reshape(-1, seq_len))
    again = list(validation_batches(shards, seq_len=seq_len, batch_size=2, vocab_size=VOCAB_SIZE))
    assert all(map(torch.equal, batches, again))


def test_validation_smaller_than_a_batch_is_one_small_batch(shards):
    (batch,) = validation_batches(shards, seq_len=ROW_LENGTH, batch_size=64, vocab_size=VOCAB_SIZE)
    assert as_set(batch) == as_set(all_rows()[1])


def test_shards_of_one_row_each_still_leave_one_to_validate(tmp_path):
    shards = write_shards(tmp_path, rows=(1, 1))
    (held_out,) = validation_batches(shards, seq_len=ROW_LENGTH, batch_size=1, vocab_size=VOCAB_SIZE)
    batch = next(make_loader(shards, batch_size=2))  # two epochs in a batch
    assert as_set(batch) == {tuple(range(ROW_LENGTH))}
    assert as_set(held_out) == {tuple(range(ROW_LENGTH, 2 * ROW_LENGTH))}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_continues_with_the_next_batch(shards, num_workers):
    loader = make_loader(shards, num_workers=num_workers)
    for _ in range(70):  # into the second epoch; the workers have read batches beyond it by now
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))  # plain values, as a checkpoint holds them
    expected = list(islice(loader, 3))

    resumed = make_loader(shards, num_workers=num_workers)
    next(resumed)  # what was read before makes no difference
    resumed.load_state_dict(state)
    assert resumed.epoch == 350 / 337
    for batch in expected:
        assert torch.equal(next(resumed), batch)


def test_resuming_on_other_ranks_and_batch_sizes_repeats_and_skips_nothing(shards):
    ranks = [make_loader(shards, batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    seen = [batch for rank in ranks for batch in islice(rank, 30)]  # 180 of 337 chunks
    assert ranks[0].state_dict() == ranks[1].state_dict()
    alone = make_loader(shards, batch_size=157)
    alone.load_state_dict(ranks[0].state_dict())
    seen.append(next(alone))
    assert as_set(np.concatenate(seen)) == as_set(all_rows()[0])


def test_resuming_refuses_what_would_change_the_meaning_of_a_position(shards, tmp_path):
    state = make_loader(shards).state_dict()
    fewer_rows = write_shards(tmp_path / "rows", (130, 1, 205, 6))
    longer_rows = write_shards(tmp_path / "length", row_length=2 * ROW_LENGTH)
    for loader, complaint in (
        (make_loader(shards, seed=2), "seed 1, not 2"),
        (make_loader(shards, seq_len=4), "seq_len 16, not 4"),
        (make_loader(fewer_rows), "other shards"),
        (make_loader(longer_rows), "other shards"),
    ):
        with pytest.raises(InputError, match=complaint):
            loader.load_state_dict(state)


def test_pickled_shards_carry_no_data(tmp_path):
    """A spawned worker gets the paths, not a copy of gigabytes of tokens."""
    shards = write_shards(tmp_path, rows=(5000,))
    shards.array(0)[:].sum()
    pickled = pickle.dumps(shards)
    assert len(pickled) < 5000  # of 320,000 bytes of tokens
    assert np.array_equal(pickle.loads(pickled).array(0), shards.array(0))


def test_one_process_reads_20_million_tokens_a_second(tmp_path, record_property):
    """Mapped int32 shards to checked int64 batches of 32 × 2048, in the page cache, the best of five trials."""
    shards = write_shards(tmp_path, rows=(200,) * 4, row_length=2048)
    loader = make_loader(shards, seq_len=2048, batch_size=32, vocab_size=800 * 2048)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        tokens = sum(batch.numel() for batch in islice(loader, 30))
        best = max(best, tokens / (time.perf_counter() - start))
    record_property("tokens_per_second", best)
    print(f"{best / 1e6:.0f}M tokens/s")
    assert best >= 20e6
