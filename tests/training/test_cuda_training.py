"""Training on a GPU. Collected only if a GPU is available."""

import dataclasses

import pytest
import torch
from runs import assert_bitwise_equal, final_state, options

from acceleron import ModelConfig
from acceleron.data import Shards
from acceleron.training import train
from acceleron.training.trainer import Trainer


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_resumed_deterministic_run_equals_an_uninterrupted_one(data_dir, tmp_path, compiled, recomputed):
    settings = dict(device="cuda", dtype="bf16", deterministic=True, no_compile=not compiled, batch_size=8)
    settings |= dict(no_gradient_checkpointing=not recomputed)
    settings |= dict(max_steps=8, save_interval=3, log_interval=4, eval_interval=5)
    train(options(data_dir, tmp_path / "uninterrupted", **settings))
    resumed = options(data_dir, tmp_path / "resumed", **settings)
    train(resumed)
    for name in ("checkpoint_6.pt", "checkpoint_8.pt"):
        (tmp_path / "resumed" / name).unlink()
    train(dataclasses.replace(resumed, resume="auto"))
    assert_bitwise_equal(final_state(tmp_path / "resumed", 8), final_state(tmp_path / "uninterrupted", 8))


@pytest.mark.filterwarnings("error", "ignore:Synchronization debug mode")
def test_step_does_not_synchronize(data_dir, tmp_path):
    run_options = options(data_dir, tmp_path, device="cuda", dtype="bf16", grad_accum=2, skip_spikes=True)
    device = torch.device("cuda")
    run = Trainer(run_options, ModelConfig.preset("nano", vocab_size=64), Shards(data_dir), device, torch.bfloat16)
    with run.context():
        for _ in range(3):
            run.train_step(1e-3)
        run.fetch()
        try:
            torch.cuda.set_sync_debug_mode("error")
            run.train_step(1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.detector.read() == []
