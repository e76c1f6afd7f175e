"""The ops of the model. Each runs on Triton kernels or on the PyTorch reference; `set_backend` chooses.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, W width of the shared expert,
V vocabulary, N = T * K expert-sorted rows, B batch, S sequence, H query heads, G key/value heads, C head_dim.

Floating-point arguments are bf16, fp16 or fp32; the reference also takes float64. For an invalid shape, dtype or
device, every op raises a ValueError that names the argument. The Triton kernels also reject strides they cannot read.
Under torch.autocast, `moe`, `expert_mlp`, `grouped_gemm` and `linear_cross_entropy` use its dtype, like F.linear. The
other ops use the dtype of their inputs, and the router always uses fp32.

The environment variable ACCELERON_REFERENCE_OPS=rope,moe makes these ops, and ops that contain one of them, run on the
reference even if Triton is selected. `set_backend` reads it.
"""

import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import contract, torch_ops
from .kernels.autograd import autocast_dtype, no_autocast
from .kernels.contract import ExpertBuffers, MoEOutput, Plan, Routing

try:
    from .kernels import configs, launch, triton_ops
except ImportError as error:
    _import_error = f"Triton 3.6 or later can't be imported ({error}); `pip install triton` on Linux"
    ROUTING_OPS = torch_ops.ROUTING_OPS
else:
    _import_error = None
    ROUTING_OPS = torch_ops.ROUTING_OPS | triton_ops.ROUTING_OPS

# Ops that contain other ops.
_CONTAINS = {
    "moe": {"dispatch_plan", "expert_mlp", "grouped_gemm", "route_topk", "router_logits", "swiglu"},
    "split_rope": {"rope"},
}
_backend, _reference_ops = "auto", ()


def triton_unavailable(device: torch.device) -> str | None:
    """Return the reason the Triton kernels cannot run on this device's tensors, or None if they can."""
    return _import_error or launch.unavailable(device)


@torch.compiler.assume_constant_result
def _auto_unavailable(device: torch.device) -> str | None:
    """Return the reason "auto" selects the reference on this device, or None if it selects Triton."""
    if reason := triton_unavailable(device):
        return reason
    if device.type != "cuda":
        return "the interpreter needs --kernels triton"
    return "AMD GPUs need --kernels triton, which has not been tested on one yet" if torch.version.hip else None


def uses_triton(device: torch.device, dtype: torch.dtype, op: str = "") -> bool:
    """Return whether an op runs on Triton kernels for tensors with this device and dtype."""
    if _backend != "auto" or op in _reference_ops:
        return _backend == "triton" and op not in _reference_ops
    return device.type == "cuda" and dtype != torch.float64 and _auto_unavailable(device) is None


def set_backend(choice: str, device: torch.device | str) -> str:
    """Choose the kernel backend of this process. Returns a log line with the reason.

    choice: "auto" (the default) selects Triton on a supported NVIDIA GPU, except for float64, and the reference
    elsewhere; "triton" always selects Triton; "reference" always works. device: where the tensors will be.
    Raises ValueError for "triton" where it cannot run, for an unknown choice, and for a bad environment variable.
    """
    global _backend, _reference_ops
    if choice not in ("auto", "triton", "reference"):
        raise ValueError(f"--kernels {choice}: expected auto, triton or reference")
    device = torch.device(device)
    reason = _auto_unavailable(device) if choice == "auto" else triton_unavailable(device)
    if choice == "triton" and reason:
        raise ValueError(f"--kernels triton: {reason}; or use --kernels auto or reference")
    reference_ops = _read_reference_ops()
    if not _import_error:
        configs.without_tma(), configs.table()  # raise ValueError for bad environment variables, before any launch
    _backend, _reference_ops = "reference" if choice == "auto" and reason else choice, reference_ops
    if _backend == "reference":
        return f"reference ({'as requested' if choice == 'reference' else reason})"
    return _describe_triton(device)


def backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return the kernel backend for this device and dtype: "reference", or Triton with its version and exceptions."""
    return _describe_triton(device) if uses_triton(device, dtype) else "reference"


def _describe_triton(device: torch.device) -> str:
    line = f"Triton {launch.triton.__version__}" + (", interpreted" if device.type == "cpu" else "")
    if without := os.environ.get("ACCELERON_NO_TMA"):
        line += f", without TMA for {without}"
    return line + (f", but the reference for {', '.join(_reference_ops)}" if _reference_ops else "")


def _read_reference_ops() -> tuple[str, ...]:
    """The ops in ACCELERON_REFERENCE_OPS, and the ops that contain one of them."""
    listed = os.environ.get("ACCELERON_REFERENCE_OPS", "")
    names = {name.strip() for name in listed.split(",") if name.strip()}
    if not names <= set(torch_ops.__all__):
        raise ValueError(f"ACCELERON_REFERENCE_OPS={listed}: expected names among {', '.join(torch_ops.__all__)}")
    return tuple(op for op in torch_ops.__all__ if names & {op, *_CONTAINS.get(op, ())})


@contextmanager
def using_backend(choice: str, device: torch.device):
    """Context manager that switches the kernel backend. Raises the errors of `set_backend`."""
    global _backend, _reference_ops
    before = _backend, _reference_ops
    set_backend(choice, device)
    try:
        yield
    finally:
        _backend, _reference_ops = before


def _autocast(x: Tensor) -> Tensor:
    """Cast x to the dtype of torch.autocast if it is enabled. float64 stays float64."""
    dtype = autocast_dtype(x.device)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def moe(
    x_TD: Tensor,
    router_ED: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    shared_w13_2WD: Tensor | None = None,
    shared_w2_DW: Tensor | None = None,
    residual_TD: Tensor | None = None,
    top_k: int = 2,
    *,
    normalize: bool = True,
    force_load_balance: bool = False,
    buffers: ExpertBuffers | None = None,
) -> MoEOutput:
    """A Mixture-of-Experts layer: each token's K routed experts and shared expert, plus the residual.

    1 <= E <= 256, and K = `top_k` is at most 16. w13_E2FD and shared_w13_2WD have the gate rows (w1) first, then the up
    rows (w3). Without shared weights, there is no shared expert. The weights are cast to x's dtype, except the
    router's; gradients have the weights' own dtype. The result has x's dtype. For backward, the Triton kernels save
    2 D + 4 F K + 6 W + 4 E + 16 K bytes per token in bf16 (x, pre-activations, logits and plan), and the weights in x's
    dtype. `normalize` and `force_load_balance` are described in `route_topk`.

    With `buffers`, the Triton kernels read w13 and w2 from them instead of casting the weights, and backward adds their
    gradients to the buffers instead of returning them. The reference ignores `buffers`, as do all backends under an
    autocast dtype that differs from the buffers'.
    """
    weights = (router_ED, w13_E2FD, w2_EDF, shared_w13_2WD, shared_w2_DW)
    options = dict(top_k=top_k, normalize=normalize, force_load_balance=force_load_balance)
    gemm_x_TD = _autocast(x_TD)
    if residual_TD is not None and autocast_dtype(x_TD.device):
        residual_TD = residual_TD.to(gemm_x_TD.dtype)
    if buffers is not None and buffers.w13_E2FD.dtype != gemm_x_TD.dtype:
        buffers = None  # autocast started after the buffers were allocated
    contract.check_moe(gemm_x_TD, *weights, residual_TD, top_k, buffers)
    with no_autocast(x_TD.device):
        if gemm_x_TD.dtype != x_TD.dtype:  # autocast: the router still reads the uncast x, so the ops are not fused
            routing = route_topk(router_logits(x_TD, router_ED), **options)
            plan = dispatch_plan(routing.topk_ids_TK, router_ED.shape[0])
            y_TD = expert_mlp(gemm_x_TD, routing.topk_scores_TK.float(), plan, w13_E2FD, w2_EDF)
            if shared_w13_2WD is not None:
                hidden_TW = swiglu(F.linear(gemm_x_TD, shared_w13_2WD.to(gemm_x_TD.dtype)))
                y_TD = y_TD + F.linear(hidden_TW, shared_w2_DW.to(gemm_x_TD.dtype))
            y_TD = y_TD if residual_TD is None else y_TD + residual_TD
            return MoEOutput(y_TD, routing.z_loss, routing.mean_probabilities_E, routing.tokens_per_expert_E)
        if uses_triton(x_TD.device, x_TD.dtype, "moe"):
            return triton_ops.moe(x_TD, *weights, residual_TD, **options, buffers=buffers)
        return torch_ops.moe(x_TD, *weights, residual_TD, **options, buffers=buffers)


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """logits_TE = x @ weight.T in fp32 for any input dtype (bf16 logits would tie), or in fp64 for an fp64 weight.

    Backward also computes in that dtype. The gradients have the dtypes of x and the weight.
    """
    contract.check_router_logits(x_TD, weight_ED)
    with no_autocast(x_TD.device):
        if uses_triton(x_TD.device, x_TD.dtype, "router_logits"):
            return triton_ops.router_logits(x_TD, weight_ED)
        return torch_ops.router_logits(x_TD, weight_ED)


def route_topk(
    logits_TE: Tensor, top_k: int = 2, *, normalize: bool = True, force_load_balance: bool = False
) -> Routing:
    """Top-k routing of router logits [T, E], E <= 256 and 1 <= K <= min(E, 16), with K = `top_k`. Computes in fp32.

    Each token selects its K largest logits; ties go to the lower expert, and NaN counts as the largest value. The top-k
    scores are the softmax of the selected logits or, with normalize=False, the softmax over all experts at the selected
    ids. z_loss = mean(logsumexp(logits)²) (ST-MoE, Zoph et al. 2022). mean_probabilities_E is the mean over the tokens
    of the softmax over all experts, from which `acceleron.moe.compute_balance_loss` forms the balance loss. The scores,
    z_loss and mean_probabilities_E are differentiable. `force_load_balance` restricts token t to the K experts from t
    mod E to (t + K - 1) mod E, for benchmarks and debugging; scores and statistics still come from the logits.
    """
    options = dict(normalize=normalize, force_load_balance=force_load_balance)
    contract.check_route_topk(logits_TE, top_k)
    with no_autocast(logits_TE.device):
        if uses_triton(logits_TE.device, logits_TE.dtype, "route_topk"):
            return triton_ops.route_topk(logits_TE, top_k, **options)
        return torch_ops.route_topk(logits_TE, top_k, **options)


def dispatch_plan(topk_ids_TK: Tensor, num_experts: int) -> Plan:
    """Sort all assignments by expert with a stable sort, on the device.

    topk_ids_TK: int32 or int64, K <= 16. Values outside 0..num_experts-1 are not detected: checking needs a host sync.
    """
    contract.check_dispatch_plan(topk_ids_TK, num_experts)
    if uses_triton(topk_ids_TK.device, topk_ids_TK.dtype, "dispatch_plan"):
        return triton_ops.dispatch_plan(topk_ids_TK, num_experts)
    return torch_ops.dispatch_plan(topk_ids_TK, num_experts)


def grouped_gemm(x_ND: Tensor, w_EFD: Tensor, plan: Plan) -> Tensor:
    """y_NF: y[n] = w[e] @ x[n] for the expert-sorted rows n of each expert e, with fp32 sums. x and w share a dtype."""
    x_ND, w_EFD = _autocast(x_ND), _autocast(w_EFD)
    contract.check_grouped_gemm(x_ND, w_EFD, plan)
    with no_autocast(x_ND.device):
        if uses_triton(x_ND.device, x_ND.dtype, "grouped_gemm"):
            return triton_ops.grouped_gemm(x_ND, w_EFD, plan)
        return torch_ops.grouped_gemm(x_ND, w_EFD, plan)


def expert_mlp(x_TD: Tensor, topk_scores_TK: Tensor, plan: Plan, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """y_TD: the sum of each token's K experts, w2 (silu(w1 x) * (w3 x)), weighted by the top-k scores.

    w13_E2FD (gate rows w1 first, then up rows w3) and w2_EDF are cast to x's dtype, which the result also has. Their
    gradients are summed in fp32 and have the weights' own dtype. topk_scores_TK is fp32. `plan` is `dispatch_plan`'s
    result for the same T and E. For backward, the Triton kernels save 2 D + (4 F + 12) K bytes per token in bf16.
    """
    x_TD = _autocast(x_TD)
    contract.check_expert_mlp(x_TD, topk_scores_TK, plan, w13_E2FD, w2_EDF)
    with no_autocast(x_TD.device):
        if uses_triton(x_TD.device, x_TD.dtype, "expert_mlp"):
            return triton_ops.expert_mlp(x_TD, topk_scores_TK, plan, w13_E2FD, w2_EDF)
        return torch_ops.expert_mlp(x_TD, topk_scores_TK, plan, w13_E2FD, w2_EDF)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). gate_up_N2F: (..., 2F), gate first, then up. Returns (..., F)."""
    contract.check_swiglu(gate_up_N2F)
    with no_autocast(gate_up_N2F.device):
        if uses_triton(gate_up_N2F.device, gate_up_N2F.dtype, "swiglu"):
            return triton_ops.swiglu(gate_up_N2F)
        return torch_ops.swiglu(gate_up_N2F)


def rope(q_BSHC: Tensor, k_BSGC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated q and k: x * cos + rotate_half(x) * sin (RoFormer, Su et al. 2021; halves as in GPT-NeoX and Llama).

    q_BSHC, k_BSGC: one dtype, an even C, last axis contiguous. cos_SC, sin_SC: the angles of the S positions, normally
    fp32, with equal halves; they get no gradient. The products are computed in fp32 (or cos's wider dtype).
    """
    contract.check_rope(q_BSHC, k_BSGC, cos_SC, sin_SC)
    with no_autocast(q_BSHC.device):
        if uses_triton(q_BSHC.device, q_BSHC.dtype, "rope"):
            return triton_ops.rope(q_BSHC, k_BSGC, cos_SC, sin_SC)
        return torch_ops.rope(q_BSHC, k_BSGC, cos_SC, sin_SC)


def split_rope(
    qkv_BSAC: Tensor, cos_SC: Tensor, sin_SC: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv_BSAC into q_BSHC, k_BSGC and v_BSGC. Its A = H + 2 G heads are q's, then k's, then v's.

    q and k are rotated as in `rope`; v is a view. The Triton kernels write the gradient of qkv in one launch.
    """
    contract.check_split_rope(qkv_BSAC, cos_SC, sin_SC, num_heads, num_kv_heads)
    with no_autocast(qkv_BSAC.device):
        if uses_triton(qkv_BSAC.device, qkv_BSAC.dtype, "split_rope"):
            return triton_ops.split_rope(qkv_BSAC, cos_SC, sin_SC, num_heads, num_kv_heads)
        return torch_ops.split_rope(qkv_BSAC, cos_SC, sin_SC, num_heads, num_kv_heads)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last axis (Zhang & Sennrich 2019) in Llama's order: fp32 statistics, cast back, times weight.

    Returns `(norm, sum)`. With a residual (shape and dtype of x), sum = x + residual, rounded to the dtype, and the
    norm is that of the sum; without one, sum is x. Continue with the returned sum: its gradient is added inside the
    norm's backward kernel. The weight (D,) is cast to x's dtype. Triton rows hold at most 64 KiB.
    """
    contract.check_rms_norm(x, weight, residual)
    with no_autocast(x.device):
        if uses_triton(x.device, x.dtype, "rms_norm"):
            return triton_ops.rms_norm(x, weight, eps, residual)
        return torch_ops.rms_norm(x, weight, eps, residual)


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int = -100, num_tokens: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of the logits x @ weight.T against the labels; the full logits are never materialized.

    weight_VD is cast to x's dtype; its gradient is summed in fp32 and returned in the weight's own dtype. labels_T is
    int64; `ignore_index` excludes a token; its row of x can hold any values. Other labels outside 0..V-1 are not
    detected. Returns an fp32 scalar (fp64 for fp64 inputs): NaN if all tokens are ignored, as in torch. The forward
    pass also computes the gradients, one chunk of logits at a time (Liger-Kernel, Hsu et al. 2024).

    num_tokens, a positive fp32 or fp64 scalar on x's device, divides the summed loss instead of the number of tokens
    that are not ignored; it gets no gradient. With the number of tokens of all ranks divided by the number of ranks,
    the mean of the ranks' losses is the mean over all tokens, and the loss of a rank without tokens is 0.
    """
    x_TD = _autocast(x_TD)
    contract.check_linear_cross_entropy(x_TD, weight_VD, labels_T, num_tokens)
    with no_autocast(x_TD.device):
        if uses_triton(x_TD.device, x_TD.dtype, "linear_cross_entropy"):
            return triton_ops.linear_cross_entropy(x_TD, weight_VD, labels_T, ignore_index, num_tokens)
        return torch_ops.linear_cross_entropy(x_TD, weight_VD, labels_T, ignore_index, num_tokens)
