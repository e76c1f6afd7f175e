"""The training loop on its own: which steps it trains, logs and saves, and where a stop request ends it."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from runs import MEASURED, assert_bitwise_equal, final_state, options, records

from acceleron.checkpoint import list_checkpoints
from acceleron.errors import RunStopped
from acceleron.training import train
from acceleron.training.loop import training_loop
from acceleron.training.setup import build_trainer, open_outputs
from acceleron.training.signals import StopSignals
from acceleron.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_nano")


def run_loop(run, monkeypatch, stop_after: int | None = None):
    """Run the loop, and again if it ends at the stop request after the log line of step `stop_after`."""
    Path(run.save_dir).mkdir(exist_ok=True)
    trainer, _ = build_trainer(run, None)
    metrics, checkpoints = open_outputs(trainer, None)
    stop, write, ends = StopSignals(), metrics.write, []

    def write_and_stop(record):
        write(record)
        stop.requested = "SIGTERM" if record["step"] == stop_after else None

    monkeypatch.setattr(metrics, "write", write_and_stop)
    with closing(trainer.loader), closing(metrics), closing(checkpoints):
        while trainer.step < run.max_steps:
            stop.requested = None
            training_loop(trainer, checkpoints, metrics, stop)
            ends.append(trainer.step)
    return ends


def log(save_dir):
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in records(save_dir)]


def test_loop_logs_at_every_interval_and_leaves_the_last_step_to_its_caller(data_dir, tmp_path, monkeypatch):
    run = options(data_dir, tmp_path, max_steps=9, log_interval=5, save_interval=4, eval_interval=7)
    assert run_loop(run, monkeypatch) == [9]
    assert [line["step"] for line in records(tmp_path)] == [4, 5, 7, 8, 9]
    assert [line["step"] for line in records(tmp_path) if "val_loss" in line] == [7, 9]
    assert list(list_checkpoints(tmp_path)) == [4, 8]


def test_stop_request_ends_the_loop_after_the_step_and_changes_nothing(data_dir, tmp_path, monkeypatch):
    settings = dict(max_steps=9, log_interval=3, save_interval=100, eval_interval=4)
    assert run_loop(options(data_dir, tmp_path / "expected", **settings), monkeypatch) == [9]
    assert run_loop(options(data_dir, tmp_path / "stopped", **settings), monkeypatch, stop_after=6) == [6, 9]
    assert log(tmp_path / "stopped") == log(tmp_path / "expected")


def test_stopped_evaluation_of_the_last_step_is_repeated(data_dir, tmp_path, monkeypatch):
    """The second process trains no step. It writes the log line and saves the step again."""
    run = options(data_dir, tmp_path / "run", max_steps=3, save_interval=100, eval_interval=100)
    train(replace(run, save_dir=str(tmp_path / "expected")))
    evaluations, validate = [], Trainer.validate
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", lambda *args: evaluations.append(args) or validate(*args))
        patch.setattr(StopSignals, "is_requested", lambda stop: bool(evaluations))
        with pytest.raises(RunStopped, match=r"stopped at step 3; everything is saved in .*checkpoint_3\.pt"):
            train(run)
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2]
    train(replace(run, resume="auto"))
    assert_bitwise_equal(final_state(tmp_path / "run", 3), final_state(tmp_path / "expected", 3))
