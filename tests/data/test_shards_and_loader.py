"""Every training chunk is read exactly once an epoch, and a resumed run goes on with the very next batch."""

import json
import os
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from counting_shards import ROW_LENGTH, ROWS, VOCAB_SIZE, all_rows, as_set, make_loader, write_shards

from acceleron.data import Shards, validation_batches
from acceleron.data.loader import Chunks
from acceleron.errors import InputError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("num_workers", [1, 3])
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


@pytest.mark.parametrize("num_workers", [1, 3])
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
    more_shards = write_shards(tmp_path / "more", (*ROWS, 7))
    fewer_shards = write_shards(tmp_path / "fewer", ROWS[:3])
    other_start = write_shards(tmp_path / "start", (131, *ROWS[1:]))  # every shard but the first begins a row later
    for loader, complaint in (
        (make_loader(shards, seed=2), "seed 1, not 2"),
        (make_loader(shards, seq_len=4), "seq_len 16, not 4"),
        (make_loader(fewer_rows), "other shards: shard_00003.npy has 6 rows of 16, and had 7 of 16;"),
        (make_loader(longer_rows), "other shards: shard_00000.npy has 130 rows of 32, .* shard_00001.*; and 2 more;"),
        (make_loader(more_shards), "other shards: shard_00004.npy is new;"),
        (make_loader(fewer_shards), "other shards: shard_00003.npy is missing;"),
        (
            make_loader(other_start),
            "shard_00000.npy has 131 rows of 16, .*; shard_00001.npy has other content; and 2 more;",
        ),
    ):
        with pytest.raises(InputError, match=complaint):
            loader.load_state_dict(state)
        assert (loader.position, loader.skipped_rows) == (0, 0)


@pytest.mark.parametrize(
    "damage",
    [
        {"position": -5},
        {"position": 2**62},
        {"position": 5.0},
        {"position": True},
        {"position": None},
        {"skipped_rows": -1},
        {"skipped_rows": "1"},
        {"seed": [1]},
        {"seq_len": 2**5000},
        {"shards": None},
        {"shards": [["shard_00000.npy", 130, 16]]},
    ],
)
def test_a_damaged_state_is_refused(shards, damage):
    loader = make_loader(shards)
    with pytest.raises(InputError, match="damaged"):
        loader.load_state_dict(loader.state_dict() | damage)
    with pytest.raises(InputError, match="damaged"):
        loader.load_state_dict([damage])


def test_the_fingerprint_tells_other_data_of_the_same_shape(shards, tmp_path):
    for entry, path, rows in zip(shards.fingerprint(), shards.paths, ROWS, strict=True):
        array = np.load(path)
        three = b"".join(array[row].tobytes() for row in (0, rows // 2, rows - 1))
        assert entry == [path.name, rows, ROW_LENGTH, zlib.crc32(three)]
    assert json.loads(json.dumps(shards.fingerprint())) == shards.fingerprint()
    for row in (0, 102, 204):
        write_shards(tmp_path)
        array = np.load(tmp_path / "shard_00002.npy")
        array[row, 3] += 1
        np.save(tmp_path / "shard_00002.npy", array)
        differs = [a != b for a, b in zip(Shards(tmp_path).fingerprint(), shards.fingerprint(), strict=True)]
        assert differs == [False, False, True, False]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("seq_len", "batch_size"), [(ROW_LENGTH, 8), (ROW_LENGTH // 4, 8), (ROW_LENGTH, 40)])
def test_origin_names_the_rows_of_a_batch(shards, seq_len, batch_size, rank):
    loader = make_loader(shards, seq_len=seq_len, batch_size=batch_size, rank=rank, world_size=2)
    for _ in range(12):
        origin = loader.origin(loader.position)
        rows = sorted({token // ROW_LENGTH for token in next(loader)[:, 0].tolist()})  # in all the data
        expected = {}
        for row in rows[:8]:
            shard = int(np.searchsorted(np.cumsum(ROWS), row, side="right"))
            expected.setdefault(shard, []).append(str(row - sum(ROWS[:shard])))
        named, _, more = origin.partition(" and ")
        assert named == "; ".join(
            f"{shards.paths[shard]} row{'s' if len(names) > 1 else ''} {', '.join(names)}"
            for shard, names in expected.items()
        )
        assert more == (f"{len(rows) - 8} more" if len(rows) > 8 else "")
    assert loader.origin(loader.position) != origin


def test_an_epoch_costs_one_read_for_each_chunk_and_one_opening_for_each_shard(tmp_path, monkeypatch):
    """What makes the loader fast, without a clock: it reads the chunk's bytes, and no others."""
    chunks = Chunks(write_shards(tmp_path), ROW_LENGTH // 4, VOCAB_SIZE, seed=1)
    open_file, read, opened, sizes = os.open, os.preadv, [], []

    def open_counted(path, *args):
        opened.append(path)
        return open_file(path, *args)

    def read_counted(file, buffers, position):
        received = read(file, buffers, position)
        sizes.append(received)
        return received

    monkeypatch.setattr(os, "open", open_counted)
    monkeypatch.setattr(os, "preadv", read_counted)
    batch = chunks.batch(chunks.stream(0, len(chunks)))
    assert as_set(batch) == as_set(all_rows()[0].reshape(-1, ROW_LENGTH // 4))
    assert sizes == [ROW_LENGTH // 4 * 4] * len(chunks)  # of int32
    assert sorted(opened) == chunks.shards.paths
