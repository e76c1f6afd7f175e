"""A whole model on the Triton kernels: its gradients, its training, and its compiled and checkpointed blocks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from compare import error

from acceleron import Acceleron, ModelConfig, ops
from acceleron.config import PRESETS
from acceleron.device import missing_compiler
from acceleron.training import TrainOptions, train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Two layers, so that one's error reaches the other's gradients; four experts, one of which a batch of 24 tokens leaves
# with few rows; widths that no block of 32 divides; a vocabulary of one and a half blocks of the others.
CONFIG = ModelConfig(
    vocab_size=48,
    d_model=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    num_experts=4,
    d_ff=24,
    d_ff_shared=20,
    max_seq_len=32,
    z_loss_coef=0.1,  # 100 and 10 times the defaults: the router's losses count in every gradient
    balance_loss_coef=0.1,
)


@pytest.fixture(autouse=True)
def selection_restored(monkeypatch):
    monkeypatch.setattr(ops, "_backend", ops._backend)


def build(dtype=torch.float32):
    torch.manual_seed(0)
    model = Acceleron(CONFIG, compute_dtype=dtype).to(DEVICE)
    for weight in model.parameters():
        weight.data *= 5 if weight.dim() > 1 else 1  # of 0.1: 0.02 leaves the router all but uniform
    return model.double() if dtype == torch.float64 else model


def losses_and_gradients(model, choice):
    ops.set_backend(choice, DEVICE)
    ids = torch.randint(CONFIG.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    output = model(ids, labels=ids)
    output.loss.backward()
    results = {name: getattr(output, name).detach() for name in ("loss", "cross_entropy", "z_loss", "balance_loss")}
    return results | {name: weight.grad for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def expected():
    """From float64, and from the reference in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_backend", ops._backend)
        return [losses_and_gradients(build(dtype), "reference") for dtype in (torch.float64, torch.float32)]


def check(results, expected):
    """Twice the reference's error: through two layers both are sums of some hundred roundings, alike in size only."""
    truths, plains = expected
    assert results.keys() == truths.keys()
    for name, truth in truths.items():
        assert error(results[name], truth) <= 2 * error(plains[name], truth) + 4 * torch.finfo(torch.float32).eps, name


def test_losses_and_gradients_of_every_parameter(expected):
    check(losses_and_gradients(build(), "triton"), expected)


def test_every_op_is_tritons(monkeypatch):
    """Or the comparisons in this file would be of the reference with itself."""
    called = set()
    for name in ops.torch_ops.__all__:
        function = getattr(ops.triton_ops, name)

        def recorded(*args, name=name, function=function, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(ops.triton_ops, name, recorded)
    losses_and_gradients(build(), "triton")
    # The others are building blocks, or the dense baseline's.
    assert called == {"linear_cross_entropy", "moe", "rms_norm", "split_rope"}
    called.clear()
    losses_and_gradients(build(), "reference")
    assert not called


@pytest.mark.skipif(missing_compiler(DEVICE) is not None, reason="torch.compile needs a compiler")
def test_compiled_and_checkpointed_blocks(expected):
    """compile_blocks sets fullgraph, so a graph break would raise."""
    model = build()
    model.gradient_checkpointing = True
    model.compile_blocks()
    check(losses_and_gradients(model, "triton"), expected)


def test_checkpointing_routes_once(monkeypatch):
    """A recomputation takes the saved experts and plan: each op of the routing runs once a layer."""
    runs = []

    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            runs.append(function)
            return function(*args, **(kwargs or {}))

    model = build()
    model.gradient_checkpointing = True
    with Ops():
        losses_and_gradients(model, "triton")
    ops = torch.ops.acceleron_triton
    assert runs.count(ops.route_top2.default) == runs.count(ops.dispatch_plan.default) == CONFIG.num_layers
    assert runs.count(ops.expert_up.default) == 2 * CONFIG.num_layers  # which is recomputed


def test_training_follows_the_reference(monkeypatch, tmp_path):
    """Eight steps of train(). Roundings differ, which the steps amplify to 5e-7 of the losses; 1e-5 is allowed."""
    monkeypatch.setitem(PRESETS, "nano", replace(CONFIG, num_layers=1))
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    # A random walk among eight tokens: there is something to learn in eight steps.
    ids = rng.integers(-1, 2, size=(30, 24)).cumsum(axis=1) % 8
    np.save(data / "shard_00000.npy", ids.astype(np.int32))
    losses = {}
    for choice in ("reference", "triton"):
        settings = dict(model_size="nano", vocab_size=48, seq_len=12, batch_size=1, max_steps=8, lr=1e-2)
        settings |= dict(num_workers=1, no_compile=True, no_gradient_checkpointing=True, log_interval=1)
        settings |= dict(eval_interval=8, save_interval=8, device=str(DEVICE), dtype="fp32", kernels=choice)
        train(TrainOptions(data_dir=str(data), save_dir=str(tmp_path / choice), **settings))
        records = [json.loads(line) for line in (tmp_path / choice / "metrics.jsonl").read_text().splitlines()]
        losses[choice] = np.array([[r["loss"], r["z_loss"], r["balance_loss"], r["grad_norm"]] for r in records])
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-5)
    assert not np.array_equal(losses["triton"], losses["reference"])  # so it was not the reference that ran
    assert losses["triton"][-1, 0] < losses["triton"][0, 0] - 0.5
