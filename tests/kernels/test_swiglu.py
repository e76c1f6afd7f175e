"""The SwiGLU kernels. Their error against float64 may be FACTOR times that of the reference in the same dtype."""

import math

import pytest
import torch
import triton
import triton.language as tl
from compare import DEVICE, DTYPES, FACTOR, error, randn

from acceleron.kernels import formulas, torch_ops
from acceleron.kernels.swiglu import sigmoid, swiglu

# A GPU's exp and division are approximate: some roundings of the fp32 that every dtype is computed in.
FLOOR = 4 * torch.finfo(torch.float32).eps


def run(function, gate_up, grad):
    leaf = gate_up.detach().requires_grad_()
    out = function(leaf)
    return out, *torch.autograd.grad(out, leaf, grad.to(out.dtype))


@triton.jit
def _sigmoid_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, sigmoid(tl.load(x_ptr + i)))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # expected: the interpreter overflows to inf
def test_sigmoid():
    x = torch.linspace(-10, 10, 1024, device=DEVICE)
    x[:7] = torch.tensor([-math.inf, -1e30, -100, 100, 1e30, math.inf, math.nan])
    y = torch.empty_like(x)
    _sigmoid_kernel[(1,)](x, y, N=1024)
    assert y[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert y[6].isnan()
    truth = x[7:].double().sigmoid()
    assert ((y[7:].double() - truth).abs() / truth).max() < 1e-6


# One row; rows and columns that no tile of 8 x 256 divides, in several tiles of each; an odd width, whose rows are not
# aligned; leading axes; a single pair.
@pytest.mark.parametrize("shape", [(1, 512), (67, 2 * 600), (9, 2 * 257), (2, 5, 2 * 7), (2,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradient(shape, dtype):
    gate_up = randn(*shape, dtype=dtype)
    grad = randn(*shape[:-1], shape[-1] // 2, seed=1, dtype=dtype)
    truths = run(formulas.swiglu, gate_up.double(), grad)
    plains = run(torch_ops.swiglu, gate_up, grad)
    for name, ours, plain, truth in zip(("out", "grad"), run(swiglu, gate_up, grad), plains, truths, strict=True):
        assert (ours.dtype, ours.shape, ours.is_contiguous()) == (dtype, truth.shape, True)
        assert error(ours, truth) <= FACTOR[dtype] * error(plain, truth) + FLOOR, name


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # expected: the interpreter overflows to inf
def test_large_gates_neither_overflow_nor_vanish():
    gate_up = torch.tensor([[-200.0, -90.0, 90.0, 200.0, 1.0, 2.0, 3.0, 4.0]], device=DEVICE)
    out, grad = run(swiglu, gate_up, torch.ones(1, 4))
    assert out.tolist() == [[0, 0, 270, 800]]
    assert grad.tolist() == [[0, 0, 3, 4, 0, 0, 90, 200]]


def test_expanded_gradient():
    gate_up = randn(5, 14).requires_grad_()
    swiglu(gate_up).sum().backward()  # its gradient has strides of 0
    assert torch.equal(gate_up.grad, run(swiglu, gate_up, torch.ones(5, 7, device=DEVICE))[1])


def test_no_rows():
    out, grad = run(swiglu, randn(0, 14), randn(0, 7))
    assert (out.shape, grad.shape) == ((0, 7), (0, 14))


def test_same_bits_every_time_and_without_gradients():
    gate_up, grad = randn(19, 600), randn(19, 300, seed=1)
    first, second = (run(swiglu, gate_up, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        assert torch.equal(swiglu(gate_up), first[0])


def test_backward_keeps_the_pre_activation_alone():
    gate_up, saved = randn(19, 600).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        swiglu(gate_up)
    assert [x.data_ptr() for x in saved] == [gate_up.data_ptr()]


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), "expected bfloat16 or float16 or float32"),
        (torch.zeros(2, 5), "an even last axis"),
        (torch.tensor(1.0), "expected shape"),
        (torch.zeros(4, 2).t(), "call .contiguous()"),
    ],
    ids=["float64", "odd", "scalar", "strides"],
)
def test_refusals_name_the_argument(gate_up, message):
    with pytest.raises(ValueError, match=rf"gate_up_N2F: .*{message}"):
        swiglu(gate_up.to(DEVICE))


def test_custom_ops_pass_opcheck():
    torch.use_deterministic_algorithms(False)  # opcheck compares runs on memory it does not own
    torch.library.opcheck(torch.ops.acceleron_triton.swiglu, (randn(3, 14),))
    torch.library.opcheck(torch.ops.acceleron_triton.swiglu_backward, (randn(3, 7), randn(3, 14)))


def test_compiles_without_a_graph_break():
    gate_up, grad = randn(9, 14), randn(9, 7, seed=1)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, gate_up, grad), run(swiglu, gate_up, grad), strict=True):
        assert torch.equal(ours, eager)
