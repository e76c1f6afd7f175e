"""The kernel self-check, on its own and at the start of train()."""

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
# The widths are not multiples of 32, and four experts share 24 tokens.
CONFIG = ModelConfig(
    vocab_size=64, d_model=32, num_layers=1, num_heads=2, num_kv_heads=1, num_experts=4, d_ff=24, d_ff_shared=20
)


@pytest.fixture(autouse=True)
def restore_backend(monkeypatch):
    monkeypatch.setattr(ops, "_backend", ops._backend)


def check(backend="triton", dtype=torch.float32, config=CONFIG, **how):
    return check_gradients(config, DEVICE, dtype, backend, batch_size=2, seq_len=12, **how)


def scale_w2_gradient(monkeypatch, factor):
    expert_grads = moe.expert_grads

    def scaled(*args):
        *others, dw2 = expert_grads(*args)
        return *others, dw2 * factor

    monkeypatch.setattr(moe, "expert_grads", scaled)


@pytest.mark.parametrize("dense", [False, True], ids=["moe", "dense"])
def test_correct_kernels_pass(dense):
    result = check(config=replace(CONFIG, dense=dense))
    assert result.passed
    assert 0 < result.error < 1e-5  # the reference would have an error of 0


def test_allowed_error_in_bf16_is_twice_the_references():
    result = check("reference", torch.bfloat16)
    assert result.passed
    assert result.error > 1e-3
    assert result.error / result.allowed == pytest.approx(0.5, abs=0.05)


@pytest.mark.skipif(missing_compiler(DEVICE) is not None, reason="torch.compile needs a compiler")
def test_compiled_and_checkpointed_kernels_pass():
    assert check(compiled=True, checkpointing=True).passed


def test_wrong_gradient_fails_and_is_named(monkeypatch):
    scale_w2_gradient(monkeypatch, 1.02)
    result = check()
    assert not result.passed
    assert result.name == "blocks.0.moe.w2_EDF"
    assert result.error == pytest.approx(0.02, rel=1e-3)


def test_nan_gradient_fails_and_is_named(monkeypatch):
    scale_w2_gradient(monkeypatch, float("nan"))
    result = check()
    assert not result.passed
    assert result.name == "blocks.0.moe.w2_EDF"


def test_check_restores_the_backend_and_the_rng_state():
    ops.set_backend("triton", DEVICE)
    before = torch.get_rng_state()
    check("reference")
    assert torch.equal(torch.get_rng_state(), before)
    assert ops.uses_triton(DEVICE, torch.float32)


# --- in train() ---


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Return a function that makes options for a one-step run. "auto" selects Triton, as on a GPU."""
    monkeypatch.setitem(PRESETS, "nano", replace(CONFIG, num_layers=2, max_seq_len=32))
    set_backend = ops.set_backend
    monkeypatch.setattr(ops, "set_backend", lambda name, device: set_backend(name.replace("auto", "triton"), device))
    data = tmp_path / "data"
    data.mkdir()
    np.save(data / "shard_00000.npy", np.random.default_rng(0).integers(64, size=(8, 24)).astype(np.int32))

    def make(name, **changes):
        settings = dict(model_size="nano", vocab_size=64, seq_len=12, batch_size=1, max_steps=1, num_workers=1)
        settings |= dict(no_compile=True, no_gradient_checkpointing=True, device=str(DEVICE), dtype="fp32")
        return TrainOptions(data_dir=str(data), save_dir=str(tmp_path / name), **settings | changes)

    return make


def test_check_does_not_change_the_run(options, tmp_path, capsys):
    checkpoints = []
    for kernels in ("auto", "triton"):  # only "auto" runs the check
        train(options(kernels, kernels=kernels))
        checkpoints.append(torch.load(tmp_path / kernels / "checkpoint_1.pt", weights_only=True))
        assert ("checked the kernels in" in capsys.readouterr().err) == (kernels == "auto")
    checked, unchecked = checkpoints
    torch.testing.assert_close(checked["model"], unchecked["model"], rtol=0, atol=0)


@pytest.mark.parametrize("dense_layers", [0, 1])  # one layer of each kind is checked
def test_run_with_wrong_kernels_stops_before_it_writes(options, tmp_path, monkeypatch, dense_layers):
    scale_w2_gradient(monkeypatch, 1.02)
    message = (
        r"^the Triton kernels fail their self-check on this device: the gradient of "
        rf"blocks\.{dense_layers}\.moe\.w2_EDF has an "
        r"error of 0\.02 \(at most 0\.0001 is allowed\); use --kernels reference; find the op with "
        r"`python -m bench ops --check_only`$"
    )
    with pytest.raises(InputError, match=message):
        train(options("run", num_dense_layers=dense_layers))
    assert not (tmp_path / "run").exists()


def test_run_with_crashing_kernels_stops_before_it_writes(options, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(moe, "expert_grads", fail)
    with pytest.raises(
        InputError, match=r"device: RuntimeError: CUDA error: an illegal memory access; use --kernels reference"
    ):
        train(options("run"))
    assert not (tmp_path / "run").exists()
