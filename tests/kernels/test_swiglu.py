"""SwiGLU kernels."""

import math

import pytest
import torch
import triton
import triton.language as tl
from compare import DEVICE, DTYPES, FACTOR, assert_accurate, assert_equal, opcheck, randn, saved_tensors

from acceleron.kernels import formulas, torch_ops
from acceleron.kernels.swiglu import sigmoid, swiglu


def run(function, gate_up, grad):
    leaf = gate_up.detach().requires_grad_()
    out = function(leaf)
    return out, *torch.autograd.grad(out, leaf, grad.to(out.dtype))


@triton.jit
def _sigmoid_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, sigmoid(tl.load(x_ptr + i)))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter warns where exp gives inf
def test_sigmoid_is_accurate_and_saturates():
    x = torch.linspace(-10, 10, 1024, device=DEVICE)
    x[:7] = torch.tensor([-math.inf, -1e30, -100, 100, 1e30, math.inf, math.nan])
    y = torch.empty_like(x)
    _sigmoid_kernel[(1,)](x, y, N=1024)
    assert y[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert y[6].isnan()
    truth = x[7:].double().sigmoid()
    assert ((y[7:].double() - truth).abs() / truth).max() < 1e-6


# One row; several 8 x 256 tiles with partial ones on both axes; an odd width, so rows are not aligned; leading axes; a
# single pair.
@pytest.mark.parametrize("shape", [(1, 512), (67, 2 * 600), (9, 2 * 257), (2, 5, 2 * 7), (2,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradient(shape, dtype):
    gate_up = randn(*shape, dtype=dtype)
    grad = randn(*shape[:-1], shape[-1] // 2, seed=1, dtype=dtype)
    truths = run(formulas.swiglu, gate_up.double(), grad)
    plains, results = (run(f, gate_up, grad) for f in (torch_ops.swiglu, swiglu))
    assert_accurate(("out", "grad"), results, plains, truths, FACTOR[dtype])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter warns where exp gives inf
def test_large_gates_do_not_overflow():
    gate_up = torch.tensor([[-200.0, -90.0, 90.0, 200.0, 1.0, 2.0, 3.0, 4.0]], device=DEVICE)
    out, grad = run(swiglu, gate_up, torch.ones(1, 4))
    assert out.tolist() == [[0, 0, 270, 800]]
    assert grad.tolist() == [[0, 0, 3, 4, 0, 0, 90, 200]]


def test_backward_accepts_an_expanded_gradient():
    gate_up = randn(5, 14).requires_grad_()
    swiglu(gate_up).sum().backward()  # the gradient of a sum has strides of 0
    assert torch.equal(gate_up.grad, run(swiglu, gate_up, torch.ones(5, 7, device=DEVICE))[1])


def test_zero_rows_are_accepted():
    out, grad = run(swiglu, randn(0, 14), randn(0, 7))
    assert (out.shape, grad.shape) == ((0, 7), (0, 14))


def test_results_are_deterministic_with_and_without_grad():
    gate_up, grad = randn(19, 600), randn(19, 300, seed=1)
    first = run(swiglu, gate_up, grad)
    assert_equal(run(swiglu, gate_up, grad), first)
    with torch.no_grad():
        assert torch.equal(swiglu(gate_up), first[0])


def test_backward_saves_only_the_pre_activation():
    gate_up = randn(19, 600).requires_grad_()
    with saved_tensors() as saved:
        swiglu(gate_up)
    assert list(saved) == [gate_up.data_ptr()]


def test_custom_ops_pass_opcheck():
    opcheck(torch.ops.acceleron_triton.swiglu, (randn(3, 14),))
    opcheck(torch.ops.acceleron_triton.swiglu_backward, (randn(3, 7), randn(3, 14)))


def test_compiles_without_graph_breaks():
    gate_up, grad = randn(9, 14), randn(9, 7, seed=1)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, gate_up, grad), run(swiglu, gate_up, grad))
