"""Kernel backend selection, and use without Triton."""

import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch

from acceleron import ModelConfig, MoE, ops
from acceleron.kernels import launch, torch_ops, triton_ops

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(GPU, reason="the tests use the interpreter only without a GPU")


@pytest.fixture(autouse=True)
def restore_backend(monkeypatch):
    monkeypatch.setattr(ops, "_backend", "auto")
    monkeypatch.setattr(ops, "_reference_ops", ())


@pytest.fixture
def calls(monkeypatch):
    """Return the namespaces of the torch ops that run, in order."""
    namespaces = []

    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            namespaces.append(function.namespace)
            return function(*args, **(kwargs or {}))

    with Ops():
        yield namespaces


def test_reference_runs_no_triton_op(calls):
    assert ops.set_backend("reference", CPU) == "reference (as requested)"
    x = torch.ones(3, 4, device="cuda" if GPU else "cpu")
    ops.swiglu(x)
    ops.route_topk(x)
    assert "acceleron_triton" not in calls
    assert "acceleron" in calls


@interpreted
def test_triton_runs_under_the_interpreter(calls):
    line = ops.set_backend("triton", CPU)
    assert line.startswith("Triton 3.")
    assert line.endswith(", interpreted")
    ops.swiglu(torch.ones(3, 4))
    ops.route_topk(torch.ones(3, 4))
    assert calls.count("acceleron_triton") == 2
    assert "acceleron" not in calls


@interpreted
def test_auto_selects_the_reference_for_cpu_tensors_under_the_interpreter(calls):
    assert ops.set_backend("auto", CPU) == "reference (the interpreter needs --kernels triton)"
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(3, 4, dtype=dtype)
        assert ops.swiglu(x).dtype == dtype
        assert ops.route_topk(x).topk_scores_TK.dtype == dtype
    assert "acceleron_triton" not in calls


def test_default_backend_is_auto(calls):
    x = torch.ones(3, 4, device="cuda" if GPU else "cpu")
    ops.route_topk(x)
    ops.route_topk(x.double())
    assert calls.count("acceleron_triton") == GPU
    assert calls.count("acceleron") == 2 - GPU


def test_cpu_without_the_interpreter_has_only_the_reference(monkeypatch, calls):
    monkeypatch.setattr(launch, "cpu_device", None)
    with pytest.raises(
        ValueError, match=r"^--kernels triton: Triton needs a GPU, but the device is cpu; TRITON_INTERPRET"
    ):
        ops.set_backend("triton", CPU)
    line = ops.set_backend("auto", CPU)
    assert line.startswith("reference (Triton needs a GPU, but the device is cpu")
    ops.route_topk(torch.ones(3, 4))
    assert "acceleron" in calls
    assert "acceleron_triton" not in calls


def test_old_gpu_has_only_the_reference(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda")
    assert not ops.uses_triton(device, torch.float32)  # before set_backend, as in library use
    with pytest.raises(ValueError, match=r"triton: Tesla T4 is older than compute capability 8\.0"):
        ops.set_backend("triton", device)
    assert ops.set_backend("auto", device) == "reference (Tesla T4 is older than compute capability 8.0)"
    assert ops._backend == "reference"


def test_amd_gpu_uses_triton_only_on_request(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    device = torch.device("cuda")
    expected = "reference (AMD GPUs need --kernels triton, which has not been tested on one yet)"
    assert ops.set_backend("auto", device) == expected
    assert not ops.uses_triton(device, torch.bfloat16)
    assert ops.set_backend("triton", device).startswith("Triton 3.")
    assert ops.uses_triton(device, torch.bfloat16)


@interpreted
def test_single_ops_can_run_on_the_reference(monkeypatch, calls):
    """An op that contains a listed op also runs on the reference."""
    monkeypatch.setenv("ACCELERON_REFERENCE_OPS", "rope, swiglu")
    line = ops.set_backend("triton", CPU)
    assert line.endswith(", interpreted, but the reference for moe, rope, split_rope, swiglu")
    ops.swiglu(torch.ones(3, 4))
    MoE(ModelConfig(d_model=32, num_heads=2, num_kv_heads=1, d_ff=8, d_ff_shared=8))(torch.ones(3, 32))
    assert "acceleron_triton" not in calls
    ops.route_topk(torch.ones(3, 4))
    assert "acceleron_triton" in calls
    monkeypatch.delenv("ACCELERON_REFERENCE_OPS")
    assert ops.set_backend("triton", CPU).endswith(", interpreted")
    calls.clear()
    ops.swiglu(torch.ones(3, 4))
    assert "acceleron_triton" in calls


def test_unknown_reference_op_is_rejected(monkeypatch):
    ops.set_backend("reference", CPU)
    monkeypatch.setenv("ACCELERON_REFERENCE_OPS", "rope,gelu")
    message = r"^ACCELERON_REFERENCE_OPS=rope,gelu: expected names among dispatch_plan, "
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=message):
            ops.set_backend(backend, CPU)
    assert ops._backend == "reference"


@interpreted
def test_log_line_lists_the_ops_without_tma(monkeypatch):
    monkeypatch.setenv("ACCELERON_NO_TMA", "up,rows")
    assert ops.set_backend("triton", CPU).endswith(", interpreted, without TMA for up,rows")


@interpreted
def test_using_backend_restores_the_backend_after_an_error():
    ops.set_backend("triton", CPU)

    def fail():
        with ops.using_backend("reference", CPU):
            assert not ops.uses_triton(CPU, torch.float32)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert ops.uses_triton(CPU, torch.float32)


def test_auto_selects_the_reference_if_triton_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(ops, "_import_error", "Triton 3.6 or later can't be imported (why)")
    message = r"^--kernels triton: Triton 3\.6 or later can't be imported \(why\); or use"
    for device in (CPU, torch.device("cuda")):
        with pytest.raises(ValueError, match=message):
            ops.set_backend("triton", device)
        assert ops.set_backend("auto", device).startswith("reference (Triton 3.6 or later can't")


@pytest.mark.parametrize("backend", ["cuda", "", "Triton"])
def test_unknown_backend_is_rejected(backend):
    with pytest.raises(ValueError, match=f"^--kernels {backend}: expected auto, triton or reference"):
        ops.set_backend(backend, CPU)


def test_rejected_backend_leaves_the_current_one(monkeypatch):
    monkeypatch.setattr(launch, "cpu_device", None)
    ops.set_backend("reference", CPU)
    for backend in ("triton", "nonsense"):
        with pytest.raises(ValueError, match=r"^--kernels"):
            ops.set_backend(backend, CPU)
    assert ops._backend == "reference"


@pytest.mark.parametrize("name", torch_ops.__all__)
def test_op_has_the_same_signature_in_both_backends(name):
    expected = signature(getattr(ops, name))
    assert signature(getattr(torch_ops, name)) == signature(getattr(triton_ops, name)) == expected


WITHOUT = """
import sys
sys.modules[{module!r}] = None  # makes its import fail
import torch
from acceleron import ModelConfig, MoE, ops

cpu = torch.device("cpu")
line = ops.set_backend("auto", cpu)
assert line.startswith("reference (Triton 3.6 or later can't be imported"), line
try:
    ops.set_backend("triton", cpu)
except ValueError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError
assert ops.ROUTING_OPS == ops.torch_ops.ROUTING_OPS
x = torch.randn(5, 32, requires_grad=True)
y, stats = MoE(ModelConfig(d_model=32, num_heads=2, num_kv_heads=1, d_ff=8, d_ff_shared=8))(x)
(y.sum() + stats.z_loss + stats.balance_loss).backward()
assert x.grad.isfinite().all() and y.shape == x.shape
"""


@pytest.mark.parametrize("module", ["triton", "triton.tools.ragged_tma"])
def test_moe_works_without_triton_or_with_an_older_one(module):
    """Triton before 3.6 has no ragged_tma, so the import fails after the first kernels."""
    command = [sys.executable, "-c", WITHOUT.format(module=module)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]


@interpreted
def test_interpreter_is_not_used_for_gpu_tensors():
    assert "TRITON_INTERPRET=1 is set" in launch.unavailable(torch.device("cuda"))
    with pytest.raises(ValueError, match="unset it"):
        ops.set_backend("triton", torch.device("cuda"))
    assert ops.set_backend("auto", torch.device("cuda")).startswith("reference (TRITON_INTERPRET=1 is set")
    assert not ops.uses_triton(torch.device("cuda"), torch.float32)


def test_setting_triton_interpret_after_the_import_is_reported():
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None); import triton; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch; from acceleron import ops\n"
        "print(ops.set_backend('auto', torch.device('cpu')))\n"
        "ops.swiglu(torch.ones(2, 4))\n"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.startswith("reference (TRITON_INTERPRET was changed after triton was imported")


@interpreted
def test_moe_layer_accepts_views_zero_tokens_and_bf16_parameters_on_triton():
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=32, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=4, d_ff=24, d_ff_shared=16, vocab_size=128
    )
    layer, x = MoE(config), torch.randn(3, 5, 64)
    expected = layer(x[..., :32])[0]
    ops.set_backend("triton", CPU)
    torch.testing.assert_close(layer(x[..., :32])[0], expected, rtol=1e-5, atol=1e-6)
    y, stats = layer(x[:0, :, :32].requires_grad_())
    y.sum().backward()
    assert y.shape == (0, 5, 32)
    assert stats.tokens_per_expert_E.tolist() == [0, 0, 0, 0]
    assert layer.router.grad.eq(0).all()
    y = layer.to(torch.bfloat16)(x[..., :32].bfloat16())[0]
    assert (y - expected).norm() < 0.05 * expected.norm()
