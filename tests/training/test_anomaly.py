"""Steps without a finite loss or gradient are skipped and logged. Loss spikes are logged, and skipped on request."""

import copy
import dataclasses
import json
import math
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch
from runs import assert_bitwise_equal, final_state, options, records
from waiting import TIMEOUT

from acceleron import ModelConfig
from acceleron.checkpoint import list_checkpoints, load_checkpoint
from acceleron.data import Loader, Shards
from acceleron.errors import RunFailed, RunStopped
from acceleron.model import Acceleron
from acceleron.training import anomaly, train
from acceleron.training.anomaly import SPIKE_WINDOW, AnomalyDetector
from acceleron.training.signals import StopSignals
from acceleron.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_nano")


@pytest.fixture
def poison(monkeypatch):
    """Apply `change` to the model's output for these training micro-batches (the first is 1)."""

    def set_up(batches, change):
        forward, count = Acceleron.forward, [0]

        def changed(self, input_ids, labels=None):
            output = forward(self, input_ids, labels)
            if not torch.is_grad_enabled():
                return output
            count[0] += 1
            return change(output) if count[0] in batches else output

        monkeypatch.setattr(Acceleron, "forward", changed)

    return set_up


def nan_loss(output):
    return output._replace(loss=output.loss * math.nan, cross_entropy=output.cross_entropy * math.nan)


def inf_gradient(output):
    """The loss keeps its value."""
    return output._replace(loss=output.loss + (output.loss - output.loss.detach()) * math.inf)


@pytest.mark.parametrize("change", [nan_loss, inf_gradient])
def test_skipped_step_does_not_advance_the_optimizer(data_dir, tmp_path, poison, change):
    poison({3}, change)
    train(options(data_dir, tmp_path, max_steps=4, save_interval=1))
    # The save after the skipped third step waits for the next good step.
    assert list(list_checkpoints(tmp_path)) == [1, 2, 4]
    second, fourth = (load_checkpoint(tmp_path / f"checkpoint_{step}.pt") for step in (2, 4))
    assert {int(state["step"]) for state in second["optimizer"]["state"].values()} == {2}
    assert {int(state["step"]) for state in fourth["optimizer"]["state"].values()} == {3}
    assert (fourth["tokens"], fourth["data"]["position"]) == (4 * 4 * 64, 16)


@pytest.mark.parametrize("change", [nan_loss, inf_gradient])
def test_skipped_step_leaves_weights_and_state_unchanged(data_dir, tmp_path, poison, change):
    config = ModelConfig.preset("nano", vocab_size=64)
    run = Trainer(options(data_dir, tmp_path), config, Shards(data_dir), torch.device("cpu"), torch.float32)
    poison({3}, change)
    states = []
    for _ in range(4):
        run.train_step(1e-3)
        state = run.state_dict()
        states.append(copy.deepcopy({name: state[name] for name in ("model", "optimizer")}))
    first, second, third, fourth = states
    assert_bitwise_equal(third, second)
    for before, after in ((first, second), (third, fourth)):
        assert all(not torch.equal(before["model"][name], after["model"][name]) for name in before["model"])


def test_skipped_step_is_logged_with_its_rows_and_excluded_from_means(data_dir, tmp_path, poison, capsys):
    """The logged rows of the shard contain the step's two micro-batches."""
    settings = dict(max_steps=4, batch_size=2, grad_accum=2, log_interval=4, seq_len=256)
    train(options(data_dir, tmp_path / "good", **settings | {"log_interval": 1}))
    losses = [line["loss"] for line in records(tmp_path / "good")]
    poison({5}, nan_loss)  # the first micro-batch of the third step
    capsys.readouterr()
    train(options(data_dir, tmp_path / "bad", **settings))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: step 3: loss nan, gradient norm nan: skipped; batch from ")
    loader = Loader(Shards(data_dir), seq_len=256, batch_size=2, vocab_size=64, seed=42)
    batches = [next(loader) for _ in range(6)]
    shard = np.load(data_dir / "shard_00000.npy")
    for part, batch in zip(warnings[0].split("batch from ")[1].split("; "), batches[4:6], strict=True):
        path, rows = part.split(" rows ")
        assert path == str(data_dir / "shard_00000.npy")
        named = {shard[int(row)].tobytes() for row in rows.split(", ")}
        assert named == {row.astype(np.int32).tobytes() for row in batch.numpy()}
    (line,) = records(tmp_path / "bad")
    assert line["skipped_steps"] == 1
    # The first two steps equal the good run's. The fourth starts from the weights after the second step.
    assert line["loss"] == pytest.approx(np.mean([*losses[:2], losses[2]]), abs=0.05)
    assert "NaN" not in (tmp_path / "bad" / "metrics.jsonl").read_text()


def test_run_stops_after_max_bad_steps_and_names_the_last_good_checkpoint(data_dir, tmp_path, poison, capsys):
    poison({5, 6} | set(range(8, 100)), nan_loss)
    run = options(data_dir, tmp_path, max_steps=40, save_interval=2, max_bad_steps=3, log_interval=50, eval_interval=50)
    with pytest.raises(RunFailed) as failure:
        train(run)
    # Steps 5 and 6 are only two in a row; steps 8 to 10 are three. The model of step 7 may have diverged already.
    assert "stopped at step 10 without saving, after 3 skipped steps in a row" in str(failure.value)
    assert f"the last good checkpoint is {tmp_path / 'checkpoint_4.pt'}" in str(failure.value)
    assert list(list_checkpoints(tmp_path)) == [2, 4]
    assert (tmp_path / "checkpoint_7.pt.diverged").exists()
    assert all(bool(w.isfinite().all()) for w in load_checkpoint(tmp_path / "checkpoint_4.pt")["model"].values())
    assert "warning: step 9: loss nan" in capsys.readouterr().err


def test_log_of_only_skipped_steps_is_valid_json(data_dir, tmp_path, poison):
    poison({1, 2}, nan_loss)
    train(options(data_dir, tmp_path, max_steps=3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert [(line["loss"], line["grad_norm"], line["skipped_steps"]) for line in strict[:2]] == [(None, None, 1)] * 2
    assert 3.9 < strict[2]["loss"] < 4.4


def test_checkpoint_of_a_diverged_model_is_renamed(data_dir, tmp_path, capsys):
    """The diverging step has a finite loss and gradient and is saved; only the next step shows the divergence."""
    run = options(data_dir, tmp_path, lr=1e30, grad_clip=0.0, warmup_steps=0, save_interval=1, keep_last=1)
    with pytest.raises(RunFailed, match="10 skipped steps in a row; there is no good checkpoint yet"):
        train(run)
    assert not list_checkpoints(tmp_path)
    assert (tmp_path / "checkpoint_1.pt.diverged").exists()
    assert "checkpoint_1.pt: renamed to checkpoint_1.pt.diverged" in capsys.readouterr().err


def test_last_good_checkpoint_is_kept_until_a_newer_one_is_known_to_be_good(data_dir, tmp_path):
    good = options(data_dir, tmp_path, max_steps=3, save_interval=1, keep_last=1)
    train(good)
    assert list(list_checkpoints(tmp_path)) == [2, 3]
    diverging = dataclasses.replace(good, max_steps=30, lr=1e30, grad_clip=0.0, resume="auto")
    with pytest.raises(RunFailed, match=f"the last good checkpoint is {tmp_path / 'checkpoint_3.pt'}"):
        train(diverging)
    assert 3 in list_checkpoints(tmp_path)
    train(dataclasses.replace(good, max_steps=5, resume="auto"))
    assert list(list_checkpoints(tmp_path)) == [4, 5]


def test_model_with_non_finite_final_validation_loss_is_not_saved(data_dir, tmp_path, monkeypatch):
    forward = Acceleron.forward

    def evaluated(*args, **kwargs):
        output = forward(*args, **kwargs)
        return output if torch.is_grad_enabled() else nan_loss(output)

    monkeypatch.setattr(Acceleron, "forward", evaluated)
    with pytest.raises(RunFailed, match="without saving, because the last validation loss is not finite"):
        train(options(data_dir, tmp_path, max_steps=2, save_interval=100))
    assert not list_checkpoints(tmp_path)
    assert records(tmp_path)[-1]["val_loss"] is None


def test_run_that_ends_with_skipped_steps_is_saved(data_dir, tmp_path, poison):
    """Skipped steps do not change the weights."""
    poison({4, 5}, nan_loss)
    train(options(data_dir, tmp_path, max_steps=5, save_interval=100))
    saved = load_checkpoint(tmp_path / "checkpoint_5.pt")
    assert saved["statistics"]["consecutive_skips"] == 2
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {3}


def test_consecutive_skips_are_counted_across_a_resume(data_dir, tmp_path, poison):
    poison({4, 5}, nan_loss)
    run = options(data_dir, tmp_path, max_steps=5, save_interval=100, max_bad_steps=3)
    train(run)
    poison({1}, nan_loss)
    with pytest.raises(RunFailed, match="stopped at step 6 without saving, after 3 skipped steps in a row"):
        train(dataclasses.replace(run, max_steps=20, resume="auto"))


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (MemoryError(), RunFailed, r"out of memory.*; stopped at step 4; everything is saved in .*checkpoint_4\.pt"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_error_in_a_step_saves_all_previous_steps(data_dir, tmp_path, poison, error, raised, message):
    """The resumed run equals a run without the error."""

    def fail(output):
        raise error

    run = options(
        data_dir, tmp_path / "run", grad_accum=2, batch_size=2, max_steps=6, save_interval=100, log_interval=6
    )
    train(dataclasses.replace(run, save_dir=str(tmp_path / "uninterrupted")))
    poison({10}, fail)  # the second micro-batch of the fifth step
    with pytest.raises(raised, match=message):
        train(run)
    assert list(list_checkpoints(tmp_path / "run")) == [4]
    poison(set(), fail)
    train(dataclasses.replace(run, resume="auto"))
    assert_bitwise_equal(final_state(tmp_path / "run", 6), final_state(tmp_path / "uninterrupted", 6))


def test_error_after_a_stop_request_counts_as_the_stop(data_dir, tmp_path, poison, monkeypatch):
    """Happens if the compiler also gets the signal. The error can be empty, and the step may already be saved."""
    handle, handled = StopSignals._handle, threading.Event()
    monkeypatch.setattr(StopSignals, "_handle", lambda stop, number: handle(stop, number) or handled.set())

    def fail(output):
        os.kill(os.getpid(), signal.SIGTERM)
        assert handled.wait(TIMEOUT)
        raise MemoryError

    for name, interval in (("unsaved", 100), ("saved", 4)):
        handled.clear()
        poison({5}, fail)
        with pytest.raises(RunStopped, match=r"SIGTERM: stopped at step 4; everything is saved in .*checkpoint_4\.pt"):
            train(options(data_dir, tmp_path / name, save_interval=interval))
        assert list(list_checkpoints(tmp_path / name)) == [4]


def check_losses(losses, skip_spikes=False):
    detector, norm = AnomalyDetector(torch.device("cpu"), skip_spikes), torch.tensor(1.0)
    skipped = [bool(detector.check(step, 10 * step, torch.tensor(loss), norm)) for step, loss in enumerate(losses)]
    return detector.read(), skipped


def test_spike_threshold_matches_the_weighted_mean_and_deviation():
    """Compares both with their definitions: weights of 0.99**age, after a plain mean of the first hundred steps."""
    rng = np.random.default_rng(0)
    losses = 3 + 0.1 * rng.standard_normal(400)
    losses[[250, 251, 300, 350]] = [3.5, 9.0, 3.55, 9.0]
    expected, counted = [], []
    for step, loss in enumerate(losses):
        if step >= SPIKE_WINDOW:
            weights = np.ones(step)
            for later in range(SPIKE_WINDOW, step):
                weights[:later] *= 1 - 1 / SPIKE_WINDOW
            mean = np.average(counted, weights=weights)
            threshold = mean + 6 * np.sqrt(np.average((np.array(counted) - mean) ** 2, weights=weights))
            if loss > threshold:
                expected.append((step, threshold))
            loss = min(loss, threshold)
        counted.append(loss)
    found, skipped = check_losses(losses)
    assert [a.step for a in found] == [step for step, _ in expected]
    assert {251, 350} <= {step for step, _ in expected}
    assert [a.threshold for a in found] == pytest.approx([threshold for _, threshold in expected])
    assert not any(skipped)
    found, skipped = check_losses(losses, skip_spikes=True)
    assert [step for step, skip in enumerate(skipped) if skip] == [step for step, _ in expected]
    assert [a.position for a in found] == [10 * step for step, _ in expected]


def test_falling_or_persistently_high_loss_is_not_a_spike():
    rng = np.random.default_rng(1)
    falling = 10 * np.exp(-np.arange(1000) / 200) + 0.02 * rng.standard_normal(1000)
    assert check_losses(falling)[0] == []
    risen = np.concatenate([falling, 5 + 0.02 * rng.standard_normal(200)])
    steps = [a.step for a in check_losses(risen)[0]]
    assert steps[0] == 1000
    assert steps[-1] < 1100


def test_spike_is_logged_and_skipped_only_with_skip_spikes(data_dir, tmp_path, poison, capsys, monkeypatch):
    monkeypatch.setattr(anomaly, "SPIKE_WINDOW", 10)
    for skip in (False, True):
        poison({11}, lambda output: output._replace(cross_entropy=output.cross_entropy + 20))
        settings = dict(max_steps=12, log_interval=12, eval_interval=12, save_interval=12)
        train(options(data_dir, tmp_path / str(skip), skip_spikes=skip, **settings))
        (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        kind = ("skipped" if skip else "a spike") + r", above \d\.\d+; batch from"
        assert re.match(rf"warning: step 11: loss 2\d\.\d+, gradient norm \S+: {kind}", warning)
        state = load_checkpoint(tmp_path / str(skip) / "checkpoint_12.pt")["optimizer"]["state"]
        assert {int(entry["step"]) for entry in state.values()} == {11 if skip else 12}
        (line,) = records(tmp_path / str(skip))
        assert line["skipped_steps"] == skip
