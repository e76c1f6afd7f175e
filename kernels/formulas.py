"""Every op as a plain, readable formula with autograd. The tests compare both backends with these formulas.

Arguments and shapes match acceleron/ops.py, and its docstrings cite the sources. Everything is computed in the dtype of
the arguments; the tests pass float64. Nothing here is fast: the experts run in a loop, and all logits are materialized.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import MoEOutput, Plan, Routing


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    return total / (total.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight, total


def rope(q_BSHC: Tensor, k_BSGC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return (x * cos_SC[:, None] + torch.cat([-second, first], dim=-1) * sin_SC[:, None]).to(x.dtype)

    return rotate(q_BSHC), rotate(k_BSGC)


def split_rope(
    qkv_BSAC: Tensor, cos_SC: Tensor, sin_SC: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_BSAC.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    return *rope(q, k, cos_SC, sin_SC), v


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD @ weight_ED.t()


def route_topk(
    logits_TE: Tensor, top_k: int = 2, *, normalize: bool = True, force_load_balance: bool = False
) -> Routing:
    T, E = logits_TE.shape
    candidates_TE = logits_TE
    if force_load_balance:
        distance_TE = (torch.arange(E) - torch.arange(T)[:, None]) % E
        candidates_TE = logits_TE.masked_fill(distance_TE.to(logits_TE.device) >= top_k, -torch.inf)
    topk_ids_TK = candidates_TE.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    probabilities_TE = logits_TE.softmax(dim=-1)
    if normalize:
        topk_scores_TK = logits_TE.gather(1, topk_ids_TK).softmax(dim=-1)
    else:
        topk_scores_TK = probabilities_TE.gather(1, topk_ids_TK)
    tokens_per_expert_E = F.one_hot(topk_ids_TK, E).sum(dim=(0, 1))
    z_loss = logits_TE.logsumexp(dim=-1).square().mean()
    return Routing(topk_scores_TK, topk_ids_TK.int(), z_loss, probabilities_TE.mean(dim=0), tokens_per_expert_E)


def dispatch_plan(topk_ids_TK: Tensor, num_experts: int) -> Plan:
    gather_idx = topk_ids_TK.flatten().argsort(stable=True)
    scatter_idx_TK = gather_idx.argsort().view_as(topk_ids_TK)
    tokens_per_expert_E = F.one_hot(topk_ids_TK.flatten().long(), num_experts).sum(dim=0)
    return Plan(gather_idx.int(), scatter_idx_TK.int(), F.pad(tokens_per_expert_E.cumsum(0), (1, 0)).int())


def grouped_gemm(x_ND: Tensor, w_EFD: Tensor, plan: Plan) -> Tensor:
    rows_of_each_expert = x_ND.split(plan.offsets.diff().tolist())
    return torch.cat([rows @ w.t() for rows, w in zip(rows_of_each_expert, w_EFD, strict=True)])


def expert_mlp(x_TD: Tensor, topk_scores_TK: Tensor, plan: Plan, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    x_ND = x_TD[plan.gather_idx // topk_scores_TK.shape[1]]
    y_ND = grouped_gemm(swiglu(grouped_gemm(x_ND, w13_E2FD, plan)), w2_EDF, plan)
    return (topk_scores_TK[:, :, None] * y_ND[plan.scatter_idx_TK]).sum(dim=1)


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
) -> MoEOutput:
    scores_TK, ids_TK, *stats = route_topk(
        router_logits(x_TD, router_ED), top_k, normalize=normalize, force_load_balance=force_load_balance
    )
    y_TD = expert_mlp(x_TD, scores_TK, dispatch_plan(ids_TK, len(router_ED)), w13_E2FD, w2_EDF)
    if shared_w13_2WD is not None:
        y_TD = y_TD + swiglu(x_TD @ shared_w13_2WD.t()) @ shared_w2_DW.t()
    return MoEOutput(y_TD if residual_TD is None else y_TD + residual_TD, *stats)


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int = -100, num_tokens: Tensor | None = None
) -> Tensor:
    logits_TV = x_TD @ weight_VD.t()
    if num_tokens is None:
        return F.cross_entropy(logits_TV, labels_T, ignore_index=ignore_index)
    return F.cross_entropy(logits_TV, labels_T, ignore_index=ignore_index, reduction="sum") / num_tokens
