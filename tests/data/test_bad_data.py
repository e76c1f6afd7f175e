"""Shards damaged during a run: errors name the file, row and cause; skipping is reproducible."""

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

from acceleron.data import ShardError, Shards
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


def truncate_last_row(path):
    os.truncate(path, path.stat().st_size - 1)


# (damage to a shard's file, cause in the error message)
DAMAGE = {
    "removed": (lambda path: path.unlink(), "the file is missing"),
    "truncated": (truncate_last_row, r"truncated to 13,247 of 13,248 bytes"),  # 128 + 205 * 16 * 4
    "emptied": (lambda path: os.truncate(path, 0), r"damaged or not a \.npy file"),
    "other rows": (lambda path: replace(path, np.load(path)[:-1]), r"from \(205, 16\) int32 to \(204, 16\) int32"),
    "different dtype": (lambda path: replace(path, np.load(path).astype(np.int64)), r"from .* int32 to .* int64"),
    # Same file and inode: the bytes at the old offset can look like tokens.
    "overwritten": (lambda path: np.save(path, np.load(path).astype(np.int64)), r"from .* int32 to .* int64"),
    "different content": (lambda path: replace(path, np.load(path)[::-1]), "its content changed since the start"),
    "floats": (lambda path: replace(path, np.load(path).astype(np.float32)), "but the dtype is float32"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    "a named pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "Illegal seek"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("max_open", [1, 128])
def test_damage_between_two_reads_raises_shard_error(shards, monkeypatch, case, max_open):
    """With at most one open file, the damaged shard is reopened; with 128, it is still open."""
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


def test_restored_shard_is_readable_again(shards):
    hidden = shards.paths[BAD].with_name("hidden")
    shards.paths[BAD].rename(hidden)
    with pytest.raises(ShardError, match="missing"):
        read(shards, BAD, 3)
    hidden.rename(shards.paths[BAD])
    assert np.array_equal(read(shards, BAD, 3), row_of(BAD, 3))


@pytest.mark.parametrize("row", [0, 102, 204])
def test_changed_shard_content_raises(shards, row):
    """The checksum covers the first, middle and last row. Unchanged rows of a changed shard also raise."""
    path = shards.paths[BAD]
    assert np.array_equal(read(shards, BAD, 50), row_of(BAD, 50))
    np.lib.format.open_memmap(path, mode="r+")[row, 3] += 1
    os.utime(path, ns=(0, 0))  # independent of the clock's resolution
    with pytest.raises(ShardError, match=f"{path}: row 50 cannot be read: its content changed since the start"):
        read(shards, BAD, 50)


def test_checksum_is_verified_only_when_the_file_changes(shards, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_FILES", 1)
    path, compared, plain = shards.paths[BAD], [], shards_module._ShardFile.checksum
    monkeypatch.setattr(shards_module._ShardFile, "checksum", lambda file: compared.append(1) or plain(file))
    for change, expected in (
        (lambda: None, 0),
        (lambda: replace(path, np.load(path)), 1),  # an identical copy
        (lambda: os.utime(path, ns=(0, 0)), 2),
        (lambda: None, 2),
    ):
        change()
        for shard in (BAD, 0) * 3:
            assert np.array_equal(read(shards, shard, 1), row_of(shard, 1))
        assert len(compared) == expected


def test_io_error_is_retried_once_then_raised(shards, monkeypatch):
    plain, failures = os.preadv, [1]

    def preadv(*arguments):
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    assert np.array_equal(read(shards, BAD, 7), row_of(BAD, 7))  # stale handle: the retry succeeds
    failures[0] = 2
    with pytest.raises(ShardError, match=f"{shards.paths[BAD]}: row 7 cannot be read: Input/output error"):
        read(shards, BAD, 7)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc/self/fd")
def test_concurrent_reads_keep_few_files_open(tmp_path, monkeypatch):
    """With at most one open file, every read closes a file that another thread may be reading."""
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
    assert max(most) <= 4 + 4 + 1  # one file and one directory listing per thread, and the cached file


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("case", DAMAGE)
def test_bad_data_fail_raises_only_when_the_batch_is_requested(tmp_path, case, num_workers):
    """Prefetching a bad row raises nothing. The next call retries, so a restored shard loses no row."""
    shards = write_shards(tmp_path / "data")
    *before, expected = islice(make_loader(shards, batch_size=1, seed=2), 5)
    loader = make_loader(shards, batch_size=1, seed=2, num_workers=num_workers)
    assert [BAD in shards_of(batch) for batch in (*before, expected)] == [False] * 4 + [True]  # with this seed
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
def test_bad_data_skip_replaces_rows_once_they_are_damaged(shards, case):
    intact = list(islice(make_loader(shards), 30))
    loader = make_loader(shards, bad_data="skip")
    for batch in intact[:10]:
        assert torch.equal(next(loader), batch)
    loader.close()  # drop the prefetched batches
    DAMAGE[case][0](shards.paths[BAD])
    for expected, batch in zip(intact[10:], loader, strict=False):
        kept = shards_of(expected) != BAD
        assert torch.equal(batch[kept], expected[kept])
        assert not (shards_of(batch) == BAD).any()
    assert loader.skipped_rows == (shards_of(torch.cat(intact[10:])) == BAD).sum() > 0


def write_bad_ids(path, rows):
    """Write ids that are too large inside every second row, and negative ids at the end of the other rows."""
    array = np.load(path)
    array[rows[::2], 5] = VOCAB_SIZE
    array[rows[1::2], -1] = -1
    np.save(path, array)


def test_token_ids_outside_the_vocabulary_raise(shards):
    write_bad_ids(shards.paths[0], [3, 9])
    chunks = Chunks(shards, ROW_LENGTH, VOCAB_SIZE)
    for row, token in ((3, VOCAB_SIZE), (9, -1)):
        message = rf"{shards.paths[0]}: row {row} contains token id {token}, .* {VOCAB_SIZE};"
        with pytest.raises(ShardError, match=message):
            chunks.batch([1, row])
    halves = Chunks(shards, ROW_LENGTH // 2, VOCAB_SIZE).batch([7, 18])  # the undamaged halves of the rows
    assert torch.equal(halves, torch.from_numpy(np.stack([row_of(0, 3)[8:], row_of(0, 9)[:8]])))
    assert torch.equal(chunks.batch([2, 4]), torch.from_numpy(np.stack([row_of(0, 2), row_of(0, 4)])))


def damage_two_shards(shards):
    """Remove the third shard and write bad ids to some rows of the first. Returns those rows."""
    rows = list(range(3, 130, 10))
    shards.paths[BAD].unlink()
    write_bad_ids(shards.paths[0], rows)
    return rows


def is_bad(row, bad_rows):
    """Return whether this row of the original shards is now bad."""
    return shards_of(row) == BAD or row[0] // ROW_LENGTH in bad_rows


@pytest.mark.parametrize("num_workers", [1, 3])
def test_skipping_replaces_only_bad_rows_with_good_rows(shards, num_workers):
    intact = list(islice(make_loader(shards), 140))  # two epochs
    bad_rows = damage_two_shards(shards)
    loader = make_loader(shards, bad_data="skip", num_workers=num_workers)
    good = {tuple(row) for row in all_rows()[0].tolist() if not is_bad(row, bad_rows)}
    skipped = 0
    for batch in intact:
        replaced = []
        for expected, row in zip(batch.tolist(), next(loader).tolist(), strict=True):
            assert tuple(row) in good
            if is_bad(expected, bad_rows):
                replaced.append(expected[0] // ROW_LENGTH)
            else:
                assert row == expected
        assert len(loader.warnings) == len(replaced)
        for row, warning in zip(replaced, loader.warnings, strict=True):
            if row in bad_rows:
                assert re.match(rf"{shards.paths[0]}: row {row} contains token id (-1|{VOCAB_SIZE}), outside", warning)
            else:
                assert warning == f"{shards.paths[BAD]}: row {row - 131} cannot be read: the file is missing"
        loader.warnings.clear()
        skipped += len(replaced)
        assert loader.skipped_rows == skipped
    assert skipped > 400


def test_substitutes_are_drawn_uniformly(shards):
    shards.paths[0].unlink()
    chunks = Chunks(shards, ROW_LENGTH, VOCAB_SIZE, bad_data="skip", seed=1)
    batch = chunks.batch(np.arange(128))  # all of the first shard
    good = all_rows()[0][128:, 0].tolist()
    counts = np.array([(batch[:, 0] == first).sum().item() for first in good])
    assert counts.sum() == 128
    # For uniform draws, chi-squared has mean n - 1 and variance 2 (n - 1). Allow 4 standard deviations.
    degrees, mean = len(good) - 1, 128 / len(good)
    assert abs(((counts - mean) ** 2 / mean).sum() - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("num_workers", [1, 3])
def test_resuming_while_skipping_reads_the_same_batches(shards, num_workers):
    settings = dict(seq_len=ROW_LENGTH // 4, bad_data="skip", num_workers=num_workers)
    known, directory = shards.fingerprint(), shards.paths[0].parent
    damage_two_shards(shards)
    loader, history = make_loader(shards, **settings), []
    for _ in range(30):
        state = loader.state_dict()
        history.append((state, next(loader), loader.warnings))
        loader.warnings = []
    assert 0 < history[10][0]["skipped_rows"] < history[20][0]["skipped_rows"]
    for step in range(0, 28, 3):
        resumed = make_loader(Shards(directory, known), **settings)
        resumed.load_state_dict(json.loads(json.dumps(history[step][0])))
        for state, batch, warnings in history[step : step + 3]:
            assert resumed.state_dict() == state
            assert torch.equal(next(resumed), batch)
            assert resumed.warnings == warnings
            resumed.warnings.clear()


def test_validation_substitutes_come_from_the_validation_split(shards):
    shards.paths[BAD].unlink()
    (batch,) = make_loader(shards, batch_size=64, bad_data="skip").held_out()
    good = as_set(all_rows()[1][:2]) | as_set(all_rows()[1][-1:])
    assert len(batch) == sum(HELD_OUT)
    assert as_set(batch) <= good
    with pytest.raises(ShardError, match="missing"):
        list(make_loader(shards, batch_size=64).held_out())


def test_skipping_raises_if_no_row_is_readable(shards):
    for path in shards.paths:
        path.unlink()
    with pytest.raises(ShardError, match=r"no readable data: .*shard_0000\d.npy: row \d+ cannot be read: .* missing"):
        next(make_loader(shards, bad_data="skip"))


def test_validation_warns_about_each_skipped_row(shards):
    expected = held_out_order(ROW_LENGTH // 4)
    shards.paths[BAD].unlink()
    loader, count = make_validation(shards, bad_data="skip")
    batches = torch.cat([next(loader) for _ in range(count)])
    kept = shards_of(expected[:20]) != BAD
    assert torch.equal(batches[kept], expected[:20][kept])
    assert not (shards_of(batches) == BAD).any()
    rows = (expected[:20, 0][~kept] // ROW_LENGTH - sum(ROWS[:BAD])).tolist()
    assert 0 < len(rows) == loader.skipped_rows
    assert loader.warnings == [f"{shards.paths[BAD]}: row {row} cannot be read: the file is missing" for row in rows]
    loader, count = make_validation(shards)
    with pytest.raises(ShardError, match=f"{shards.paths[BAD]}: row {rows[0]} cannot be read: the file is missing"):
        list(loader)


def test_resuming_without_a_shard_suggests_bad_data_skip(shards):
    state, directory = make_loader(shards).state_dict(), shards.paths[0].parent
    shards.paths[BAD].unlink()
    message = r"shard_00002\.npy is missing; pass the same data \(--bad_data skip continues without a missing shard\)$"
    with pytest.raises(InputError, match=message):
        make_loader(Shards(directory)).load_state_dict(state)
    write_shards(directory, (*ROWS, 7))  # the flag does not allow an additional shard
    with pytest.raises(InputError, match=r"shard_00004\.npy is new; pass the same data$"):
        make_loader(Shards(directory)).load_state_dict(state)


UNUSABLE = {
    "missing": (lambda path: path.unlink(), "the file is missing"),
    "truncated": (truncate_last_row, "truncated to 13,247"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), r"damaged or not a \.npy file"),
    "other rows": (lambda path: replace(path, np.load(path)[:-1]), r"its shape is \(204, 16\), previously \(205, 16\)"),
    "longer rows": (lambda path: replace(path, np.zeros((9, 32), int)), r"shape is \(9, 32\), previously \(205, 16\)"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_known_shard_keeps_its_rows_when_it_becomes_unusable(shards, capsys, case):
    known, directory = shards.fingerprint(), shards.paths[0].parent
    before = make_loader(shards)
    batches = list(islice(before, 70))
    damage, cause = UNUSABLE[case]
    damage(shards.paths[BAD])
    damaged = Shards(directory, known)
    (warning,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"warning: {shards.paths[BAD]}: .*{cause}", warning)
    assert damaged.fingerprint() == known
    skipping, failing = (make_loader(damaged, bad_data=choice) for choice in ("skip", "fail"))
    skipping.load_state_dict(before.state_dict() | {"position": 0})
    for expected, batch in zip(batches, skipping, strict=False):
        kept = shards_of(expected) != BAD
        assert torch.equal(batch[kept], expected[kept])
        assert not (shards_of(batch) == BAD).any()
    failing.load_state_dict(before.state_dict())
    with pytest.raises(ShardError, match=rf"{shards.paths[BAD]}: row \d+ cannot be read: .*{cause}"):
        list(islice(failing, 10))
    assert capsys.readouterr().err == ""


def test_directory_without_any_known_shard_is_rejected(shards, tmp_path):
    known = write_shards(tmp_path / "longer", row_length=2 * ROW_LENGTH).fingerprint()
    with pytest.raises(InputError, match=r"cannot resume: .*different shards.* \(130, 16\), previously \(130, 32\)"):
        Shards(shards.paths[0].parent, known)


VALID_ENTRY = ["shard_00000.npy", 130, 16, 0]


@pytest.mark.parametrize(
    "known",
    [
        {},
        "shard_00000.npy",
        [VALID_ENTRY[:3]],
        [tuple(VALID_ENTRY)],
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
        [VALID_ENTRY, VALID_ENTRY],
        [["shard_00001.npy", 1, 16, 0], VALID_ENTRY],
        [VALID_ENTRY, ["shard_00001.npy", 1, 32, 0]],
    ],
)
def test_damaged_fingerprint_is_rejected(shards, known):
    with pytest.raises(InputError, match="list of shards is damaged"):
        Shards(shards.paths[0].parent, known)


def test_fortran_order_is_rejected(tmp_path):
    write_shards(tmp_path)
    np.save(tmp_path / "shard_00001.npy", np.zeros((8, ROW_LENGTH), dtype=np.int32, order="F"))
    with pytest.raises(InputError, match=r"shard_00001\.npy: stored in Fortran order; convert it with np"):
        Shards(tmp_path)


def test_named_pipe_is_not_a_shard(shards):
    os.mkfifo(shards.paths[0].with_name("shard_00009.npy"))  # opening it normally would block
    with pytest.raises(InputError, match=r"shard_00009\.npy: Illegal seek"):
        Shards(shards.paths[0].parent)


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<u2", "|u1", "<i8"])
def test_standard_headers_are_parsed_without_pythons_compiler(tmp_path, monkeypatch, dtype):
    """Python 3.11's compiler fails at random when two threads use it, which would make a valid shard seem damaged."""
    array = np.arange(96, dtype=dtype).reshape(6, 16)
    np.save(tmp_path / "shard_00000.npy", array)

    def fail(*_):
        raise SystemError("AST constructor recursion depth mismatch (before=150, after=45)")

    monkeypatch.setattr("ast.literal_eval", fail)
    with pytest.raises((SystemError, ValueError)):
        np.load(tmp_path / "shard_00000.npy")
    assert np.array_equal(read(Shards(tmp_path), 0, 5), array[5])
