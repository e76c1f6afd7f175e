"""The PyTorch reference, checked against the formulas in float64, and its gradients against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from compare import LargestTensor, assert_accurate, assert_equal, error, opcheck
from hypothesis import given
from hypothesis import strategies as st

from acceleron import ops
from acceleron.kernels import formulas, torch_ops

FACTOR = 1.5  # an op's error can be at most this many times the error of the formula in its dtype
NARROW = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- routing ---


# T, E, K and a scale. T = 1; odd T; E = K; one expert; many experts; logits of 1e4, which would overflow a naive
# exponential.
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("T", "E", "K", "scale"),
    [(1, 8, 2, 1), (37, 8, 4, 1), (64, 2, 2, 1), (9, 1, 1, 1), (50, 64, 8, 1), (20, 256, 16, 1), (33, 8, 2, 1e4)],
)
def test_routing_matches_the_formula(T, E, K, scale, normalize):
    logits = randn(T, E) * scale
    results = (backend.route_topk(logits, K, normalize=normalize) for backend in (ops, formulas))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=5, max_size=5), min_size=1, max_size=20))
def test_ties_go_to_the_lower_id(rows):
    """Three values for five experts give ties in every row."""
    expected = [sorted(range(5), key=lambda e: (-row[e], e))[:2] for row in rows]
    assert ops.route_topk(torch.tensor(rows)).topk_ids_TK.tolist() == expected


def test_minus_infinity_never_selects_an_expert_twice():
    routing = ops.route_topk(torch.tensor([[-torch.inf, 3.0, -torch.inf]]))
    assert routing.topk_ids_TK.tolist() == [[1, 0]]
    assert routing.topk_scores_TK.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_routed_in_fp32(dtype):
    logits = randn(40, 8, dtype=dtype)
    assert_equal(ops.route_topk(logits), ops.route_topk(logits.float()))


@pytest.mark.parametrize(("K", "normalize"), [(2, True), (2, False), (4, True), (1, False)])
def test_routing_gradients(K, normalize):
    logits = randn(9, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: (lambda r: (r.topk_scores_TK, r.z_loss, r.mean_probabilities_E))(
            ops.route_topk(x, K, normalize=normalize)
        ),
        logits,
    )


# --- the expert MLP ---


# T, D, F, E, the experts that get tokens, and K (default: 2).
CASES = {
    "usual": (33, 16, 24, 4, None),
    "one token": (1, 16, 24, 4, None),
    "empty experts": (20, 16, 24, 8, (1, 5, 6)),
    "hot experts": (20, 16, 24, 8, (6, 2)),
    "two experts": (12, 8, 8, 2, None),
    "odd widths": (19, 7, 5, 3, None),
    "K = 1": (19, 16, 24, 4, None, 1),
    "K = 8": (19, 16, 24, 64, None, 8),
}


def expert_inputs(T, D, width, E, used, top_k=2, dtype=torch.float32):
    """Return the plan, and the leaves x, topk_scores, w13 and w2."""
    g = torch.Generator().manual_seed(1)
    pool = torch.tensor(used or range(E))
    ids = torch.stack([pool[torch.randperm(len(pool), generator=g)[:top_k]] for _ in range(T)]).int()
    scores = torch.rand(T, top_k, generator=g, dtype=torch.float64)
    # Weights with scale 1 / sqrt(fan-in) keep every tensor at unit scale.
    tensors = [randn(T, D), scores, randn(E, 2 * width, D, seed=2) / D**0.5, randn(E, D, width, seed=3) / width**0.5]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t.to(wide if i == 1 else dtype).requires_grad_() for i, t in enumerate(tensors)]
    return ops.dispatch_plan(ids, E), leaves


def run(function, leaves, grad):
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_expert_mlp_and_every_gradient(case, dtype):
    plan, leaves = expert_inputs(*CASES[case], dtype=dtype)
    grad = randn(*leaves[0].shape, seed=4)

    def formula(x, scores, w13, w2):
        return formulas.expert_mlp(x, scores.to(x.dtype), plan, w13, w2)

    truths = run(formula, [leaf.detach().double().requires_grad_() for leaf in leaves], grad)
    plains = run(formula, leaves, grad)
    results = run(lambda x, scores, w13, w2: ops.expert_mlp(x, scores, plan, w13, w2), leaves, grad)
    floor = 4 * torch.finfo(dtype).eps  # the formula can be exact by chance
    assert_accurate(("y", "x", "topk_scores", "w13", "w2"), results, plains, truths, FACTOR, floor)


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_grouped_gemm_multiplies_each_row_by_its_expert(dtype, top_k):
    ids = torch.tensor([0, 3, 3, 0, 3, 4], dtype=torch.int32).view(-1, top_k)
    plan = ops.dispatch_plan(ids, 5)  # experts 1 and 2 are empty
    x, w = randn(6, 8, dtype=dtype), randn(5, 16, 8, seed=1, dtype=dtype)
    truth = formulas.grouped_gemm(x.double(), w.double(), plan)
    assert error(ops.grouped_gemm(x, w, plan), truth) <= 2 * torch.finfo(dtype).eps


def test_expert_mlp_is_deterministic():
    plan, leaves = expert_inputs(*CASES["usual"])
    first, second = (
        run(lambda x, scores, w13, w2: ops.expert_mlp(x, scores, plan, w13, w2), leaves, randn(33, 16, seed=4))
        for _ in range(2)
    )
    assert_equal(first, second)


# --- SwiGLU, RoPE, RMSNorm ---


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_swiglu_matches_the_formula(dtype):
    gate_up = randn(13, 2 * 7, dtype=dtype)
    truth = formulas.swiglu(gate_up.double())
    assert error(ops.swiglu(gate_up), truth) <= FACTOR * error(formulas.swiglu(gate_up), truth)


def test_swiglu_gradient():
    assert torch.autograd.gradcheck(ops.swiglu, randn(5, 6).requires_grad_())


@pytest.mark.parametrize("head_dim", [32, 48, 64, 96])
def test_rope_is_a_rotation_by_position_times_frequency(head_dim):
    """Channels i and i + C/2 form a complex number that rotates by position * 10000**(-2i/C)."""
    B, S, H, G = 2, 9, 4, 2
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(S, dtype=torch.float64), frequencies)
    q, k = randn(B, S, H, head_dim).requires_grad_(), randn(B, S, G, head_dim, seed=1).requires_grad_()
    both = torch.cat([angles, angles], dim=-1)
    results = ops.rope(q, k, both.cos(), both.sin())
    for x, rotated in zip((q, k), results, strict=True):
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        torch.testing.assert_close(rotated, torch.cat([turned.real, turned.imag], dim=-1), rtol=1e-12, atol=1e-12)
    # Backward applies the inverse rotation, so the gradient of the results themselves is the input.
    torch.testing.assert_close(torch.autograd.grad(results, (q, k), results)[0], q, rtol=1e-12, atol=1e-12)


def test_split_rope_is_rope_of_the_views():
    qkv, angles = randn(2, 9, 8, 16).requires_grad_(), randn(9, 8, seed=1).repeat(1, 2)
    q, k, v = ops.split_rope(qkv, angles.cos(), angles.sin(), 4, 2)
    assert torch.equal(v, qkv[:, :, 6:])
    assert v.data_ptr() == qkv[:, :, 6:].data_ptr()
    turned = ops.rope(qkv[:, :, :4], qkv[:, :, 4:6], angles.cos(), angles.sin())
    assert q.is_contiguous()
    assert k.is_contiguous()
    assert_equal((q, k), turned)
    # Backward applies the inverse rotation, so the gradient of the results themselves is the input.
    torch.testing.assert_close(torch.autograd.grad((q, k, v), qkv, (q, k, v))[0], qkv, rtol=1e-12, atol=1e-12)


def test_rope_rounds_once():
    q = randn(1, 64, 2, 32, dtype=torch.bfloat16)
    angles = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) * 100
    narrow, _ = ops.rope(q, q, angles.cos(), angles.sin())
    wide, _ = ops.rope(q.double(), q.double(), angles.cos().double(), angles.sin().double())
    assert narrow.dtype == torch.bfloat16
    assert ((narrow.double() - wide).abs() <= 2**-8 * wide.abs() + 1e-6).all()


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_matches_the_formula(with_residual):
    x, weight, residual = randn(6, 10).requires_grad_(), randn(10, seed=1).requires_grad_(), randn(6, 10, seed=2)
    total = x + residual if with_residual else x
    expected = total / (total.pow(2).sum(-1, keepdim=True) / 10 + 1e-6).sqrt() * weight
    norm, summed = ops.rms_norm(x, weight, 1e-6, residual if with_residual else None)
    torch.testing.assert_close(summed, total, rtol=0, atol=0)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=1e-12)
    residuals = (residual.requires_grad_(),) if with_residual else ()
    assert torch.autograd.gradcheck(lambda x, w, *r: ops.rms_norm(x, w, 1e-6, *r), (x, weight, *residuals))


def test_rms_norm_rounds_in_llamas_order():
    """Statistics are fp32, and a cast precedes the product with the weight. In bf16, transformers is bitwise equal."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, weight = randn(8, 64, dtype=torch.bfloat16) * 3, randn(64, seed=1, dtype=torch.bfloat16)
    norm = llama.LlamaRMSNorm(64, eps=1e-6)
    norm.weight = torch.nn.Parameter(weight)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6)[0], norm(x))


# --- linear cross-entropy ---


@pytest.fixture
def small_chunks(monkeypatch):
    """Use chunks of seven tokens, with a short last one."""
    monkeypatch.setattr(torch_ops, "LOGITS_PER_CHUNK", 7 * 50)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("num_tokens", [None, 7.25])
@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
def test_linear_cross_entropy_and_gradients(dtype, num_tokens):
    T, V, D = 45, 50, 16
    x, weight = randn(T, D, dtype=dtype).requires_grad_(), randn(V, D, seed=1, dtype=dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    labels[[0, 8, 44]] = -100

    def plain(x, weight):
        logits = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction="sum") / (num_tokens or T - 3)

    def op(x, weight):
        return ops.linear_cross_entropy(x, weight, labels, num_tokens=num_tokens and torch.tensor(num_tokens))

    leaves, grad = (x, weight), torch.tensor(3.0)
    truths = run(plain, [t.detach().double().requires_grad_() for t in leaves], grad)
    results = run(op, leaves, grad)
    floor = 4 * torch.finfo(dtype).eps
    assert_accurate(("loss", "x", "weight"), results, run(plain, leaves, grad), truths, FACTOR, floor)
    assert results[1][[0, 8, 44]].abs().max() == 0


@pytest.mark.usefixtures("small_chunks")
def test_fp32_weight_gets_an_fp32_gradient_from_bf16_activations():
    """The gradient is accumulated over the chunks in fp32."""
    x, weight = randn(350, 16, dtype=torch.bfloat16), randn(50, 16, seed=1, dtype=torch.float32).requires_grad_()
    labels = torch.randint(50, (350,), generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, labels), weight)
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.bfloat16().float())
    # Both use the same bf16 logits, so the only error is from rounding the gradient's GEMM operands.
    logits = F.linear(x, weight.bfloat16()).double()
    truth = (logits.softmax(-1) - F.one_hot(labels, 50)).t() @ x.double() / 350
    assert error(grad, truth) < 2**-8


@pytest.mark.usefixtures("small_chunks")
def test_full_logits_are_never_materialized():
    """Their gradients are not materialized either. The largest tensor is the gradient of x."""
    x, weight = randn(900, 16).requires_grad_(), randn(50, 16, seed=1).requires_grad_()
    with LargestTensor() as largest:
        ops.linear_cross_entropy(x, weight, torch.zeros(900, dtype=torch.int64)).backward()
    assert largest.numel == 900 * 16


# --- custom ops ---


def test_custom_ops_pass_opcheck():
    ops = torch.ops.acceleron
    offsets = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    opcheck(ops.topk_experts, (randn(9, 4), 3))
    opcheck(ops.sort_by_expert, (torch.tensor([[1, 0], [2, 1]], dtype=torch.int32), 3))
    opcheck(ops.grouped_rows, (randn(6, 8), randn(3, 8, 4), offsets))
    opcheck(ops.grouped_weight_grad, (randn(6, 8), randn(6, 4), offsets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1,), (65,), (0, 1, 63, 64, 65, 0, 130, 7), (3, 200, 0), (40, 40, 40, 40)])
def test_16_bit_grouped_gemm_uses_the_right_expert_for_every_row(sizes, dtype):
    """Its GEMMs include rows of neighboring experts. Their results must be overwritten or dropped."""
    N, experts = sum(sizes), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x, w = randn(N, 16, dtype=dtype), randn(len(sizes), 24, 16, seed=1, dtype=dtype)
    offsets = F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).int()
    y = torch.ops.acceleron.grouped_rows(x, w.transpose(1, 2), offsets)
    truth = torch.einsum("nd,nfd->nf", x.double(), w.double()[experts])
    # The result is rounded once, from a sum of 16 products that are exact in fp32.
    assert ((y.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-5).all()
