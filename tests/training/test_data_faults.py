"""What a run does when its data goes bad under it: what was trained is saved, whatever happens."""

import dataclasses
import errno
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import assert_same_bits, learned, options, records, write_shard
from waiting import HANG

from acceleron.checkpoint import load_checkpoint
from acceleron.data.loader import Chunks, Loader
from acceleron.data.shards import Shards
from acceleron.errors import InputError, RunFailed
from acceleron.training import loop, train
from acceleron.training import run as run_module
from acceleron.training.run import Run

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
    """Calls a function before the reader's batch of this number, counted from 1."""

    def set_up(number: int, fault):
        read, count = Chunks.batch, [0]

        def batch(self, *args):
            count[0] += 1
            if count[0] == number:
                fault()
            return read(self, *args)

        monkeypatch.setattr(Chunks, "batch", batch)

    return set_up


def put_wrong_ids(path):
    """But not into the rows by which a shard is known."""
    ids = np.load(path)
    ids[1:25] = ids[26:49] = 64
    np.save(path, ids)


FAULTS = {
    "vanishes": (os.remove, "the file has vanished"),
    "is truncated": (lambda path: os.truncate(path, 1000), "truncated to 1,000 of the"),
    "changes its type": (lambda path: np.save(path, np.zeros((50, 256), dtype=np.int64)), "its header tells of"),
    "changes its shape": (lambda path: np.save(path, np.zeros((25, 512), dtype=np.int32)), "its header tells of"),
    "becomes another": (lambda path: np.save(path, np.ones((50, 256), dtype=np.int32)), "other content than at the"),
    "gets wrong ids": (put_wrong_ids, "holds token id 64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_that_goes_bad_ends_the_run_saved(data_dir, tmp_path, before_batch, fault):
    damage, complaint = FAULTS[fault]
    shard = data_dir / "shard_00001.npy"
    before_batch(8, lambda: damage(shard))
    run = options(data_dir, tmp_path / "run", max_steps=30, eval_interval=30, save_interval=100)
    with pytest.raises(InputError, match=f"{shard}: row .*{complaint}") as failure:
        train(run)
    step = records(tmp_path / "run")[-1]["step"]
    assert step >= 7
    path = tmp_path / "run" / f"checkpoint_{step}.pt"
    assert str(failure.value).endswith(f"stopped at step {step}; {path} holds all of it")
    assert load_checkpoint(path)["step"] == step


def test_a_repaired_shard_lets_the_run_go_on_as_if_nothing_had_been(data_dir, tmp_path, before_batch, monkeypatch):
    run = options(data_dir, tmp_path / "run", max_steps=12, eval_interval=12, save_interval=100)
    train(dataclasses.replace(run, save_dir=str(tmp_path / "whole")))
    shard = data_dir / "shard_00001.npy"
    with monkeypatch.context():
        before_batch(6, lambda: shard.rename(tmp_path / "away.npy"))
        with pytest.raises(InputError, match="has vanished"):
            train(run)
    (tmp_path / "away.npy").rename(shard)
    train(dataclasses.replace(run, resume="auto"))
    assert_same_bits(learned(tmp_path / "run", 12), learned(tmp_path / "whole", 12))


def test_rows_that_can_not_be_read_are_skipped_on_every_resume_alike(
    data_dir, tmp_path, before_batch, monkeypatch, capsys
):
    """Its shard is gone from the fourth batch on, for all runs."""
    read, gone = Shards.read, data_dir / "shard_00001.npy"
    settings = dict(max_steps=12, eval_interval=12, save_interval=6, log_interval=3, bad_data="skip")
    run = options(data_dir, tmp_path / "whole", **settings)
    monkeypatch.setattr(run_module, "COMPLAINTS", 3)
    before_batch(4, lambda: gone.rename(tmp_path / "away.npy"))
    train(run)
    said = capsys.readouterr().err
    assert said.count(f"warning: skipped: {gone}: row ") == 3
    assert "further skipped rows are not told" in said
    skipped = [line["skipped_rows"] for line in records(tmp_path / "whole")]
    assert skipped[0] == 0
    assert 12 < skipped[-1] < 36  # of the 36 sequences of 9 batches, about half
    assert Shards.read is read

    # Again from the middle, where the shard is missing from the start.
    for name in ("metrics.jsonl", "checkpoint_6.pt"):
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    train(dataclasses.replace(run, save_dir=str(tmp_path / "part"), resume="auto"))
    assert f"warning: {gone}: the file has vanished; none of its rows can be read" in capsys.readouterr().err
    assert_same_bits(learned(tmp_path / "part", 12), learned(tmp_path / "whole", 12))


def test_a_reader_that_dies_ends_the_run_saved(data_dir, tmp_path, before_batch):
    def die():
        raise MemoryError("no room")

    before_batch(5, die)
    with pytest.raises(RunFailed, match=r"a reader thread failed: MemoryError: no room; stopped at step 4; .*_4\.pt"):
        train(options(data_dir, tmp_path / "run", save_interval=100))
    assert load_checkpoint(tmp_path / "run" / "checkpoint_4.pt")["step"] == 4


def test_data_and_disk_that_both_fail_are_both_told(data_dir, tmp_path, before_batch, monkeypatch):
    monkeypatch.setattr(loop, "LAST_PATIENCE", 0.0)
    monkeypatch.setattr(loop, "LAST_RETRY_SECONDS", 0.0)

    def full(contents, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    before_batch(5, lambda: os.remove(data_dir / "shard_00001.npy"))
    with pytest.raises(InputError, match=r"has vanished; stopped at step .*could not be saved in 3 attempts"):
        train(options(data_dir, tmp_path / "run", max_steps=30, eval_interval=30, save_interval=100))


def test_a_stall_is_told_and_measured(data_dir, tmp_path, monkeypatch, capsys):
    """The clock advances by 25 s in each step, and in each of three attempts to get the fourth batch that fail."""
    clock, poll, step, failures = SimpleNamespace(now=0.0), Loader.poll, Run.step, [25.0, 25.0, 25.0]
    clock.perf_counter = clock.monotonic = lambda: clock.now

    def poll_again(loader, timeout):
        if loader.position == 3 * loader.batch_size and failures:
            clock.now += failures.pop()
            return None
        return poll(loader, HANG)

    def timed_step(run, lr):
        step(run, lr)
        clock.now += 25.0

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(run_module, "time", clock)
    monkeypatch.setattr(Loader, "poll", poll_again)
    monkeypatch.setattr(Run, "step", timed_step)
    train(options(data_dir, tmp_path / "run", max_steps=4, eval_interval=4))
    said = capsys.readouterr()
    assert run_module.STALL_SECONDS == 60  # passed by the third attempt alone
    (warning,) = [line for line in said.err.splitlines() if "no data" in line]
    assert re.fullmatch(rf"warning: no data for 75 s: {data_dir}/shard_0000[01]\.npy rows? \d+.*", warning)
    log = records(tmp_path / "run")
    assert [line["data_wait"] for line in log] == [0, 0, 0, 0.75]
    assert [line["tokens_per_second"] for line in log] == [4 * 64 / 25] * 3 + [4 * 64 / 100]
    assert "data wait 75.0%" in said.out
