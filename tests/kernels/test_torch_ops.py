"""The reference ops against float64 loops written from the formulas, and their gradients against finite differences.

Errors are compared, not outputs: in a narrow dtype an op may be off from the float64 truth by FACTOR times what the
plain loop is off in that dtype.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import error
from hypothesis import given
from hypothesis import strategies as st

from acceleron import ops
from acceleron.kernels import torch_ops

FACTOR = 1.5
NARROW = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- routing ---


def loop_routing(logits):
    """Token by token, from the formulas."""
    T, E = len(logits), len(logits[0])
    experts = [sorted(range(E), key=lambda e: (-row[e], e))[:2] for row in logits]
    z_loss = balance = 0.0
    weights, counts, probabilities = [], [0] * E, [0.0] * E
    for row, (a, b) in zip(logits, experts, strict=True):
        weights.append([1 / (1 + math.exp(row[b] - row[a])), 1 - 1 / (1 + math.exp(row[b] - row[a]))])
        logsumexp = max(row) + math.log(sum(math.exp(v - max(row)) for v in row))
        z_loss += logsumexp**2 / T
        for e in range(E):
            probabilities[e] += math.exp(row[e] - logsumexp) / T
        counts[a] += 1
        counts[b] += 1
    balance = E * sum(c / (2 * T) * p for c, p in zip(counts, probabilities, strict=True))
    return experts, weights, z_loss, balance, counts


# T = 1; a T that no block size divides; E = K = 2; many experts; scale 1e4 overflows a naive exp.
@pytest.mark.parametrize(
    ("T", "E", "scale"), [(1, 8, 1), (37, 8, 1), (64, 2, 1), (50, 64, 1), (20, 256, 1), (33, 8, 1e4)]
)
def test_routing_matches_the_formulas(T, E, scale):
    logits = randn(T, E) * scale
    experts, weights, z_loss, balance, counts = loop_routing(logits.tolist())
    routing = ops.route_top2(logits)
    assert routing.topk_ids_TK.tolist() == experts
    assert routing.topk_ids_TK.dtype == torch.int32
    torch.testing.assert_close(
        routing.topk_scores_TK, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    assert routing.z_loss.item() == pytest.approx(z_loss, rel=1e-12)
    assert routing.balance_loss.item() == pytest.approx(balance, rel=1e-12)
    assert routing.tokens_per_expert_E.tolist() == counts


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=5, max_size=5), min_size=1, max_size=20))
def test_ties_go_to_the_lower_expert(rows):
    """Three values among five experts: every row has ties."""
    assert ops.route_top2(torch.tensor(rows)).topk_ids_TK.tolist() == loop_routing(rows)[0]


def test_minus_infinity_never_chooses_an_expert_twice():
    routing = ops.route_top2(torch.tensor([[-torch.inf, 3.0, -torch.inf]]))
    assert routing.topk_ids_TK.tolist() == [[1, 0]]
    assert routing.topk_scores_TK.tolist() == [[1.0, 0.0]]


def test_uniform_routing_has_a_balance_loss_of_exactly_one():
    """Equal logits: the choice is lopsided (experts 0 and 1), yet every probability is 1/E."""
    assert ops.route_top2(torch.zeros(16, 8)).balance_loss.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_routed_in_fp32(dtype):
    logits = randn(40, 8, dtype=dtype)
    narrow, wide = ops.route_top2(logits), ops.route_top2(logits.float())
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_routing_gradients():
    logits = randn(9, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: (lambda r: (r.topk_scores_TK, r.z_loss, r.balance_loss))(ops.route_top2(x)), logits
    )


@given(
    st.integers(2, 9).flatmap(
        lambda E: st.tuples(st.just(E), st.lists(st.tuples(*[st.integers(0, E - 1)] * 2), min_size=1))
    )
)
def test_plan_is_a_stable_sort(case):
    num_experts, experts = case
    flat = [expert for pair in experts for expert in pair]
    plan = ops.dispatch_plan(torch.tensor(experts, dtype=torch.int32), num_experts)
    gather_idx = sorted(range(len(flat)), key=lambda a: flat[a])  # Python's sort is stable
    assert plan.gather_idx.tolist() == gather_idx
    assert [gather_idx[row] for row in plan.scatter_idx_TK.flatten().tolist()] == list(range(len(flat)))
    assert plan.offsets.tolist() == [sum(e < expert for e in flat) for expert in range(num_experts + 1)]
    assert {t.dtype for t in plan} == {torch.int32}


# --- the expert MLP ---


def loop_expert_mlp(x, weights, experts, w13, w2):
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for k in range(2):
            gate, up = (w13[experts[t, k]] @ x[t]).chunk(2)
            y = y + (weights[t, k].to(x.dtype) * (w2[experts[t, k]] @ (gate * torch.sigmoid(gate) * up)))
        rows.append(y)
    return torch.stack(rows)


# T, D, F, E and which experts get tokens: all; T = 1; an expert without tokens; all on the same two; E = K; odd widths.
CASES = {
    "usual": (33, 16, 24, 4, None),
    "one token": (1, 16, 24, 4, None),
    "empty experts": (20, 16, 24, 8, (1, 5, 6)),
    "hot experts": (20, 16, 24, 8, (6, 2)),
    "two experts": (12, 8, 8, 2, None),
    "odd widths": (19, 7, 5, 3, None),
}


def expert_inputs(T, D, width, E, used, dtype):
    g = torch.Generator().manual_seed(1)
    pool = torch.tensor(used or range(E))
    experts = torch.stack([pool[torch.randperm(len(pool), generator=g)[:2]] for _ in range(T)]).int()
    weights = torch.rand(T, 2, generator=g, dtype=torch.float64)
    # Weights of scale 1/sqrt(fan-in) keep every tensor at unit scale.
    tensors = [randn(T, D), weights, randn(E, 2 * width, D, seed=2) / D**0.5, randn(E, D, width, seed=3) / width**0.5]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return experts, [t.to(wide if i == 1 else dtype).requires_grad_() for i, t in enumerate(tensors)]


def run(function, leaves, grad):
    y = function(*leaves)
    return y, torch.autograd.grad(y, leaves, grad.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_expert_mlp_and_every_gradient(case, dtype):
    experts, leaves = expert_inputs(*CASES[case], dtype)
    grad = randn(*leaves[0].shape, seed=4)
    plan = ops.dispatch_plan(experts, leaves[2].shape[0])

    def loop(x, weights, w13, w2):
        return loop_expert_mlp(x, weights, experts, w13, w2)

    truth, true_grads = run(loop, [leaf.detach().double().requires_grad_() for leaf in leaves], grad)
    plain, plain_grads = run(loop, leaves, grad)
    result, grads = run(lambda x, weights, w13, w2: ops.expert_mlp(x, weights, plan, w13, w2), leaves, grad)
    floor = 4 * torch.finfo(dtype).eps  # where the loop is exact by luck
    assert error(result, truth) <= FACTOR * error(plain, truth) + floor
    for name, ours, theirs, true, leaf in zip(
        ("x", "weights", "w13", "w2"), grads, plain_grads, true_grads, leaves, strict=True
    ):
        assert ours.dtype == leaf.dtype
        assert error(ours, true) <= FACTOR * error(theirs, true) + floor, name


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
def test_grouped_gemm_multiplies_each_row_by_its_expert(dtype):
    experts = torch.tensor([[0, 3], [3, 0], [3, 4]], dtype=torch.int32)  # experts 1 and 2 are empty
    plan = ops.dispatch_plan(experts, 5)
    x, w = randn(6, 8, dtype=dtype), randn(5, 16, 8, seed=1, dtype=dtype)
    expected = torch.stack([w[e].double() @ row.double() for e, row in zip([0, 0, 3, 3, 3, 4], x, strict=True)])
    assert error(ops.grouped_gemm(x, w, plan), expected) <= 2 * torch.finfo(dtype).eps


def test_same_inputs_give_the_same_bits():
    experts, leaves = expert_inputs(*CASES["usual"], torch.float32)
    plan = ops.dispatch_plan(experts, 4)
    runs = [run(lambda x, w, a, b: ops.expert_mlp(x, w, plan, a, b), leaves, randn(33, 16, seed=4)) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


# --- SwiGLU, RoPE, RMSNorm ---


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_swiglu(dtype):
    gate_up = randn(13, 2 * 7, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    truth = gate / (1 + (-gate).exp()) * up
    plain = gate_up[:, :7] * torch.sigmoid(gate_up[:, :7]) * gate_up[:, 7:]
    assert error(ops.swiglu(gate_up), truth) <= FACTOR * error(plain, truth)


def test_swiglu_gradient():
    assert torch.autograd.gradcheck(ops.swiglu, randn(5, 6).requires_grad_())


@pytest.mark.parametrize("head_dim", [32, 48, 64, 96])
def test_rope_is_a_rotation_by_position_times_frequency(head_dim):
    """Channel i and i + C/2 are a complex number, turned by position * 10000**(-2i/C)."""
    B, S, H, G = 2, 9, 4, 2
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(S, dtype=torch.float64), frequencies)
    q, k = randn(B, S, H, head_dim).requires_grad_(), randn(B, S, G, head_dim, seed=1).requires_grad_()
    both = torch.cat([angles, angles], dim=-1)
    results = ops.rope(q, k, both.cos(), both.sin())
    for x, rotated in zip((q, k), results, strict=True):
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        torch.testing.assert_close(rotated, torch.cat([turned.real, turned.imag], dim=-1), rtol=1e-12, atol=1e-12)
    # A rotation's gradient is the inverse rotation of the incoming one: that of the result itself is the input.
    torch.testing.assert_close(torch.autograd.grad(results, (q, k), results)[0], q, rtol=1e-12, atol=1e-12)


def test_split_rope_is_rope_of_the_views():
    qkv, angles = randn(2, 9, 8, 16).requires_grad_(), randn(9, 8, seed=1).repeat(1, 2)
    q, k, v = ops.split_rope(qkv, angles.cos(), angles.sin(), 4, 2)
    assert torch.equal(v, qkv[:, :, 6:])
    assert v.data_ptr() == qkv[:, :, 6:].data_ptr()
    turned = ops.rope(qkv[:, :, :4], qkv[:, :, 4:6], angles.cos(), angles.sin())
    for ours, expected in zip((q, k), turned, strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, expected)
    # The inverse rotation of q and k, and v's own: the gradient of the results themselves is the input.
    torch.testing.assert_close(torch.autograd.grad((q, k, v), qkv, (q, k, v))[0], qkv, rtol=1e-12, atol=1e-12)


def test_rope_rounds_once():
    q = randn(1, 64, 2, 32, dtype=torch.bfloat16)
    angles = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) * 100
    narrow, _ = ops.rope(q, q, angles.cos(), angles.sin())
    wide, _ = ops.rope(q.double(), q.double(), angles.cos().double(), angles.sin().double())
    assert narrow.dtype == torch.bfloat16
    assert ((narrow.double() - wide).abs() <= 2**-8 * wide.abs() + 1e-6).all()


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(with_residual):
    x, weight, residual = randn(6, 10).requires_grad_(), randn(10, seed=1).requires_grad_(), randn(6, 10, seed=2)
    total = x + residual if with_residual else x
    expected = total / (total.pow(2).sum(-1, keepdim=True) / 10 + 1e-6).sqrt() * weight
    norm, summed = ops.rms_norm(x, weight, 1e-6, residual if with_residual else None)
    torch.testing.assert_close(summed, total, rtol=0, atol=0)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=1e-12)
    residuals = (residual.requires_grad_(),) if with_residual else ()
    assert torch.autograd.gradcheck(lambda x, w, *r: ops.rms_norm(x, w, 1e-6, *r), (x, weight, *residuals))


def test_rms_norm_has_llamas_order():
    """fp32 statistics, then cast, then times the weight: bit for bit what transformers computes in bf16."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, weight = randn(8, 64, dtype=torch.bfloat16) * 3, randn(64, seed=1, dtype=torch.bfloat16)
    norm = llama.LlamaRMSNorm(64, eps=1e-6)
    norm.weight = torch.nn.Parameter(weight)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6)[0], norm(x))


# --- linear cross-entropy ---


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven tokens a chunk, so that the chunks are many and the last is short."""
    monkeypatch.setattr(torch_ops, "LOGITS_PER_CHUNK", 7 * 50)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
def test_linear_cross_entropy_and_gradients(dtype):
    T, V, D = 45, 50, 16
    x, weight = randn(T, D, dtype=dtype).requires_grad_(), randn(V, D, seed=1, dtype=dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    labels[[0, 8, 44]] = -100

    def plain(x, weight):
        return F.cross_entropy(F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32)), labels)

    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth, true_grads = run(plain, wide, torch.tensor(3.0))
    theirs, their_grads = run(plain, (x, weight), torch.tensor(3.0))
    ours, our_grads = run(lambda *xw: ops.linear_cross_entropy(*xw, labels), (x, weight), torch.tensor(3.0))
    floor = 4 * torch.finfo(dtype).eps
    assert error(ours, truth.detach()) <= FACTOR * error(theirs, truth.detach()) + floor
    for name, a, b, true in zip(("x", "weight"), our_grads, their_grads, true_grads, strict=True):
        assert error(a, true) <= FACTOR * error(b, true) + floor, name
    assert our_grads[0][[0, 8, 44]].abs().max() == 0


@pytest.mark.usefixtures("small_chunks")
def test_fp32_weight_gets_an_fp32_gradient_from_bf16_activations():
    """Accumulated over the chunks in fp32: closer to the truth than one rounded to bf16 could be."""
    x, weight = randn(350, 16, dtype=torch.bfloat16), randn(50, 16, seed=1, dtype=torch.float32).requires_grad_()
    labels = torch.randint(50, (350,), generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, labels), weight)
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.bfloat16().float())
    # Against torch with the same bf16 logits: what is left is the rounding of the gradient's own GEMM operands.
    logits = F.linear(x, weight.bfloat16()).double()
    truth = (logits.softmax(-1) - F.one_hot(labels, 50)).t() @ x.double() / 350
    assert error(grad, truth) < 2**-8


def test_all_labels_ignored_is_nan_as_in_torch():
    assert ops.linear_cross_entropy(randn(3, 4), randn(5, 4), torch.full((3,), -100)).isnan()


@pytest.mark.usefixtures("small_chunks")
def test_no_tensor_of_all_logits_exists():
    """Not the logits of all tokens, nor their gradient: the largest tensor is the weight's gradient."""

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Sizes.largest = max(Sizes.largest, result.numel())
            return result

    x, weight = randn(900, 16).requires_grad_(), randn(50, 16, seed=1).requires_grad_()
    with Sizes():
        ops.linear_cross_entropy(x, weight, torch.zeros(900, dtype=torch.int64)).backward()
    assert Sizes.largest == 900 * 16  # x's gradient; the logits would be 900 * 50


# --- as custom ops ---


def test_custom_ops_pass_opcheck():
    torch.use_deterministic_algorithms(False)  # opcheck compares runs on memory it does not own
    ops = torch.ops.acceleron
    offsets = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    torch.library.opcheck(ops.top2_experts, (randn(9, 4),))
    torch.library.opcheck(ops.sort_by_expert, (torch.tensor([[1, 0], [2, 1]], dtype=torch.int32), 3))
    torch.library.opcheck(ops.grouped_rows, (randn(6, 8), randn(3, 8, 4), offsets))
    torch.library.opcheck(ops.grouped_weight_grad, (randn(6, 8), randn(6, 4), offsets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1,), (65,), (0, 1, 63, 64, 65, 0, 130, 7), (3, 200, 0), (40, 40, 40, 40)])
def test_grouped_gemm_in_16_bits_gives_every_row_its_own_expert(sizes, dtype):
    """There it multiplies more rows than an expert's, next to the end those before them: none may be left wrong."""
    N, experts = sum(sizes), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x, w = randn(N, 16, dtype=dtype), randn(len(sizes), 24, 16, seed=1, dtype=dtype)
    offsets = F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).int()
    y = torch.ops.acceleron.grouped_rows(x, w.transpose(1, 2), offsets)
    truth = torch.einsum("nd,nfd->nf", x.double(), w.double()[experts])
    # One rounding of a sum of 16 products, each of them exact in fp32.
    assert ((y.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-5).all()
