"""A model on the Triton kernels: gradients, training, compiled and checkpointed blocks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from compare import error

from acceleron import Acceleron, ModelConfig, ops
from acceleron.config import PRESETS
from acceleron.device import missing_compiler
from acceleron.kernels import expert_mlp
from acceleron.training import TrainOptions, train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Two layers, so errors in one reach the gradients of the other; four experts, where one gets few of the 24 tokens;
# widths with partial blocks of 32; a vocabulary of one and a half blocks.
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
    z_loss_coef=0.1,  # 100 and 10 times the defaults, so the router losses matter in every gradient
    balance_loss_coef=0.1,
)


@pytest.fixture(autouse=True)
def restore_backend(monkeypatch):
    monkeypatch.setattr(ops, "_backend", ops._backend)


def build(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    model = Acceleron(replace(CONFIG, **fields), compute_dtype=dtype).to(DEVICE)
    for weight in model.parameters():
        weight.data *= 5 if weight.dim() > 1 else 1  # std 0.1, because 0.02 leaves the router nearly uniform
    return model.double() if dtype == torch.float64 else model


def losses_and_gradients(model, backend):
    ops.set_backend(backend, DEVICE)
    ids = torch.randint(CONFIG.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    output = model(ids, labels=ids)
    output.loss.backward()
    results = {name: getattr(output, name).detach() for name in ("loss", "cross_entropy", "z_loss", "balance_loss")}
    return results | {name: weight.grad for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def expected():
    """Return the reference's results in float64 and in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_backend", ops._backend)
        return [losses_and_gradients(build(dtype), "reference") for dtype in (torch.float64, torch.float32)]


def check(results, expected):
    """Allow twice the reference's error, because rounding differs in each of the two layers."""
    truths, plains = expected
    assert results.keys() == truths.keys()
    for name, truth in truths.items():
        assert error(results[name], truth) <= 2 * error(plains[name], truth) + 4 * torch.finfo(torch.float32).eps, name


def test_losses_and_gradients_of_every_parameter(expected):
    check(losses_and_gradients(build(), "triton"), expected)


def test_a_dense_layer_and_a_layer_with_three_experts_per_token_and_no_shared_expert():
    fields = dict(num_dense_layers=1, top_k=3, d_ff_shared=0)
    expected = [losses_and_gradients(build(dtype, **fields), "reference") for dtype in (torch.float64, torch.float32)]
    check(losses_and_gradients(build(**fields), "triton"), expected)


def test_model_calls_triton_ops_only_on_the_triton_backend(monkeypatch):
    called = set()
    for name in ops.torch_ops.__all__:
        function = getattr(ops.triton_ops, name)

        def recorded(*args, name=name, function=function, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(ops.triton_ops, name, recorded)
    losses_and_gradients(build(), "triton")
    # All other ops are parts of these or belong to the dense baseline.
    assert called == {"linear_cross_entropy", "moe", "rms_norm", "split_rope"}
    called.clear()
    losses_and_gradients(build(), "reference")
    assert not called


@pytest.mark.skipif(missing_compiler(DEVICE) is not None, reason="torch.compile needs a compiler")
def test_compiled_and_checkpointed_blocks(expected):
    """A graph break would raise an error, because compile_blocks sets fullgraph."""
    model = build()
    model.gradient_checkpointing = True
    model.compile_blocks()
    check(losses_and_gradients(model, "triton"), expected)


def backward(model, ids):
    model(ids, labels=ids).loss.backward()


@pytest.mark.skipif(missing_compiler(DEVICE) is not None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize(
    ("compiled", "dtype"), [(False, torch.float16), pytest.param(True, torch.float32, marks=pytest.mark.slow)]
)
def test_accumulated_gradients_match_the_sum_of_separate_ones(compiled, dtype):
    ops.set_backend("triton", DEVICE)
    expected, model = build(dtype), build(dtype)
    model.blocks[1].moe.w2_EDF.requires_grad_(False)  # its layer returns gradients as usual
    if compiled:
        expected.compile_blocks()
        model.compile_blocks()
    first, second = (torch.randint(CONFIG.vocab_size, (1, 9), device=DEVICE) for _ in range(2))
    for ids in (first, second):
        backward(expected, ids)
    backward(model, first)
    with model.accumulate_gradients():
        total, buffers = model.blocks[0].moe.w13_E2FD.grad, model.blocks[0].moe.expert_buffers
        assert buffers.w2_EDF.dtype == dtype
        backward(model, second)
    assert model.blocks[0].moe.w13_E2FD.grad is total  # added in place
    assert model.blocks[0].moe.expert_buffers is None
    frozen = model.blocks[1].moe.w2_EDF
    for (name, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (weight.grad is None) == (weight is frozen), name
        assert weight is frozen or (weight.grad.any() and torch.equal(weight.grad, other.grad)), name


def test_kernels_add_to_the_gradients_of_a_step_with_several_micro_batches(monkeypatch):
    """No gradient of an expert's weight is returned. Under autocast, gradients are returned as usual."""
    ops.set_backend("triton", DEVICE)
    model = build()
    ids = torch.randint(CONFIG.vocab_size, (1, 9), device=DEVICE)
    returned = []
    plain = expert_mlp.grouped_weight_grad
    monkeypatch.setattr(expert_mlp, "grouped_weight_grad", lambda *args: returned.append(1) or plain(*args))
    with model.accumulate_gradients():
        backward(model, ids)
        assert not returned
        with torch.autocast(DEVICE.type, torch.float16):
            backward(model, ids)
        assert len(returned) == 2 * CONFIG.num_layers


def test_checkpointing_does_not_recompute_the_routing():
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
    assert runs.count(ops.route_topk.default) == runs.count(ops.dispatch_plan.default) == CONFIG.num_layers
    assert runs.count(ops.expert_up.default) == 2 * CONFIG.num_layers  # forward and recomputation


def test_training_losses_match_the_reference(monkeypatch, tmp_path):
    """After eight steps of train(), rounding differences reach 5e-7 of the losses; the tolerance is 1e-5."""
    monkeypatch.setitem(PRESETS, "nano", replace(CONFIG, num_layers=1))
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    # The data is a random walk over eight tokens, so the loss falls within eight steps.
    ids = rng.integers(-1, 2, size=(30, 24)).cumsum(axis=1) % 8
    np.save(data / "shard_00000.npy", ids.astype(np.int32))
    losses = {}
    for backend in ("reference", "triton"):
        settings = dict(model_size="nano", vocab_size=48, seq_len=12, batch_size=1, max_steps=8, lr=1e-2)
        settings |= dict(num_workers=1, no_compile=True, no_gradient_checkpointing=True, log_interval=1)
        settings |= dict(eval_interval=8, save_interval=8, device=str(DEVICE), dtype="fp32", kernels=backend)
        train(TrainOptions(data_dir=str(data), save_dir=str(tmp_path / backend), **settings))
        records = [json.loads(line) for line in (tmp_path / backend / "metrics.jsonl").read_text().splitlines()]
        losses[backend] = np.array([[r["loss"], r["z_loss"], r["balance_loss"], r["grad_norm"]] for r in records])
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-5)
    assert not np.array_equal(losses["triton"], losses["reference"])  # two different backends ran
    assert losses["triton"][-1, 0] < losses["triton"][0, 0] - 0.5
