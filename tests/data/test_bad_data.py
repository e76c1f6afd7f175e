"""Shards that go bad while they are read: the error names file, row and cause, or the rows are skipped reproducibly."""

import errno
import json
import os
import re
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from counting_shards import (
    HELD_OUT,
    ROW_LENGTH,
    ROWS,
    VOCAB_SIZE,
    all_rows,
    as_set,
    held_out_order,
    make_loader,
    make_validation,
    shards_of,
    write_shards,
)

from acceleron.data import ShardError, Shards, validation_batches
from acceleron.data import shards as shards_module
from acceleron.data.loader import Chunks
from acceleron.errors import InputError

BAD = 2  # the shard that these tests damage


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "data")


def read(shards, shard, row):
    out = np.empty(ROW_LENGTH, dtype=np.int64)
    shards.read(shard, row, 0, out)
    return out


def row_of(shard, row):
    first = (sum(ROWS[:shard]) + row) * ROW_LENGTH
    return np.arange(first, first + ROW_LENGTH)


def replace(path, array):
    np.save(path.with_name("new.npy"), array)
    path.with_name("new.npy").replace(path)


def truncate_in(path):
    """In its last row."""
    os.truncate(path, path.stat().st_size - 1)


# What each does to a shard's file, and the cause that the error names.
DAMAGE = {
    "vanished": (lambda path: path.unlink(), "the file has vanished"),
    "truncated": (truncate_in, r"truncated to 13,247 of the 13,248 bytes"),  # 128 + 205 * 16 * 4
    "emptied": (lambda path: os.truncate(path, 0), r"damaged or not a \.npy file"),
    "other rows": (lambda path: replace(path, np.load(path)[:-1]), r"\(204, 16\) int32, and told of \(205, 16\) int32"),
    "other dtype": (lambda path: replace(path, np.load(path).astype(np.int64)), r"int64, and told of .* int32"),
    # Into the same file: what is read at the old place may look like tokens.
    "overwritten": (lambda path: np.save(path, np.load(path).astype(np.int64)), r"int64, and told of .* int32"),
    "other content": (lambda path: replace(path, np.load(path)[::-1]), "the file has other content than at the start"),
    "of floats": (lambda path: replace(path, np.load(path).astype(np.float32)), "but this holds float32"),
    "now a directory": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    "now a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "Illegal seek"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("max_open", [1, 128])
def test_damage_between_two_reads_is_an_error(shards, monkeypatch, case, max_open):
    """With room for one open file the damaged one is opened again; with more, it is open already."""
    monkeypatch.setattr(shards_module, "MAX_OPEN_FILES", max_open)
    damage, cause = DAMAGE[case]
    for shard in (0, BAD, 0):
        assert np.array_equal(read(shards, shard, 0), row_of(shard, 0))
    damage(shards.paths[BAD])
    for row in (0, 204):
        with pytest.raises(ShardError, match=rf"{shards.paths[BAD]}: row {row} cannot be read: .*{cause}") as raised:
            read(shards, BAD, row)
        assert "\n" not in str(raised.value)
    assert np.array_equal(read(shards, 0, 1), row_of(0, 1))


def test_a_shard_that_comes_back_is_read_again(shards):
    hidden = shards.paths[BAD].with_name("hidden")
    shards.paths[BAD].rename(hidden)
    with pytest.raises(ShardError, match="vanished"):
        read(shards, BAD, 3)
    hidden.rename(shards.paths[BAD])
    assert np.array_equal(read(shards, BAD, 3), row_of(BAD, 3))


@pytest.mark.parametrize("row", [0, 102, 204])
def test_other_content_written_into_a_shard_is_an_error(shards, row):
    """The first, the middle and the last row are compared; that the row itself is as it was makes no difference."""
    path = shards.paths[BAD]
    assert np.array_equal(read(shards, BAD, 50), row_of(BAD, 50))
    np.lib.format.open_memmap(path, mode="r+")[row, 3] += 1
    os.utime(path, ns=(0, 0))  # so that the clock's resolution does not matter
    with pytest.raises(
        ShardError, match=f"{path}: row 50 cannot be read: the file has other content than at the start"
    ):
        read(shards, BAD, 50)


def test_a_shard_is_compared_when_its_file_is_another_one_and_not_whenever_it_is_opened(shards, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_FILES", 1)
    path, compared, plain = shards.paths[BAD], [], shards_module._File.checksum
    monkeypatch.setattr(shards_module._File, "checksum", lambda file: compared.append(1) or plain(file))
    for change, expected in (
        (lambda: None, 0),
        (lambda: replace(path, np.load(path)), 1),  # a copy, which is as good
        (lambda: os.utime(path, ns=(0, 0)), 2),
        (lambda: None, 2),
    ):
        change()
        for shard in (BAD, 0) * 3:
            assert np.array_equal(read(shards, shard, 1), row_of(shard, 1))
        assert len(compared) == expected


def test_an_io_error_that_stays_is_an_error(shards, monkeypatch):
    plain, failures = os.preadv, [1]

    def preadv(*arguments):
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    assert np.array_equal(read(shards, BAD, 7), row_of(BAD, 7))  # a stale handle: the second attempt reads
    failures[0] = 2
    with pytest.raises(ShardError, match=f"{shards.paths[BAD]}: row 7 cannot be read: Input/output error"):
        read(shards, BAD, 7)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux lists them")
def test_threads_share_few_open_files(tmp_path, monkeypatch):
    """Every read closes a file that another thread may be reading."""
    monkeypatch.setattr(shards_module, "MAX_OPEN_FILES", 1)
    before, wrong, most = len(os.listdir("/proc/self/fd")), [], []
    shards = write_shards(tmp_path / "data", (4,) * 32)

    def work(seed):
        for shard, row in np.random.default_rng(seed).integers((32, 4), size=(400, 2)).tolist():
            expected = np.arange(ROW_LENGTH) + (4 * shard + row) * ROW_LENGTH
            try:
                if not np.array_equal(read(shards, shard, row), expected):
                    wrong.append((shard, row))
            except ShardError as error:
                wrong.append(error)
            most.append(len(os.listdir("/proc/self/fd")) - before)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 1600
    assert not wrong
    assert max(most) <= 4 + 4 + 1  # each thread's file, and its listing of the directory


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("case", DAMAGE)
def test_fatal_when_the_batch_is_taken(tmp_path, case, num_workers):
    """Not when it is read ahead; and the next call tries again, so that a shard that comes back is no loss."""
    shards = write_shards(tmp_path / "data")
    *before, expected = islice(make_loader(shards, batch_size=1, seed=2), 5)
    loader = make_loader(shards, batch_size=1, seed=2, num_workers=num_workers)
    assert [BAD in shards_of(batch) for batch in (*before, expected)] == [False] * 4 + [True]  # by this seed
    path = shards.paths[BAD]
    content, (damage, cause) = path.read_bytes(), DAMAGE[case]
    damage(path)
    for batch in before:
        assert torch.equal(next(loader), batch)
    state = loader.state_dict()
    row = int(expected[0, 0]) // ROW_LENGTH - sum(ROWS[:BAD])
    for _ in range(2):
        with pytest.raises(ShardError, match=f"row {row} cannot be read: .*{cause}"):
            next(loader)
        assert loader.state_dict() == state
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    path.write_bytes(content)
    assert torch.equal(next(loader), expected)


@pytest.mark.parametrize("case", DAMAGE)
def test_skipped_from_the_moment_of_the_damage(shards, case):
    intact = list(islice(make_loader(shards), 30))
    loader = make_loader(shards, bad_data="skip")
    for batch in intact[:10]:
        assert torch.equal(next(loader), batch)
    loader.close()  # with what it has read ahead
    DAMAGE[case][0](shards.paths[BAD])
    for expected, batch in zip(intact[10:], loader, strict=False):
        kept = shards_of(expected) != BAD
        assert torch.equal(batch[kept], expected[kept])
        assert not (shards_of(batch) == BAD).any()
    assert loader.skipped_rows == (shards_of(torch.cat(intact[10:])) == BAD).sum() > 0


def spoil(path, rows):
    """In every other of these rows a token id beyond the vocabulary, in the others a negative one at the end."""
    array = np.load(path)
    array[rows[::2], 5] = VOCAB_SIZE
    array[rows[1::2], -1] = -1
    np.save(path, array)


def test_ids_outside_the_vocabulary(shards):
    spoil(shards.paths[0], [3, 9])
    chunks = Chunks(shards, ROW_LENGTH, VOCAB_SIZE)
    for row, token in ((3, VOCAB_SIZE), (9, -1)):
        with pytest.raises(ShardError, match=rf"{shards.paths[0]}: row {row} holds token id {token}, .* {VOCAB_SIZE};"):
            chunks.batch([1, row])
    halves = Chunks(shards, ROW_LENGTH // 2, VOCAB_SIZE).batch([7, 18])  # the good half of each
    assert torch.equal(halves, torch.from_numpy(np.stack([row_of(0, 3)[8:], row_of(0, 9)[:8]])))
    assert torch.equal(chunks.batch([2, 4]), torch.from_numpy(np.stack([row_of(0, 2), row_of(0, 4)])))


def half_bad(shards):
    """The third shard goes missing, and some rows of the first get bad ids; returns these."""
    rows = list(range(3, 130, 10))
    shards.paths[BAD].unlink()
    spoil(shards.paths[0], rows)
    return rows


def is_bad(row, bad_rows):
    """Of a row as the intact shards have it."""
    return shards_of(row) == BAD or row[0] // ROW_LENGTH in bad_rows


@pytest.mark.parametrize("num_workers", [1, 3])
def test_skipping_replaces_bad_rows_alone_and_by_good_ones(shards, num_workers):
    intact = list(islice(make_loader(shards), 140))  # two epochs
    bad_rows = half_bad(shards)
    loader = make_loader(shards, bad_data="skip", num_workers=num_workers)
    good = {tuple(row) for row in all_rows()[0].tolist() if not is_bad(row, bad_rows)}
    skipped = 0
    for batch in intact:
        complaints = []
        for expected, row in zip(batch.tolist(), next(loader).tolist(), strict=True):
            assert tuple(row) in good
            if is_bad(expected, bad_rows):
                complaints.append(expected[0] // ROW_LENGTH)
            else:
                assert row == expected
        assert len(loader.complaints) == len(complaints)
        for row, complaint in zip(complaints, loader.complaints, strict=True):
            if row in bad_rows:
                assert re.match(rf"{shards.paths[0]}: row {row} holds token id (-1|{VOCAB_SIZE}), outside", complaint)
            else:
                assert complaint == f"{shards.paths[BAD]}: row {row - 131} cannot be read: the file has vanished"
        loader.complaints.clear()
        skipped += len(complaints)
        assert loader.skipped_rows == skipped
    assert skipped > 400


def test_substitutes_are_drawn_evenly(shards):
    shards.paths[0].unlink()
    batch = Chunks(shards, ROW_LENGTH, VOCAB_SIZE, bad_data="skip", seed=1).batch(np.arange(128))  # all of it
    good = all_rows()[0][128:, 0].tolist()
    counts = np.array([(batch[:, 0] == first).sum().item() for first in good])
    assert counts.sum() == 128
    # Of an even draw, chi-squared has the mean n - 1 and the variance 2 (n - 1): within 4 deviations.
    degrees, mean = len(good) - 1, 128 / len(good)
    assert abs(((counts - mean) ** 2 / mean).sum() - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_run_resumed_in_the_middle_of_skipping_reads_the_same(shards, num_workers):
    settings = dict(seq_len=ROW_LENGTH // 4, bad_data="skip", num_workers=num_workers)
    known, directory = shards.fingerprint(), shards.paths[0].parent
    half_bad(shards)
    loader, history = make_loader(shards, **settings), []
    for _ in range(30):
        state = loader.state_dict()
        history.append((state, next(loader), loader.complaints))
        loader.complaints = []
    assert 0 < history[10][0]["skipped_rows"] < history[20][0]["skipped_rows"]
    for step in range(0, 28, 3):
        resumed = make_loader(Shards(directory, known), **settings)
        resumed.load_state_dict(json.loads(json.dumps(history[step][0])))
        for state, batch, complaints in history[step : step + 3]:
            assert resumed.state_dict() == state
            assert torch.equal(next(resumed), batch)
            assert resumed.complaints == complaints
            resumed.complaints.clear()


def test_skipping_in_validation_stays_in_validation(shards):
    shards.paths[BAD].unlink()
    (batch,) = validation_batches(shards, seq_len=16, batch_size=64, vocab_size=VOCAB_SIZE, bad_data="skip")
    good = as_set(all_rows()[1][:2]) | as_set(all_rows()[1][-1:])
    assert len(batch) == sum(HELD_OUT)
    assert as_set(batch) <= good
    with pytest.raises(ShardError, match="vanished"):
        list(validation_batches(shards, seq_len=16, batch_size=64, vocab_size=VOCAB_SIZE))


def test_nothing_readable_is_an_error_even_when_skipping(shards):
    for path in shards.paths:
        path.unlink()
    with pytest.raises(ShardError, match=r"no readable data: .*shard_0000\d.npy: row \d+ cannot be read: .* vanished"):
        next(make_loader(shards, bad_data="skip"))


def test_rows_that_validation_skips_are_named(shards):
    expected = held_out_order(ROW_LENGTH // 4)
    shards.paths[BAD].unlink()
    loader, count = make_validation(shards, bad_data="skip")
    batches = torch.cat([next(loader) for _ in range(count)])
    kept = shards_of(expected[:20]) != BAD
    assert torch.equal(batches[kept], expected[:20][kept])
    assert not (shards_of(batches) == BAD).any()
    rows = (expected[:20, 0][~kept] // ROW_LENGTH - sum(ROWS[:BAD])).tolist()
    assert 0 < len(rows) == loader.skipped_rows
    assert loader.complaints == [
        f"{shards.paths[BAD]}: row {row} cannot be read: the file has vanished" for row in rows
    ]
    loader, count = make_validation(shards)
    with pytest.raises(ShardError, match=f"{shards.paths[BAD]}: row {rows[0]} cannot be read: the file has vanished"):
        list(loader)


def test_resuming_without_a_shard_names_the_flag_that_lets_it(shards):
    state, directory = make_loader(shards).state_dict(), shards.paths[0].parent
    shards.paths[BAD].unlink()
    message = r"shard_00002\.npy is missing; pass the same data \(--bad_data skip continues without a missing shard\)$"
    with pytest.raises(InputError, match=message):
        make_loader(Shards(directory)).load_state_dict(state)
    write_shards(directory, (*ROWS, 7))  # one more, of which the flag makes nothing
    with pytest.raises(InputError, match=r"shard_00004\.npy is new; pass the same data$"):
        make_loader(Shards(directory)).load_state_dict(state)


KEPT = {
    "missing": (lambda path: path.unlink(), "the file has vanished"),
    "truncated": (truncate_in, "truncated to 13,247"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), r"damaged or not a \.npy file"),
    "other rows": (lambda path: replace(path, np.load(path)[:-1]), r"its shape is \(204, 16\), and was \(205, 16\)"),
    "longer rows": (lambda path: replace(path, np.zeros((9, 32), int)), r"its shape is \(9, 32\), and was \(205, 16\)"),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_known_shard_that_is_lost_keeps_its_place(shards, capsys, case):
    known, directory = shards.fingerprint(), shards.paths[0].parent
    before = make_loader(shards)
    batches = list(islice(before, 70))
    damage, cause = KEPT[case]
    damage(shards.paths[BAD])
    lacking = Shards(directory, known)
    (warning,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"warning: {shards.paths[BAD]}: .*{cause}", warning)
    assert lacking.fingerprint() == known
    skipping, failing = (make_loader(lacking, bad_data=choice) for choice in ("skip", "fail"))
    skipping.load_state_dict(before.state_dict() | {"position": 0})
    for expected, batch in zip(batches, skipping, strict=False):
        kept = shards_of(expected) != BAD
        assert torch.equal(batch[kept], expected[kept])
        assert not (shards_of(batch) == BAD).any()
    failing.load_state_dict(before.state_dict())
    with pytest.raises(ShardError, match=rf"{shards.paths[BAD]}: row \d+ cannot be read: .*{cause}"):
        list(islice(failing, 10))
    assert capsys.readouterr().err == ""


def test_shards_none_of_which_are_known_are_refused(shards, tmp_path):
    known = write_shards(tmp_path / "longer", row_length=2 * ROW_LENGTH).fingerprint()
    with pytest.raises(InputError, match=r"cannot resume: .*other shards.* \(130, 16\), and was \(130, 32\)"):
        Shards(shards.paths[0].parent, known)


GOOD = ["shard_00000.npy", 130, 16, 0]


@pytest.mark.parametrize(
    "known",
    [
        {},
        "shard_00000.npy",
        [GOOD[:3]],
        [tuple(GOOD)],
        [["../shard_00000.npy", 130, 16, 0]],
        [["/etc/shard_00000.npy", 130, 16, 0]],
        [["shard_/../../00000.npy", 130, 16, 0]],
        [["shard_\\00000.npy", 130, 16, 0]],
        [["shard_\x00.npy", 130, 16, 0]],
        [["shard_\ud800.npy", 130, 16, 0]],
        [["tokenizer.json", 130, 16, 0]],
        [["shard_00000.npy", 0, 16, 0]],
        [["shard_00000.npy", -130, -16, 0]],
        [["shard_00000.npy", 130.0, 16, 0]],
        [["shard_00000.npy", True, 16, 0]],
        [["shard_00000.npy", 2**40, 16, 0]],
        [["shard_00000.npy", 130, 10**5000, 0]],
        [["shard_00000.npy", 130, 16, 2**32]],
        [["shard_00000.npy", 130, 16, None]],
        [GOOD, GOOD],
        [["shard_00001.npy", 1, 16, 0], GOOD],
        [GOOD, ["shard_00001.npy", 1, 32, 0]],
    ],
)
def test_a_damaged_list_of_known_shards_is_refused(shards, known):
    with pytest.raises(InputError, match="list of shards is damaged"):
        Shards(shards.paths[0].parent, known)


def test_fortran_order_is_refused(tmp_path):
    write_shards(tmp_path)
    np.save(tmp_path / "shard_00001.npy", np.zeros((8, ROW_LENGTH), dtype=np.int32, order="F"))
    with pytest.raises(InputError, match=r"shard_00001\.npy: stored in Fortran order; save it from np\.ascontiguous"):
        Shards(tmp_path)


def test_a_pipe_is_no_shard(shards):
    os.mkfifo(shards.paths[0].with_name("shard_00009.npy"))  # opening it would wait for a writer
    with pytest.raises(InputError, match=r"shard_00009\.npy: Illegal seek"):
        Shards(shards.paths[0].parent)


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<u2", "|u1", "<i8"])
def test_a_header_that_numpy_wrote_is_read_without_pythons_compiler(tmp_path, monkeypatch, dtype):
    """Which two threads of Python 3.11 can't use at once: it fails at random, and a good shard would be a bad one."""
    array = np.arange(96, dtype=dtype).reshape(6, 16)
    np.save(tmp_path / "shard_00000.npy", array)

    def fail(*_):
        raise SystemError("AST constructor recursion depth mismatch (before=150, after=45)")

    monkeypatch.setattr("ast.literal_eval", fail)
    with pytest.raises((SystemError, ValueError)):
        np.load(tmp_path / "shard_00000.npy")
    assert np.array_equal(read(Shards(tmp_path), 0, 5), array[5])
