"""RMSNorm kernels."""

import pytest
import torch
from compare import DEVICE, DTYPES, FACTOR, assert_accurate, assert_equal, opcheck, randn, saved_tensors

from acceleron.kernels import formulas, torch_ops
from acceleron.kernels import rms_norm as module
from acceleron.kernels.rms_norm import rms_norm

# The interpreter truncates to bf16 three times in a row, always toward zero.
FACTOR = FACTOR | {torch.bfloat16: FACTOR[torch.bfloat16] * (2 if DEVICE == "cpu" else 1)}
EPS = 1e-6
NAMES = ("norm", "sum", "grad of x", "grad of weight", "grad of residual")
with_and_without_residual = pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])


def run(function, x, weight, residual, grads):
    """Return both outputs and the gradient of each input."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, residual) if t is not None]
    outs = function(*leaves[:2], EPS, *leaves[2:])
    return *outs, *torch.autograd.grad(outs, leaves, [grad.to(x.dtype) for grad in grads])


def inputs(shape, dtype, weight_dtype, with_residual):
    # The weight has mean 1, as in a model, and unit variance, which exposes a missing product.
    x, weight = randn(*shape, dtype=dtype), 1 + randn(shape[-1], seed=1, dtype=weight_dtype)
    residual = randn(*shape, seed=2, dtype=dtype) if with_residual else None
    return x, weight, residual, [randn(*shape, seed=seed, dtype=dtype) for seed in (3, 4)]


def check_accuracy(arguments, weight):
    """Compare with the ground truth. weight: the weight that the ground truth uses."""
    x, _, residual, grads = arguments
    wide = [None if t is None else t.double() for t in (x, weight, residual)]
    truths = run(formulas.rms_norm, *wide, grads)
    plains, results = (run(f, *arguments) for f in (torch_ops.rms_norm, rms_norm))
    assert_accurate(NAMES[: len(truths)], results, plains, truths, FACTOR[x.dtype])
    return results


# One row; widths that are not powers of two, with partial tiles and more tiles than the interpreter's 24 programs; an
# odd width, with leading axes; a row wider than a tile.
@pytest.mark.parametrize("shape", [(1, 64), (53, 1000), (77, 500), (3, 5, 7), (2, 4500)], ids=str)
@with_and_without_residual
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_every_gradient(shape, dtype, with_residual):
    arguments = inputs(shape, dtype, torch.float32, with_residual)
    # The weight is an fp32 parameter, cast to x's dtype.
    assert check_accuracy(arguments, arguments[1].to(dtype))[3].dtype == torch.float32


def test_16_bit_weight_gets_a_16_bit_gradient():
    arguments = inputs((9, 24), torch.float16, torch.float16, True)
    assert check_accuracy(arguments, arguments[1])[3].dtype == torch.float16


def test_rounds_in_llamas_order():
    """The sum, the normalized value and the product are each rounded. test_torch_ops.py compares with transformers."""
    x, weight, residual, _ = inputs((9, 96), torch.float16, torch.float32, True)
    norm, total = rms_norm(x, weight, EPS, residual)
    expected, expected_total = torch_ops.rms_norm(x, weight, EPS, residual)
    assert torch.equal(total, expected_total)
    # The last bits of the statistics differ, so one value in several thousand rounds the other way. If a rounding step
    # is missing, one in four does.
    assert (norm != expected).float().mean() < 0.01
    assert torch.equal(rms_norm(total, weight, EPS)[0], norm)


def test_sum_without_a_residual_aliases_x():
    """The sum is part of the graph, so its gradient is added in the norm's backward kernel."""
    x, weight, *_ = inputs((9, 24), torch.float32, torch.float32, False)
    norm, total = rms_norm(x.requires_grad_(), weight, EPS)
    assert total.data_ptr() == x.data_ptr()
    assert total.grad_fn is norm.grad_fn


@with_and_without_residual
def test_backward_accepts_expanded_gradients(with_residual):
    x, weight, residual, _ = inputs((9, 24), torch.float32, torch.float32, with_residual)
    leaves = [t.requires_grad_() for t in (x, weight, residual) if t is not None]
    sum(out.sum() for out in rms_norm(x, weight, EPS, residual)).backward()  # the gradients have strides of 0
    expected = run(rms_norm, x, weight, residual, [torch.ones_like(x)] * 2)[2:]
    assert_equal([leaf.grad for leaf in leaves], list(expected))


@pytest.mark.parametrize("used", [0, 1], ids=["norm", "sum"])
@with_and_without_residual
def test_backward_skips_an_unused_output(monkeypatch, used, with_residual):
    """Backward allocates no zero gradient and launches no kernel unless the norm is used."""
    x, weight, residual, grads = inputs((9, 24), torch.float32, torch.float32, with_residual)
    leaves = [t.requires_grad_() for t in (x, weight, residual) if t is not None]
    launches = []
    backward = module._rms_norm_backward
    monkeypatch.setattr(module, "_rms_norm_backward", lambda *args: launches.append(args[1]) or backward(*args))
    out = rms_norm(*leaves[:2], EPS, residual)[used]
    ours = torch.autograd.grad(out, leaves, grads[used], allow_unused=True, materialize_grads=True)
    assert launches == ([] if used else [None])
    grads[1 - used] = torch.zeros_like(x)
    assert_equal(ours, run(rms_norm, x, weight, residual, grads)[2:])


def test_zero_rows_are_accepted():
    x, weight, residual, grads = inputs((0, 24), torch.float32, torch.float32, True)
    norm, _, grad_x, grad_weight, _ = run(rms_norm, x, weight, residual, grads)
    assert norm.shape == grad_x.shape == (0, 24)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_results_are_deterministic():
    arguments = inputs((53, 1000), torch.float32, torch.float32, True)
    assert_equal(run(rms_norm, *arguments), run(rms_norm, *arguments))


@with_and_without_residual
def test_backward_saves_one_activation_and_four_bytes_per_row(with_residual):
    x, weight, residual, _ = inputs((9, 24), torch.float16, torch.float32, with_residual)
    with saved_tensors() as saved:
        rms_norm(x.requires_grad_(), weight.requires_grad_(), EPS, residual)
    assert sum(t.nbytes for t in saved.values()) == x.nbytes + weight.nbytes + 4 * 9


def test_rows_wider_than_16384_are_rejected():
    with pytest.raises(ValueError, match=r"^rms_norm: x: expected rows of at most 16384 values"):
        rms_norm(torch.zeros(2, 16385, device=DEVICE), torch.zeros(16385, device=DEVICE), EPS)


@with_and_without_residual
def test_custom_ops_pass_opcheck(with_residual):
    x, weight, residual, (grad, grad_total) = inputs((9, 24), torch.float16, torch.float32, with_residual)
    ops = torch.ops.acceleron_triton
    opcheck(ops.rms_norm, (x, weight, EPS, residual))
    rstd = ops.rms_norm(x, weight, EPS, residual)[2]
    opcheck(ops.rms_norm_backward, (grad, grad_total if with_residual else None, x, weight, rstd))


@with_and_without_residual
def test_compiles_without_graph_breaks(with_residual):
    arguments = inputs((9, 24), torch.float32, torch.float32, with_residual)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, *arguments), run(rms_norm, *arguments))
