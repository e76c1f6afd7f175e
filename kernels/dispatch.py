"""Dispatch plan: a stable counting sort of the assignments by expert, without host syncs or atomics.

Legend: T tokens, E experts, K experts per token, N = T * K assignments, B programs.

Each program counts its assignments to each expert, then places them after those of the previous programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Plan
from .launch import MAX_PROGRAMS, check_launch


@triton.jit
def _count_kernel(
    topk_ids_ptr, counts_ptr, N, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr
):
    """Count this program's assignments to each expert."""
    es = tl.arange(0, E_PAD)
    counts = tl.zeros((E_PAD,), dtype=tl.int32)
    for block in range(BLOCKS):
        ns = (tl.program_id(0) * BLOCKS + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        experts = tl.load(topk_ids_ptr + ns, mask=ns < N, other=-1)
        counts += tl.sum((experts[:, None] == es[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + tl.program_id(0) * E + es, counts, mask=es < E)


@triton.jit
def _place_kernel(
    topk_ids_ptr, counts_ptr, gather_idx_ptr, scatter_idx_ptr, offsets_ptr, N, B,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Place each assignment after lower experts, earlier programs, and earlier assignments of this program."""
    program = tl.program_id(0)
    es = tl.arange(0, E_PAD)
    total = tl.zeros((E_PAD,), dtype=tl.int32)
    before = tl.zeros((E_PAD,), dtype=tl.int32)
    for start in range(0, B, BLOCK_N):
        bs = start + tl.arange(0, BLOCK_N)
        mask = (bs < B)[:, None] & (es < E)[None, :]
        counts = tl.load(counts_ptr + bs[:, None] * E + es[None, :], mask=mask, other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((bs < program)[:, None], counts, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    if program == 0:
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + es, ends, mask=es < E)
    next_row = ends - total + before
    for block in range(BLOCKS):
        ns = (program * BLOCKS + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        experts = tl.load(topk_ids_ptr + ns, mask=ns < N, other=-1)
        mine = experts[:, None] == es[None, :]
        ranks = tl.cumsum(mine.to(tl.int32), axis=0) - 1
        rows = tl.sum(tl.where(mine, next_row[None, :] + ranks, 0), axis=1)
        tl.store(scatter_idx_ptr + ns, rows, mask=ns < N)
        tl.store(gather_idx_ptr + rows, ns, mask=ns < N)
        next_row += tl.sum(mine.to(tl.int32), axis=0)


@torch.library.custom_op("acceleron_triton::dispatch_plan", mutates_args=())
def build_plan(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return gather_idx, scatter_idx_TK and offsets of `Plan`."""
    N, E = topk_ids_TK.numel(), num_experts
    int32 = dict(dtype=torch.int32, device=topk_ids_TK.device)
    gather_idx, scatter_idx_TK, offsets = (torch.empty(s, **int32) for s in (N, topk_ids_TK.shape, E + 1))
    if N == 0:
        return gather_idx, scatter_idx_TK, offsets.zero_()
    e_pad = triton.next_power_of_2(E)
    block_n = min(4096 // e_pad, 512)
    blocks = triton.next_power_of_2(triton.cdiv(N, block_n * MAX_PROGRAMS))
    programs = triton.cdiv(N, block_n * blocks)
    counts = torch.empty(programs, E, **int32)
    sizes = dict(E=E, E_PAD=e_pad, BLOCK_N=block_n, BLOCKS=blocks)
    with torch.cuda.device_of(topk_ids_TK):
        _count_kernel[(programs,)](topk_ids_TK, counts, N, **sizes)
        _place_kernel[(programs,)](topk_ids_TK, counts, gather_idx, scatter_idx_TK, offsets, N, programs, **sizes)
    return gather_idx, scatter_idx_TK, offsets


@build_plan.register_fake
def _(topk_ids_TK, num_experts):
    shapes = (topk_ids_TK.numel(), topk_ids_TK.shape, num_experts + 1)
    return tuple(topk_ids_TK.new_empty(shape, dtype=torch.int32) for shape in shapes)


def dispatch_plan(topk_ids_TK: Tensor, num_experts: int) -> Plan:
    """`ops.dispatch_plan` on contiguous ids."""
    check_launch("dispatch_plan", topk_ids_TK=topk_ids_TK)
    return Plan(*build_plan(topk_ids_TK, num_experts))
