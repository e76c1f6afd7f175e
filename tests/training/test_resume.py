"""N steps and N more are 2N: the same losses, weights, optimizer state, data and statistics, bit for bit."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from runs import assert_same_bits, learned, options, records

from acceleron.checkpoint import load_checkpoint
from acceleron.data.tokenizer import train_tokenizer
from acceleron.errors import InputError
from acceleron.training import train

pytestmark = pytest.mark.usefixtures("small_nano")


def forget_after(save_dir, step: int):
    """As if the process had died before it saved again."""
    for path in save_dir.glob("checkpoint_*.pt"):
        if int(path.stem.split("_")[1]) > step:
            path.unlink()


SETTINGS = {
    "eager": dict(no_gradient_checkpointing=True),
    "recomputed, accumulated": dict(grad_accum=2, batch_size=2, num_workers=3),
    "compiled": dict(no_compile=False, no_gradient_checkpointing=True),
    "dense, bf16": dict(dense=True, dtype="bf16", skip_spikes=True),
    "deterministic, wsd": dict(deterministic=True, schedule="wsd"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_resumed_run_equals_an_uninterrupted_one(data_dir, tmp_path, case):
    """The log's intervals straddle the moment of the save. The evaluation's batch is smaller than a step's, always."""
    torch.set_num_threads(2 if case == "eager" else 1)
    settings = dict(batch_size=8, max_steps=8, save_interval=3, log_interval=4, eval_interval=5) | SETTINGS[case]
    train(options(data_dir, tmp_path / "whole", **settings))
    expected = learned(tmp_path / "whole", 8)
    parts = options(data_dir, tmp_path / "parts", **settings)
    train(parts)
    for step in (6, 3):
        forget_after(tmp_path / "parts", step)
        train(dataclasses.replace(parts, resume="auto"))
        assert_same_bits(learned(tmp_path / "parts", 8), expected)
    # What is compared is no constant.
    assert len({line["loss"] for line in expected[0]}) == len(expected[0]) == 5


def test_an_evaluation_changes_nothing_but_the_log(data_dir, tmp_path):
    """Compiled with static shapes: a batch of another shape in between is compiled on its own."""
    settings = dict(batch_size=8, max_steps=4, save_interval=4, log_interval=1) | SETTINGS["compiled"]
    train(options(data_dir, tmp_path / "often", eval_interval=1, **settings))
    train(options(data_dir, tmp_path / "once", eval_interval=4, **settings))
    (often, state), (once, expected) = learned(tmp_path / "often", 4), learned(tmp_path / "once", 4)
    assert_same_bits(state, expected)
    assert [line["loss"] for line in often] == [line["loss"] for line in once]
    assert ["val_loss" in line for line in often + once] == [True] * 4 + [False] * 3 + [True]


def test_auto_takes_the_newest_whole_checkpoint_and_warns_of_others(data_dir, tmp_path, capsys):
    train(options(data_dir, tmp_path, max_steps=9, save_interval=3))
    expected = learned(tmp_path, 9)
    newest, middle = tmp_path / "checkpoint_9.pt", tmp_path / "checkpoint_6.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    content = bytearray(middle.read_bytes())
    content[len(content) // 2] ^= 1
    middle.write_bytes(content)
    capsys.readouterr()
    train(options(data_dir, tmp_path, max_steps=9, save_interval=3, resume="auto"))
    said = capsys.readouterr().err
    warnings = [line for line in said.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "checkpoint_9.pt: truncated" in warnings[0]
    assert "checkpoint_6.pt: damaged: its record archive/data/" in warnings[1]
    assert f"continuing from {tmp_path / 'checkpoint_3.pt'}, step 3" in said
    assert_same_bits(learned(tmp_path, 9), expected)


def test_auto_begins_where_there_is_nothing_and_ends_where_all_is_done(data_dir, tmp_path, capsys):
    run = options(data_dir, tmp_path / "run", max_steps=2, resume="auto")
    train(run)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.is_file()}
    capsys.readouterr()
    train(run)
    assert "nothing is left to do" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.is_file()} == before


def test_auto_never_begins_anew_over_damaged_checkpoints(data_dir, tmp_path):
    run = options(data_dir, tmp_path, max_steps=1)
    train(run)
    (tmp_path / "checkpoint_1.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        train(dataclasses.replace(run, resume="auto", max_steps=2))
    assert (tmp_path / "checkpoint_1.pt").read_bytes() == b"damaged"


def test_resuming_with_other_flags_uses_them_and_says_so(data_dir, tmp_path, capsys):
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
    ("changes", "complaint"),
    [
        (dict(seed=7), "seed 42, not 7"),
        (dict(seq_len=32), "seq_len 64, not 32"),
        (dict(dense=True), "dense False"),
        (dict(vocab_size=128), "vocab_size 64"),
        (dict(data_dir="others"), "shard_00000.npy has other content"),
    ],
)
def test_resuming_refuses_what_would_make_the_result_wrong(data_dir, tmp_path, changes, complaint):
    """Other data of the same shape among it."""
    train(options(data_dir, tmp_path / "run", max_steps=1))
    (tmp_path / "others").mkdir()
    np.save(tmp_path / "others" / "shard_00000.npy", np.load(data_dir / "shard_00000.npy")[:, ::-1].copy())
    if "data_dir" in changes:
        changes = dict(data_dir=str(tmp_path / "others"))
    with pytest.raises(InputError, match=complaint):
        train(dataclasses.replace(options(data_dir, tmp_path / "run", max_steps=2, resume="auto"), **changes))


def test_a_change_of_the_machine_is_told(data_dir, tmp_path, capsys):
    train(options(data_dir, tmp_path, max_steps=1))
    torch.set_num_threads(2)
    train(options(data_dir, tmp_path, max_steps=2, resume="auto"))
    assert "warning: threads: 2, before 1: the run goes on, but not bit for bit the same" in capsys.readouterr().err


def test_a_resumed_run_never_mixes_with_another(data_dir, tmp_path):
    """Neither with one in another directory, nor with its own later part."""
    for name in ("one", "two"):
        train(options(data_dir, tmp_path / name, max_steps=2, save_interval=1))
    before = (tmp_path / "two" / "checkpoint_2.pt").read_bytes()
    for save_dir, checkpoint in (("two", "one/checkpoint_2.pt"), ("two", "two/checkpoint_1.pt")):
        with pytest.raises(InputError, match=r"another run|has checkpoint_2\.pt"):
            train(options(data_dir, tmp_path / save_dir, max_steps=3, resume=str(tmp_path / checkpoint)))
    assert (tmp_path / "two" / "checkpoint_2.pt").read_bytes() == before
    # Into a directory of its own it may.
    train(options(data_dir, tmp_path / "three", max_steps=3, resume=str(tmp_path / "one" / "checkpoint_1.pt")))
    assert [line["step"] for line in records(tmp_path / "three")] == [2, 3]


def test_the_log_has_every_step_once(data_dir, tmp_path):
    """Also after a process that died between two checkpoints, within a line."""
    run = options(data_dir, tmp_path, max_steps=6, save_interval=2)
    train(run)
    forget_after(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 7})[:-3])
    train(dataclasses.replace(run, resume="auto"))
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_half_written_tokenizer_of_a_killed_run_is_no_obstacle(data_dir, tmp_path):
    train_tokenizer(["some words to merge " * 3], 262).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json.partial").write_text("{")
    tokenizer = str(tmp_path / "tokenizer.json")
    train(options(data_dir, tmp_path / "run", vocab_size=320, tokenizer=tokenizer, max_steps=1))
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
