"""bench throughput: contenders run train.py's own loop, and a failing process produces a failed row."""

import dataclasses
import json
import os
import signal
import threading
from argparse import Namespace
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from acceleron.errors import InputError
from acceleron.training import TrainOptions, train
from bench import shapes, throughput, worker
from bench.rows import read
from bench.throughput import Contender, run_rounds

NEVER = throughput.NEVER


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A nano run on random shards."""
    directory = tmp_path_factory.mktemp("data")
    np.save(directory / "shard_00000.npy", np.random.default_rng(0).integers(2048, size=(8, 2048)))
    return TrainOptions(
        data_dir=str(directory), save_dir=str(directory / "run"), model_size="nano", vocab_size=2048, batch_size=2,
        seq_len=64, device="cpu", dtype="fp32", kernels="reference", no_compile=True, no_gradient_checkpointing=True,
        max_steps=NEVER, eval_interval=NEVER, save_interval=NEVER, log_interval=1, num_workers=1,
    )  # fmt: skip


def contender(options: TrainOptions, save_dir, **changes) -> Contender:
    return Contender(dataclasses.replace(options, save_dir=str(save_dir), **changes), "eager", limit=600.0)


def trained(found: list[Contender], rounds: int, with_profile: bool = False) -> list[throughput.Row]:
    try:
        for each in found:
            each.check()
        run_rounds(found, rounds, 1e-9, 1e12, with_profile)
    finally:
        for each in found:
            each.worker.close()
    return [each.row for each in found]


def losses(directory) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_contenders_train_like_train_py_and_pause_between_rounds(options, tmp_path):
    settings = dict(schedule="wsd", warmup_steps=2, lr=1e-3)
    found = [contender(options, tmp_path / str(dense), dense=dense, **settings) for dense in (False, True)]
    moe, dense = trained(found, rounds=2)
    for row in (moe, dense):
        assert row.problem() == ""
        assert row.error <= row.allowed < 1e-3
        assert len(row.values) == 2
        assert row.details["mfu"] == pytest.approx(row.median * row.details["flops_per_token"] / 1e12)
        assert row.details["start_seconds"] > 0
    assert (moe.provider, dense.provider, moe.group) == ("MoE, reference", "dense, reference", dense.group)
    # The losses of four steps (first, timed, two rounds) match a run without pauses.
    train(dataclasses.replace(options, save_dir=str(tmp_path / "plain"), max_steps=10, **settings))
    assert losses(tmp_path / "False") == losses(tmp_path / "plain")[:4]
    assert len(set(losses(tmp_path / "False"))) == 4


def test_a_dead_process_gives_a_failed_row_and_the_others_continue(options, tmp_path):
    dies, lives = contender(options, tmp_path / "dies"), contender(options, tmp_path / "lives")
    raises = contender(options, tmp_path / "raises", seq_len=96)  # does not divide the rows
    os.kill(dies.worker.process.pid, signal.SIGKILL)
    rows = trained([dies, lives, raises], rounds=1, with_profile=True)
    assert rows[0].failed == "the process was killed by SIGKILL"
    assert rows[1].problem() == ""
    assert any("mm" in op["kernel"] for op in rows[1].details["profile"])
    assert "seq_len" in rows[2].failed
    assert rows[0].values == rows[2].values == []


def test_a_round_counts_all_tokens_of_its_steps(options, monkeypatch):
    found = object.__new__(Contender)
    found.options, found.limit, found.step_seconds = dataclasses.replace(options, grad_accum=3), 1.0, 0.5
    found.row = throughput.Row("throughput", "MoE", {})
    asked = []
    found.ask = lambda message, limit: asked.append(message) or {"seconds": 4.0}
    found.round(2.6)
    assert asked == [5]
    assert found.row.values == [5 * 2 * 3 * 64 / 4.0]


def flags(**given) -> Namespace:
    names = dict.fromkeys(("batch_size", "grad_accum", "seq_len", "kernels"))
    return Namespace(**(names | dict(dtype=torch.float32, limit=1.0, device=torch.device("cpu")) | given))


def test_modes_set_the_options_of_train(options, monkeypatch, tmp_path):
    monkeypatch.setattr(throughput, "Worker", lambda serve, options: Namespace(close=None))
    made = {}
    for mode in throughput.MODES:
        moe, dense = throughput.contenders("nano", mode, str(tmp_path), flags(), ExitStack())
        assert dataclasses.replace(moe.options, dense=True, save_dir=dense.options.save_dir) == dense.options
        made[mode] = moe.options
        if mode == "predecessor":
            assert (moe.options.batch_size, moe.options.grad_accum, moe.options.seq_len) == (32, 4, 512)
    assert not made["predecessor"].no_gradient_checkpointing
    assert made["balanced"].debug_force_load_balance
    assert made["deterministic"].deterministic
    assert made["eager"].no_compile
    assert not made["compiled"].no_compile


@pytest.mark.parametrize("flag", [{"batch_size": 0}, {"seq_len": 3}, {"grad_accum": -1}])
def test_an_invalid_batch_shape_is_rejected(flag):
    with pytest.raises(InputError, match=f"--{next(iter(flag))}"):
        shapes.batch_shape("tiny", False, flags(**flag))


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, TypeError])
def test_a_failing_check_on_a_gpu_writes_rows_without_waiting(end, tmp_path, monkeypatch):
    """One contender's check raises while the second contender's hangs."""
    released, rows = threading.Event(), [throughput.Row("throughput", name, {}) for name in ("MoE", "dense")]

    def check():
        raise end

    found = [Namespace(row=row, check=each) for row, each in zip(rows, (check, released.wait), strict=True)]
    names = dict.fromkeys(("kernels", "batch_size", "grad_accum", "seq_len"))
    arguments = Namespace(**names, device=torch.device("cuda"), dtype=torch.bfloat16, model_size=["tiny"])
    vars(arguments).update(mode=["eager"], output=tmp_path, rounds=1, seconds=1.0, profile=False)
    monkeypatch.setattr(throughput, "parse", lambda *args, **flags: arguments)
    monkeypatch.setattr(throughput, "contenders", lambda *args: found)
    monkeypatch.setattr(throughput, "write_corpus", lambda *args: "")
    monkeypatch.setattr(throughput.devices, "peak_flops", lambda *args: (1e12, "made up"))
    monkeypatch.setattr("bench.rows.device_name", lambda device: "GPU")
    try:
        with pytest.raises(end):
            throughput.main()
    finally:
        released.set()
    assert [row.failed for row in read(tmp_path)] == ["stopped before its first round"] * 2


def test_a_worker_with_a_broken_connection_exits_silently(capsys):
    def serve(connection):
        raise ConnectionResetError

    worker._run(serve, Namespace(send=lambda message: None), ())
    assert capsys.readouterr().err == ""
