"""Mixture-of-Experts layer as one op: router, top-k routing, routed experts, shared expert and residual.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, W width of the shared expert,
N = T * K.

A single op can fuse more than separate ops. Forward adds the residual and the shared expert's output while it sums a
token's K rows. Backward adds the three gradients of x (from the router, routed experts and shared expert) in one
kernel. Separate ops would access [T, D] eight more times. At the tiny size, that is 8% of the GEMMs' minimum time.
"""

import torch
from torch import Tensor

from .autograd import first_order
from .contract import ExpertBuffers, MoEOutput
from .dispatch import build_plan
from .expert_mlp import expert_down, expert_grads, expert_up, token_grad
from .launch import check_launch
from .router import router_logits_forward, router_weight_grad
from .routing import route, route_backward
from .swiglu import swiglu_backward, swiglu_forward


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_TD, router_ED, w13_E2FD, w2_EDF, shared_w13_2WD, shared_w2_DW, residual_TD,
        top_k, normalize, force_load_balance, with_grad, *buffers,
    ):  # fmt: skip
        weights = (router_ED, w13_E2FD, w2_EDF, shared_w13_2WD, shared_w2_DW)
        w13, w2, *sums = buffers or (w13_E2FD.to(x_TD.dtype), w2_EDF.to(x_TD.dtype), None, None)
        logits_TE = router_logits_forward(x_TD, router_ED)
        topk_scores_TK, topk_ids_TK, *statistics = route(logits_TE, top_k, normalize, force_load_balance)
        gather_idx, scatter_idx_TK, offsets = build_plan(topk_ids_TK, router_ED.shape[0])
        shared, shared_TD = (None,) * 4, None
        if shared_w13_2WD is not None:
            shared_w13, shared_w2 = shared_w13_2WD.to(x_TD.dtype), shared_w2_DW.to(x_TD.dtype)
            gate_up_T2W = x_TD @ shared_w13.t()
            shared_act_TW = swiglu_forward(gate_up_T2W)
            shared, shared_TD = (gate_up_T2W, shared_act_TW, shared_w13, shared_w2), shared_act_TW @ shared_w2.t()
        h_N2F, act_NF = expert_up(x_TD, w13, gather_idx, offsets, with_grad)
        y_TD = expert_down(act_NF, w2, topk_scores_TK, scatter_idx_TK, offsets, shared_TD, residual_TD)
        ctx.mark_non_differentiable(statistics[-1])
        if with_grad:
            routing = (logits_TE, topk_scores_TK, topk_ids_TK, gather_idx, scatter_idx_TK, offsets)
            ctx.save_for_backward(*sums, x_TD, router_ED, *routing, h_N2F, w13, w2, *shared)
            ctx.dtypes = [None if w is None else w.dtype for w in weights]
            ctx.normalize = normalize
        return y_TD, *statistics

    @staticmethod
    @first_order("moe")
    def backward(ctx, dy_TD, dz, dmean_probabilities_E, _counts):
        saved = ctx.saved_tensors  # read once: with checkpointing, every access recomputes
        sum13_E2FD, sum2_EDF, x_TD, router_ED, *routing, h_N2F, w13, w2 = saved[:-4]
        gate_up_T2W, shared_act_TW, shared_w13, shared_w2 = saved[-4:]
        logits_TE, topk_scores_TK, topk_ids_TK, gather_idx, scatter_idx_TK, offsets = routing
        need_x, *need_weights, need_residual = ctx.needs_input_grad[:7]
        dtypes = [dtype if need else None for dtype, need in zip(ctx.dtypes, need_weights, strict=True)]
        router_dtype, dtype13, dtype2, shared_dtype13, shared_dtype2 = dtypes
        dy_TD = dy_TD.contiguous()
        dx_TD = drouter_ED = dshared_w13 = dshared_w2 = None

        if shared_w2 is not None:
            dgate_up_T2W = swiglu_backward(dy_TD @ shared_w2, gate_up_T2W)
        if shared_dtype13:
            dshared_w13 = (dgate_up_T2W.t() @ x_TD).to(shared_dtype13)
        if shared_dtype2:
            dshared_w2 = (dy_TD.t() @ shared_act_TW).to(shared_dtype2)
        target13 = dtype13 if sum13_E2FD is None or dtype13 is None else sum13_E2FD
        target2 = dtype2 if sum2_EDF is None or dtype2 is None else sum2_EDF
        rows_ND, dtopk_scores_TK, dw13_E2FD, dw2_EDF = expert_grads(
            dy_TD, x_TD, h_N2F, topk_scores_TK, gather_idx, scatter_idx_TK, offsets, w13, w2, target13, target2
        )
        dlogits_TE = route_backward(
            logits_TE, topk_ids_TK, dtopk_scores_TK, dz, dmean_probabilities_E.contiguous(), ctx.normalize
        )
        if router_dtype:
            drouter_ED = router_weight_grad(dlogits_TE, x_TD).to(router_dtype)
        if need_x:
            dshared_TD = None if shared_w13 is None else dgate_up_T2W @ shared_w13
            dx_TD = token_grad(rows_ND, scatter_idx_TK, dshared_TD, dlogits_TE, router_ED)
        dresidual_TD = dy_TD if need_residual else None
        grads = (dx_TD, drouter_ED, dw13_E2FD, dw2_EDF, dshared_w13, dshared_w2, dresidual_TD)
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


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
    """`ops.moe` on contiguous tensors; `torch_ops.moe` shows the layer step by step."""
    names = ("router_ED", "w13_E2FD", "w2_EDF", "shared_w13_2WD", "shared_w2_DW")
    weights = (router_ED, w13_E2FD, w2_EDF, shared_w13_2WD, shared_w2_DW)
    check_launch("moe", x_TD=x_TD, **dict(zip(names, weights, strict=True)), residual_TD=residual_TD)
    if buffers is not None:
        check_launch("moe: buffers", **buffers._asdict())
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (x_TD, *weights, residual_TD) if x is not None)
    options = (top_k, normalize, force_load_balance, with_grad)
    return MoEOutput(*_MoE.apply(x_TD, *weights, residual_TD, *options, *(buffers or ())))
