"""Checkpoints are whole or not there; a disk that fails costs none that was there, and no run."""

import errno
import math
import os
import re
import threading
import time
import zipfile
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from runs import HalfWritten, assert_same_bits, learned, options, records
from waiting import HANG

from acceleron.checkpoint import (
    FORMAT,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    verify_archive,
)
from acceleron.errors import InputError, RunFailed
from acceleron.training import loop, train
from acceleron.training.metrics import Metrics
from acceleron.training.saver import Saver

pytestmark = pytest.mark.usefixtures("small_nano")


class FullDisk:
    """Takes so many bytes, and then no more."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@pytest.fixture
def full_disk(monkeypatch):
    """Lets the attempts of these numbers, counted from 1, to save fail in the middle."""

    def fill(*failing: int):
        save, attempts = torch.save, iter(range(1, 1000))

        def save_to_disk(contents, file):
            room = 200_000 if next(attempts) in failing else 1 << 40
            save(contents, FullDisk(file, room))

        monkeypatch.setattr(torch, "save", save_to_disk)

    return fill


def contents(step: int, seed: int = 0) -> dict:
    weights = torch.randn(3, 1000, generator=torch.Generator().manual_seed(seed))
    return {"format": FORMAT, "step": step, "model": dict(enumerate(weights)), "plain": [1, 2.5, ("a", None)]}


def test_what_was_given_is_written_though_it_changes_at_once(tmp_path, monkeypatch):
    """In the background: `save` returns while the write is held."""
    gate, save = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda given, file: save(given, HalfWritten(file, lambda: gate.wait(HANG))))
    saver = Saver(tmp_path)
    for step in (1, 2):  # the second copies into the memory of the first
        given = contents(step, seed=step)
        gate.clear()
        saver.save(given, step)
        for weight in given["model"].values():
            weight.zero_()
        assert saver.outcome() is None
        assert not (tmp_path / f"checkpoint_{step}.pt").exists()
        gate.set()
        saver.wait()
        outcome = saver.outcome()
        assert outcome.error is None
        assert_same_bits(torch.load(outcome.path), contents(step, seed=step))
        assert saver.outcome() is None  # told once


def test_the_last_ones_are_kept_and_no_others_touched(tmp_path):
    for name in ("checkpoint_best.pt", "checkpoint_10.pt.bak", "model.pt", "checkpoint_9.pt"):
        (tmp_path / name).write_text("the user's, or a later one that is damaged")
    saver = Saver(tmp_path, keep_last=2)
    for step in range(1, 6):
        saver.save(contents(step), step)
        saver.wait()
        assert saver.outcome().error is None
    assert list(list_checkpoints(tmp_path)) == [4, 5, 9]
    assert len(list(tmp_path.iterdir())) == 6


def test_only_whole_ones_that_are_known_to_be_good_count_for_those_kept(tmp_path, capsys):
    saver = Saver(tmp_path)
    for step in range(1, 6):
        saver.save(contents(step), 0)
        saver.wait()
    for step in (3, 5):
        path = tmp_path / f"checkpoint_{step}.pt"
        path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "checkpoint_2.pt").unlink()
    (tmp_path / "checkpoint_2.pt").mkdir()
    again = Saver(tmp_path, keep_last=2)
    for step, good_step, expected in (
        (6, 0, [1, 3, 4, 5, 6]),  # none is known to be good
        (7, 3, [1, 3, 4, 5, 6, 7]),  # that is 1, as 3 is damaged
        (8, 4, [4, 5, 6, 7, 8]),
        (9, 8, [8, 9]),
    ):
        again.save(contents(step), good_step)
        again.wait()
        assert again.outcome().error is None
        assert sorted(list_checkpoints(tmp_path)) == expected
    assert (tmp_path / "checkpoint_2.pt").is_dir()


@pytest.mark.parametrize("fault", ["write", "fsync", "read back"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, full_disk, fault):
    """Retention deletes nothing before the new one has been read back whole."""
    saver = Saver(tmp_path, keep_last=1)
    saver.save(contents(1), 100)
    saver.wait()
    before = (tmp_path / "checkpoint_1.pt").read_bytes()
    saver.outcome()
    if fault == "write":
        full_disk()
        monkeypatch.setattr(torch, "save", lambda contents, file: FullDisk(file, 0).write(b"x"))
        reason = "No space left on device"
    elif fault == "fsync":
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output")))
        reason = "Input/output"
    else:
        save = torch.save

        def save_and_flip(contents, file):
            save(contents, file)
            file.seek(5000)
            byte = contents["model"][0].numpy().tobytes()[0]
            file.write(bytes([byte ^ 1, byte ^ 2, byte ^ 3]))

        monkeypatch.setattr(torch, "save", save_and_flip)
        reason = "does not match its checksum"
    saver.save(contents(2), 100)
    saver.wait()
    outcome = saver.outcome()
    assert (outcome.step, outcome.path.name) == (2, "checkpoint_2.pt")
    assert reason in outcome.error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"checkpoint_1.pt": before}


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / "checkpoint_3.pt.partial").write_text("half")
    Saver(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_moved_away_is_made_again(tmp_path):
    saver = Saver(tmp_path / "run")
    saver.save(contents(1), 0)
    saver.wait()
    (tmp_path / "run").rename(tmp_path / "away")
    saver.save(contents(2), 1)
    saver.wait()
    verify_archive(tmp_path / "run" / "checkpoint_2.pt")


def test_every_flipped_bit_that_matters_is_found(tmp_path):
    """In each record of a checkpoint, its first, middle and last byte; torch.load alone takes all in the tensors."""
    saver = Saver(tmp_path)
    saver.save(contents(1), 100)
    saver.wait()
    path = tmp_path / "checkpoint_1.pt"
    original = path.read_bytes()
    found = 0
    with zipfile.ZipFile(path) as archive:
        spans = []
        for record in archive.infolist():
            content = archive.read(record)
            spans.append((record.filename, original.index(content, record.header_offset), len(content)))
    for name, start, length in spans:
        for offset in {0, length // 2, length - 1}:
            damaged = bytearray(original)
            damaged[start + offset] ^= 1 << (offset % 8)
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=name):
                verify_archive(path)
            found += 1
    assert found > 15


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(data_dir, tmp_path, monkeypatch, capsys, full_disk):
    """The next attempt is made after a while, not only at the next interval; the one before stays."""
    monkeypatch.setattr(loop, "RETRY_SECONDS", 0.0)
    save = Saver.save
    monkeypatch.setattr(Saver, "save", lambda saver, *args: save(saver, *args) or saver.wait())
    train(options(data_dir, tmp_path / "expected", save_interval=4))
    full_disk(2, 3)
    capsys.readouterr()
    train(options(data_dir, tmp_path / "run", save_interval=4))
    said = capsys.readouterr()
    warnings = [line for line in said.err.splitlines() if line.startswith("warning")]
    first = tmp_path / "run" / "checkpoint_4.pt"
    assert len(warnings) == 2
    for warning in warnings:
        assert "could not be written (No space left on device: it takes " in warning
        assert f"; the last good checkpoint is {first}" in warning
    assert list(list_checkpoints(tmp_path / "run")) == [4, 10, 12]  # not 8, nor 9 at once
    assert not any((tmp_path / "run").glob("*.partial"))
    assert_same_bits(learned(tmp_path / "run", 12)[1], learned(tmp_path / "expected", 12)[1])


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_that_says_what_remains(
    data_dir, tmp_path, monkeypatch, full_disk
):
    monkeypatch.setattr(loop, "LAST_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(loop, "LAST_PATIENCE", 0.0)
    full_disk(2, 3, 4)
    first = tmp_path / "checkpoint_6.pt"
    with pytest.raises(RunFailed, match=f"step 12 could not be saved in 3 attempts; the last good .* is {first}"):
        train(options(data_dir, tmp_path))
    assert load_checkpoint(first)["step"] == 6
    assert len(records(tmp_path)) == 12
    train(options(data_dir, tmp_path, resume="auto"))
    assert load_checkpoint(tmp_path / "checkpoint_12.pt")["step"] == 12


@pytest.mark.parametrize("stop_at", [math.inf, 100.0])
def test_the_last_checkpoint_is_tried_ever_less_often(data_dir, tmp_path, monkeypatch, capsys, full_disk, stop_at):
    """For a quarter of an hour, or until a stop is asked for; one warning says so, and how much room is needed."""
    now, starts = [0.0], []

    def sleep(seconds: float):
        now[0] += seconds
        if now[0] > stop_at:
            monkeypatch.setattr(loop.Trainer, "_stopped", lambda trainer: True)

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep, perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_500_000))
    full_disk(*range(1, 1000))
    fail = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: starts.append(now[0]) or fail(*args))
    with pytest.raises(RunFailed, match="step 2 could not be saved in"):
        train(options(data_dir, tmp_path, max_steps=2))
    waits = [round(after - before) for before, after in pairwise(starts)]
    assert waits == [3, 6, 12, 24, 48, *([60] * 14 if stop_at > 900 else [7])]  # 7: until the stop
    said = capsys.readouterr().err
    assert said.count("could not be written") == 1
    needed = re.search(r"No space left on device: it takes (\S+) MB, and 1.5 MB are free\)", said)
    assert 0.2 < float(needed[1]) < 2  # three copies of the weights
    assert said.count("trying again for 15 minutes, every 3 to 60 s") == 1


def test_a_log_that_cannot_be_written_is_written_later(data_dir, tmp_path, monkeypatch, capsys):
    """Half a line, that a full disk took, is taken back."""
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 1})
    file, room = metrics._file, [4]

    class Full:
        name = "metrics.jsonl"

        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            return file.write(data[: room[0]])

    metrics._file = Full()
    metrics.write({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert "No space left on device" in capsys.readouterr().err
    room[0] = None
    metrics.write({"step": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    room[0] = 4
    metrics.write({"step": 4})
    room[0] = None
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text().endswith('{"step": 3}\n{"step": 4}\n')


def test_a_line_that_was_not_written_comes_before_the_checkpoint_that_is(data_dir, tmp_path, monkeypatch):
    """Killed after it, nothing would write the line again."""
    write, full = Metrics.write, [False]

    def write_while_full(self, record):
        full[0] = record["step"] == 5
        write(self, record)

    def flush(self, to_disk=False):
        if not full[0] or to_disk:
            full[0] = False
            real_flush(self, to_disk)

    real_flush = Metrics.flush
    monkeypatch.setattr(Metrics, "write", write_while_full)
    monkeypatch.setattr(Metrics, "flush", flush)
    save = torch.save

    def check_and_save(saved, file):
        assert [line["step"] for line in records(tmp_path)] == list(range(1, saved["step"] + 1))
        save(saved, file)

    monkeypatch.setattr(torch, "save", check_and_save)
    train(options(data_dir, tmp_path, max_steps=5, eval_interval=10))
    assert list(list_checkpoints(tmp_path)) == [5]


def test_the_log_of_another_run_is_moved_aside(data_dir, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "precious": true}\n')
    train(options(data_dir, tmp_path, max_steps=1))
    assert (tmp_path / "metrics.1.jsonl").read_text() == '{"step": 1, "precious": true}\n'
    assert [line["step"] for line in records(tmp_path)] == [1]


def test_tensorboards_thread_fails_quietly(tmp_path, capsys):
    before = threading.excepthook
    metrics = Metrics(tmp_path, 0)

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    metrics.close()
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook is before


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(tmp_path, monkeypatch):
    """It may be whole: to continue from an older one would lose what is in it."""
    saver = Saver(tmp_path)
    for step in (1, 2):
        saver.save(contents(step), 0)
        saver.wait()

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    with pytest.raises(InputError, match=r"checkpoint_2\.pt: cannot be read \(Input/output error\)"):
        newest_checkpoint(tmp_path)
