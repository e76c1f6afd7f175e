"""Runs of several ranks that are signalled, killed or stalled, on one rank or all. A resumed run loses nothing."""

import errno
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import Job, environments, new_store
from runs import (
    SMALL_NANO,
    Child,
    assert_bitwise_equal,
    final_state,
    options,
    pause,
    pause_at_step,
    records,
    shrink_nano,
)
from test_crashes import killed_at, valid_checkpoints
from test_signals import pause_evaluation, pause_first_write, stall_data
from waiting import TIMEOUT, wait_until

from acceleron.checkpoint import list_checkpoints
from acceleron.data.loader import Chunks
from acceleron.distributed import Ranks
from acceleron.errors import InputError
from acceleron.model import Acceleron
from acceleron.training import checkpointing

STEPS = 24
BUG, BAD_INPUT, FAILED, STOPPED, INTERRUPTED = 1, 2, 3, 75, 130
LOST = "error: rank {} ended or does not respond: stopped without saving; continue with --resume auto"


def settings(data_dir, save_dir, **changes):
    intervals = dict(log_interval=3, eval_interval=10, save_interval=1000, resume="auto", batch_size=2)
    return options(data_dir, save_dir, **intervals | dict(max_steps=STEPS) | changes)


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    job = Job(settings(data_dir, directory / "run"), 2, directory / "output", shrink_nano)
    assert job.statuses() == [0, 0], job.output()
    return final_state(directory / "run", STEPS)[1]


def rank_hook(rank: int | None, hook: Callable[[], None]):
    """Hook: call `hook` on this rank (None: on all). All ranks print when they receive a signal."""
    hook() if rank in (None, int(os.environ["RANK"])) else shrink_nano()
    announce = Ranks.announce_stop

    def announce_and_print(ranks):
        announce(ranks)
        print("signal received", flush=True)

    Ranks.announce_stop = announce_and_print


def start(run, tmp_path, rank: int | None, hook: Callable[[], None], size: int = 2) -> Job:
    """Start a job and wait until the hook on this rank prints "paused"."""
    job = Job(run, size, tmp_path / "output", partial(rank_hook, rank, hook))
    for child in job.children if rank is None else [job.children[rank]]:
        child.wait_for("paused")
    return job


def resume(run, tmp_path, uninterrupted):
    job = Job(run, 2, tmp_path / "resumed", shrink_nano)
    assert job.statuses() == [0, 0], job.output()
    assert_bitwise_equal(final_state(Path(run.save_dir), STEPS)[1], uninterrupted)


PHASES = {  # rank that pauses (None: all), hook that pauses it in a phase, and the steps at which the run can stop
    "training": (1, partial(pause_at_step, 4), {4}),
    "evaluation": (None, pause_evaluation, {10}),
    "data stall": (1, stall_data, {5}),
    "data stall in an evaluation": (1, partial(pause_evaluation, stalls=True), {10}),
    "background save": (0, pause_first_write, {3, 4, 5, 6}),
}


@pytest.mark.parametrize(
    ("phase", "signalled"),
    [
        ("training", [0, 1]),  # as torchrun does
        pytest.param("data stall", [0], marks=pytest.mark.slow),
        pytest.param("training", [0], marks=pytest.mark.slow),
        pytest.param("training", [1], marks=pytest.mark.slow),
        pytest.param("evaluation", [1], marks=pytest.mark.slow),
        pytest.param("data stall", [1], marks=pytest.mark.slow),
        pytest.param("data stall in an evaluation", [0], marks=pytest.mark.slow),
        pytest.param("background save", [1], marks=pytest.mark.slow),
    ],
)
def test_signal_to_any_rank_saves_once_and_loses_nothing(data_dir, tmp_path, uninterrupted, phase, signalled):
    rank, hook, steps = PHASES[phase]
    run = settings(data_dir, tmp_path / "run", save_interval=3 if phase == "background save" else 1000)
    job = start(run, tmp_path, rank, partial(hook, gate=str(tmp_path / "gate")))
    for number in signalled:
        job.children[number].signal(signal.SIGTERM)
        job.children[number].wait_for("signal received")
    (tmp_path / "gate").touch()
    assert job.statuses() == [STOPPED, STOPPED], job.output()
    step = max(list_checkpoints(tmp_path / "run"))
    where = f"everything is saved in {tmp_path}/run/checkpoint_{step}.pt; continue with --resume auto"
    assert step in steps
    assert job.output().count(f"SIGTERM: stopped at step {step}; {where}") == 1
    assert job.output().count("SIGTERM: ") == 2, job.output()
    assert "SIGTERM: saving and stopping after this step" in job.output()
    assert "Traceback" not in job.output()
    assert not (tmp_path / "run" / "run.lock").exists()
    resume(run, tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [[0, 1], [1]])
def test_signal_before_the_first_step_ends_at_once(data_dir, tmp_path, signalled):
    job = start(settings(data_dir, tmp_path / "run"), tmp_path, 1, partial(pause_at_step, 1, str(tmp_path / "gate")))
    for number in signalled:
        job.children[number].signal(signal.SIGTERM)
    statuses = job.statuses()
    assert [statuses[number] for number in signalled] == [STOPPED] * len(signalled)
    assert job.output().count("SIGTERM before the end of the first step: nothing new to save") == 1, job.output()
    assert "error" not in job.output()
    assert not list_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.slow
def test_signal_during_the_last_save_changes_nothing(data_dir, tmp_path, uninterrupted):
    job = start(settings(data_dir, tmp_path / "run"), tmp_path, 0, partial(pause_first_write, str(tmp_path / "gate")))
    job.children[1].signal(signal.SIGTERM)
    job.children[1].wait_for("signal received")
    (tmp_path / "gate").touch()
    assert job.statuses() == [0, 0], job.output()
    assert_bitwise_equal(final_state(tmp_path / "run", STEPS)[1], uninterrupted)


@pytest.mark.slow
def test_second_interrupt_exits_immediately(data_dir, tmp_path):
    run = settings(data_dir, tmp_path / "run", save_interval=3)
    job = start(run, tmp_path, 0, partial(pause_first_write, str(tmp_path / "no gate")))
    for child in job.children:
        child.signal(signal.SIGINT)
    job.children[0].wait_for("SIGINT: saving and stopping after this step")
    for child in job.children:
        child.signal(signal.SIGINT)
    assert job.statuses() == [INTERRUPTED, INTERRUPTED], job.output()
    assert job.output().count("stopped immediately: unsaved progress is lost; existing checkpoints are valid") == 1


def unreadable_batch(number: int):
    """Hook: reading this batch raises an InputError."""
    shrink_nano()
    read, count = Chunks.batch, itertools.count(1)

    def batch(*args):
        if next(count) == number:
            raise InputError("shard: damaged")
        return read(*args)

    Chunks.batch = batch


def test_unreadable_data_on_one_rank_stops_all_and_saves(data_dir, tmp_path, uninterrupted):
    run = settings(data_dir, tmp_path / "run")
    job = Job(run, 2, tmp_path / "output", partial(rank_hook, 1, partial(unreadable_batch, 6)))
    assert job.statuses() == [BAD_INPUT, BAD_INPUT], job.output()
    saved = f"stopped at step 5; everything is saved in {tmp_path}/run/checkpoint_5.pt"
    assert job.output().count(f"error: rank 1: shard: damaged; {saved}\n") == 1, job.output()
    assert job.output().count("error") == 1
    assert "Traceback" not in job.output()
    resume(run, tmp_path, uninterrupted)


def fill_disk():
    """Hook: no checkpoint can be written."""
    shrink_nano()
    checkpointing.FINAL_RETRY_SECONDS = 0.1

    def save(contents, path):
        print("paused", flush=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpointing.save_checkpoint = save


@pytest.mark.slow
def test_signal_to_a_rank_ends_the_attempts_to_save(data_dir, tmp_path):
    job = start(settings(data_dir, tmp_path / "run"), tmp_path, 0, fill_disk)
    job.children[1].signal(signal.SIGTERM)
    assert job.statuses() == [FAILED, FAILED], job.output()
    assert len(re.findall(rf"error: step {STEPS} could not be saved in \d+ attempts; there is no", job.output())) == 1
    assert job.output().count("error") == 1


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_rank_ends_the_job_without_saving(data_dir, tmp_path, uninterrupted, killed):
    """The default timeout of 10 minutes plays no role."""
    run = settings(data_dir, tmp_path / "run", save_interval=3)
    job = start(run, tmp_path, 1, partial(pause_at_step, 9, str(tmp_path / "gate")))
    survivor = job.children[1 - killed]
    job.children[killed].signal(signal.SIGKILL)
    survivor.signal(signal.SIGTERM)  # as torchrun does
    survivor.wait_for("signal received")
    (tmp_path / "gate").touch()
    assert survivor.status() == FAILED, job.output()
    output = survivor.output.read_text()
    assert output.count(LOST.format(killed)) == 1, output
    assert "SIGTERM" not in output
    assert "Traceback" not in output
    assert valid_checkpoints(tmp_path / "run")[-1] == 6
    resume(run, tmp_path, uninterrupted)


@pytest.mark.slow
def test_killed_rank_is_named_among_many(data_dir, tmp_path):
    """Only the neighbors of a rank have open connections to it."""
    run = settings(data_dir, tmp_path / "run", batch_size=1)
    job = start(run, tmp_path, 2, partial(pause_at_step, 4, str(tmp_path / "gate")), size=4)
    job.children[2].signal(signal.SIGKILL)
    assert job.statuses() == [FAILED, FAILED, -signal.SIGKILL, FAILED], job.output()
    assert job.output().count(LOST.format(2)) == 1, job.output()
    assert job.output().count("error") == 1


@pytest.mark.slow
def test_rank_killed_during_the_last_save(data_dir, tmp_path, uninterrupted):
    run = settings(data_dir, tmp_path / "run", save_interval=10)
    job = start(run, tmp_path, 0, partial(pause_in_last_write, str(tmp_path / "gate")))
    job.children[0].signal(signal.SIGKILL)
    assert job.children[1].status() == FAILED, job.output()
    assert job.output().count(LOST.format(0)) == 1, job.output()
    assert valid_checkpoints(tmp_path / "run") == [10, 20]
    resume(run, tmp_path, uninterrupted)


def pause_in_last_write(gate: str):
    shrink_nano()
    save = checkpointing.save_checkpoint

    def save_or_pause(contents, path):
        if contents["step"] == STEPS:
            path.with_name(path.name + ".partial").touch()
            print("paused", flush=True)
            wait_until(lambda: os.path.exists(gate))
        return save(contents, path)

    checkpointing.save_checkpoint = save_or_pause


@pytest.mark.slow
@pytest.mark.parametrize("stalls", ["process", "data"])
def test_stalled_rank_ends_the_job_after_the_timeout(data_dir, tmp_path, stalls):
    run = settings(data_dir, tmp_path / "run", timeout=15)
    gate = str(tmp_path / "gate")
    job = start(run, tmp_path, 1, partial(stall_data, gate) if stalls == "data" else partial(pause_at_step, 6, gate))
    first, stalled = job.children
    if stalls == "process":
        stalled.signal(signal.SIGSTOP)
    assert first.status() == FAILED, job.output()
    assert first.output.read_text().count(LOST.format(1)) == 1, job.output()
    assert "Traceback" not in job.output()
    assert not list_checkpoints(tmp_path / "run")
    if stalls == "process":
        stalled.signal(signal.SIGKILL)
    else:
        stalled.signal(signal.SIGTERM)  # as torchrun does
        assert stalled.status() == FAILED, job.output()
        assert job.output().count("error") == 1, job.output()


def pause_before_backward(step: int, gate: str):
    """Hook: pause before this step's backward pass."""
    shrink_nano()
    backward, steps = torch.Tensor.backward, itertools.count(1)

    def paused(*args, **kwargs):
        if next(steps) == step:
            pause(gate)
        return backward(*args, **kwargs)

    torch.Tensor.backward = paused


@pytest.mark.slow
def test_stalled_rank_is_named_if_others_wait_in_a_group_of_the_mesh(data_dir, tmp_path):
    run = settings(data_dir, tmp_path / "run", timeout=15, batch_size=1, data_parallel="hsdp")
    hook = partial(rank_hook, 1, partial(pause_before_backward, 6, str(tmp_path / "gate")))
    job = Job(run, 4, tmp_path / "output", hook, per_node=2)
    job.children[1].wait_for("paused")
    for rank in (0, 2, 3):
        assert job.children[rank].status() == FAILED, job.output()
    assert job.output().count(LOST.format(1)) == 1, job.output()
    assert job.output().count("error: ") == 1, job.output()
    job.children[1].signal(signal.SIGKILL)


def test_rank_that_never_starts_is_reported(data_dir, tmp_path):
    store = new_store()
    environment = environments(store, 2)[0]
    child = Child(settings(data_dir, tmp_path / "run", timeout=1), tmp_path / "output", shrink_nano, environment)
    assert child.status() == FAILED
    output = child.output.read_text()  # with two warnings of c10d
    assert output.endswith("error: not all 2 ranks started within --timeout 1 s; continue with --resume auto\n")
    assert "Traceback" not in output


def fail_at_step(step: int, error: Exception):
    """Hook: this step's forward pass raises the error."""
    shrink_nano()
    forward, steps = Acceleron.forward, itertools.count(1)

    def failing(*args, **kwargs):
        if next(steps) == step:
            raise error
        return forward(*args, **kwargs)

    Acceleron.forward = failing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (RuntimeError("boom"), BUG, "Traceback (most recent call last)"),
        (torch.OutOfMemoryError("CUDA out of memory"), BAD_INPUT, "error: out of memory: use a smaller model"),
    ],
)
def test_error_on_one_rank_ends_all(data_dir, tmp_path, error, status, shown):
    hook = partial(rank_hook, 1, partial(fail_at_step, 5, error))
    job = Job(settings(data_dir, tmp_path / "run"), 2, tmp_path / "output", hook)
    assert job.statuses() == [FAILED, status], job.output()
    first, second = (child.output.read_text() for child in job.children)
    assert shown in second
    assert "Traceback" not in first
    assert (LOST.format(1) in first) == (status == BUG)  # one line is enough for an error with a clear message
    assert not list_checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_job_survives_random_kills(data_dir, tmp_path, uninterrupted):
    """Kill a random rank at a random interpreter event or checkpoint write, 20 times, and restart all ranks."""
    moments, killed, runs = random.Random(3), 0, 0
    while killed < 20:
        runs += 1
        run, before = settings(data_dir, tmp_path / f"run{runs}", save_interval=3, keep_last=2), []
        while True:
            writing = killed % 4 == 0
            rank = 0 if writing else moments.randrange(2)  # only rank 0 writes
            moment = 1 + int(moments.random() ** 2 * (WRITES if writing else EVENTS))
            hook = partial(rank_hook, rank, partial(killed_at, moment, writing)) if killed < 20 else shrink_nano
            job = Job(run, 2, tmp_path / f"output{runs}.{killed}", hook)
            statuses = job.statuses()
            if statuses == [0, 0]:
                break
            if statuses[1 - rank] != 0:  # else the rank was killed at its exit
                assert sorted(statuses) == [-signal.SIGKILL, FAILED], job.output()
                assert job.output().count(LOST.format(rank)) == 1, job.output()
            assert "Traceback" not in job.output(), job.output()
            killed += 1
            steps = valid_checkpoints(tmp_path / f"run{runs}")
            for step in before:  # a checkpoint is deleted only if two newer ones exist
                assert step in steps or sum(newer > step for newer in steps) >= 2
            before = steps
        assert_bitwise_equal(final_state(tmp_path / f"run{runs}", STEPS)[1], uninterrupted)
        assert not any((tmp_path / f"run{runs}").glob("*.partial"))
        assert not (tmp_path / f"run{runs}" / "run.lock").exists()
    print(f"{killed} kills of {runs} runs")


EVENTS, WRITES = 1_000_000, 4000  # in one run


class Torchrun:
    """train.py on two ranks under the real torchrun."""

    def __init__(self, data_dir, save_dir: Path, *arguments: str, steps: int):
        config = save_dir.with_suffix(".json")
        config.write_text(json.dumps({**SMALL_NANO.to_dict(), "vocab_size": 64}))
        root = Path(__file__).resolve().parents[2]
        run = settings(data_dir, save_dir, max_steps=steps, save_interval=3, config=str(config))
        flags = ("config", "data_dir", "save_dir", "seq_len", "max_steps", "lr", "num_workers", "device", "dtype")
        flags += ("log_interval", "eval_interval", "save_interval", "resume", "batch_size")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
        command += [str(root / "train.py"), "--no_compile", *(f"--{name}={getattr(run, name)}" for name in flags)]
        self.output = save_dir.with_suffix(".output")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output)

    def rank(self, number: int) -> int | None:
        """Return the process of a rank, if it is running."""
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if f"RANK={number}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
        return None

    def wait_for(self, condition: Callable[[], bool]):
        wait_until(lambda: condition() or self.process.poll() is not None)
        assert condition(), self.output.read_text()


@pytest.fixture
def torchrun(data_dir, tmp_path):
    started = []

    def start(*arguments: str, steps: int) -> Torchrun:
        started.append(Torchrun(data_dir, tmp_path / "run", *arguments, steps=steps))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            run.process.terminate()
        run.process.wait()


@pytest.mark.slow
def test_sigterm_to_torchrun(data_dir, tmp_path, uninterrupted, torchrun):
    run = torchrun(steps=100_000)
    run.wait_for(lambda: "step 3/" in run.output.read_text())
    run.process.terminate()
    assert run.process.wait(TIMEOUT) == 1
    output, step = run.output.read_text(), max(list_checkpoints(tmp_path / "run"))
    where = f"everything is saved in {tmp_path}/run/checkpoint_{step}.pt; continue with --resume auto"
    assert output.count(f"SIGTERM: stopped at step {step}; {where}") == 1, output
    assert output.count("SIGTERM: saving and stopping after this step") == 1
    assert output.count("Traceback") == 1  # torchrun's own
    assert records(tmp_path / "run")[-1]["step"] <= step


@pytest.mark.slow
def test_torchrun_restarts_killed_ranks(data_dir, tmp_path, torchrun):
    steps, kills = 200, 5
    reference = Job(settings(data_dir, tmp_path / "reference", max_steps=steps), 2, tmp_path / "output", shrink_nano)
    assert reference.statuses() == [0, 0], reference.output()
    run, newest = torchrun(f"--max_restarts={kills}", steps=steps), 0
    for number in range(kills):
        run.wait_for(lambda newest=newest: max(list_checkpoints(tmp_path / "run"), default=0) > newest)
        os.kill(run.rank(number % 2), signal.SIGKILL)
        lost = LOST.format(number % 2)
        run.wait_for(lambda lost=lost, count=number // 2 + 1: run.output.read_text().count(lost) == count)
        newest = max(list_checkpoints(tmp_path / "run"))
    assert run.process.wait(TIMEOUT) == 0, run.output.read_text()
    output = run.output.read_text()
    assert output.count("error: ") == kills
    assert "SIGTERM: " not in output
    assert "Traceback" not in output
    assert_bitwise_equal(final_state(tmp_path / "run", steps)[1], final_state(tmp_path / "reference", steps)[1])
