"""Checkpoints are valid or absent. A disk failure neither damages an existing checkpoint nor stops the run."""

import errno
import math
import os
import re
import threading
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import SplitWriter, assert_bitwise_equal, final_state, options, records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from waiting import TIMEOUT

from acceleron.checkpoint import FORMAT, list_checkpoints, load_checkpoint, newest_checkpoint, verify_archive
from acceleron.errors import InputError, RunFailed
from acceleron.training import checkpointing, train
from acceleron.training.checkpointing import CheckpointManager, SaveResult
from acceleron.training.metrics import Metrics
from acceleron.training.signals import StopSignals

pytestmark = pytest.mark.usefixtures("small_nano")


class FullDisk:
    """A file on a disk with `room` bytes of free space."""

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
    """Make these saves fail halfway (the first save is 1)."""

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


def save(manager: CheckpointManager, step: int, good_step: int = 0) -> SaveResult:
    manager.save(contents(step), good_step)
    return manager.poll(wait=True)


def test_save_writes_a_snapshot_in_the_background(tmp_path, monkeypatch):
    """`save` returns while the write is blocked, and later changes do not reach the file."""
    gate, write = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda given, file: write(given, SplitWriter(file, lambda: gate.wait(TIMEOUT))))
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):  # the second save reuses the buffers of the first
        given = contents(step, seed=step)
        gate.clear()
        manager.save(given, step)
        for weight in given["model"].values():
            weight.zero_()
        assert manager.poll() is None
        assert not (tmp_path / f"checkpoint_{step}.pt").exists()
        gate.set()
        result = manager.poll(wait=True)
        assert result.error is None
        assert_bitwise_equal(torch.load(result.path), contents(step, seed=step))
        assert manager.poll() is None  # returned once


def test_keep_last_deletes_only_older_checkpoints(tmp_path):
    for name in ("checkpoint_best.pt", "checkpoint_10.pt.bak", "model.pt", "checkpoint_9.pt"):
        (tmp_path / name).write_text("a file of the user, or a newer damaged checkpoint")
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in range(1, 6):
        assert save(manager, step, good_step=step).error is None
    assert list(list_checkpoints(tmp_path)) == [4, 5, 9]
    assert len(list(tmp_path.iterdir())) == 6


def test_keep_last_counts_only_valid_checkpoints_and_keeps_a_good_one(tmp_path):
    manager = CheckpointManager(tmp_path)
    for step in range(1, 6):
        save(manager, step)
    for step in (3, 5):
        path = tmp_path / f"checkpoint_{step}.pt"
        path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "checkpoint_2.pt").unlink()
    (tmp_path / "checkpoint_2.pt").mkdir()
    again = CheckpointManager(tmp_path, keep_last=2)
    for step, good_step, expected in (
        (6, 0, [1, 3, 4, 5, 6]),  # none is good yet
        (7, 3, [1, 3, 4, 5, 6, 7]),  # 1 is the last good one, because 3 is damaged
        (8, 4, [4, 5, 6, 7, 8]),
        (9, 8, [8, 9]),
    ):
        assert save(again, step, good_step).error is None
        assert sorted(list_checkpoints(tmp_path)) == expected
    assert (tmp_path / "checkpoint_2.pt").is_dir()


@pytest.mark.parametrize("fault", ["write", "fsync", "read back"])
def test_failed_save_changes_nothing(tmp_path, monkeypatch, fault):
    """keep_last deletes nothing before the new checkpoint is verified."""
    manager = CheckpointManager(tmp_path, keep_last=1)
    save(manager, 1, good_step=100)
    before = (tmp_path / "checkpoint_1.pt").read_bytes()
    if fault == "write":
        monkeypatch.setattr(torch, "save", lambda contents, file: FullDisk(file, 0).write(b"x"))
        reason = "No space left on device"
    elif fault == "fsync":
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output")))
        reason = "Input/output"
    else:
        write = torch.save

        def save_and_flip(contents, file):
            write(contents, file)
            file.seek(5000)
            byte = contents["model"][0].numpy().tobytes()[0]
            file.write(bytes([byte ^ 1, byte ^ 2, byte ^ 3]))

        monkeypatch.setattr(torch, "save", save_and_flip)
        reason = "does not match its checksum"
    result = save(manager, 2, good_step=100)
    assert (result.step, result.path.name) == (2, "checkpoint_2.pt")
    assert reason in result.error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"checkpoint_1.pt": before}


def test_partial_checkpoint_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / "checkpoint_3.pt.partial").write_text("half")
    CheckpointManager(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_moved_directory_is_created_again(tmp_path):
    manager = CheckpointManager(tmp_path / "run")
    save(manager, 1)
    (tmp_path / "run").rename(tmp_path / "away")
    save(manager, 2)
    verify_archive(tmp_path / "run" / "checkpoint_2.pt")


def test_flipped_bits_are_detected_in_every_record(tmp_path):
    """Tests the first, middle and last byte of each record. torch.load alone accepts any flipped bit in a tensor."""
    save(CheckpointManager(tmp_path), 1)
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


def test_full_disk_costs_a_checkpoint_but_not_the_run(data_dir, tmp_path, monkeypatch, capsys, full_disk):
    """The run retries before the next interval and keeps the previous checkpoint."""
    monkeypatch.setattr(checkpointing, "RETRY_SECONDS", 0.0)
    save = CheckpointManager.save
    monkeypatch.setattr(
        CheckpointManager, "save", lambda manager, *args: save(manager, *args) or manager.poll(wait=True)
    )
    train(options(data_dir, tmp_path / "expected", save_interval=4))
    full_disk(2, 3)
    capsys.readouterr()
    train(options(data_dir, tmp_path / "run", save_interval=4))
    output = capsys.readouterr()
    warnings = [line for line in output.err.splitlines() if line.startswith("warning")]
    first = tmp_path / "run" / "checkpoint_4.pt"
    assert len(warnings) == 2
    for warning in warnings:
        assert "could not be written (No space left on device: it needs " in warning
        assert f"; the last good checkpoint is {first}" in warning
    assert list(list_checkpoints(tmp_path / "run")) == [4, 10, 12]  # not 8, or 9 (the immediate retry)
    assert not any((tmp_path / "run").glob("*.partial"))
    assert_bitwise_equal(final_state(tmp_path / "run", 12)[1], final_state(tmp_path / "expected", 12)[1])


def test_failed_final_save_names_the_last_good_checkpoint(data_dir, tmp_path, monkeypatch, full_disk):
    monkeypatch.setattr(checkpointing, "FINAL_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(checkpointing, "FINAL_TIMEOUT", 0.0)
    full_disk(2, 3, 4)
    first = tmp_path / "checkpoint_6.pt"
    with pytest.raises(RunFailed, match=f"step 12 could not be saved in 3 attempts; the last good .* is {first}"):
        train(options(data_dir, tmp_path))
    assert load_checkpoint(first)["step"] == 6
    assert len(records(tmp_path)) == 12
    train(options(data_dir, tmp_path, resume="auto"))
    assert load_checkpoint(tmp_path / "checkpoint_12.pt")["step"] == 12


@pytest.mark.parametrize("stop_at", [math.inf, 100.0])
def test_final_save_is_retried_at_growing_intervals(data_dir, tmp_path, monkeypatch, capsys, full_disk, stop_at):
    """Retries last 15 minutes or until a stop is requested. One warning shows the space needed."""
    now, starts = [0.0], []

    def sleep(seconds: float):
        now[0] += seconds

    monkeypatch.setattr(StopSignals, "is_requested", lambda stop: now[0] > stop_at)
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep, perf_counter=time.perf_counter)
    monkeypatch.setattr(checkpointing, "time", clock)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_500_000))
    full_disk(*range(1, 1000))
    fail = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: starts.append(now[0]) or fail(*args))
    with pytest.raises(RunFailed, match="step 2 could not be saved in"):
        train(options(data_dir, tmp_path, max_steps=2))
    waits = [round(after - before) for before, after in pairwise(starts)]
    assert waits == [3, 6, 12, 24, 48, *([60] * 14 if stop_at > 900 else [7])]  # 7: until the stop
    output = capsys.readouterr().err
    assert output.count("could not be written") == 1
    needed = re.search(r"No space left on device: it needs (\S+) MB, and 1.5 MB are free\)", output)
    assert 0.2 < float(needed[1]) < 2  # three copies of the weights
    assert output.count("retrying for 15 minutes, every 3 to 60 s") == 1


def test_log_line_is_written_later_after_a_full_disk(tmp_path, monkeypatch, capsys):
    """A partial line is removed."""
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


def test_pending_log_lines_are_written_before_a_checkpoint(data_dir, tmp_path, monkeypatch):
    """Otherwise, a kill after the checkpoint would lose the lines permanently."""
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


def test_log_of_a_different_run_is_renamed(data_dir, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "precious": true}\n')
    train(options(data_dir, tmp_path, max_steps=1))
    assert (tmp_path / "metrics.1.jsonl").read_text() == '{"step": 1, "precious": true}\n'
    assert [line["step"] for line in records(tmp_path)] == [1]


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    for start, loss in ((0, 2.0), (2, 3.0)):  # resumed from step 2
        metrics = Metrics(tmp_path, start)
        for step in (start + 1, start + 2, start + 3):
            metrics.write({"step": step, "loss": loss, "val_loss": None, "tokens": 10 * step})
        metrics.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["loss", "tokens"]
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2), (2, 2), (3, 3), (4, 3), (5, 3)]
    assert [event.value for event in found.Scalars("tokens")] == [10, 20, 30, 40, 50]


def test_full_disk_stops_tensorboard_but_not_the_log(tmp_path, capsys):
    metrics = Metrics(tmp_path, 0)
    with Path("/dev/full").open("wb", buffering=0) as full:
        metrics._board = RecordWriter(full)
        for step in (1, 2):
            metrics.write({"step": step, "loss": 1.0})
    metrics.close()
    assert [line["step"] for line in records(tmp_path)] == [1, 2]
    assert capsys.readouterr().err.count("cannot write TensorBoard files") == 1


def test_auto_does_not_skip_an_unreadable_checkpoint(tmp_path, monkeypatch):
    """The file may be valid. Continuing from an older one would lose its progress."""
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        save(manager, step)

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    with pytest.raises(InputError, match=r"checkpoint_2\.pt: cannot be read \(Input/output error\)"):
        newest_checkpoint(tmp_path)
