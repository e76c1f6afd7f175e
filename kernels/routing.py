"""Fused top-2 routing, without host syncs or atomics.

Legend: T tokens, E experts, K = 2, B programs.

The logits are read once. Each program writes the scores and ids of its tokens, and its partial sums for the two losses.
A second kernel adds the partial sums in a fixed order.
"""

from math import nan

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import first_order
from .contract import TOP_K, Routing
from .launch import MAX_PROGRAMS, check_launch


@triton.jit
def _softmax(logits, mask):
    """Return the softmax and logsumexp of each row."""
    largest = tl.max(tl.where(mask, logits, float("-inf")), axis=1)
    exps = tl.where(mask, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.sum(exps, axis=1)
    return exps / total[:, None], largest + tl.log(total)


@triton.jit
def _route_kernel(
    logits_ptr, topk_scores_ptr, topk_ids_ptr, squares_ptr, probabilities_ptr, counts_ptr, T,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCKS: tl.constexpr,
    FORCE_LOAD_BALANCE: tl.constexpr,
):  # fmt: skip
    """Route BLOCKS * BLOCK_T tokens per program, and sum their logsumexp², probabilities and choices."""
    es = tl.arange(0, E_PAD)
    squares = tl.zeros((BLOCK_T,), dtype=tl.float32)
    probabilities = tl.zeros((E_PAD,), dtype=tl.float32)
    counts = tl.zeros((E_PAD,), dtype=tl.int32)
    for block in range(BLOCKS):
        ts = (tl.program_id(0) * BLOCKS + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = ts < T
        mask = inside[:, None] & (es < E)[None, :]
        logits = tl.load(logits_ptr + ts.to(tl.int64)[:, None] * E + es[None, :], mask=mask, other=0.0).to(tl.float32)
        # The largest key marks the largest logit; ties go to the lowest expert. The high half holds the logit's bits as
        # an ordered integer, and the low half holds E_PAD - 1 - e. NaN is largest; + 0.0 turns -0.0 into 0.
        bits = (logits + 0.0).to(tl.int32, bitcast=True)
        bits = tl.where(logits != logits, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
        keys = (bits.to(tl.int64) << 32) + (E_PAD - 1 - es)[None, :]
        keys = tl.where((es < E)[None, :], keys, -0x8000000000000000)
        if FORCE_LOAD_BALANCE:
            keys = tl.where((es[None, :] + E - (ts % E)[:, None]) % E < 2, keys, -0x8000000000000000)
        first = E_PAD - 1 - (tl.max(keys, axis=1) & (E_PAD - 1)).to(tl.int32)
        is_first = es[None, :] == first[:, None]
        keys = tl.where(is_first, -0x8000000000000000, keys)
        second = E_PAD - 1 - (tl.max(keys, axis=1) & (E_PAD - 1)).to(tl.int32)
        is_second = es[None, :] == second[:, None]
        gap = tl.sum(tl.where(is_second, logits, 0.0), axis=1) - tl.sum(tl.where(is_first, logits, 0.0), axis=1)
        exp_gap = tl.exp(gap)  # gap <= 0
        tl.store(topk_scores_ptr + 2 * ts, 1 / (1 + exp_gap), mask=inside)
        tl.store(topk_scores_ptr + 2 * ts + 1, exp_gap / (1 + exp_gap), mask=inside)
        tl.store(topk_ids_ptr + 2 * ts, first, mask=inside)
        tl.store(topk_ids_ptr + 2 * ts + 1, second, mask=inside)
        softmax, logsumexp = _softmax(logits, (es < E)[None, :])
        squares += tl.where(inside, logsumexp * logsumexp, 0.0)
        probabilities += tl.sum(tl.where(mask, softmax, 0.0), axis=0)
        counts += tl.sum(((is_first | is_second) & inside[:, None]).to(tl.int32), axis=0)
    program = tl.program_id(0)
    tl.store(squares_ptr + program, tl.sum(squares, axis=0))
    tl.store(probabilities_ptr + program * E + es, probabilities, mask=es < E)
    tl.store(counts_ptr + program * E + es, counts, mask=es < E)


@triton.jit
def _route_sums_kernel(
    squares_ptr, probabilities_ptr, counts_ptr, z_loss_ptr, balance_loss_ptr, tokens_per_expert_ptr, T, B,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Add the partial sums in a fixed order and compute both losses, in a single program."""
    es = tl.arange(0, E_PAD)
    squares = tl.zeros((BLOCK_B,), dtype=tl.float32)
    probabilities = tl.zeros((E_PAD,), dtype=tl.float32)
    counts = tl.zeros((E_PAD,), dtype=tl.int32)
    for start in range(0, B, BLOCK_B):
        bs = start + tl.arange(0, BLOCK_B)
        mask = (bs < B)[:, None] & (es < E)[None, :]
        squares += tl.load(squares_ptr + bs, mask=bs < B, other=0.0)
        probabilities += tl.sum(
            tl.load(probabilities_ptr + bs[:, None] * E + es[None, :], mask=mask, other=0.0), axis=0
        )
        counts += tl.sum(tl.load(counts_ptr + bs[:, None] * E + es[None, :], mask=mask, other=0), axis=0)
    tokens = 1.0 * T  # a T of 1 is a constant, which has no .to
    tl.store(z_loss_ptr, tl.sum(squares, axis=0) / tokens)
    fractions = counts.to(tl.float32) / (2 * tokens)
    tl.store(balance_loss_ptr, E * tl.sum(fractions * (probabilities / tokens), axis=0))
    tl.store(tokens_per_expert_ptr + es, counts.to(tl.int64), mask=es < E)


@triton.jit
def _route_backward_kernel(
    logits_ptr, topk_ids_ptr, counts_ptr, dtopk_scores_ptr, dz_ptr, dbalance_ptr, dlogits_ptr, T,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute dlogits from the gradients of the scores, the z-loss and the balance loss.

    p is the softmax over all experts, l the logsumexp, s the scores, f the shares of the assignments. The terms are
    s0 s1 (ds0 - ds1) for the first choice and its negative for the second; 2 l p dz / T; E p (f - f.p) dbalance / T.
    """
    es = tl.arange(0, E_PAD)
    ts = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = ts < T
    mask = inside[:, None] & (es < E)[None, :]
    tile = ts.to(tl.int64)[:, None] * E + es[None, :]
    logits = tl.load(logits_ptr + tile, mask=mask, other=0.0).to(tl.float32)
    is_first = es[None, :] == tl.load(topk_ids_ptr + 2 * ts, mask=inside, other=0)[:, None]
    is_second = es[None, :] == tl.load(topk_ids_ptr + 2 * ts + 1, mask=inside, other=1)[:, None]
    gap = tl.sum(tl.where(is_second, logits, 0.0), axis=1) - tl.sum(tl.where(is_first, logits, 0.0), axis=1)
    exp_gap = tl.exp(gap)
    dgap = tl.load(dtopk_scores_ptr + 2 * ts, mask=inside, other=0.0)
    dgap -= tl.load(dtopk_scores_ptr + 2 * ts + 1, mask=inside, other=0.0)
    dgap *= exp_gap / ((1 + exp_gap) * (1 + exp_gap))
    softmax, logsumexp = _softmax(logits, (es < E)[None, :])
    tokens = 1.0 * T  # a T of 1 is a constant, which has no .to
    fractions = tl.load(counts_ptr + es, mask=es < E, other=0).to(tl.float32) / (2 * tokens)
    mean = tl.sum(softmax * fractions[None, :], axis=1)
    dz = tl.load(dz_ptr) * 2 * logsumexp / tokens
    dbalance = tl.load(dbalance_ptr) * E / tokens
    dlogits = softmax * (dz[:, None] + dbalance * (fractions[None, :] - mean[:, None]))
    dlogits += tl.where(is_first, dgap[:, None], 0.0) - tl.where(is_second, dgap[:, None], 0.0)
    tl.store(dlogits_ptr + tile, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


def _route_blocks(T: int, E: int) -> tuple[int, int, dict]:
    """Return the number of programs (at most MAX_PROGRAMS), blocks per program, and sizes of ~2048-logit blocks."""
    e_pad = triton.next_power_of_2(E)
    block_t = min(2048 // e_pad, 256)
    blocks = triton.next_power_of_2(triton.cdiv(T, block_t * MAX_PROGRAMS))
    return triton.cdiv(T, block_t * blocks), blocks, dict(E=E, E_PAD=e_pad, BLOCK_T=block_t)


@torch.library.custom_op("acceleron_triton::route_top2", mutates_args=())
def route(logits_TE: Tensor, force_load_balance: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return topk_scores_TK, topk_ids_TK, z_loss, balance_loss and tokens_per_expert_E of `Routing`."""
    T, E = logits_TE.shape
    fp32, int32 = (dict(dtype=dtype, device=logits_TE.device) for dtype in (torch.float32, torch.int32))
    topk_scores_TK, topk_ids_TK = torch.empty(T, TOP_K, **fp32), torch.empty(T, TOP_K, **int32)
    z_loss, balance_loss = torch.empty((), **fp32), torch.empty((), **fp32)
    tokens_per_expert_E = torch.empty(E, dtype=torch.int64, device=logits_TE.device)
    if T == 0:  # the mean over zero tokens is NaN
        return topk_scores_TK, topk_ids_TK, z_loss.fill_(nan), balance_loss.fill_(nan), tokens_per_expert_E.zero_()
    programs, blocks, sizes = _route_blocks(T, E)
    squares, probabilities = torch.empty(programs, **fp32), torch.empty(programs, E, **fp32)
    counts = torch.empty(programs, E, **int32)
    with torch.cuda.device_of(logits_TE):
        _route_kernel[(programs,)](
            logits_TE, topk_scores_TK, topk_ids_TK, squares, probabilities, counts, T, **sizes, BLOCKS=blocks,
            FORCE_LOAD_BALANCE=force_load_balance,
        )  # fmt: skip
        _route_sums_kernel[(1,)](
            squares, probabilities, counts, z_loss, balance_loss, tokens_per_expert_E, T, programs,
            E=E, E_PAD=sizes["E_PAD"], BLOCK_B=sizes["BLOCK_T"],
        )  # fmt: skip
    return topk_scores_TK, topk_ids_TK, z_loss, balance_loss, tokens_per_expert_E


@route.register_fake
def _(logits_TE, force_load_balance=False):
    T, E = logits_TE.shape
    fp32 = logits_TE.new_empty(T, TOP_K, dtype=torch.float32)
    losses = (logits_TE.new_empty((), dtype=torch.float32) for _ in range(2))
    return fp32, torch.empty_like(fp32, dtype=torch.int32), *losses, logits_TE.new_empty(E, dtype=torch.int64)


@torch.library.custom_op("acceleron_triton::route_top2_backward", mutates_args=())
def route_backward(
    logits_TE: Tensor,
    topk_ids_TK: Tensor,
    tokens_per_expert_E: Tensor,
    dtopk_scores_TK: Tensor,
    dz: Tensor,
    dbalance: Tensor,
) -> Tensor:
    """dlogits_TE."""
    T, E = logits_TE.shape
    dlogits_TE = torch.empty_like(logits_TE)
    if T == 0:
        return dlogits_TE
    _, _, sizes = _route_blocks(T, E)
    with torch.cuda.device_of(logits_TE):
        _route_backward_kernel[(triton.cdiv(T, sizes["BLOCK_T"]),)](
            logits_TE, topk_ids_TK, tokens_per_expert_E, dtopk_scores_TK, dz, dbalance, dlogits_TE, T, **sizes
        )
    return dlogits_TE


@route_backward.register_fake
def _(logits_TE, topk_ids_TK, tokens_per_expert_E, dtopk_scores_TK, dz, dbalance):
    return torch.empty_like(logits_TE)


class _RouteTop2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, force_load_balance):
        topk_scores_TK, topk_ids_TK, z_loss, balance_loss, tokens_per_expert_E = route(logits_TE, force_load_balance)
        ctx.mark_non_differentiable(topk_ids_TK, tokens_per_expert_E)
        ctx.save_for_backward(logits_TE, topk_ids_TK, tokens_per_expert_E)
        return topk_scores_TK, topk_ids_TK, z_loss, balance_loss, tokens_per_expert_E

    @staticmethod
    @first_order("route_top2")
    def backward(ctx, dtopk_scores_TK, _experts, dz, dbalance, _counts):
        return route_backward(*ctx.saved_tensors, dtopk_scores_TK.contiguous(), dz, dbalance), None


def route_top2(logits_TE: Tensor, force_load_balance: bool = False) -> Routing:
    """`ops.route_top2` on contiguous logits.

    The two experts are valid and distinct for any logits. A row with NaN or inf makes its scores or the losses
    non-finite, as in torch_ops.
    """
    check_launch("route_top2", logits_TE=logits_TE)
    return Routing(*_RouteTop2.apply(logits_TE, force_load_balance))
