"""Fused top-k routing, without host syncs or atomics.

Legend: T tokens, E experts, K experts per token, B programs.

The logits are read once. Each program writes the scores and ids of its tokens, and its partial sums for the z-loss, the
mean probabilities and the counts. A second kernel adds the partial sums in a fixed order.
"""

from math import nan

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import first_order
from .contract import Routing
from .launch import MAX_PROGRAMS, check_launch


@triton.jit
def _softmax(logits, mask):
    """Return the softmax of each row, its maximum, and the sum of its exponentials."""
    largest = tl.max(tl.where(mask, logits, float("-inf")), axis=1)
    exps = tl.where(mask, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.sum(exps, axis=1)
    return exps / total[:, None], largest, total


@triton.jit
def _route_kernel(
    logits_ptr, topk_scores_ptr, topk_ids_ptr, squares_ptr, probabilities_ptr, counts_ptr, T,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, TOP_K: tl.constexpr, K_PAD: tl.constexpr,
    BLOCKS: tl.constexpr, NORMALIZE: tl.constexpr, FORCE_LOAD_BALANCE: tl.constexpr,
):  # fmt: skip
    """Route BLOCKS * BLOCK_T tokens per program, and sum their logsumexp², probabilities and choices."""
    es, ks = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    squares = tl.zeros((BLOCK_T,), dtype=tl.float32)
    probabilities = tl.zeros((E_PAD,), dtype=tl.float32)
    counts = tl.zeros((E_PAD,), dtype=tl.int32)
    for block in range(BLOCKS):
        ts = (tl.program_id(0) * BLOCKS + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = ts < T
        mask = inside[:, None] & (es < E)[None, :]
        logits = tl.load(logits_ptr + ts.to(tl.int64)[:, None] * E + es[None, :], mask=mask, other=0.0).to(tl.float32)
        # The largest key marks the largest logit; ties go to the lowest expert. The high half holds the logit's bits as
        # an ordered integer, and the low half holds E_PAD - 1 - e. NaN is largest; + 0.0 turns -0.0 into 0. All keys of
        # a token differ, so the next key is the largest one below; its logit and its expert are read from the key.
        bits = (logits + 0.0).to(tl.int32, bitcast=True)
        bits = tl.where(logits != logits, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
        keys = (bits.to(tl.int64) << 32) + (E_PAD - 1 - es)[None, :]
        keys = tl.where((es < E)[None, :], keys, -0x8000000000000000)
        if FORCE_LOAD_BALANCE:
            keys = tl.where((es[None, :] + E - (ts % E)[:, None]) % E < TOP_K, keys, -0x8000000000000000)
        topk_keys = tl.zeros((BLOCK_T, K_PAD), dtype=tl.int64)
        key = tl.full((BLOCK_T,), 0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
        for k in tl.static_range(TOP_K):
            key = tl.max(tl.where(keys < key[:, None], keys, -0x8000000000000000), axis=1)
            topk_keys = tl.where(ks[None, :] == k, key[:, None], topk_keys)
        topk_ids = E_PAD - 1 - (topk_keys & (E_PAD - 1)).to(tl.int32)
        topk_bits = (topk_keys >> 32).to(tl.int32)
        topk_logits = (topk_bits ^ ((topk_bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        softmax, largest, total = _softmax(logits, (es < E)[None, :])
        if NORMALIZE:
            topk_scores, _, _ = _softmax(topk_logits, (ks < TOP_K)[None, :])
        else:
            topk_scores = tl.exp(topk_logits - largest[:, None]) / total[:, None]
        topk_tile = ts.to(tl.int64)[:, None] * TOP_K + ks[None, :]
        topk_mask = inside[:, None] & (ks < TOP_K)[None, :]
        tl.store(topk_scores_ptr + topk_tile, topk_scores, mask=topk_mask)
        tl.store(topk_ids_ptr + topk_tile, topk_ids, mask=topk_mask)
        logsumexp = largest + tl.log(total)
        squares += tl.where(inside, logsumexp * logsumexp, 0.0)
        probabilities += tl.sum(tl.where(mask, softmax, 0.0), axis=0)
        counts += tl.sum(((keys >= key[:, None]) & inside[:, None]).to(tl.int32), axis=0)
    program = tl.program_id(0)
    tl.store(squares_ptr + program, tl.sum(squares, axis=0))
    tl.store(probabilities_ptr + program * E + es, probabilities, mask=es < E)
    tl.store(counts_ptr + program * E + es, counts, mask=es < E)


@triton.jit
def _route_sums_kernel(
    squares_ptr, probabilities_ptr, counts_ptr, z_loss_ptr, mean_probabilities_ptr, tokens_per_expert_ptr, T, B,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Add the partial sums in a fixed order, in a single program."""
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
    tl.store(mean_probabilities_ptr + es, probabilities / tokens, mask=es < E)
    tl.store(tokens_per_expert_ptr + es, counts.to(tl.int64), mask=es < E)


@triton.jit
def _route_backward_kernel(
    logits_ptr, topk_ids_ptr, dtopk_scores_ptr, dz_ptr, dmean_probabilities_ptr, dlogits_ptr, T,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Compute dlogits from the gradients of the scores, the z-loss and the mean probabilities P.

    p is the softmax over all experts, l the logsumexp, and s the softmax that the scores are taken from: that of the
    selected logits, or p. ds is 0 for the other experts. The terms are 2 l p dz / T; p (dP - p.dP) / T; s (ds - s.ds).
    """
    es = tl.arange(0, E_PAD)
    ts = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = ts < T
    mask = inside[:, None] & (es < E)[None, :]
    tile = ts.to(tl.int64)[:, None] * E + es[None, :]
    logits = tl.load(logits_ptr + tile, mask=mask, other=0.0).to(tl.float32)
    softmax, largest, total = _softmax(logits, (es < E)[None, :])
    tokens = 1.0 * T  # a T of 1 is a constant, which has no .to
    dz = tl.load(dz_ptr) * 2 * (largest + tl.log(total)) / tokens
    dp = tl.load(dmean_probabilities_ptr + es, mask=es < E, other=0.0) / tokens
    dlogits = softmax * (dz[:, None] + (dp[None, :] - tl.sum(softmax * dp[None, :], axis=1)[:, None]))
    choices = ts.to(tl.int64) * TOP_K
    if NORMALIZE and TOP_K == 2:  # s0 s1 (ds0 - ds1) and its negative: unlike the general form, it does not cancel
        is_first = es[None, :] == tl.load(topk_ids_ptr + choices, mask=inside, other=0)[:, None]
        is_second = es[None, :] == tl.load(topk_ids_ptr + choices + 1, mask=inside, other=1)[:, None]
        gap = tl.sum(tl.where(is_second, logits, 0.0), axis=1) - tl.sum(tl.where(is_first, logits, 0.0), axis=1)
        exp_gap = tl.exp(gap)
        dgap = tl.load(dtopk_scores_ptr + choices, mask=inside, other=0.0)
        dgap -= tl.load(dtopk_scores_ptr + choices + 1, mask=inside, other=0.0)
        dgap *= exp_gap / ((1 + exp_gap) * (1 + exp_gap))
        dlogits += tl.where(is_first, dgap[:, None], 0.0) - tl.where(is_second, dgap[:, None], 0.0)
    else:
        selected = tl.zeros((BLOCK_T, E_PAD), dtype=tl.int1)
        dscores = tl.zeros((BLOCK_T, E_PAD), dtype=tl.float32)
        for k in tl.static_range(TOP_K):
            is_kth = es[None, :] == tl.load(topk_ids_ptr + choices + k, mask=inside, other=k)[:, None]
            dscore = tl.load(dtopk_scores_ptr + choices + k, mask=inside, other=0.0)
            selected |= is_kth
            dscores = tl.where(is_kth, dscore[:, None], dscores)
        if NORMALIZE:
            softmax, _, _ = _softmax(logits, selected)
        dlogits += softmax * (dscores - tl.sum(softmax * dscores, axis=1)[:, None])
    tl.store(dlogits_ptr + tile, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


def _route_blocks(T: int, E: int, top_k: int) -> tuple[int, int, dict]:
    """Return the number of programs (at most MAX_PROGRAMS), blocks per program, and the sizes of a block.

    A block has 2048 logits, half of that above K = 2 and a quarter above K = 8, so that registers do not spill.
    """
    e_pad = triton.next_power_of_2(E)
    block_t = min((2048 >> (top_k > 2) >> (top_k > 8)) // e_pad, 256)
    blocks = triton.next_power_of_2(triton.cdiv(T, block_t * MAX_PROGRAMS))
    return triton.cdiv(T, block_t * blocks), blocks, dict(E=E, E_PAD=e_pad, BLOCK_T=block_t)


@torch.library.custom_op("acceleron_triton::route_topk", mutates_args=())
def route(
    logits_TE: Tensor, top_k: int = 2, normalize: bool = True, force_load_balance: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return topk_scores_TK, topk_ids_TK, z_loss, mean_probabilities_E and tokens_per_expert_E of `Routing`."""
    T, E = logits_TE.shape
    fp32, int32 = (dict(dtype=dtype, device=logits_TE.device) for dtype in (torch.float32, torch.int32))
    topk_scores_TK, topk_ids_TK = torch.empty(T, top_k, **fp32), torch.empty(T, top_k, **int32)
    z_loss, mean_probabilities_E = torch.empty((), **fp32), torch.empty(E, **fp32)
    tokens_per_expert_E = torch.empty(E, dtype=torch.int64, device=logits_TE.device)
    results = topk_scores_TK, topk_ids_TK, z_loss, mean_probabilities_E, tokens_per_expert_E
    if T == 0:  # the mean over zero tokens is NaN
        z_loss.fill_(nan), mean_probabilities_E.fill_(nan), tokens_per_expert_E.zero_()
        return results
    programs, blocks, sizes = _route_blocks(T, E, top_k)
    squares, probabilities = torch.empty(programs, **fp32), torch.empty(programs, E, **fp32)
    counts = torch.empty(programs, E, **int32)
    with torch.cuda.device_of(logits_TE):
        _route_kernel[(programs,)](
            logits_TE, topk_scores_TK, topk_ids_TK, squares, probabilities, counts, T, **sizes,
            TOP_K=top_k, K_PAD=triton.next_power_of_2(top_k), BLOCKS=blocks, NORMALIZE=normalize,
            FORCE_LOAD_BALANCE=force_load_balance,
        )  # fmt: skip
        _route_sums_kernel[(1,)](
            squares, probabilities, counts, z_loss, mean_probabilities_E, tokens_per_expert_E, T, programs,
            E=E, E_PAD=sizes["E_PAD"], BLOCK_B=sizes["BLOCK_T"],
        )  # fmt: skip
    return results


@route.register_fake
def _(logits_TE, top_k=2, normalize=True, force_load_balance=False):
    T, E = logits_TE.shape
    topk_scores_TK = logits_TE.new_empty(T, top_k, dtype=torch.float32)
    statistics = (logits_TE.new_empty(shape, dtype=torch.float32) for shape in ((), E))
    return topk_scores_TK, topk_scores_TK.int(), *statistics, logits_TE.new_empty(E, dtype=torch.int64)


@torch.library.custom_op("acceleron_triton::route_topk_backward", mutates_args=())
def route_backward(
    logits_TE: Tensor,
    topk_ids_TK: Tensor,
    dtopk_scores_TK: Tensor,
    dz: Tensor,
    dmean_probabilities_E: Tensor,
    normalize: bool = True,
) -> Tensor:
    """dlogits_TE."""
    T, E = logits_TE.shape
    dlogits_TE = torch.empty_like(logits_TE)
    if T == 0:
        return dlogits_TE
    _, _, sizes = _route_blocks(T, E, topk_ids_TK.shape[1])
    with torch.cuda.device_of(logits_TE):
        _route_backward_kernel[(triton.cdiv(T, sizes["BLOCK_T"]),)](
            logits_TE, topk_ids_TK, dtopk_scores_TK, dz, dmean_probabilities_E, dlogits_TE, T, **sizes,
            TOP_K=topk_ids_TK.shape[1], NORMALIZE=normalize,
        )  # fmt: skip
    return dlogits_TE


@route_backward.register_fake
def _(logits_TE, topk_ids_TK, dtopk_scores_TK, dz, dmean_probabilities_E, normalize=True):
    return torch.empty_like(logits_TE)


class _RouteTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, top_k, normalize, force_load_balance):
        results = route(logits_TE, top_k, normalize, force_load_balance)
        _, topk_ids_TK, _, _, tokens_per_expert_E = results
        ctx.mark_non_differentiable(topk_ids_TK, tokens_per_expert_E)
        ctx.save_for_backward(logits_TE, topk_ids_TK)
        ctx.normalize = normalize
        return results

    @staticmethod
    @first_order("route_topk")
    def backward(ctx, dtopk_scores_TK, _experts, dz, dmean_probabilities_E, _counts):
        grads = dtopk_scores_TK.contiguous(), dz, dmean_probabilities_E.contiguous()
        return route_backward(*ctx.saved_tensors, *grads, ctx.normalize), None, None, None


def route_topk(
    logits_TE: Tensor, top_k: int = 2, *, normalize: bool = True, force_load_balance: bool = False
) -> Routing:
    """`ops.route_topk` on contiguous logits.

    The experts are valid and distinct for any logits. A row with NaN or inf makes its scores or the statistics
    non-finite, as in torch_ops.
    """
    check_launch("route_topk", logits_TE=logits_TE)
    return Routing(*_RouteTopK.apply(logits_TE, top_k, normalize, force_load_balance))
