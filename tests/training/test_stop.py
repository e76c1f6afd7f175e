"""A signal ends a run within a step, saved; started again it ends as an uninterrupted one."""

import os
import signal
import time

import pytest
import torch
from runs import Child, SlowFile, assert_same_bits, learned, options, records, shrink_nano, slow_saves, write_shard

from acceleron.data.loader import Chunks
from acceleron.model import Acceleron
from acceleron.training import loop
from acceleron.training.checkpoint import list_checkpoints, load_checkpoint

STEPS = 40
STOPPED = 75


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("data"))


def settings(data_dir, save_dir, **changes):
    intervals = dict(max_steps=STEPS, log_interval=3, eval_interval=10, save_interval=1000, resume="auto")
    return options(data_dir, save_dir, **intervals | changes)


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    child = Child(settings(data_dir, directory / "run"), directory / "output", shrink_nano)
    assert child.status() == 0, child.output.read_text()
    return learned(directory / "run", STEPS)


def slow_steps():
    shrink_nano()
    forward = Acceleron.forward
    Acceleron.forward = lambda *args, **kwargs: time.sleep(0.1) or forward(*args, **kwargs)


def slow_evaluation(stalls: bool = False):
    """Of 50 batches, each of which takes a while, or of one that never comes."""
    shrink_nano()
    make = loop.validation_loader

    def make_slow(*args, **kwargs):
        loader, _ = make(*args, **kwargs)
        batch = next(loader)

        def poll(timeout):
            print("evaluating", flush=True)
            time.sleep(0.2)
            return None if stalls else batch

        loader.poll = poll
        return loader, 50

    loop.validation_loader = make_slow


def stalling_evaluation():
    slow_evaluation(stalls=True)


def stalling_data():
    """The sixth batch never comes."""
    shrink_nano()
    read, count = Chunks.batch, iter(range(1000))

    def stall(self, *args):
        if next(count) == 5:
            print("stalled", flush=True)
            time.sleep(1000)
        return read(self, *args)

    Chunks.batch = stall


def very_slow_saves():
    shrink_nano()
    slow_saves(0.002)


PHASES = {  # hook, the text that tells that it is in that phase
    "warm-up": (slow_steps, "step 3/"),  # of the learning rate, which takes 4 steps
    "evaluation": (slow_evaluation, "evaluating"),
    "data stall": (stalling_data, "step 3/"),
    "data stall in an evaluation": (stalling_evaluation, "evaluating"),
    "writing a checkpoint": (very_slow_saves, "step 3/"),
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
    hook, text = PHASES[phase]
    run = settings(data_dir, tmp_path / "run", save_interval=3 if phase == "writing a checkpoint" else 1000)
    child = Child(run, tmp_path / "output", hook)
    child.wait_for(text)
    if phase == "data stall":
        time.sleep(0.5)  # in which it does the two steps that it has data for
    began = time.monotonic()
    child.signal(number)
    assert child.status(10) == STOPPED, child.output.read_text()
    seconds = time.monotonic() - began
    step = max(list_checkpoints(tmp_path / "run"))
    said = child.output.read_text()
    assert f"{number.name}: stopped at step {step}; {tmp_path}/run/checkpoint_{step}.pt holds all of it" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "run.lock").exists()
    expected_steps = {"data stall": (5, 5)}.get(phase, (10, 10) if "evaluation" in phase else (3, 5))
    assert expected_steps[0] <= step <= expected_steps[1]
    assert seconds < (8 if phase == "writing a checkpoint" else 2)  # one or two writes of 1.5 s

    again = Child(run, tmp_path / "output", shrink_nano)
    assert again.status() == 0, again.output.read_text()
    log, state = learned(tmp_path / "run", STEPS)
    assert_same_bits(state, uninterrupted[1])
    if run.save_interval > STEPS:  # a checkpoint brings a line with it
        assert_same_bits(log, uninterrupted[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_compiling_ends_at_once_and_leaves_nothing(data_dir, tmp_path, number):
    run = settings(data_dir, tmp_path / "run", no_compile=False)
    child = Child(run, tmp_path / "output", FreshCache(tmp_path / "cache"))
    child.wait_for("writing to")
    time.sleep(1)
    assert "step" not in child.output.read_text().rpartition("writing to")[2]
    child.signal(number)
    assert child.status(5) == STOPPED
    assert f"{number.name} before the first step was done: nothing new to save" in child.output.read_text()
    assert not list_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "run.lock").exists()


class FreshCache:
    """Nothing compiled before is found. A class, as the child must be able to unpickle it."""

    def __init__(self, directory, hook=shrink_nano):
        self.directory, self.hook = str(directory), hook

    def __call__(self):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.directory
        self.hook()


def in_a_group_of_its_own():
    shrink_nano()
    os.setsid()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_compiler_too_loses_nothing(data_dir, tmp_path, number):
    """As a terminal or a scheduler sends it: to all processes of the group, while the first evaluation compiles."""
    run = settings(data_dir, tmp_path / "run", no_compile=False, batch_size=8, eval_interval=2, log_interval=1)
    child = Child(run, tmp_path / "output", FreshCache(tmp_path / "cache", in_a_group_of_its_own))
    child.wait_for("step 1/", 300)
    time.sleep(1.5)
    assert "step 2/" not in child.output.read_text()
    os.killpg(child.process.pid, number)
    assert child.status(60) == STOPPED, child.output.read_text()
    assert list(list_checkpoints(tmp_path / "run")) == [2]
    assert "Traceback" not in child.output.read_text()


def test_a_second_interrupt_ends_at_once_and_harms_no_file(data_dir, tmp_path, uninterrupted):
    run = settings(data_dir, tmp_path / "run", save_interval=10)
    child = Child(run, tmp_path / "output", saves_that_slow_down)
    child.wait_for("saved")
    child.wait_for("step 12/")
    child.signal(signal.SIGINT)
    child.wait_for("SIGINT: saving and stopping after this step")
    time.sleep(0.2)
    began = time.monotonic()
    child.signal(signal.SIGINT)
    assert child.status(5) == 130
    assert time.monotonic() - began < 1
    assert any((tmp_path / "run").glob("*.partial"))  # it was in the middle of a write
    assert load_checkpoint(tmp_path / "run" / "checkpoint_10.pt")["step"] == 10
    assert Child(run, tmp_path / "output", shrink_nano).status() == 0
    assert not any((tmp_path / "run").glob("*.partial"))
    assert_same_bits(learned(tmp_path / "run", STEPS), uninterrupted)


def saves_that_slow_down():
    """The first is fast, the others take a minute."""
    shrink_nano()
    save = torch.save
    pauses = iter([0.0, 0.1])
    torch.save = lambda contents, file: save(contents, SlowFile(file, next(pauses)))


def test_a_signal_that_was_ignored_stays_ignored(data_dir, tmp_path):
    """As by nohup, which a closed terminal must not end."""
    child = Child(settings(data_dir, tmp_path / "run", max_steps=20), tmp_path / "output", slow_and_nohup)
    child.wait_for("step 3/")
    child.signal(signal.SIGHUP)
    assert child.status() == 0, child.output.read_text()
    assert records(tmp_path / "run")[-1]["step"] == 20


def slow_and_nohup():
    slow_steps()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
