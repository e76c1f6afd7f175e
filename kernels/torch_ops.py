"""Reference backend: every op in PyTorch. It runs on any device. acceleron/ops.py documents the ops.

The ops are differentiable in float32, float64, bfloat16 and float16. They are deterministic: gradients gather where
autograd would scatter and accumulate. They are tuned for CPUs; formulas.py has the plain formulas.
"""

from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import first_order, no_autocast, scale_gradient, split_mean
from .contract import ExpertBuffers, MoEOutput, Plan, Routing, wide
from .formulas import rope, split_rope
from .formulas import swiglu as swiglu_formula

__all__ = [
    "dispatch_plan",
    "expert_mlp",
    "grouped_gemm",
    "linear_cross_entropy",
    "moe",
    "rms_norm",
    "rope",
    "route_topk",
    "router_logits",
    "split_rope",
    "swiglu",
]

# Logits per chunk of the cross-entropy: 2**24 fp32 values are 64 MiB. On a CPU, larger chunks are no faster in fp32. In
# 16 bits, chunks four times as large are 1.3 times as fast: the GEMMs speed up, but the sum of dweight does not.
LOGITS_PER_CHUNK = 1 << 24
CHUNKS_IN_ONE_OF_16_BITS = 4


# The two routing decisions are custom ops so selective checkpointing can save their outputs (ROUTING_OPS). Recomputed
# logits can differ in the last bit, and that must not send a token to a different expert.


@torch.library.custom_op("acceleron::topk_experts", mutates_args=())
def topk_experts(logits_TE: Tensor, top_k: int) -> Tensor:
    """Return the ids of each row's largest logits, largest first; ties go to the lower id. int32 [T, K]."""
    # A stable sort guarantees the order of ties. torch.topk does not.
    return logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].to(torch.int32)


@topk_experts.register_fake
def _(logits_TE, top_k):
    return logits_TE.new_empty((logits_TE.shape[0], top_k), dtype=torch.int32)


@torch.library.custom_op("acceleron::sort_by_expert", mutates_args=())
def sort_by_expert(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return gather_idx, scatter_idx_TK and offsets of `Plan`, computed on the device."""
    experts_N = topk_ids_TK.flatten()
    sorted_N, gather_idx = experts_N.sort(stable=True)
    scatter_idx = torch.empty_like(gather_idx)
    scatter_idx[gather_idx] = torch.arange(gather_idx.numel(), device=gather_idx.device)
    boundaries = torch.arange(num_experts + 1, dtype=sorted_N.dtype, device=gather_idx.device)
    offsets = torch.searchsorted(sorted_N, boundaries, out_int32=True)
    return gather_idx.to(torch.int32), scatter_idx.to(torch.int32).view_as(topk_ids_TK), offsets


@sort_by_expert.register_fake
def _(topk_ids_TK, num_experts):
    def int32(*shape):
        return topk_ids_TK.new_empty(shape, dtype=torch.int32)

    return int32(topk_ids_TK.numel()), int32(*topk_ids_TK.shape), int32(num_experts + 1)


ROUTING_OPS = frozenset({torch.ops.acceleron.topk_experts.default, torch.ops.acceleron.sort_by_expert.default})


class _Choose(torch.autograd.Function):
    """The values at topk_ids_TK. The gradient uses comparisons instead of gather's scatter-add.

    A scatter-add is not deterministic on a GPU. In a recomputed block, torch 2.13's CPU inductor also runs it after the
    kernel that reads its result, which silently gives wrong router gradients.
    """

    @staticmethod
    def forward(ctx, values_TE, topk_ids_TK):
        ctx.save_for_backward(topk_ids_TK)
        ctx.num_experts = values_TE.shape[1]
        return values_TE.gather(1, topk_ids_TK.long())

    @staticmethod
    def backward(ctx, grad_TK):
        (topk_ids_TK,) = ctx.saved_tensors
        all_experts = torch.arange(ctx.num_experts, device=topk_ids_TK.device)
        grad_TE = grad_TK.new_zeros(len(grad_TK), ctx.num_experts)
        for ids_T, grad_T in zip(topk_ids_TK.unbind(1), grad_TK.unbind(1), strict=True):
            grad_TE = torch.where(ids_T[:, None] == all_experts, grad_T[:, None], grad_TE)
        return grad_TE, None


class _RouterLogits(torch.autograd.Function):
    """F.linear with a backward pass that ignores autocast, even inside an autocast context."""

    @staticmethod
    def forward(ctx, x_TD, weight_ED):
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD, weight_ED)

    @staticmethod
    def backward(ctx, grad_TE):
        x_TD, weight_ED = ctx.saved_tensors
        with no_autocast(grad_TE.device):
            return grad_TE @ weight_ED, grad_TE.t() @ x_TD


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Return logits_TE = x @ weight.T in fp32, also for a 16-bit weight, or in fp64 for an fp64 weight."""
    dtype = wide(weight_ED.dtype)
    return _RouterLogits.apply(x_TD.to(dtype), weight_ED.to(dtype))


def route_topk(
    logits_TE: Tensor, top_k: int = 2, *, normalize: bool = True, force_load_balance: bool = False
) -> Routing:
    """Compute the top-k routing of the router logits, and the router's statistics."""
    logits_TE = logits_TE.to(wide(logits_TE.dtype))
    T, E = logits_TE.shape
    candidates_TE = logits_TE.detach()
    if force_load_balance:
        turns_TE = torch.arange(E, device=logits_TE.device) - torch.arange(T, device=logits_TE.device)[:, None]
        candidates_TE = candidates_TE.masked_fill(turns_TE.remainder(E) >= top_k, -torch.inf)
    topk_ids_TK = topk_experts(candidates_TE, top_k)
    probabilities_TE = logits_TE.softmax(dim=-1)
    if normalize:
        topk_scores_TK = _Choose.apply(logits_TE, topk_ids_TK).softmax(dim=-1)
    else:
        topk_scores_TK = _Choose.apply(probabilities_TE, topk_ids_TK)
    z_loss = logits_TE.logsumexp(dim=-1).square().mean()
    tokens_per_expert_E = (topk_ids_TK.flatten()[:, None] == torch.arange(E, device=topk_ids_TK.device)).sum(dim=0)
    return Routing(topk_scores_TK, topk_ids_TK, z_loss, probabilities_TE.mean(dim=0), tokens_per_expert_E)


def dispatch_plan(topk_ids_TK: Tensor, num_experts: int) -> Plan:
    """Sort all assignments by expert, stably."""
    return Plan(*torch.ops.acceleron.sort_by_expert(topk_ids_TK, num_experts))


class _Gather(torch.autograd.Function):
    """Gather the expert-sorted rows x_ND. Instead of scattering, backward gathers and sums each token's K rows."""

    @staticmethod
    def forward(ctx, x_TD, gather_idx, scatter_idx_TK):
        ctx.save_for_backward(scatter_idx_TK)
        return x_TD.index_select(0, gather_idx // scatter_idx_TK.shape[1])

    @staticmethod
    def backward(ctx, grad_ND):
        (scatter_idx_TK,) = ctx.saved_tensors
        rows = (grad_ND.index_select(0, idx_T) for idx_T in scatter_idx_TK.unbind(dim=1))
        return reduce(torch.add, rows), None, None


class _Combine(torch.autograd.Function):
    """Compute the weighted sum of each token's K rows in the precision of the scores."""

    @staticmethod
    def forward(ctx, y_ND, topk_scores_TK, gather_idx, scatter_idx_TK):
        ctx.save_for_backward(y_ND, topk_scores_TK, gather_idx, scatter_idx_TK)
        # Return the result of a new op. If the result is modified in place, or .to is a no-op, torch 2.11 compiles
        # zero gradients.
        y_TD = y_ND.index_select(0, scatter_idx_TK[:, 0]) * topk_scores_TK[:, :1]
        for k in range(1, topk_scores_TK.shape[1]):
            rows = y_ND.index_select(0, scatter_idx_TK[:, k])
            y_TD = torch.addcmul(y_TD, rows.to(y_TD.dtype), topk_scores_TK[:, k : k + 1])
        return y_TD if y_TD.dtype == y_ND.dtype else y_TD.to(y_ND.dtype)

    @staticmethod
    def backward(ctx, grad_TD):
        y_ND, topk_scores_TK, gather_idx, scatter_idx_TK = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, gather_idx // scatter_idx_TK.shape[1])
        grad_scores_N = (grad_ND.to(topk_scores_TK.dtype) * y_ND).sum(dim=-1)
        scores_N = topk_scores_TK.flatten().index_select(0, gather_idx)
        grad_y_ND = (grad_ND * scores_N[:, None]).to(y_ND.dtype)
        return grad_y_ND, grad_scores_N.index_select(0, scatter_idx_TK.flatten()).view_as(topk_scores_TK), None, None


# The grouped GEMMs are custom ops for two reasons: torch's fake grouped_mm supports only bfloat16, and a loop over
# experts reads the offsets, which would break a compiled graph. On a CPU, the loop is as fast as grouped_mm.

# On a CPU, oneDNN compiles a 16-bit GEMM for each new row count, which takes 1 to 2 ms. Row counts change with every
# batch, so they are rounded up to a multiple of this, except for weight gradients, which sum over the rows.
ROWS_STEP = 64


def _expert_rows(offsets: Tensor) -> list[slice]:
    bounds = offsets.tolist()
    return [slice(start, end) for start, end in pairwise(bounds)]


def _supports_grouped_mm(a: Tensor, b: Tensor) -> bool:
    # The row size must be a multiple of 16 bytes.
    widths_fit = all(width % 8 == 0 for width in (a.shape[-1], *b.shape[-2:]))
    return a.is_cuda and a.dtype == torch.bfloat16 and widths_fit


@torch.library.custom_op("acceleron::grouped_rows", mutates_args=())
def _grouped_rows(x_NI: Tensor, w_EIO: Tensor, offsets: Tensor) -> Tensor:
    """Return y_NO[n] = x[n] @ w[e] for the rows n of each expert e."""
    if _supports_grouped_mm(x_NI, w_EIO):
        return F.grouped_mm(x_NI, w_EIO, offs=offsets[1:])
    N = x_NI.shape[0]
    y_NO = x_NI.new_empty(N, w_EIO.shape[2])
    step = ROWS_STEP if x_NI.dtype.itemsize == 2 and not x_NI.is_cuda else 1
    for expert, rows in enumerate(_expert_rows(offsets)):
        length = -(-(rows.stop - rows.start) // step) * step
        if rows.start + length <= N:
            # The extra rows belong to later experts, which overwrite them.
            window = slice(rows.start, rows.start + length)
            torch.mm(x_NI[window], w_EIO[expert], out=y_NO[window])
        else:
            first = max(0, N - length)
            y_NO[rows] = torch.mm(x_NI[first:], w_EIO[expert])[rows.start - first : rows.stop - first]
    return y_NO


@_grouped_rows.register_fake
def _(x_NI, w_EIO, offsets):
    return x_NI.new_empty(x_NI.shape[0], w_EIO.shape[2])


@torch.library.custom_op("acceleron::grouped_weight_grad", mutates_args=())
def _grouped_weight_grad(grad_NF: Tensor, x_ND: Tensor, offsets: Tensor) -> Tensor:
    """Return grad_w_EFD[e] = grad[rows].T @ x[rows] over each expert's rows. An expert without rows gets 0."""
    if _supports_grouped_mm(grad_NF, x_ND):
        return F.grouped_mm(grad_NF.t(), x_ND, offs=offsets[1:])
    grad_w_EFD = x_ND.new_empty(offsets.numel() - 1, grad_NF.shape[1], x_ND.shape[1])
    for expert, rows in enumerate(_expert_rows(offsets)):
        torch.mm(grad_NF[rows].t(), x_ND[rows], out=grad_w_EFD[expert])
    return grad_w_EFD


@_grouped_weight_grad.register_fake
def _(grad_NF, x_ND, offsets):
    return x_ND.new_empty(offsets.numel() - 1, grad_NF.shape[1], x_ND.shape[1])


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_EFD, offsets):
        ctx.save_for_backward(x_ND, w_EFD, offsets)
        return torch.ops.acceleron.grouped_rows(x_ND, w_EFD.transpose(1, 2), offsets)

    @staticmethod
    @first_order("grouped_gemm")
    def backward(ctx, grad_NF):
        x_ND, w_EFD, offsets = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        grad_x_ND = torch.ops.acceleron.grouped_rows(grad_NF, w_EFD, offsets)
        return grad_x_ND, torch.ops.acceleron.grouped_weight_grad(grad_NF, x_ND, offsets), None


def grouped_gemm(x_ND: Tensor, w_EFD: Tensor, plan: Plan) -> Tensor:
    """Return y_NF, each expert-sorted row multiplied by its expert's weight."""
    return _GroupedGemm.apply(x_ND, w_EFD, plan.offsets)


def expert_mlp(x_TD: Tensor, topk_scores_TK: Tensor, plan: Plan, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """Return the weighted sum of each token's K experts, w2 (silu(w1 x) * (w3 x))."""
    w13, w2 = w13_E2FD.to(x_TD.dtype), w2_EDF.to(x_TD.dtype)
    x_ND = _Gather.apply(x_TD, plan.gather_idx, plan.scatter_idx_TK)
    y_ND = grouped_gemm(swiglu(grouped_gemm(x_ND, w13, plan)), w2, plan)
    return _Combine.apply(y_ND, topk_scores_TK, plan.gather_idx, plan.scatter_idx_TK)


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
    """Run the layer op by op. `buffers` is not used."""
    routing = route_topk(
        router_logits(x_TD, router_ED), top_k, normalize=normalize, force_load_balance=force_load_balance
    )
    plan = dispatch_plan(routing.topk_ids_TK, router_ED.shape[0])
    y_TD = expert_mlp(x_TD, routing.topk_scores_TK, plan, w13_E2FD, w2_EDF)
    if shared_w13_2WD is not None:
        shared_w13, shared_w2 = shared_w13_2WD.to(x_TD.dtype), shared_w2_DW.to(x_TD.dtype)
        y_TD = y_TD + F.linear(swiglu(F.linear(x_TD, shared_w13)), shared_w2)
    if residual_TD is not None:
        y_TD = residual_TD + y_TD
    return MoEOutput(y_TD, routing.z_loss, routing.mean_probabilities_E, routing.tokens_per_expert_E)


def expert_mlp_token(x: Tensor, logits_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, top_k: int) -> Tensor:
    """Return the routed experts' output for one token (1, 1, D), without plan, statistics and gather.

    Those took a third of a decoding step on a CPU. This function computes no gradients and reads the expert ids on the
    host. x and the weights share one dtype; logits_E is fp32.
    """
    logits, experts = (values[:top_k] for values in logits_E.sort(descending=True, stable=True))
    y = torch.zeros_like(x)
    for weight, expert in zip(logits.softmax(dim=-1).tolist(), experts.tolist(), strict=True):
        y.add_(F.linear(swiglu(F.linear(x, w13_E2FD[expert])), w2_EDF[expert]), alpha=weight)
    return y


class _SwiGLU(torch.autograd.Function):
    """Saves the pre-activation only; autograd would also save silu(gate)."""

    @staticmethod
    def forward(ctx, gate_up_N2F):
        ctx.save_for_backward(gate_up_N2F)
        return swiglu_formula(gate_up_N2F)

    @staticmethod
    @first_order("swiglu")
    def backward(ctx, grad_NF):
        (gate_up_N2F,) = ctx.saved_tensors
        gate, up = gate_up_N2F.chunk(2, dim=-1)
        grad_gate = torch.ops.aten.silu_backward(grad_NF * up, gate)
        return torch.cat([grad_gate, F.silu(gate) * grad_NF], dim=-1)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    return _SwiGLU.apply(gate_up_N2F) if torch.is_grad_enabled() else swiglu_formula(gate_up_N2F)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and the sum itself."""
    if residual is not None:
        x = x + residual
    # F.rms_norm computes in fp32 and casts back; a weight passed to it would be applied before the cast.
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight.to(x.dtype), x


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients chunk by chunk in the forward pass. Backward only scales them, as the loss is a scalar."""

    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T, ignore_index, num_tokens):
        T, V = x_TD.shape[0], weight_VD.shape[0]
        need_x, need_weight = ctx.needs_input_grad[:2]
        weight, sum_dtype = weight_VD.to(x_TD.dtype), wide(x_TD.dtype)
        keep_T = labels_T != ignore_index
        target_T = labels_T.where(keep_T, 0)
        count = keep_T.sum(dtype=sum_dtype) if num_tokens is None else num_tokens.to(sum_dtype)
        mantissa, power = split_mean(count)
        # The rows of ignored tokens are multiplied by 0.
        scale_T = torch.where(keep_T, 1 / mantissa, 0)
        grad_x = torch.empty_like(x_TD) if need_x else None
        # Sum in fp32, because a bf16 sum over 100k tokens loses small gradients.
        grad_weight = None
        if need_weight:  # the first chunk fills it
            grad_weight = (torch.empty_like if T else torch.zeros_like)(weight_VD, dtype=sum_dtype)
        loss = torch.zeros((), dtype=sum_dtype, device=x_TD.device)
        # The chunks have about the same size.
        limit = LOGITS_PER_CHUNK * (CHUNKS_IN_ONE_OF_16_BITS if x_TD.element_size() == 2 else 1)
        step = max(1, -(-T // max(1, -(-T // max(1, limit // V)))))
        # All chunks share one buffer. On a CPU, the page faults of a new buffer take 20% of the GEMM's time.
        logits_buffer = x_TD.new_empty(step, V)
        wide_buffer = logits_buffer if x_TD.dtype == sum_dtype else x_TD.new_empty(step, V, dtype=sum_dtype)
        for start in range(0, T, step):
            chunk = slice(start, start + step)
            # Zero the ignored rows: 0 * inf would be NaN in the loss and in the gradient of the weight.
            x, target = torch.where(keep_T[chunk, None], x_TD[chunk], 0), target_T[chunk, None]
            narrow, logits = logits_buffer[: len(x)], wide_buffer[: len(x)]
            torch.mm(x, weight.t(), out=narrow)
            if logits.dtype != narrow.dtype:
                logits.copy_(narrow)
            target_logit = logits.gather(1, target)
            # Compute softmax and logsumexp in place with one exp. torch's logsumexp alone takes twice as long.
            largest = logits.amax(dim=-1, keepdim=True)
            exps = logits.sub_(largest).exp_()
            total = exps.sum(dim=-1, keepdim=True)
            loss += ((largest + total.log() - target_logit).squeeze(1) * scale_T[chunk]).sum()
            if not (need_x or need_weight):
                continue
            scale = scale_T[chunk, None]
            grad_logits = exps.mul_(scale / total).scatter_add_(1, target, -scale)
            if grad_logits.dtype != narrow.dtype:
                grad_logits = narrow.copy_(grad_logits)
            if need_x:
                torch.mm(grad_logits, weight, out=grad_x[chunk])
            if need_weight and x.dtype == sum_dtype:
                grad_weight.addmm_(grad_logits.t(), x, beta=float(start > 0))
            elif need_weight:
                part = grad_logits.t() @ x
                grad_weight = grad_weight.copy_(part) if start == 0 else grad_weight.add_(part)
        ctx.save_for_backward(grad_x, grad_weight, power)
        return (loss * power).masked_fill(count == 0, torch.nan)

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(ctx, grad_loss):
        *grads, power = ctx.saved_tensors
        grads = (None if grad is None else scale_gradient(grad, grad_loss * power) for grad in grads)
        return *grads, None, None, None


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int = -100, num_tokens: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy. Logits are computed LOGITS_PER_CHUNK at a time, or 4x that in 16 bits."""
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, ignore_index, num_tokens)
