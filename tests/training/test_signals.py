"""A signal saves and stops a run within one step. The resumed run equals an uninterrupted one."""

import itertools
import os
import signal
import threading
from functools import partial

import pytest
import torch
from runs import (
    Child,
    SplitWriter,
    assert_bitwise_equal,
    call_during_writes,
    final_state,
    options,
    pause,
    pause_at_step,
    records,
    shrink_nano,
)
from waiting import wait_until

from acceleron.checkpoint import list_checkpoints, load_checkpoint
from acceleron.data import Loader
from acceleron.data.loader import Chunks

STEPS = 40
STOPPED = 75


def settings(data_dir, save_dir, **changes):
    intervals = dict(max_steps=STEPS, log_interval=3, eval_interval=10, save_interval=1000, resume="auto")
    return options(data_dir, save_dir, **intervals | changes)


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    child = Child(settings(data_dir, directory / "run"), directory / "output", shrink_nano)
    assert child.status() == 0, child.output.read_text()
    return final_state(directory / "run", STEPS)


def pause_evaluation(gate: str, stalls: bool = False):
    """Hook: pause at the first of endless evaluation batches. With `stalls`, the batch never arrives."""
    shrink_nano()
    make = Loader.held_out

    def make_paused(training_loader):
        loader = make(training_loader)
        batch, polls = next(loader), itertools.count(1)

        def poll(timeout):
            number = next(polls)
            print("poll", number, flush=True)
            if number == 1:
                pause(gate)
            return None if stalls else batch

        loader.poll, loader.position = poll, 0
        return loader

    Loader.held_out = make_paused


def stall_data(gate: str):
    """Hook: the sixth batch never arrives, with or without the gate."""
    shrink_nano()
    read, poll, count = Chunks.batch, Loader.poll, itertools.count(1)

    def stall(*args):
        return threading.Event().wait() if next(count) == 6 else read(*args)

    def poll_and_print(loader, timeout):
        batch = poll(loader, timeout)
        if batch is None and loader.position == 5 * loader.batch_size * loader.world_size:
            print("paused", flush=True)
        return batch

    Chunks.batch, Loader.poll = stall, poll_and_print


def pause_first_write(gate: str):
    """Hook: pause while writing the first checkpoint, at step 3. Training continues."""
    shrink_nano()
    writes = itertools.count(1)
    call_during_writes(lambda: pause(gate) if next(writes) == 1 else None)


PHASES = {  # hook that pauses the run in a phase, and the steps at which it can stop
    "warmup": (partial(pause_at_step, 4), {4}),  # the learning rate warmup takes 4 steps
    "step before an evaluation": (partial(pause_at_step, 10), {10}),
    "evaluation": (pause_evaluation, {10}),
    "data stall": (stall_data, {5}),
    "data stall in an evaluation": (partial(pause_evaluation, stalls=True), {10}),
    "writing a checkpoint": (pause_first_write, {3, 4, 5, 6}),  # the checkpoint at step 6 waits for this one
}


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("warmup", signal.SIGTERM),
        ("warmup", signal.SIGINT),
        ("warmup", signal.SIGUSR1),
        ("warmup", signal.SIGHUP),
        ("step before an evaluation", signal.SIGTERM),
        ("evaluation", signal.SIGTERM),
        ("data stall", signal.SIGUSR1),
        ("data stall in an evaluation", signal.SIGTERM),
        ("writing a checkpoint", signal.SIGINT),
    ],
)
def test_signal_saves_and_stops_the_run_within_one_step(data_dir, tmp_path, uninterrupted, phase, number):
    hook, steps = PHASES[phase]
    run = settings(data_dir, tmp_path / "run", save_interval=3 if phase == "writing a checkpoint" else 1000)
    child = Child(run, tmp_path / "output", partial(hook, gate=str(tmp_path / "gate")))
    child.wait_for("paused")
    assert any((tmp_path / "run").glob("*.partial")) == (phase == "writing a checkpoint")
    child.signal(number)
    child.wait_for(f"{number.name}: saving and stopping after this step")
    (tmp_path / "gate").touch()
    status, output = child.status(), child.output.read_text()
    assert status == STOPPED, output
    step = max(list_checkpoints(tmp_path / "run"))
    assert (
        f"{number.name}: stopped at step {step}; everything is saved in {tmp_path}/run/checkpoint_{step}.pt" in output
    )
    assert "Traceback" not in output
    assert "note:" not in output  # an error after the signal
    assert not (tmp_path / "run" / "run.lock").exists()
    assert step in steps
    assert "poll 2" not in output or "stall" in phase  # no evaluation batch after the signal
    again = Child(run, tmp_path / "output", shrink_nano)
    assert again.status() == 0, again.output.read_text()
    log, state = final_state(tmp_path / "run", STEPS)
    assert_bitwise_equal(state, uninterrupted[1])
    if run.save_interval > STEPS:  # each checkpoint also writes a log line
        assert_bitwise_equal(log, uninterrupted[0])


COMPILER = """#!/bin/sh
case "$*" in *.cpp*)
    if [ -e {0}/pause ]; then
        touch {0}/compiling
        while [ -e {0}/pause ]; do sleep 0.02; done
    fi
esac
exec g++ "$@"
"""


@pytest.fixture
def compiler(tmp_path):
    """A compiler that creates a file "compiling" and waits while the file "pause" exists."""
    path = tmp_path / "compiler" / "compiler"
    path.parent.mkdir()
    path.write_text(COMPILER.format(path.parent))
    path.chmod(0o755)
    yield path
    path.with_name("pause").unlink(missing_ok=True)


def compile_with(compiler: str):
    """Hook: use this compiler and an empty cache."""
    from torch._inductor import config

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{compiler}.cache"
    config.cpp.cxx = (None, compiler)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_during_the_first_compilation_exits_without_saving(data_dir, tmp_path, compiler, number):
    compiler.with_name("pause").touch()
    run = settings(data_dir, tmp_path / "run", no_compile=False)
    child = Child(run, tmp_path / "output", partial(compile_with, str(compiler)))
    wait_until(compiler.with_name("compiling").exists)
    assert "step" not in child.output.read_text().rpartition("writing to")[2]
    child.signal(number)
    assert child.status() == STOPPED
    assert f"{number.name} before the end of the first step: nothing new to save" in child.output.read_text()
    assert not list_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "run.lock").exists()


def compile_evaluation_with(compiler: str, gate: str):
    """Hook: pause only the evaluation's compilation, in a new process group."""
    shrink_nano()
    os.setsid()
    make = Loader.held_out

    def make_and_pause(loader):
        compile_with(compiler)
        open(gate, "w").close()
        return make(loader)

    Loader.held_out = make_and_pause


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_that_also_kills_the_compiler_loses_nothing(data_dir, tmp_path, compiler, number):
    """Terminals and schedulers signal the entire process group. Here the first evaluation is compiling at that time."""
    run = settings(data_dir, tmp_path / "run", no_compile=False, batch_size=8, eval_interval=2, log_interval=1)
    gate = compiler.with_name("pause")
    child = Child(run, tmp_path / "output", partial(compile_evaluation_with, str(compiler), str(gate)))
    wait_until(compiler.with_name("compiling").exists)
    assert "step 1/" in child.output.read_text()
    assert "step 2/" not in child.output.read_text()
    os.killpg(child.process.pid, number)
    child.wait_for(f"{number.name}: saving and stopping after this step")
    gate.unlink()
    assert child.status() == STOPPED, child.output.read_text()
    assert list(list_checkpoints(tmp_path / "run")) == [2]
    assert "Traceback" not in child.output.read_text()


def pause_second_save(gate: str):
    shrink_nano()
    save, saves = torch.save, itertools.count(1)

    def save_and_pause(contents, file):
        save(contents, SplitWriter(file, lambda: pause(gate)) if next(saves) == 2 else file)

    torch.save = save_and_pause


def test_second_interrupt_exits_immediately_and_damages_no_file(data_dir, tmp_path, uninterrupted):
    run = settings(data_dir, tmp_path / "run", save_interval=10)
    child = Child(run, tmp_path / "output", partial(pause_second_save, str(tmp_path / "no gate")))
    child.wait_for("saved")
    child.signal(signal.SIGINT)
    child.wait_for("SIGINT: saving and stopping after this step")
    child.wait_for("paused")
    child.signal(signal.SIGINT)
    assert child.status() == 130
    assert any((tmp_path / "run").glob("*.partial"))  # the second interrupt came during a write
    assert load_checkpoint(tmp_path / "run" / "checkpoint_10.pt")["step"] == 10
    assert Child(run, tmp_path / "output", shrink_nano).status() == 0
    assert not any((tmp_path / "run").glob("*.partial"))
    assert_bitwise_equal(final_state(tmp_path / "run", STEPS), uninterrupted)


def ignore_hangup(gate: str):
    pause_at_step(4, gate)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_ignored_signal_stays_ignored(data_dir, tmp_path):
    """A closed terminal must not end a run under nohup."""
    run = settings(data_dir, tmp_path / "run", max_steps=20)
    child = Child(run, tmp_path / "output", partial(ignore_hangup, str(tmp_path / "gate")))
    child.wait_for("paused")
    child.signal(signal.SIGHUP)
    (tmp_path / "gate").touch()
    assert child.status() == 0, child.output.read_text()
    assert records(tmp_path / "run")[-1]["step"] == 20
