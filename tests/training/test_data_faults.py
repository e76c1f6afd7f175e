"""When the data becomes unreadable during training, the run saves its progress."""

import dataclasses
import errno
import os
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import assert_bitwise_equal, final_state, options, records, write_shard
from waiting import TIMEOUT

from acceleron.checkpoint import load_checkpoint
from acceleron.data.loader import Chunks, Loader
from acceleron.errors import InputError, RunFailed
from acceleron.training import checkpointing, loop, metrics, train
from acceleron.training import trainer as trainer_module
from acceleron.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_nano")


@pytest.fixture
def data_dir(tmp_path):
    """Two shards of 50 rows."""
    directory = write_shard(tmp_path / "data")
    ids = np.load(directory / "shard_00000.npy")
    for index in range(2):
        np.save(directory / f"shard_0000{index}.npy", ids[50 * index : 50 * index + 50])
    return directory


@pytest.fixture
def before_batch(monkeypatch):
    """Call `fault` before the reader thread's batch `number` (the first is 1)."""

    def set_up(number: int, fault):
        read, count = Chunks.batch, [0]

        def batch(self, *args):
            count[0] += 1
            if count[0] == number:
                fault()
            return read(self, *args)

        monkeypatch.setattr(Chunks, "batch", batch)

    return set_up


def write_invalid_ids(path):
    """Damages none of the rows that identify the shard."""
    ids = np.load(path)
    ids[1:25] = ids[26:49] = 64
    np.save(path, ids)


FAULTS = {
    "vanishes": (os.remove, "the file is missing"),
    "is truncated": (lambda path: os.truncate(path, 1000), "truncated to 1,000 of"),
    "changes its type": (lambda path: np.save(path, np.zeros((50, 256), dtype=np.int64)), "its header changed from"),
    "changes its shape": (lambda path: np.save(path, np.zeros((25, 512), dtype=np.int32)), "its header changed from"),
    "is replaced": (lambda path: np.save(path, np.ones((50, 256), dtype=np.int32)), "its content changed"),
    "has invalid ids": (write_invalid_ids, "contains token id 64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_shard_saves_and_stops_the_run(data_dir, tmp_path, before_batch, fault):
    damage, message = FAULTS[fault]
    shard = data_dir / "shard_00001.npy"
    before_batch(8, lambda: damage(shard))
    run = options(data_dir, tmp_path / "run", max_steps=30, eval_interval=30, save_interval=100)
    with pytest.raises(InputError, match=f"{shard}: row .*{message}") as failure:
        train(run)
    step = records(tmp_path / "run")[-1]["step"]
    assert step >= 7
    path = tmp_path / "run" / f"checkpoint_{step}.pt"
    assert str(failure.value).endswith(f"stopped at step {step}; everything is saved in {path}")
    assert load_checkpoint(path)["step"] == step


def test_run_continues_identically_after_the_shard_is_repaired(data_dir, tmp_path, before_batch):
    run = options(data_dir, tmp_path / "run", max_steps=12, eval_interval=12, save_interval=100)
    train(dataclasses.replace(run, save_dir=str(tmp_path / "uninterrupted")))
    shard = data_dir / "shard_00001.npy"
    before_batch(6, lambda: shard.rename(tmp_path / "away.npy"))
    with pytest.raises(InputError, match="is missing"):
        train(run)
    (tmp_path / "away.npy").rename(shard)
    train(dataclasses.replace(run, resume="auto"))
    assert_bitwise_equal(final_state(tmp_path / "run", 12), final_state(tmp_path / "uninterrupted", 12))


def test_unreadable_rows_are_skipped_identically_after_a_resume(data_dir, tmp_path, before_batch, monkeypatch, capsys):
    """The shard is missing starting with the fourth batch."""
    gone = data_dir / "shard_00001.npy"
    settings = dict(max_steps=12, eval_interval=12, save_interval=6, log_interval=3, bad_data="skip")
    run = options(data_dir, tmp_path / "uninterrupted", **settings)
    monkeypatch.setattr(trainer_module, "MAX_ROW_WARNINGS", 3)
    before_batch(4, lambda: gone.rename(tmp_path / "away.npy"))
    train(run)
    output = capsys.readouterr().err
    assert output.count(f"warning: skipped: {gone}: row ") == 3
    assert "further skipped rows are not logged" in output
    skipped = [line["skipped_rows"] for line in records(tmp_path / "uninterrupted")]
    assert skipped[0] == 0
    assert 12 < skipped[-1] < 36  # about half of the 36 sequences in 9 batches

    # For a run resumed from step 6, the shard is missing from the start.
    for name in ("metrics.jsonl", "checkpoint_6.pt"):
        (tmp_path / "resumed").mkdir(exist_ok=True)
        (tmp_path / "resumed" / name).write_bytes((tmp_path / "uninterrupted" / name).read_bytes())
    train(dataclasses.replace(run, save_dir=str(tmp_path / "resumed"), resume="auto"))
    assert f"warning: {gone}: the file is missing; none of its rows can be read" in capsys.readouterr().err
    assert_bitwise_equal(final_state(tmp_path / "resumed", 12), final_state(tmp_path / "uninterrupted", 12))


def test_reader_failure_saves_and_stops_the_run(data_dir, tmp_path, before_batch):
    def die():
        raise MemoryError("no room")

    before_batch(5, die)
    with pytest.raises(RunFailed, match=r"a reader thread failed: MemoryError: no room; stopped at step 4; .*_4\.pt"):
        train(options(data_dir, tmp_path / "run", save_interval=100))
    assert load_checkpoint(tmp_path / "run" / "checkpoint_4.pt")["step"] == 4


def test_data_and_disk_failures_are_both_reported(data_dir, tmp_path, before_batch, monkeypatch):
    monkeypatch.setattr(checkpointing, "FINAL_TIMEOUT", 0.0)
    monkeypatch.setattr(checkpointing, "FINAL_RETRY_SECONDS", 0.0)

    def full(contents, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    before_batch(5, lambda: os.remove(data_dir / "shard_00001.npy"))
    with pytest.raises(InputError, match=r"is missing; stopped at step .*could not be saved in 3 attempts"):
        train(options(data_dir, tmp_path / "run", max_steps=30, eval_interval=30, save_interval=100))


def test_data_stall_is_logged_and_measured(data_dir, tmp_path, monkeypatch, capsys):
    """The clock advances by 25 s per step and per failed poll. The fourth batch needs three extra polls."""
    clock, poll, step, failures = SimpleNamespace(now=0.0), Loader.poll, Trainer.train_step, [25.0, 25.0, 25.0]
    clock.perf_counter = clock.monotonic = lambda: clock.now
    clock.time, clock.time_ns = time.time, time.time_ns

    def poll_again(loader, timeout):
        if loader.position == 3 * loader.batch_size and failures:
            clock.now += failures.pop()
            return None
        return poll(loader, TIMEOUT)

    def timed_step(run, lr):
        step(run, lr)
        clock.now += 25.0

    for module in (loop, metrics, trainer_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(Loader, "poll", poll_again)
    monkeypatch.setattr(Trainer, "train_step", timed_step)
    train(options(data_dir, tmp_path / "run", max_steps=4, eval_interval=4))
    output = capsys.readouterr()
    assert trainer_module.STALL_SECONDS == 60  # only the third poll exceeds it
    (warning,) = [line for line in output.err.splitlines() if "no data" in line]
    assert re.fullmatch(rf"warning: no data for 75 s: {data_dir}/shard_0000[01]\.npy rows? \d+.*", warning)
    log = records(tmp_path / "run")
    assert [line["data_wait"] for line in log] == [0, 0, 0, 0.75]
    assert [line["tokens_per_second"] for line in log] == [4 * 64 / 25] * 3 + [4 * 64 / 100]
    assert "data wait 75.0%" in output.out
