"""What a run promises on a GPU: collected only where there is one."""

import dataclasses

import pytest
import torch
from runs import assert_same_bits, learned, options

from acceleron import ModelConfig
from acceleron.data import Shards
from acceleron.training import train
from acceleron.training.run import Run


@pytest.mark.parametrize("compiled", [False, True])
def test_a_resumed_deterministic_run_equals_an_uninterrupted_one(data_dir, tmp_path, compiled):
    settings = dict(device="cuda", dtype="bf16", deterministic=True, no_compile=not compiled, batch_size=8)
    settings |= dict(max_steps=8, save_interval=3, log_interval=4, eval_interval=5)
    train(options(data_dir, tmp_path / "whole", **settings))
    parts = options(data_dir, tmp_path / "parts", **settings)
    train(parts)
    for name in ("checkpoint_6.pt", "checkpoint_8.pt"):
        (tmp_path / "parts" / name).unlink()
    train(dataclasses.replace(parts, resume="auto"))
    assert_same_bits(learned(tmp_path / "parts", 8), learned(tmp_path / "whole", 8))


@pytest.mark.filterwarnings("error")
def test_a_step_waits_for_nothing_on_the_device(data_dir, tmp_path):
    """Bad numbers and spikes are judged there."""
    run_options = options(data_dir, tmp_path, device="cuda", dtype="bf16", grad_accum=2, skip_spikes=True)
    device = torch.device("cuda")
    run = Run(run_options, ModelConfig.preset("nano", vocab_size=64), Shards(data_dir), device, torch.bfloat16)
    with run.context():
        for _ in range(3):
            run.step(1e-3)
        run.fetch()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.step(1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.judgements() == []
