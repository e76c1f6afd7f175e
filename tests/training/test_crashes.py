"""A run that is killed at any moment and restarted gives the same result as an uninterrupted run.

CRASH_KILLS and SOAK_STEPS set the length of the slow tests.
"""

import itertools
import os
import random
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from runs import Child, assert_bitwise_equal, call_during_writes, final_state, options, shrink_nano, write_shard
from waiting import wait_until

from acceleron.checkpoint import list_checkpoints, load_checkpoint

STEPS = 60
EVENTS, WRITES = 6_000_000, 9000  # in one run; see killed_at


def killed_at(moment: int, writing: bool):
    """Hook: kill the process at this interpreter event (call or return, in any thread) or this checkpoint write."""
    shrink_nano()
    moments = itertools.count(1)

    def tick(*_):
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    if writing:
        call_during_writes(tick)
    else:
        threading.setprofile(tick)
        sys.setprofile(tick)


def settings(data_dir, save_dir):
    intervals = dict(log_interval=4, eval_interval=10, save_interval=3, keep_last=2)
    return options(data_dir, save_dir, max_steps=STEPS, resume="auto", num_workers=2, **intervals)


def valid_checkpoints(save_dir: Path) -> list[int]:
    """Return the steps of all checkpoints. Raises InputError if one is invalid."""
    for path in list_checkpoints(save_dir).values():
        load_checkpoint(path)
    return list(list_checkpoints(save_dir))


def kill_repeatedly(data_dir, directory: Path, kills: int, seed: int):
    """Kill runs at random moments, `kills` times in total, and compare the result of each run with the reference."""
    moments, killed, within_a_write, runs = random.Random(seed), 0, 0, 0
    output = directory / "output"
    reference = Child(settings(data_dir, directory / "reference"), output, shrink_nano)
    assert reference.status() == 0, output.read_text()
    expected = final_state(directory / "reference", STEPS)
    while killed < kills:
        runs += 1
        save_dir, steps_before = directory / f"run{runs}", []
        while True:
            writing = killed % 2 == 0
            # Squared, because a resumed process has fewer events left.
            moment = 1 + int(moments.random() ** 2 * (WRITES if writing else EVENTS))
            hook = partial(killed_at, moment, writing) if killed < kills else shrink_nano
            child = Child(settings(data_dir, save_dir), directory / f"output{killed}", hook)
            status = child.status()
            partial_there = any(save_dir.glob("*.partial"))
            if status == 0:
                break
            assert status == -9, child.output.read_text()
            killed += 1
            within_a_write += partial_there
            steps = valid_checkpoints(save_dir)
            for step in steps_before:  # a checkpoint is deleted only if two newer ones exist
                assert step in steps or sum(newer > step for newer in steps) >= 2
            steps_before = steps
        assert_bitwise_equal(final_state(save_dir, STEPS), expected)
        assert valid_checkpoints(save_dir) == [STEPS - 3, STEPS]
        assert not any(save_dir.glob("*.partial"))
        assert not (save_dir / "run.lock").exists()
    print(f"{killed} kills of {runs} runs, {within_a_write} of them during a checkpoint write")
    assert within_a_write >= kills // 2


def test_run_survives_a_few_kills(data_dir, tmp_path):
    kill_repeatedly(data_dir, tmp_path, kills=6, seed=1)


@pytest.mark.slow
def test_run_survives_many_kills(data_dir, tmp_path):
    kill_repeatedly(data_dir, tmp_path, kills=int(os.environ.get("CRASH_KILLS", 50)), seed=2)


@pytest.mark.slow
def test_memory_and_open_files_do_not_grow(tmp_path):
    """A nano run with checkpoints and evaluations uses no more of them in its second half than in its first."""
    steps = int(os.environ.get("SOAK_STEPS", 2000))
    data_dir = write_shard(tmp_path / "data", rows=2000)
    intervals = dict(log_interval=10, eval_interval=50, save_interval=50, keep_last=2)
    run = options(data_dir, tmp_path / "run", max_steps=steps, no_gradient_checkpointing=True, **intervals)
    child = Child(run, tmp_path / "output")
    child.wait_for("saved")
    log, samples = tmp_path / "run" / "metrics.jsonl", []
    while child.process.is_alive():  # one sample per log line
        size = log.stat().st_size
        samples.append(resources(child.process.pid))
        wait_until(lambda size=size: log.stat().st_size > size or not child.process.is_alive())
    assert child.status() == 0, child.output.read_text()
    memory, files = np.array(samples[:-1]).T  # the process may be exiting during the last sample
    assert len(memory) > steps // 20
    first, second = np.array_split(memory[len(memory) // 5 :], 2)
    print(f"{first.mean() / 1e6:.1f} MB, then {second.mean() / 1e6:.1f} MB; files {set(files)}")
    assert second.mean() < 1.02 * first.mean()
    # Use the minimum: a checkpoint write briefly opens one or two files, but a leak raises the minimum permanently.
    assert min(files[len(files) // 2 :]) <= min(files[: len(files) // 2])
    assert max(files) <= min(files) + 2


def resources(pid: int) -> tuple[int, int]:
    """Return the resident bytes and the number of open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))
