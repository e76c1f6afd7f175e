"""The check of a kernel backend: what passes it, what fails it, and what train() does then."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from acceleron import ModelConfig, ops
from acceleron.config import PRESETS
from acceleron.device import missing_compiler
from acceleron.errors import InputError
from acceleron.kernels import moe
from acceleron.self_check import check_gradients
from acceleron.training import TrainOptions, train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Widths that no block of 32 divides, and four experts that 24 tokens fill evenly.
CONFIG = ModelConfig(
    vocab_size=64, d_model=32, num_layers=1, num_heads=2, num_kv_heads=1, num_experts=4, d_ff=24, d_ff_shared=20
)


@pytest.fixture(autouse=True)
def selection_restored(monkeypatch):
    monkeypatch.setattr(ops, "_backend", ops._backend)


def check(backend="triton", dtype=torch.float32, config=CONFIG, **how):
    return check_gradients(config, DEVICE, dtype, backend, batch_size=2, seq_len=12, **how)


def scale_w2_gradient(monkeypatch, factor):
    right = moe.expert_grads

    def wrong(*args):
        rows, dweights, dw13, dw2 = right(*args)
        return rows, dweights, dw13, dw2 * factor

    monkeypatch.setattr(moe, "expert_grads", wrong)


@pytest.mark.parametrize("dense", [False, True], ids=["moe", "dense"])
def test_right_kernels_pass(dense):
    result = check(config=replace(CONFIG, dense=dense))
    assert result.passed
    assert 0 < result.error < 1e-5  # so it was not the reference that ran


def test_sixteen_bits_are_held_to_the_reference_in_16_bits():
    """Against itself, the reference has half of what is allowed, up to the floor."""
    result = check("reference", torch.bfloat16)
    assert result.passed
    assert result.error > 1e-3
    assert result.error / result.allowed == pytest.approx(0.5, abs=0.05)


@pytest.mark.skipif(missing_compiler(DEVICE) is not None, reason="torch.compile needs a compiler")
def test_compiled_and_checkpointed():
    assert check(compiled=True, checkpointing=True).passed


def test_a_wrong_gradient_is_named(monkeypatch):
    scale_w2_gradient(monkeypatch, 1.02)
    result = check()
    assert not result.passed
    assert result.name == "blocks.0.moe.w2_EDF"
    assert result.error == pytest.approx(0.02, rel=1e-3)


def test_nan_fails(monkeypatch):
    scale_w2_gradient(monkeypatch, float("nan"))
    result = check()
    assert not result.passed
    assert result.name == "blocks.0.moe.w2_EDF"


def test_a_check_leaves_no_trace():
    ops.set_backend("triton", DEVICE)
    before = torch.get_rng_state()
    check("reference")
    assert torch.equal(torch.get_rng_state(), before)
    assert ops.uses_triton(DEVICE, torch.float32)


# --- in train() ---


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Of a run of one step in which "auto" selects Triton, as on a GPU."""
    monkeypatch.setitem(PRESETS, "nano", replace(CONFIG, num_layers=2, max_seq_len=32))
    select = ops.set_backend
    monkeypatch.setattr(ops, "set_backend", lambda choice, device: select(choice.replace("auto", "triton"), device))
    data = tmp_path / "data"
    data.mkdir()
    np.save(data / "shard_00000.npy", np.random.default_rng(0).integers(64, size=(8, 24)).astype(np.int32))

    def make(name, **changes):
        settings = dict(model_size="nano", vocab_size=64, seq_len=12, batch_size=1, max_steps=1, num_workers=1)
        settings |= dict(no_compile=True, no_gradient_checkpointing=True, device=str(DEVICE), dtype="fp32")
        return TrainOptions(data_dir=str(data), save_dir=str(tmp_path / name), **settings | changes)

    return make


def test_a_checked_run_is_bitwise_that_without_a_check(options, tmp_path, capsys):
    saved = {}
    for choice in ("auto", "triton"):
        train(options(choice, kernels=choice))
        saved[choice] = torch.load(tmp_path / choice / "checkpoint_1.pt", weights_only=True)
        assert ("checked the kernels in" in capsys.readouterr().err) == (choice == "auto")
    checked, unchecked = saved.values()
    torch.testing.assert_close(checked["model"], unchecked["model"], rtol=0, atol=0)
    assert torch.equal(checked["rng"]["torch"], unchecked["rng"]["torch"])


def test_a_run_on_wrong_kernels_stops_before_it_writes(options, tmp_path, monkeypatch):
    scale_w2_gradient(monkeypatch, 1.02)
    message = (
        r"^the Triton kernels fail their check on this device: the gradient of blocks\.0\.moe\.w2_EDF has an error of "
        r"0\.02, 0\.0001 is allowed; use --kernels reference, and find the op with "
        r"`python -m bench ops --check_only --model_size nano`$"
    )
    with pytest.raises(InputError, match=message):
        train(options("run"))
    assert not (tmp_path / "run").exists()


def test_a_run_on_failing_kernels_stops_before_it_writes(options, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(moe, "expert_grads", fail)
    with pytest.raises(InputError, match=r"device: RuntimeError: CUDA error: an illegal memory access; pass --kernels"):
        train(options("run"))
    assert not (tmp_path / "run").exists()
