"""Argument checks of every op: the error names the bad argument."""

import pytest
import torch
from compare import DEVICE, randn

from acceleron import ops
from acceleron.kernels import torch_ops

T, D, E, F, W, V = 9, 16, 5, 12, 8, 20
B, S, H, G, C = 2, 5, 4, 2, 8


def make_plan(tokens, experts, top_k=2):
    return torch_ops.dispatch_plan(torch.zeros(tokens, top_k, dtype=torch.int32, device=DEVICE), experts)


X, W13, W2, ANGLES = randn(T, D), randn(E, 2 * F, D), randn(E, D, F), randn(S, C)
VALID = {
    "dispatch_plan": dict(topk_ids_TK=torch.zeros(T, 2, dtype=torch.int32, device=DEVICE), num_experts=E),
    "expert_mlp": dict(x_TD=X, topk_scores_TK=randn(T, 2), plan=make_plan(T, E), w13_E2FD=W13, w2_EDF=W2),
    "grouped_gemm": dict(x_ND=randn(2 * T, D), w_EFD=W13, plan=make_plan(T, E)),
    "linear_cross_entropy": dict(x_TD=X, weight_VD=randn(V, D), labels_T=torch.arange(T, device=DEVICE))
    | dict(num_tokens=torch.tensor(4.5, device=DEVICE)),
    "moe": dict(x_TD=X, router_ED=randn(E, D), w13_E2FD=W13, w2_EDF=W2)
    | dict(shared_w13_2WD=randn(2 * W, D), shared_w2_DW=randn(D, W), residual_TD=X, top_k=2),
    "rms_norm": dict(x=X, weight=randn(D), residual=X, eps=1e-6),
    "rope": dict(q_BSHC=randn(B, S, H, C), k_BSGC=randn(B, S, G, C), cos_SC=ANGLES, sin_SC=ANGLES),
    "route_topk": dict(logits_TE=randn(T, E), top_k=2),
    "router_logits": dict(x_TD=X, weight_ED=randn(E, D)),
    "split_rope": dict(qkv_BSAC=randn(B, S, H + 2 * G, C), cos_SC=ANGLES, sin_SC=ANGLES, num_heads=H, num_kv_heads=G),
    "swiglu": dict(gate_up_N2F=randn(T, 2 * F)),
}
TENSORS = [(op, name) for op in VALID for name, x in VALID[op].items() if isinstance(x, torch.Tensor)]


def call(op, **changes):
    return getattr(ops, op)(**VALID[op] | changes)


@pytest.mark.parametrize("op", torch_ops.__all__)
def test_valid_arguments_are_accepted(op, backend):
    call(op)


# torch would broadcast or promote many of these.
@pytest.mark.parametrize(
    ("op", "name", "change", "message"),
    [
        ("dispatch_plan", "topk_ids_TK", lambda ids: ids.repeat(1, 3), "1 to 5 experts per token, but got 6"),
        ("dispatch_plan", "topk_ids_TK", lambda ids: ids.flatten(), "shape"),
        ("dispatch_plan", "topk_ids_TK", lambda ids: ids.float(), "int32 or int64, but got float32"),
        ("dispatch_plan", "num_experts", lambda _: 0, "1 to 256 experts, but got 0"),
        ("dispatch_plan", "num_experts", lambda _: 257, "1 to 256 experts, but got 257"),
        ("expert_mlp", "x_TD", lambda x: x[None], "shape"),
        ("expert_mlp", "x_TD", lambda x: x[:, :0], "a non-empty last axis"),
        ("expert_mlp", "topk_scores_TK", lambda scores: scores[:1], "shape"),
        ("expert_mlp", "topk_scores_TK", lambda scores: scores.repeat(1, 3), "1 to 5 experts per token, but got 6"),
        ("expert_mlp", "plan", lambda _: make_plan(T, E, 1), r"shape \(9, 2\), but got \(9, 1\)"),
        ("expert_mlp", "topk_scores_TK", lambda scores: scores.half(), "float32, but got float16"),
        ("expert_mlp", "w13_E2FD", lambda w13: w13[:, 1:], r"shape \(5, 24, 16\), but got \(5, 23, 16\)"),
        ("expert_mlp", "w13_E2FD", lambda w13: w13[1:], "shape"),
        ("expert_mlp", "w13_E2FD", lambda w13: w13.int(), "bfloat16 or .*, but got int32"),
        ("expert_mlp", "w2_EDF", lambda w2: w2[:, 1:], "shape"),
        ("expert_mlp", "plan", lambda _: make_plan(T - 1, E), "shape"),
        ("expert_mlp", "plan", lambda _: make_plan(T, E - 1), r"shape \(6\)"),
        ("expert_mlp", "plan", lambda plan: plan._replace(gather_idx=plan.gather_idx.long()), "int32, but got int64"),
        ("expert_mlp", "plan", lambda plan: plan._replace(scatter_idx_TK=plan.scatter_idx_TK[0]), "shape"),
        ("grouped_gemm", "x_ND", lambda x: x[None], "shape"),
        ("grouped_gemm", "x_ND", lambda x: x[:-1], r"shape \(18, any\), but got \(17, 16\)"),
        ("grouped_gemm", "w_EFD", lambda w: w.half(), "float32, but got float16"),
        ("grouped_gemm", "w_EFD", lambda w: w[..., 1:], "shape"),
        ("grouped_gemm", "w_EFD", lambda w: w[0], "shape"),
        ("grouped_gemm", "plan", lambda plan: plan._replace(offsets=plan.offsets[1:]), "shape"),
        ("grouped_gemm", "plan", lambda plan: plan._replace(scatter_idx_TK=plan.scatter_idx_TK[:-1]), "shape"),
        ("linear_cross_entropy", "x_TD", lambda x: x[0], "shape"),
        ("linear_cross_entropy", "weight_VD", lambda weight: weight[:, :8], "shape"),
        ("linear_cross_entropy", "weight_VD", lambda weight: weight.int(), "bfloat16 or .*, but got int32"),
        ("linear_cross_entropy", "labels_T", lambda labels: labels[1:], "shape"),
        ("linear_cross_entropy", "labels_T", lambda labels: labels[:, None], "shape"),
        ("linear_cross_entropy", "labels_T", lambda labels: labels.int(), "int64, but got int32"),
        ("linear_cross_entropy", "num_tokens", lambda count: count[None], r"shape \(\), but got \(1,\)"),
        ("linear_cross_entropy", "num_tokens", lambda count: count.half(), "float32 or float64, but got float16"),
        ("linear_cross_entropy", "num_tokens", lambda count: count.long(), "float32 or float64, but got int64"),
        ("moe", "router_ED", lambda router: router[1:], "shape"),
        ("moe", "top_k", lambda _: 6, "1 to 5 experts per token, but got 6"),
        ("moe", "top_k", lambda _: 0, "1 to 5 experts per token, but got 0"),
        ("moe", "w13_E2FD", lambda w13: w13[:, 1:], r"shape \(5, 24, 16\), but got \(5, 23, 16\)"),
        ("moe", "w2_EDF", lambda w2: w2[:, :1], "shape"),
        ("moe", "w2_EDF", lambda w2: w2[:0], "1 to 256 experts, but got 0"),
        ("moe", "shared_w13_2WD", lambda w13: w13[1:], "shape"),
        ("moe", "shared_w2_DW", lambda w2: w2[:1], "shape"),
        ("moe", "shared_w2_DW", lambda _: None, "both or neither"),
        ("moe", "residual_TD", lambda residual: residual[1:], "shape"),
        ("moe", "residual_TD", lambda residual: residual.bfloat16(), "float32, but got bfloat16"),
        ("rms_norm", "x", lambda x: x[0, 0], "shape"),
        ("rms_norm", "weight", lambda weight: weight[:1], "shape"),
        ("rms_norm", "residual", lambda residual: residual[:1], "shape"),
        ("rms_norm", "residual", lambda residual: residual.bfloat16(), "float32, but got bfloat16"),
        ("rope", "q_BSHC", lambda q: q[..., :7], "an even head_dim"),
        ("rope", "q_BSHC", lambda q: q[0], "shape"),
        ("rope", "k_BSGC", lambda k: k[:1], "shape"),
        ("rope", "k_BSGC", lambda k: k[:, :, :0], "at least one head"),
        ("rope", "k_BSGC", lambda k: k.bfloat16(), "float32, but got bfloat16"),
        ("rope", "cos_SC", lambda cos: cos[:1], "shape"),
        ("rope", "sin_SC", lambda sin: sin.half(), "float32, but got float16"),
        ("route_topk", "top_k", lambda _: 0, "1 to 5 experts per token, but got 0"),
        ("route_topk", "top_k", lambda _: 6, "1 to 5 experts per token, but got 6"),
        ("route_topk", "logits_TE", lambda logits: logits.repeat(1, 52)[:, :257], "1 to 256 experts, but got 257"),
        ("route_topk", "logits_TE", lambda logits: logits[None], "shape"),
        ("route_topk", "logits_TE", lambda logits: logits.long(), "bfloat16 or .*, but got int64"),
        ("router_logits", "x_TD", lambda x: x[None], "shape"),
        ("router_logits", "weight_ED", lambda weight: weight[:, :1], r"shape \(any, 16\), but got \(5, 1\)"),
        ("split_rope", "qkv_BSAC", lambda qkv: qkv[..., :7], "an even head_dim"),
        ("split_rope", "qkv_BSAC", lambda qkv: qkv[:, :, 1:], r"shape \(any, any, 8, any\)"),
        ("split_rope", "num_kv_heads", lambda _: 0, "at least 1"),
        ("split_rope", "cos_SC", lambda cos: cos[:, :4], "shape"),
        ("split_rope", "sin_SC", lambda sin: sin.half(), "float32, but got float16"),
        ("swiglu", "gate_up_N2F", lambda gate_up: gate_up[:, 1:], "an even last axis"),
        ("swiglu", "gate_up_N2F", lambda gate_up: gate_up[0, 0], "shape"),
    ],
)
def test_error_names_the_argument_of_wrong_shape_or_dtype(op, name, change, message, backend):
    with pytest.raises(ValueError, match=rf"^{op}: .*\b{name}\b.*: expected {message}"):
        call(op, **{name: change(VALID[op][name])})


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if name != next(iter(VALID[op]))])
def test_error_names_the_argument_on_a_different_device(op, name, backend):
    with pytest.raises(ValueError, match=f"^{op}: {name}: expected a tensor on {DEVICE}"):
        call(op, **{name: VALID[op][name].to("meta")})


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if VALID[op][name].dim() > 1])
def test_triton_rejects_strides(op, name):
    strided = VALID[op][name].transpose(-1, -2).contiguous().transpose(-1, -2)
    with (
        ops.using_backend("triton", torch.device(DEVICE)),
        pytest.raises(ValueError, match=rf"^{op}: {name}: expected .* call \.contiguous\(\)$"),
    ):
        call(op, **{name: strided})


@pytest.mark.parametrize("op", sorted(set(VALID) - {"dispatch_plan"}))
def test_triton_rejects_float64(op):
    wide = {name: x.double() for name, x in VALID[op].items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    message = f"^{op}: {next(iter(wide))}: expected bfloat16 or float16 or float32, but got float64"
    with ops.using_backend("triton", torch.device(DEVICE)), pytest.raises(ValueError, match=message):
        call(op, **wide)
