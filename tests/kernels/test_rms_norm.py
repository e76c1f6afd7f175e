"""The RMSNorm kernels. Their error against float64 may be FACTOR times that of the reference in the same dtype."""

import pytest
import torch
from compare import DEVICE, DTYPES, FACTOR, error, randn

from acceleron.kernels import formulas, torch_ops
from acceleron.kernels import rms_norm as module
from acceleron.kernels.rms_norm import rms_norm

# The interpreter cuts bf16 off three times in a row, with errors of the same sign.
FACTOR = FACTOR | {torch.bfloat16: FACTOR[torch.bfloat16] * (2 if DEVICE == "cpu" else 1)}
# A GPU's rsqrt is approximate: some roundings of the fp32 that every dtype is computed in.
FLOOR = 4 * torch.finfo(torch.float32).eps
EPS = 1e-6


def run(function, x, weight, residual, grads):
    """{name: tensor} of the outputs and of the gradient of each input."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, residual) if t is not None]
    outs = function(*leaves[:2], EPS, *leaves[2:])
    grads = torch.autograd.grad(outs, leaves, [grad.to(x.dtype) for grad in grads])
    names = ("norm", "sum", "grad of x", "grad of weight", "grad of residual")
    return dict(zip(names, (*outs, *grads), strict=False))


def inputs(shape, dtype, weight_dtype, with_residual):
    # A weight around 1 as in a model, but of unit spread, so that a product left out shows.
    x, weight = randn(*shape, dtype=dtype), 1 + randn(shape[-1], seed=1, dtype=weight_dtype)
    residual = randn(*shape, seed=2, dtype=dtype) if with_residual else None
    return x, weight, residual, [randn(*shape, seed=seed, dtype=dtype) for seed in (3, 4)]


# One row; a width of no power of two, with rows that no tile divides and more tiles than the 24 programs that the
# interpreter's device gets, so that programs take several; an odd width, with leading axes; a row wider than a tile.
@pytest.mark.parametrize("shape", [(1, 64), (53, 1000), (77, 500), (3, 5, 7), (2, 4500)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_every_gradient(shape, dtype, with_residual):
    x, weight, residual, grads = inputs(shape, dtype, torch.float32, with_residual)
    # The weight is an fp32 parameter, which takes part in x's dtype.
    wide = [None if t is None else t.double() for t in (x, weight.to(dtype), residual)]
    truths = run(formulas.rms_norm, *wide, grads)
    plains = run(torch_ops.rms_norm, x, weight, residual, grads)
    ours = run(rms_norm, x, weight, residual, grads)
    for name, truth in truths.items():
        assert ours[name].dtype == (torch.float32 if name == "grad of weight" else dtype), name
        assert error(ours[name], truth) <= FACTOR[dtype] * error(plains[name], truth) + FLOOR, name


def test_weight_in_the_narrow_dtype_gets_a_narrow_gradient():
    x, weight, residual, grads = inputs((9, 24), torch.float16, torch.float16, True)
    truths = run(formulas.rms_norm, *(t.double() for t in (x, weight, residual)), grads)
    plains = run(torch_ops.rms_norm, x, weight, residual, grads)
    for name, ours in run(rms_norm, x, weight, residual, grads).items():
        assert ours.dtype == torch.float16
        assert error(ours, truths[name]) <= 1.5 * error(plains[name], truths[name]) + FLOOR, name


def test_rounds_where_llama_does():
    """Bit for bit the reference, which is bit for bit transformers: the sum, the normed value and the product round."""
    x, weight, residual, _ = inputs((9, 96), torch.float16, torch.float32, True)
    norm, total = rms_norm(x, weight, EPS, residual)
    expected, expected_total = torch_ops.rms_norm(x, weight, EPS, residual)
    assert torch.equal(total, expected_total)
    # A value in thousands may fall on the other side of a tie, as the statistics differ in their last bits; with a
    # rounding left out it is one in four.
    assert (norm != expected).float().mean() < 0.01
    assert torch.equal(rms_norm(total, weight, EPS)[0], norm)


def test_the_sum_of_x_alone_is_x():
    """No copy; but as a part of the graph, so that its gradient is added in the norm's backward kernel."""
    x, weight, *_ = inputs((9, 24), torch.float32, torch.float32, False)
    norm, total = rms_norm(x.requires_grad_(), weight, EPS)
    assert total.data_ptr() == x.data_ptr()
    assert total.grad_fn is norm.grad_fn


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_expanded_gradients(with_residual):
    x, weight, residual, _ = inputs((9, 24), torch.float32, torch.float32, with_residual)
    leaves = [t.requires_grad_() for t in (x, weight, residual) if t is not None]
    sum(out.sum() for out in rms_norm(x, weight, EPS, residual)).backward()  # gradients with strides of 0
    ones = [torch.ones_like(x)] * 2
    expected = list(run(rms_norm, x, weight, residual, ones).values())[2:]
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("used", [0, 1], ids=["norm", "sum"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_only_one_of_the_outputs_is_used(monkeypatch, used, with_residual):
    """The other has no gradient, which is neither made nor read; without the norm's no kernel runs at all."""
    x, weight, residual, grads = inputs((9, 24), torch.float32, torch.float32, with_residual)
    leaves = [t.requires_grad_() for t in (x, weight, residual) if t is not None]
    launches = []
    backward = module._rms_norm_backward
    monkeypatch.setattr(module, "_rms_norm_backward", lambda *args: launches.append(args[1]) or backward(*args))
    out = rms_norm(*leaves[:2], EPS, residual)[used]
    ours = torch.autograd.grad(out, leaves, grads[used], allow_unused=True, materialize_grads=True)
    assert launches == ([] if used else [None])
    grads[1 - used] = torch.zeros_like(x)
    expected = list(run(rms_norm, x, weight, residual, grads).values())[2:]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_no_rows():
    x, weight, residual, grads = inputs((0, 24), torch.float32, torch.float32, True)
    results = run(rms_norm, x, weight, residual, grads)
    assert results["norm"].shape == results["grad of x"].shape == (0, 24)
    assert torch.equal(results["grad of weight"], torch.zeros_like(weight))


def test_same_bits_every_time():
    arguments = inputs((53, 1000), torch.float32, torch.float32, True)
    first, second = (run(rms_norm, *arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_backward_keeps_one_tensor_of_activations_and_four_bytes_a_row(with_residual):
    x, weight, residual, _ = inputs((9, 24), torch.float16, torch.float32, with_residual)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        rms_norm(x.requires_grad_(), weight.requires_grad_(), EPS, residual)
    assert sum(saved.values()) == x.nbytes + weight.nbytes + 4 * 9


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x.double(), "expected bfloat16 or float16 or float32"),
        ("x", lambda x: x.t().contiguous().t(), "a contiguous tensor"),
        ("x", lambda x: x[0, 0], "expected shape"),
        ("weight", lambda weight: weight[1:], "expected shape"),
        ("weight", lambda weight: weight.double(), "expected bfloat16 or float16 or float32"),
        ("weight", lambda weight: weight.to("meta"), "expected a tensor on"),
        ("residual", lambda residual: residual[1:], "expected shape"),
        ("residual", lambda residual: residual.half(), "expected float32"),
    ],
)
def test_refusals_name_the_argument(name, change, message):
    arguments = dict(
        zip(("x", "weight", "residual"), inputs((9, 24), torch.float32, torch.float32, True), strict=False)
    )
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^rms_norm: {name}: .*{message}"):
        rms_norm(**arguments, eps=EPS)


def test_a_row_that_no_block_holds_is_refused():
    with pytest.raises(ValueError, match=r"^rms_norm: x: expected rows of at most 16384 values"):
        rms_norm(torch.zeros(2, 16385, device=DEVICE), torch.zeros(16385, device=DEVICE), EPS)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_custom_ops_pass_opcheck(with_residual):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs on memory it does not own
    x, weight, residual, (grad, grad_total) = inputs((9, 24), torch.float16, torch.float32, with_residual)
    ops = torch.ops.acceleron_triton
    torch.library.opcheck(ops.rms_norm, (x, weight, EPS, residual))
    rstd = ops.rms_norm(x, weight, EPS, residual)[2]
    torch.library.opcheck(ops.rms_norm_backward, (grad, grad_total if with_residual else None, x, weight, rstd))


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_compiles_without_a_graph_break(with_residual):
    arguments = inputs((9, 24), torch.float32, torch.float32, with_residual)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    eager = run(rms_norm, *arguments)
    for name, ours in run(compiled, *arguments).items():
        assert torch.equal(ours, eager[name]), name
