"""Each epoch reads every training chunk once, and a resumed run continues with the next batch."""

import json
import os
import threading
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from counting_shards import ROW_LENGTH, ROWS, VOCAB_SIZE, all_rows, as_set, make_loader, write_shards

from acceleron.data import Shards
from acceleron.data.loader import Chunks
from acceleron.errors import InputError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seq_len", [ROW_LENGTH, ROW_LENGTH // 4])
def test_every_epoch_yields_each_training_chunk_exactly_once(shards, seq_len, world_size, num_workers):
    expected = all_rows()[0].reshape(-1, seq_len)
    size = len(expected)
    # 337 rows in batches of 5: with one to three ranks, a batch straddles the epoch boundary.
    steps = -(-2 * size // (5 * world_size))
    ranks = [
        islice(make_loader(shards, seq_len=seq_len, num_workers=num_workers, rank=rank, world_size=world_size), steps)
        for rank in range(world_size)
    ]
    delivered = np.concatenate([batch for step in zip(*ranks, strict=True) for batch in step])
    first, second = delivered[:size], delivered[size : 2 * size]
    assert as_set(first) == as_set(second) == as_set(expected)  # equal counts, so no duplicates
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, expected)


def test_seed_determines_the_order(shards):
    def epoch(seed):
        return np.concatenate(list(islice(make_loader(shards, seed=seed), 60)))

    assert np.array_equal(epoch(1), epoch(1))
    assert not np.array_equal(epoch(1), epoch(2))


@pytest.mark.parametrize("seq_len", [ROW_LENGTH, ROW_LENGTH // 4])
def test_validation_uses_exactly_the_held_out_rows(shards, seq_len):
    batches = list(make_loader(shards, seq_len=seq_len, batch_size=2).held_out())
    assert as_set(np.concatenate(batches)) == as_set(all_rows()[1].reshape(-1, seq_len))
    again = list(make_loader(shards, seq_len=seq_len, batch_size=2).held_out())
    assert all(map(torch.equal, batches, again))


def test_small_validation_split_yields_one_small_batch(shards):
    (batch,) = make_loader(shards, batch_size=64).held_out()
    assert as_set(batch) == as_set(all_rows()[1])


def test_single_row_shards_still_hold_out_one_row(tmp_path):
    shards = write_shards(tmp_path, rows=(1, 1))
    (held_out,) = make_loader(shards, batch_size=1).held_out()
    batch = next(make_loader(shards, batch_size=2))  # one batch spans two epochs
    assert as_set(batch) == {tuple(range(ROW_LENGTH))}
    assert as_set(held_out) == {tuple(range(ROW_LENGTH, 2 * ROW_LENGTH))}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_resuming_continues_with_the_next_batch(shards, num_workers):
    loader = make_loader(shards, num_workers=num_workers)
    for _ in range(70):  # stops in the second epoch, after the readers have prefetched more
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))  # plain values, as in a checkpoint
    expected = list(islice(loader, 3))

    resumed = make_loader(shards, num_workers=num_workers)
    next(resumed)  # earlier reads have no effect
    resumed.load_state_dict(state)
    assert resumed.epoch == 350 / 337
    for batch in expected:
        assert torch.equal(next(resumed), batch)


def test_resuming_with_a_different_world_size_and_batch_size_is_exact(shards):
    ranks = [make_loader(shards, batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    seen = [batch for rank in ranks for batch in islice(rank, 30)]  # 180 of 337 chunks
    assert ranks[0].state_dict() == ranks[1].state_dict()
    alone = make_loader(shards, batch_size=157)
    alone.load_state_dict(ranks[0].state_dict())
    seen.append(next(alone))
    assert as_set(np.concatenate(seen)) == as_set(all_rows()[0])


def test_resuming_with_different_data_or_flags_is_rejected(shards, tmp_path):
    state = make_loader(shards).state_dict()
    fewer_rows = write_shards(tmp_path / "rows", (130, 1, 205, 6))
    longer_rows = write_shards(tmp_path / "length", row_length=2 * ROW_LENGTH)
    more_shards = write_shards(tmp_path / "more", (*ROWS, 7))
    fewer_shards = write_shards(tmp_path / "fewer", ROWS[:3])
    longer_first = write_shards(tmp_path / "start", (131, *ROWS[1:]))  # the other shards start one row later
    for loader, message in (
        (make_loader(shards, seed=2), "seed 1, not 2"),
        (make_loader(shards, seq_len=4), "seq_len 16, not 4"),
        (make_loader(fewer_rows), "different shards: shard_00003.npy has 6 rows of 16, previously 7 of 16;"),
        (make_loader(longer_rows), "different shards: shard_00000.npy has 130 rows of 32, .* shard_00001.*; and 2 "),
        (make_loader(more_shards), "different shards: shard_00004.npy is new;"),
        (make_loader(fewer_shards), "different shards: shard_00003.npy is missing;"),
        (
            make_loader(longer_first),
            "shard_00000.npy has 131 rows of 16, .*; shard_00001.npy has different content; and 2 more;",
        ),
    ):
        with pytest.raises(InputError, match=message):
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
def test_damaged_loader_state_is_rejected(shards, damage):
    loader = make_loader(shards)
    with pytest.raises(InputError, match="damaged"):
        loader.load_state_dict(loader.state_dict() | damage)
    with pytest.raises(InputError, match="damaged"):
        loader.load_state_dict([damage])


def test_fingerprint_distinguishes_data_of_the_same_shape(shards, tmp_path):
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
def test_describe_rows_lists_the_rows_of_a_batch(shards, seq_len, batch_size, rank):
    loader = make_loader(shards, seq_len=seq_len, batch_size=batch_size, rank=rank, world_size=2)
    for _ in range(12):
        described = loader.describe_rows(loader.position)
        rows = sorted({token // ROW_LENGTH for token in next(loader)[:, 0].tolist()})  # indices over all shards
        expected = {}
        for row in rows[:8]:
            shard = int(np.searchsorted(np.cumsum(ROWS), row, side="right"))
            expected.setdefault(shard, []).append(str(row - sum(ROWS[:shard])))
        listed, _, more = described.partition(" and ")
        assert listed == "; ".join(
            f"{shards.paths[shard]} row{'s' if len(names) > 1 else ''} {', '.join(names)}"
            for shard, names in expected.items()
        )
        assert more == (f"{len(rows) - 8} more" if len(rows) > 8 else "")
    assert loader.describe_rows(loader.position) != described


def test_epoch_reads_each_chunk_once_and_opens_each_shard_once(tmp_path, monkeypatch):
    """Checks loading efficiency without a clock: the loader reads only the chunk's bytes."""
    chunks = Chunks(write_shards(tmp_path), ROW_LENGTH // 4, VOCAB_SIZE, seed=1)
    open_file, read, opened, sizes = os.open, os.preadv, [], []
    this_thread = threading.current_thread()  # leftover readers from other tests may still be reading

    def open_counted(path, *args):
        if threading.current_thread() is this_thread:
            opened.append(path)
        return open_file(path, *args)

    def read_counted(file, buffers, position):
        received = read(file, buffers, position)
        if threading.current_thread() is this_thread:
            sizes.append(received)
        return received

    monkeypatch.setattr(os, "open", open_counted)
    monkeypatch.setattr(os, "preadv", read_counted)
    batch = chunks.batch(chunks.stream(0, len(chunks)))
    assert as_set(batch) == as_set(all_rows()[0].reshape(-1, ROW_LENGTH // 4))
    assert sizes == [ROW_LENGTH // 4 * 4] * len(chunks)  # of int32
    assert sorted(opened) == chunks.shards.paths
