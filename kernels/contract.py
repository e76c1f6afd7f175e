"""Result types of the ops, and the argument checks that acceleron/ops.py calls.

A check raises a ValueError that names the argument in cases where torch would silently broadcast, promote or read past
the end. It never reads values on a device.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, W width of the shared expert,
V vocabulary, N = T * K expert-sorted rows, B batch, S sequence, H query heads, G key/value heads, C head_dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_EXPERTS, MAX_TOP_K = 256, 16  # limits of the Triton kernels
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Routing(NamedTuple):
    """Top-k routing and the router's statistics. ids are int32, counts int64, the rest fp32 (fp64 for fp64 logits)."""

    topk_scores_TK: Tensor
    topk_ids_TK: Tensor
    z_loss: Tensor
    mean_probabilities_E: Tensor
    tokens_per_expert_E: Tensor


class Plan(NamedTuple):
    """The T * K assignments, sorted by expert. Assignment t * K + k is the k-th choice of token t.

    gather_idx: int32 [N], the assignment of each expert-sorted row (a stable sort).
    scatter_idx_TK: int32, the row of each assignment.
    offsets: int32 [E + 1]; expert e owns the rows offsets[e]:offsets[e + 1].
    """

    gather_idx: Tensor
    scatter_idx_TK: Tensor
    offsets: Tensor


class ExpertBuffers(NamedTuple):
    """For several micro-batches: the routed experts' weights in x's dtype, and the fp32 sums of their gradients."""

    w13_E2FD: Tensor
    w2_EDF: Tensor
    dw13_E2FD: Tensor
    dw2_EDF: Tensor


class MoEOutput(NamedTuple):
    """Output of a Mixture-of-Experts layer, with the statistics of `Routing`."""

    y_TD: Tensor
    z_loss: Tensor
    mean_probabilities_E: Tensor
    tokens_per_expert_E: Tensor


def check(
    argument: str,
    x: Tensor,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype] = FLOATS,
    like: Tensor | None = None,
):
    """Raise ValueError unless x has this shape (None: any size), one of these dtypes, and the device of `like`."""
    if isinstance(dtypes, torch.dtype):
        dtypes = (dtypes,)
    if x.dim() != len(shape) or any(want not in (None, size) for want, size in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{argument}: expected shape ({wanted}), but got {tuple(x.shape)}")
    if x.dim() > 1 and x.shape[-1] == 0:
        raise ValueError(f"{argument}: expected a non-empty last axis, but got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{argument}: expected {names}, but got {str(x.dtype).removeprefix('torch.')}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{argument}: expected a tensor on {like.device}, but it is on {x.device}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores, statistics and sums: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_experts(argument: str, experts: int):
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"{argument}: expected 1 to {MAX_EXPERTS} experts, but got {experts}")


def _check_top_k(argument: str, top_k: int, experts: int):
    if type(top_k) is not int or not 1 <= top_k <= min(experts, MAX_TOP_K):
        raise ValueError(f"{argument}: expected 1 to {min(experts, MAX_TOP_K)} experts per token, but got {top_k}")


def _check_plan(op: str, plan: Plan, shape_TK: Sequence[int | None], experts: int, like: Tensor):
    check(f"{op}: plan.scatter_idx_TK", plan.scatter_idx_TK, shape_TK, torch.int32, like)
    check(f"{op}: plan.gather_idx", plan.gather_idx, (plan.scatter_idx_TK.numel(),), torch.int32, like)
    check(f"{op}: plan.offsets", plan.offsets, (experts + 1,), torch.int32, like)


def check_route_topk(logits_TE: Tensor, top_k: int):
    check("route_topk: logits_TE", logits_TE, (None, None))
    _check_experts("route_topk: logits_TE", logits_TE.shape[1])
    _check_top_k("route_topk: top_k", top_k, logits_TE.shape[1])


def check_dispatch_plan(topk_ids_TK: Tensor, num_experts: int):
    check("dispatch_plan: topk_ids_TK", topk_ids_TK, (None, None), (torch.int32, torch.int64))
    _check_experts("dispatch_plan: num_experts", num_experts)
    _check_top_k("dispatch_plan: topk_ids_TK", topk_ids_TK.shape[1], num_experts)


def check_router_logits(x_TD: Tensor, weight_ED: Tensor):
    check("router_logits: x_TD", x_TD, (None, None))
    check("router_logits: weight_ED", weight_ED, (None, x_TD.shape[1]), like=x_TD)


def check_grouped_gemm(x_ND: Tensor, w_EFD: Tensor, plan: Plan):
    check("grouped_gemm: x_ND", x_ND, (plan.gather_idx.numel(), None))
    check("grouped_gemm: w_EFD", w_EFD, (None, None, x_ND.shape[1]), x_ND.dtype, x_ND)
    _check_experts("grouped_gemm: w_EFD", w_EFD.shape[0])
    _check_plan("grouped_gemm", plan, (None, None), w_EFD.shape[0], x_ND)


def _check_weights(op: str, D: int, w13_E2FD: Tensor, w2_EDF: Tensor, like: Tensor):
    check(f"{op}: w2_EDF", w2_EDF, (None, D, None), like=like)
    E, _, F = w2_EDF.shape
    _check_experts(f"{op}: w2_EDF", E)
    check(f"{op}: w13_E2FD", w13_E2FD, (E, 2 * F, D), like=like)


def check_expert_mlp(x_TD: Tensor, topk_scores_TK: Tensor, plan: Plan, w13_E2FD: Tensor, w2_EDF: Tensor):
    check("expert_mlp: x_TD", x_TD, (None, None))
    T, D = x_TD.shape
    _check_weights("expert_mlp", D, w13_E2FD, w2_EDF, x_TD)
    check("expert_mlp: topk_scores_TK", topk_scores_TK, (T, None), wide(x_TD.dtype), x_TD)
    _check_top_k("expert_mlp: topk_scores_TK", topk_scores_TK.shape[1], w2_EDF.shape[0])
    _check_plan("expert_mlp", plan, topk_scores_TK.shape, w2_EDF.shape[0], x_TD)


def check_moe(x_TD, router_ED, w13_E2FD, w2_EDF, shared_w13_2WD, shared_w2_DW, residual_TD, top_k, buffers):
    check("moe: x_TD", x_TD, (None, None))
    D = x_TD.shape[1]
    _check_weights("moe", D, w13_E2FD, w2_EDF, x_TD)
    check("moe: router_ED", router_ED, (w2_EDF.shape[0], D), like=x_TD)
    _check_top_k("moe: top_k", top_k, w2_EDF.shape[0])
    if (shared_w13_2WD is None) != (shared_w2_DW is None):
        raise ValueError("moe: shared_w13_2WD and shared_w2_DW: expected both or neither")
    if shared_w2_DW is not None:
        check("moe: shared_w2_DW", shared_w2_DW, (D, None), like=x_TD)
        check("moe: shared_w13_2WD", shared_w13_2WD, (2 * shared_w2_DW.shape[1], D), like=x_TD)
    if residual_TD is not None:
        check("moe: residual_TD", residual_TD, x_TD.shape, x_TD.dtype, x_TD)
    if buffers is not None:
        for name, weight in (("w13_E2FD", w13_E2FD), ("w2_EDF", w2_EDF)):
            check(f"moe: buffers.{name}", getattr(buffers, name), weight.shape, x_TD.dtype, x_TD)
            check(f"moe: buffers.d{name}", getattr(buffers, f"d{name}"), weight.shape, torch.float32, x_TD)


def check_swiglu(gate_up_N2F: Tensor):
    check("swiglu: gate_up_N2F", gate_up_N2F, [None] * max(1, gate_up_N2F.dim()))
    if gate_up_N2F.shape[-1] % 2:
        raise ValueError(
            f"swiglu: gate_up_N2F: expected an even last axis, gate then up, but got {tuple(gate_up_N2F.shape)}"
        )


def _check_heads(argument: str, x: Tensor, heads: int | None):
    check(argument, x, (None, None, heads, None))
    if not x.shape[2]:
        raise ValueError(f"{argument}: expected at least one head, but got {tuple(x.shape)}")
    if x.shape[3] % 2:
        raise ValueError(f"{argument}: expected an even head_dim, but got {tuple(x.shape)}")


def _check_angles(op: str, x: Tensor, cos_SC: Tensor, sin_SC: Tensor):
    S, C = x.shape[1], x.shape[3]
    check(f"{op}: cos_SC", cos_SC, (S, C), like=x)
    check(f"{op}: sin_SC", sin_SC, (S, C), cos_SC.dtype, x)


def check_rope(q_BSHC: Tensor, k_BSGC: Tensor, cos_SC: Tensor, sin_SC: Tensor):
    _check_heads("rope: q_BSHC", q_BSHC, None)
    B, S, _, C = q_BSHC.shape
    check("rope: k_BSGC", k_BSGC, (B, S, None, C), q_BSHC.dtype, q_BSHC)
    _check_heads("rope: k_BSGC", k_BSGC, None)
    _check_angles("rope", q_BSHC, cos_SC, sin_SC)


def check_split_rope(qkv_BSAC: Tensor, cos_SC: Tensor, sin_SC: Tensor, num_heads: int, num_kv_heads: int):
    if num_heads < 1 or num_kv_heads < 1:
        heads = f"{num_heads} and {num_kv_heads}"
        raise ValueError(f"split_rope: num_heads and num_kv_heads: expected at least 1 of each, but got {heads}")
    _check_heads("split_rope: qkv_BSAC", qkv_BSAC, num_heads + 2 * num_kv_heads)
    _check_angles("split_rope", qkv_BSAC, cos_SC, sin_SC)


def check_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None):
    check("rms_norm: x", x, [None] * max(1, x.dim()))
    check("rms_norm: weight", weight, x.shape[-1:], like=x)
    if residual is not None:
        check("rms_norm: residual", residual, x.shape, x.dtype, x)


def check_linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, num_tokens: Tensor | None):
    check("linear_cross_entropy: x_TD", x_TD, (None, None))
    T, D = x_TD.shape
    check("linear_cross_entropy: weight_VD", weight_VD, (None, D), like=x_TD)
    check("linear_cross_entropy: labels_T", labels_T, (T,), torch.int64, x_TD)
    if num_tokens is not None:  # 16 bits cannot hold most token counts
        check("linear_cross_entropy: num_tokens", num_tokens, (), (torch.float32, torch.float64), x_TD)
