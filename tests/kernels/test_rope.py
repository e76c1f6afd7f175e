"""RoPE kernel for separate q and k and for the fused qkv tensor."""

import pytest
import torch
from compare import DEVICE, DTYPES, EPS, FACTOR, assert_accurate, assert_equal, opcheck, randn, record_launches

from acceleron.kernels import formulas, torch_ops
from acceleron.kernels import rope as module
from acceleron.kernels.rope import rope, split_rope

FLOOR = EPS  # either the kernel or torch can fuse a multiply and an add


def angles(S, C):
    frequencies = 10000.0 ** (-torch.arange(0, C, 2) / C)
    both = torch.outer(torch.arange(S) + 100.0, frequencies).repeat(1, 2).to(DEVICE)
    return both.cos(), both.sin()


def split(qkv, H):
    """Return q and k as strided views of one tensor, as in the model."""
    G = (qkv.shape[2] - H) // 2
    return qkv.split([H, G, G], dim=2)[:2]


def run(function, qkv, H, cos, sin, grads):
    leaf = qkv.detach().requires_grad_()
    if qkv.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    out = function(*split(leaf, H), cos, sin)
    return *out, *torch.autograd.grad(out, leaf, [grad.to(out[0].dtype) for grad in grads])


def inputs(B, S, H, G, C, dtype=torch.float32):
    qkv = randn(B, S, H + 2 * G, C, dtype=dtype)
    return qkv, H, *angles(S, C), (randn(B, S, H, C, seed=1, dtype=dtype), randn(B, S, G, C, seed=2, dtype=dtype))


def run_split(function, qkv, H, cos, sin, grads):
    """Return q, k, v and the gradient of qkv."""
    leaf = qkv.detach().requires_grad_()
    if qkv.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    out = function(leaf, cos, sin, H, (qkv.shape[2] - H) // 2)
    return *out, *torch.autograd.grad(out, leaf, [grad.to(qkv.dtype) for grad in grads])


def split_inputs(B, S, H, G, C, dtype=torch.float32):
    *arguments, grads = inputs(B, S, H, G, C, dtype)
    return *arguments, (*grads, randn(B, S, G, C, seed=3, dtype=dtype))


# B, S, H, G, C: the head_dims of the named sizes (48 and 96 are not powers of two), with partial tiles of positions;
# one position; head counts that are not powers of two, with an odd head_dim / 2; a single pair.
CASES = [(2, 19, 16, 4, 32), (1, 9, 16, 4, 48), (2, 5, 16, 4, 64), (1, 5, 16, 4, 96)]
CASES += [(3, 1, 4, 4, 32), (1, 70, 6, 3, 10), (1, 3, 1, 1, 2)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradient(case, dtype):
    arguments = inputs(*case, dtype)
    truths = run(formulas.rope, arguments[0].double(), *arguments[1:])
    plains = run(torch_ops.rope, *arguments)
    assert_accurate(("q", "k", "grad"), run(rope, *arguments), plains, truths, FACTOR[dtype], FLOOR)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_outputs_and_gradient(case, dtype):
    arguments = split_inputs(*case, dtype)
    (qkv, H, *_, (_, _, grad_v)), G = arguments, case[3]
    truths = run_split(formulas.split_rope, qkv.double(), *arguments[1:])
    plains = run_split(torch_ops.split_rope, *arguments)
    q, k, v, grad = run_split(split_rope, *arguments)
    assert torch.equal(v, qkv[:, :, H + G :])
    assert grad.is_contiguous()
    grad_q, grad_k, ours_grad_v = grad.split([H, G, G], dim=2)
    assert torch.equal(ours_grad_v, grad_v)
    results = q, k, grad_q.contiguous(), grad_k.contiguous()
    plains, truths = ((q, k, *grad.split([H, G, G], dim=2)[:2]) for q, k, _, grad in (plains, truths))
    assert_accurate(("q", "k", "grad of q", "grad of k"), results, plains, truths, FACTOR[dtype], FLOOR)


def test_split_backward_accepts_any_strides():
    """Gradients come in attention's (B, H, S, C) order, and expanded along each axis."""
    qkv, H, cos, sin, grads = split_inputs(2, 9, 4, 2, 16)
    orders = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads]
    wanted = run_split(split_rope, qkv, H, cos, sin, grads)[-1]
    assert torch.equal(run_split(split_rope, qkv, H, cos, sin, orders)[-1], wanted)
    expanded = [grad[:1, :1, :1, :1].expand_as(grad) for grad in grads]
    wanted = run_split(split_rope, qkv, H, cos, sin, [grad.contiguous() for grad in expanded])[-1]
    assert wanted.any()
    assert torch.equal(run_split(split_rope, qkv, H, cos, sin, expanded)[-1], wanted)


@pytest.mark.parametrize("unused", [0, 1, 2], ids=["q", "k", "v"])
def test_split_backward_with_an_unused_output(unused):
    qkv, H, cos, sin, grads = split_inputs(2, 9, 4, 2, 16)

    def gradient(function):
        leaf = qkv.detach().requires_grad_()
        out = function(leaf, cos, sin, H, 2)
        used = [(x, grad) for index, (x, grad) in enumerate(zip(out, grads, strict=True)) if index != unused]
        return torch.autograd.grad([x for x, _ in used], leaf, [grad for _, grad in used])[0]

    ours = gradient(split_rope)
    assert [bool(part.any()) for part in ours.split([H, 2, 2], dim=2)] == [index != unused for index in range(3)]
    torch.testing.assert_close(ours, gradient(torch_ops.split_rope), rtol=1e-6, atol=1e-6)


def test_accepts_any_strides_except_on_the_last_axis():
    """q, k and their gradients are views of (B, H, S, C) tensors, the layout that attention uses."""
    q, k = randn(2, 4, 9, 16), randn(2, 2, 9, 16, seed=1)
    grads = randn(2, 4, 9, 16, seed=2), randn(2, 2, 9, 16, seed=3)
    cos_sin = angles(9, 16)

    def both(order):
        leaves = [order(x.transpose(1, 2)).detach().requires_grad_() for x in (q, k)]
        out = rope(*leaves, *cos_sin)
        return *out, *torch.autograd.grad(out, leaves, [order(grad.transpose(1, 2)) for grad in grads])

    assert_equal(both(lambda x: x), both(torch.Tensor.contiguous))


def test_backward_accepts_expanded_gradients():
    q, k = randn(2, 9, 4, 16).requires_grad_(), randn(2, 9, 2, 16, seed=1).requires_grad_()
    cos, sin = angles(9, 16)
    sum(x.sum() for x in rope(q, k, cos, sin)).backward()  # the gradients have strides of 0
    first, second = torch.cat([cos[:, :8] + sin[:, :8], cos[:, :8] - sin[:, :8]], -1).chunk(2, -1)
    expected = torch.cat([first, second], -1)[:, None]
    torch.testing.assert_close(q.grad, expected.expand_as(q), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k.grad, expected.expand_as(k), rtol=1e-6, atol=1e-6)


def test_q_and_k_are_new_tensors_and_v_is_a_view():
    qkv, H, cos, sin, _ = inputs(1, 9, 4, 2, 16)
    before = qkv.clone()
    with torch.no_grad():
        out = rope(*split(qkv, H), cos, sin)
        *turned, v = split_rope(qkv, cos, sin, H, 2)
    assert torch.equal(qkv, before)
    assert all(x.is_contiguous() and x.untyped_storage().data_ptr() != qkv.data_ptr() for x in (*out, *turned))
    assert v.untyped_storage().data_ptr() == qkv.data_ptr()


@pytest.mark.parametrize(
    "passes", [lambda: run(rope, *inputs(1, 9, 4, 2, 16)), lambda: run_split(split_rope, *split_inputs(1, 9, 4, 2, 16))]
)
def test_forward_and_backward_launch_one_kernel_each(monkeypatch, passes):
    launches = record_launches(monkeypatch, module, "_rope_kernel")
    passes()
    assert len(launches) == 2


def test_zero_positions_are_accepted():
    qkv, H, cos, sin, grads = inputs(2, 0, 4, 2, 16)
    assert [x.shape[1] for x in run(rope, qkv, H, cos, sin, grads)] == [0, 0, 0]
    assert [x.shape[1] for x in run_split(split_rope, *split_inputs(2, 0, 4, 2, 16))] == [0, 0, 0, 0]


def test_results_are_deterministic():
    arguments = inputs(2, 19, 16, 4, 32)
    assert_equal(run(rope, *arguments), run(rope, *arguments))


def test_custom_ops_pass_opcheck():
    qkv, H, cos, sin, _ = inputs(1, 9, 4, 2, 16)
    for inverse in (False, True):
        opcheck(torch.ops.acceleron_triton.rope, (*split(qkv, H), cos, sin, inverse))
    *_, grads = split_inputs(1, 9, 4, 2, 16)
    opcheck(torch.ops.acceleron_triton.split_rope_backward, (*grads, cos, sin))


def test_compiles_without_graph_breaks():
    arguments = inputs(2, 9, 4, 2, 16)
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, *arguments), run(rope, *arguments))
    for dynamic in (False, True):
        compiled = torch.compile(split_rope, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for positions in (9, 11):
            arguments = split_inputs(2, positions, 4, 2, 16)
            assert_equal(run_split(compiled, *arguments), run_split(split_rope, *arguments))
