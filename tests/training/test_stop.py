"""A signal ends a run within a step, saved; started again it ends as an uninterrupted one."""

import itertools
import os
import signal
import threading
from functools import partial

import pytest
import torch
from runs import (
    Child,
    HalfWritten,
    assert_same_bits,
    hold,
    hold_step,
    learned,
    options,
    records,
    shrink_nano,
    within_writes,
)
from waiting import wait_until

from acceleron.checkpoint import list_checkpoints, load_checkpoint
from acceleron.data import Loader
from acceleron.data.loader import Chunks
from acceleron.training import loop

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
    return learned(directory / "run", STEPS)


def hold_evaluation(gate: str, stalls: bool = False):
    """At the first of 50 batches; with `stalls` it never comes."""
    shrink_nano()
    make = loop.validation_loader

    def make_held(*args, **kwargs):
        loader, _ = make(*args, **kwargs)
        batch, polls = next(loader), itertools.count(1)

        def poll(timeout):
            number = next(polls)
            print("poll", number, flush=True)
            if number == 1:
                hold(gate)
            return None if stalls else batch

        loader.poll = poll
        return loader, 50

    loop.validation_loader = make_held


def stall_data(gate: str):
    """The sixth batch never comes, which does not wait for the gate."""
    shrink_nano()
    read, poll, count = Chunks.batch, Loader.poll, itertools.count(1)

    def stall(*args):
        return threading.Event().wait() if next(count) == 6 else read(*args)

    def tell(loader, timeout):
        batch = poll(loader, timeout)
        if batch is None and loader.position == 5 * loader.batch_size:
            print("held", flush=True)
        return batch

    Chunks.batch, Loader.poll = stall, tell


def hold_first_write(gate: str):
    """That of the checkpoint of step 3, while the training goes on."""
    shrink_nano()
    writes = itertools.count(1)
    within_writes(lambda: hold(gate) if next(writes) == 1 else None)


PHASES = {  # a hook that holds the run in that phase, and the steps at which it may end then
    "warm-up": (partial(hold_step, 4), {4}),  # of the learning rate, which takes 4 steps
    "evaluation": (hold_evaluation, {10}),
    "data stall": (stall_data, {5}),
    "data stall in an evaluation": (partial(hold_evaluation, stalls=True), {10}),
    "writing a checkpoint": (hold_first_write, {3, 4, 5, 6}),  # the next one, of step 6, waits for it
}


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("warm-up", signal.SIGTERM),
        ("warm-up", signal.SIGINT),
        ("warm-up", signal.SIGUSR1),
        ("warm-up", signal.SIGHUP),
        ("evaluation", signal.SIGTERM),
        ("data stall", signal.SIGUSR1),
        ("data stall in an evaluation", signal.SIGTERM),
        ("writing a checkpoint", signal.SIGINT),
    ],
)
def test_a_signal_saves_and_ends_the_run_within_a_step(data_dir, tmp_path, uninterrupted, phase, number):
    hook, steps = PHASES[phase]
    run = settings(data_dir, tmp_path / "run", save_interval=3 if phase == "writing a checkpoint" else 1000)
    child = Child(run, tmp_path / "output", partial(hook, gate=str(tmp_path / "gate")))
    child.wait_for("held")
    assert any((tmp_path / "run").glob("*.partial")) == (phase == "writing a checkpoint")
    child.signal(number)
    child.wait_for(f"{number.name}: saving and stopping after this step")
    (tmp_path / "gate").touch()
    assert child.status() == STOPPED, child.output.read_text()
    step = max(list_checkpoints(tmp_path / "run"))
    said = child.output.read_text()
    assert f"{number.name}: stopped at step {step}; {tmp_path}/run/checkpoint_{step}.pt holds all of it" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "run.lock").exists()
    assert step in steps
    assert "poll 2" not in said or "stall" in phase  # of an evaluation's 50 batches, none after the signal

    again = Child(run, tmp_path / "output", shrink_nano)
    assert again.status() == 0, again.output.read_text()
    log, state = learned(tmp_path / "run", STEPS)
    assert_same_bits(state, uninterrupted[1])
    if run.save_interval > STEPS:  # a checkpoint brings a line with it
        assert_same_bits(log, uninterrupted[0])


COMPILER = """#!/bin/sh
case "$*" in *.cpp*)
    if [ -e {0}/hold ]; then
        touch {0}/compiling
        while [ -e {0}/hold ]; do sleep 0.02; done
    fi
esac
exec g++ "$@"
"""


@pytest.fixture
def compiler(tmp_path):
    """While there is a file "hold" beside it, it makes a file "compiling" and waits."""
    path = tmp_path / "compiler" / "compiler"
    path.parent.mkdir()
    path.write_text(COMPILER.format(path.parent))
    path.chmod(0o755)
    yield path
    path.with_name("hold").unlink(missing_ok=True)


def compile_with(compiler: str):
    """And find nothing that was compiled before."""
    from torch._inductor import config

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{compiler}.cache"
    config.cpp.cxx = (None, compiler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_compiling_ends_at_once_and_leaves_nothing(data_dir, tmp_path, compiler, number):
    compiler.with_name("hold").touch()
    run = settings(data_dir, tmp_path / "run", no_compile=False)
    child = Child(run, tmp_path / "output", partial(compile_with, str(compiler)))
    wait_until(compiler.with_name("compiling").exists)
    assert "step" not in child.output.read_text().rpartition("writing to")[2]
    child.signal(number)
    assert child.status() == STOPPED
    assert f"{number.name} before the first step was done: nothing new to save" in child.output.read_text()
    assert not list_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "run.lock").exists()


def compile_evaluation_with(compiler: str, hold: str):
    """In a group of its own; what is held is the evaluation's compilation alone."""
    shrink_nano()
    os.setsid()
    make = loop.validation_loader

    def make_and_hold(*args, **kwargs):
        compile_with(compiler)
        open(hold, "w").close()
        return make(*args, **kwargs)

    loop.validation_loader = make_and_hold


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_compiler_too_loses_nothing(data_dir, tmp_path, compiler, number):
    """As a terminal or a scheduler sends it: to all processes of the group, while the first evaluation compiles."""
    run = settings(data_dir, tmp_path / "run", no_compile=False, batch_size=8, eval_interval=2, log_interval=1)
    hold = compiler.with_name("hold")
    child = Child(run, tmp_path / "output", partial(compile_evaluation_with, str(compiler), str(hold)))
    wait_until(compiler.with_name("compiling").exists)
    assert "step 1/" in child.output.read_text()
    assert "step 2/" not in child.output.read_text()
    os.killpg(child.process.pid, number)
    child.wait_for(f"{number.name}: saving and stopping after this step")
    hold.unlink()
    assert child.status() == STOPPED, child.output.read_text()
    assert list(list_checkpoints(tmp_path / "run")) == [2]
    assert "Traceback" not in child.output.read_text()


def hold_second_save(gate: str):
    shrink_nano()
    save, saves = torch.save, itertools.count(1)

    def save_and_hold(contents, file):
        held = next(saves) == 2
        save(contents, HalfWritten(file, lambda: hold(gate)) if held else file)

    torch.save = save_and_hold


def test_a_second_interrupt_ends_at_once_and_harms_no_file(data_dir, tmp_path, uninterrupted):
    run = settings(data_dir, tmp_path / "run", save_interval=10)
    child = Child(run, tmp_path / "output", partial(hold_second_save, str(tmp_path / "no gate")))
    child.wait_for("saved")
    child.signal(signal.SIGINT)
    child.wait_for("SIGINT: saving and stopping after this step")
    child.wait_for("held")
    child.signal(signal.SIGINT)
    assert child.status() == 130
    assert any((tmp_path / "run").glob("*.partial"))  # it was in the middle of a write
    assert load_checkpoint(tmp_path / "run" / "checkpoint_10.pt")["step"] == 10
    assert Child(run, tmp_path / "output", shrink_nano).status() == 0
    assert not any((tmp_path / "run").glob("*.partial"))
    assert_same_bits(learned(tmp_path / "run", STEPS), uninterrupted)


def ignore_hangup(gate: str):
    hold_step(4, gate)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_signal_that_was_ignored_stays_ignored(data_dir, tmp_path):
    """As by nohup, which a closed terminal must not end."""
    run = settings(data_dir, tmp_path / "run", max_steps=20)
    child = Child(run, tmp_path / "output", partial(ignore_hangup, str(tmp_path / "gate")))
    child.wait_for("held")
    child.signal(signal.SIGHUP)
    (tmp_path / "gate").touch()
    assert child.status() == 0, child.output.read_text()
    assert records(tmp_path / "run")[-1]["step"] == 20
