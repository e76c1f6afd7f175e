"""A resumed run is bitwise identical: losses, weights, optimizer state, data position and statistics."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from runs import assert_bitwise_equal, final_state, options, records

from acceleron.checkpoint import load_checkpoint
from acceleron.data.tokenizer import train_tokenizer
from acceleron.errors import InputError
from acceleron.training import train
from acceleron.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_nano")


def delete_checkpoints_after(save_dir, step: int):
    """Simulate a process that died before the next save."""
    for path in save_dir.glob("checkpoint_*.pt"):
        if int(path.stem.split("_")[1]) > step:
            path.unlink()


# The first of two layers is dense.
OTHER_SHAPE = dict(num_experts=8, top_k=4, d_ff=16, d_ff_shared=0, num_dense_layers=1)
SETTINGS = {
    "eager": dict(no_gradient_checkpointing=True),
    "recomputed, accumulated": dict(grad_accum=2, batch_size=2, num_workers=3),
    "compiled": dict(no_compile=False, no_gradient_checkpointing=True),
    "compiled, recomputed, deterministic": dict(no_compile=False, deterministic=True, dtype="bf16"),
    "dense, bf16": dict(dense=True, dtype="bf16", skip_spikes=True),
    "other shape": OTHER_SHAPE,
    "deterministic, wsd": dict(deterministic=True, schedule="wsd"),
}


SLOW = {"compiled"}  # another case is also compiled


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in SETTINGS])
def test_resumed_run_equals_an_uninterrupted_one(data_dir, tmp_path, case):
    """Saves fall inside log intervals, and evaluation batches are smaller than training batches."""
    torch.set_num_threads(2 if case == "eager" else 1)
    settings = dict(batch_size=8, max_steps=8, save_interval=3, log_interval=4, eval_interval=5) | SETTINGS[case]
    train(options(data_dir, tmp_path / "uninterrupted", **settings))
    expected = final_state(tmp_path / "uninterrupted", 8)
    resumed = options(data_dir, tmp_path / "resumed", **settings)
    train(resumed)
    for step in (6, 3):
        delete_checkpoints_after(tmp_path / "resumed", step)
        train(dataclasses.replace(resumed, resume="auto"))
        assert_bitwise_equal(final_state(tmp_path / "resumed", 8), expected)
    # The losses differ, so the comparison is not trivial.
    assert len({line["loss"] for line in expected[0]}) == len(expected[0]) == 5


def test_steps_do_not_depend_on_global_random_generators(data_dir, tmp_path, monkeypatch):
    """A checkpoint does not contain their states."""
    settings = dict(batch_size=8, max_steps=4, eval_interval=3)
    train(options(data_dir, tmp_path / "expected", **settings))
    step = Trainer.train_step

    def reseeded_step(run, lr):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(run.step)
        step(run, lr)

    monkeypatch.setattr(Trainer, "train_step", reseeded_step)
    train(options(data_dir, tmp_path / "reseeded", **settings))
    assert_bitwise_equal(final_state(tmp_path / "reseeded", 4), final_state(tmp_path / "expected", 4))


@pytest.mark.slow
def test_evaluation_changes_only_the_log(data_dir, tmp_path):
    """The model is compiled with static shapes: a batch with a different shape is compiled separately."""
    settings = dict(batch_size=8, max_steps=4, save_interval=4, log_interval=1) | SETTINGS["compiled"]
    train(options(data_dir, tmp_path / "often", eval_interval=1, **settings))
    train(options(data_dir, tmp_path / "once", eval_interval=4, **settings))
    (often, state), (once, expected) = final_state(tmp_path / "often", 4), final_state(tmp_path / "once", 4)
    assert_bitwise_equal(state, expected)
    assert [line["loss"] for line in often] == [line["loss"] for line in once]
    assert ["val_loss" in line for line in often + once] == [True] * 4 + [False] * 3 + [True]


def test_auto_resumes_from_the_newest_valid_checkpoint_and_warns_about_others(data_dir, tmp_path, capsys):
    train(options(data_dir, tmp_path, max_steps=9, save_interval=3))
    expected = final_state(tmp_path, 9)
    newest, middle = tmp_path / "checkpoint_9.pt", tmp_path / "checkpoint_6.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    content = bytearray(middle.read_bytes())
    content[len(content) // 2] ^= 1
    middle.write_bytes(content)
    capsys.readouterr()
    train(options(data_dir, tmp_path, max_steps=9, save_interval=3, resume="auto"))
    output = capsys.readouterr().err
    warnings = [line for line in output.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "checkpoint_9.pt: truncated" in warnings[0]
    assert "checkpoint_6.pt: damaged: archive/data/" in warnings[1]
    assert f"continuing from {tmp_path / 'checkpoint_3.pt'}, step 3" in output
    assert_bitwise_equal(final_state(tmp_path, 9), expected)


def test_auto_starts_a_new_run_and_leaves_a_complete_one_unchanged(data_dir, tmp_path, capsys):
    run = options(data_dir, tmp_path / "run", max_steps=2, resume="auto")
    train(run)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.is_file()}
    capsys.readouterr()
    train(run)
    assert "training is complete" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.is_file()} == before


def test_auto_never_replaces_damaged_checkpoints(data_dir, tmp_path):
    run = options(data_dir, tmp_path, max_steps=1)
    train(run)
    (tmp_path / "checkpoint_1.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"has no valid checkpoint"):
        train(dataclasses.replace(run, resume="auto", max_steps=2))
    assert (tmp_path / "checkpoint_1.pt").read_bytes() == b"damaged"


def test_resuming_with_different_flags_uses_them_and_warns(data_dir, tmp_path, capsys):
    train(options(data_dir, tmp_path, max_steps=6))
    checkpoint = str(tmp_path / "checkpoint_6.pt")
    capsys.readouterr()
    train(options(data_dir, tmp_path, max_steps=12, weight_decay=0.5, batch_size=2, bad_data="skip", resume=checkpoint))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [line.split()[1] for line in warnings] == ["--batch_size", "--max_steps", "--weight_decay", "--bad_data"]
    assert warnings[0] == "warning: --batch_size is 2, but was 4 before"
    contents = load_checkpoint(tmp_path / "checkpoint_12.pt")
    assert [group["weight_decay"] for group in contents["optimizer"]["param_groups"]] == [0.5, 0.0]
    assert records(tmp_path)[-1]["tokens"] == 6 * 4 * 64 + 6 * 2 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seed=7), "seed 42, not 7"),
        (dict(seq_len=32), "seq_len 64, not 32"),
        (dict(dense=True), "dense False"),
        (dict(vocab_size=128), "vocab_size 64"),
        (dict(top_k=1), r"top_k 2 \(here 1\)"),
        (dict(data_dir="others"), "shard_00000.npy has different content"),
    ],
)
def test_resuming_rejects_a_different_model_or_data(data_dir, tmp_path, changes, message):
    """Covers different data with the same shape."""
    train(options(data_dir, tmp_path / "run", max_steps=1))
    (tmp_path / "others").mkdir()
    np.save(tmp_path / "others" / "shard_00000.npy", np.load(data_dir / "shard_00000.npy")[:, ::-1].copy())
    if "data_dir" in changes:
        changes = dict(data_dir=str(tmp_path / "others"))
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(options(data_dir, tmp_path / "run", max_steps=2, resume="auto"), **changes))


def test_model_json_gives_the_model_of_a_run(data_dir, tmp_path, capsys):
    """The file replaces the flags, both in a new run and to continue the old one."""
    settings = dict(dense=True, max_steps=2) | OTHER_SHAPE
    train(options(data_dir, tmp_path / "flags", **settings))
    config = str(tmp_path / "flags" / "model.json")
    train(options(data_dir, tmp_path / "config", max_steps=2, vocab_size=None, config=config))
    (log, expected), (other, found) = (final_state(tmp_path / name, 2) for name in ("flags", "config"))
    assert_bitwise_equal((other, found), (log, expected))
    assert found["config"].d_ff_dense == 4 * 16
    capsys.readouterr()
    train(options(data_dir, tmp_path / "flags", max_steps=3, vocab_size=None, config=config, resume="auto"))
    warnings = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["--max_steps"]
    # Flags override the file's fields.
    train(options(data_dir, tmp_path / "wide", max_steps=1, config=config, d_ff=24))
    assert load_checkpoint(tmp_path / "wide" / "checkpoint_1.pt")["config"].d_ff_dense == 4 * 24


def test_change_of_the_machine_is_a_warning(data_dir, tmp_path, capsys):
    train(options(data_dir, tmp_path, max_steps=1))
    torch.set_num_threads(2)
    train(options(data_dir, tmp_path, max_steps=2, resume="auto"))
    assert "warning: threads is 2, but was 1 before: results will not be bitwise equal" in capsys.readouterr().err


def test_resumed_run_never_mixes_with_a_different_run(data_dir, tmp_path):
    """Covers a run in a different directory, and later checkpoints of the same run."""
    for name in ("one", "two"):
        train(options(data_dir, tmp_path / name, max_steps=2, save_interval=1))
    before = (tmp_path / "two" / "checkpoint_2.pt").read_bytes()
    for save_dir, checkpoint in (("two", "one/checkpoint_2.pt"), ("two", "two/checkpoint_1.pt")):
        with pytest.raises(InputError, match=r"different run|has checkpoint_2\.pt"):
            train(options(data_dir, tmp_path / save_dir, max_steps=3, resume=str(tmp_path / checkpoint)))
    assert (tmp_path / "two" / "checkpoint_2.pt").read_bytes() == before
    # A new directory is allowed.
    train(options(data_dir, tmp_path / "three", max_steps=3, resume=str(tmp_path / "one" / "checkpoint_1.pt")))
    assert [line["step"] for line in records(tmp_path / "three")] == [2, 3]


def test_log_has_every_step_once(data_dir, tmp_path):
    """Holds even if the process dies between two checkpoints, in the middle of a line."""
    run = options(data_dir, tmp_path, max_steps=6, save_interval=2)
    train(run)
    delete_checkpoints_after(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 7})[:-3])
    train(dataclasses.replace(run, resume="auto"))
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_partial_tokenizer_of_a_killed_run_is_replaced(data_dir, tmp_path):
    train_tokenizer(["some words to merge " * 3], 262).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json.partial").write_text("{")
    tokenizer = str(tmp_path / "tokenizer.json")
    train(options(data_dir, tmp_path / "run", vocab_size=320, tokenizer=tokenizer, max_steps=1))
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
