"""Routed experts: gather, up-projection, SwiGLU, down-projection and weighted sum, forward and backward.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, N = T * K sorted rows.

Forward launches three kernels: h_N2F and act_NF (up-projection and SwiGLU); rows_ND (down-projection); y_TD, the
weighted sum of each token's K rows. Like SonicMoE, it saves only x, h and the plan for backward, not act or the
down-projection's output. Backward launches: copy dy_ND; dh, the weighted act and the score gradients, in the epilogue
of r = w2.T dy; dW2; copy x_ND; dW13; the rows of dx; dx_TD, the sum of each token's K rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .autograd import first_order
from .configs import choose
from .contract import Plan
from .grouped_gemm import (
    add_weight_grad,
    expert_rows,
    grouped_dot,
    grouped_rows,
    grouped_weight_grad,
    locate,
    persistent_grid,
    scatter_rows,
)
from .launch import check_launch, device_of
from .swiglu import sigmoid


@triton.jit
def _up_kernel(
    x_ptr, gather_idx_ptr, offsets_ptr, w, h_ptr, act_ptr,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TMA: tl.constexpr, E_PAD: tl.constexpr, WITH_H: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Compute h[n] = w13[e] @ x[n] and act = silu(gate) * up. A tile has BLOCK_N gate and BLOCK_N matching up columns.

    One accumulator holds both. With two, ptxas serializes the wgmmas of the flattened loop (warning C7515).
    """
    begin_E, end_E, last_E = expert_rows(offsets_ptr, E, E_PAD, BLOCK_M)
    column_tiles: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tiles = tl.max(last_E, axis=0) * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end = locate(tile // column_tiles, begin_E, end_E, last_E, E_PAD, BLOCK_M)
        f = (tile % column_tiles) * BLOCK_N
        acc = grouped_dot(
            x_ptr, gather_idx_ptr, w, expert, row, end, f, F, D, "E2OI", TMA, BLOCK_M, 2 * BLOCK_N, BLOCK_K, TOP_K
        )
        rows = row + tl.arange(0, BLOCK_M)
        if not WITH_H:
            acc += 0.0  # otherwise ptxas moves fp16 conversions between the wgmmas and serializes them (C7514)
        h = acc.to(h_ptr.dtype.element_ty)
        gate, up = tl.split(tl.permute(tl.reshape(h, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
        fs = f + tl.arange(0, BLOCK_N)
        mask = (rows < end)[:, None] & (fs < F)[None, :]
        h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * (2 * F) + fs[None, :]
        if WITH_H:
            tl.store(h_ptrs, gate, mask=mask)
            tl.store(h_ptrs + F, up, mask=mask)
        # Use the rounded h, so backward recomputes the same values.
        gate = gate.to(tl.float32)
        act = gate * sigmoid(gate) * up.to(tl.float32)
        act_ptrs = act_ptr + rows.to(tl.int64)[:, None] * F + fs[None, :]
        tl.store(act_ptrs, act.to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hidden_grad_kernel(
    dy, offsets_ptr, w, h_ptr, gather_idx_ptr, topk_scores_ptr, act_ptr, dh_ptr, sums_ptr, N,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, TMA: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Compute r[n] = w2[e].T @ dy[n]. Store dh, act times the score of its row, and a tile's part of sum(r * act).

    For score s, dact = s r, and the gradient of s is r . act. The epilogue handles a quarter of the tile's rows at a
    time, which limits its registers: eight warps with more than 128 each would not fit twice on an SM.
    """
    begin_E, end_E, last_E = expert_rows(offsets_ptr, E, E_PAD, BLOCK_M)
    column_tiles: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tiles = tl.max(last_E, axis=0) * column_tiles
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    PART: tl.constexpr = BLOCK_M // 4
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end = locate(tile // column_tiles, begin_E, end_E, last_E, E_PAD, BLOCK_M)
        column_tile = tile % column_tiles
        f = column_tile * BLOCK_N
        acc = grouped_dot(dy, None, w, expert, row, end, f, F, D, "EIO", TMA, BLOCK_M, BLOCK_N, BLOCK_K)
        # Triton splits in registers, after it has changed the tile to the layout of the coalesced loads of h.
        quarters = tl.permute(tl.reshape(acc.to(dtype), (2, 2, PART, BLOCK_N)), (2, 3, 0, 1))
        r02, r13 = tl.split(quarters)
        r0, r2 = tl.split(r02)
        r1, r3 = tl.split(r13)
        quarters = (r0, r1, r2, r3)
        fs = f + tl.arange(0, BLOCK_N)
        for part in tl.static_range(4):
            rows = row + part * PART + tl.arange(0, PART)
            mine = rows < end
            mask = mine[:, None] & (fs < F)[None, :]
            assignments = tl.load(gather_idx_ptr + rows, mask=mine, other=0)
            wide = rows.to(tl.int64)[:, None] * (2 * F) + fs[None, :]
            act_ptrs = act_ptr + rows.to(tl.int64)[:, None] * F + fs[None, :]
            gate = tl.load(h_ptr + wide, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(h_ptr + wide + F, mask=mask, other=0.0).to(tl.float32)
            scale = tl.load(topk_scores_ptr + assignments, mask=mine, other=0.0)[:, None]
            r = quarters[part].to(tl.float32)
            s = sigmoid(gate)
            silu = gate * s
            act = silu * up
            dact = r * scale
            sums = tl.sum(r * act, axis=1)
            tl.store(act_ptrs, (act * scale).to(dtype), mask=mask)
            tl.store(dh_ptr + wide, (dact * up * (s + silu * (1 - s))).to(dtype), mask=mask)
            tl.store(dh_ptr + wide + F, (dact * silu).to(dtype), mask=mask)
            tl.store(sums_ptr + column_tile.to(tl.int64) * N + assignments, sums, mask=mine)


@triton.jit
def _token_tile(T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the tokens and columns of this program's tile of [T, D], the tile's offsets, and its mask."""
    column_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    ts = tl.program_id(0) // column_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    ds = tl.program_id(0) % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    return ts, ds, ts.to(tl.int64)[:, None] * D + ds[None, :], (ts < T)[:, None] & (ds < D)[None, :]


@triton.jit
def _combine_kernel(
    rows_ptr, scatter_idx_ptr, topk_scores_ptr, shared_ptr, residual_ptr, y_ptr, T,
    D: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y[t] = sum over k of topk_scores[t, k] * rows[scatter_idx[t, k]], plus shared[t], plus residual[t]."""
    ts, ds, tile, mask = _token_tile(T, D, BLOCK_T, BLOCK_D)
    y = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(scatter_idx_ptr + TOP_K * ts + k, mask=ts < T, other=0).to(tl.int64)
        weight = tl.load(topk_scores_ptr + TOP_K * ts + k, mask=ts < T, other=0.0)
        y += weight[:, None] * tl.load(rows_ptr + row[:, None] * D + ds[None, :], mask=mask, other=0.0).to(tl.float32)
    if SHARED:
        y += tl.load(shared_ptr + tile, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual_ptr + tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + tile, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _token_grad_kernel(
    rows_ptr, scatter_idx_ptr, shared_ptr, dlogits_ptr, router_ptr, dx_ptr, T,
    D: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, ROUTER: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx[t] = sum over k of rows[scatter_idx[t, k]], plus shared[t], plus sum over e of dlogits[t, e] * router[e]."""
    ts, ds, tile, mask = _token_tile(T, D, BLOCK_T, BLOCK_D)
    dx = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(scatter_idx_ptr + TOP_K * ts + k, mask=ts < T, other=0).to(tl.int64)
        dx += tl.load(rows_ptr + row[:, None] * D + ds[None, :], mask=mask, other=0.0).to(tl.float32)
    if SHARED:
        dx += tl.load(shared_ptr + tile, mask=mask, other=0.0).to(tl.float32)
    if ROUTER:
        # This fp32 sum uses no tensor cores. Up to about 32 experts, memory traffic hides its 2 E FLOPs per value.
        for e in range(E):
            dlogit = tl.load(dlogits_ptr + ts.to(tl.int64) * E + e, mask=ts < T, other=0.0)
            weight = tl.load(router_ptr + e * D + ds, mask=ds < D, other=0.0).to(tl.float32)
            dx += dlogit[:, None] * weight[None, :]
    tl.store(dx_ptr + tile, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _token_blocks(T: int, D: int, K: int) -> tuple[tuple[int], dict]:
    """Return the grid and blocks of a kernel over [T, D]. Each program handles 8 KiB of bf16. Tiles are in row order.

    Above K = 8, it handles 4 KiB: otherwise token_grad would spill registers in fp32.

    There are more threads than columns. Only then does Triton load a router row in the layout of the sum. Otherwise the
    row goes through shared memory, with two barriers per expert.
    """
    block_d = min(128, triton.next_power_of_2(D))
    block_t = (4096 if K <= 8 else 2048) // block_d
    return (triton.cdiv(T, block_t) * triton.cdiv(D, block_d),), dict(BLOCK_T=block_t, BLOCK_D=block_d, num_warps=8)


@torch.library.custom_op("acceleron_triton::expert_up", mutates_args=())
def expert_up(
    x_TD: Tensor, w13_E2FD: Tensor, gather_idx: Tensor, offsets: Tensor, with_h: bool
) -> tuple[Tensor, Tensor]:
    """Return the pre-activation h_N2F (empty unless with_h) and act_NF = silu(gate) * up for expert-sorted rows."""
    (E, F2, D), N = w13_E2FD.shape, gather_idx.numel()
    F = F2 // 2
    h_N2F, act_NF = x_TD.new_empty(N if with_h else 0, F2), x_TD.new_empty(N, F)
    if N == 0:
        return h_N2F, act_NF
    device = device_of(x_TD)
    config, tma = choose("up", device, (E, D, F), D, x_TD, w13_E2FD)
    w = w13_E2FD
    if tma:
        w = TensorDescriptor.from_tensor(w13_E2FD.view(2 * E, F, D), [2, config.block_n, config.block_k])
    with torch.cuda.device_of(x_TD):
        _up_kernel[persistent_grid(device, config, N, E, F)](
            x_TD, gather_idx, offsets, w, h_N2F, act_NF,
            E=E, D=D, F=F, TMA=tma, E_PAD=triton.next_power_of_2(E), WITH_H=with_h, TOP_K=N // len(x_TD),
            **config.blocks(),
        )  # fmt: skip
    return h_N2F, act_NF


@expert_up.register_fake
def _(x_TD, w13_E2FD, gather_idx, offsets, with_h):
    N, F2 = gather_idx.shape[0], w13_E2FD.shape[1]
    return x_TD.new_empty(N if with_h else 0, F2), x_TD.new_empty(N, F2 // 2)


@torch.library.custom_op("acceleron_triton::expert_down", mutates_args=())
def expert_down(
    act_NF: Tensor,
    w2_EDF: Tensor,
    topk_scores_TK: Tensor,
    scatter_idx_TK: Tensor,
    offsets: Tensor,
    shared_TD: Tensor | None,
    residual_TD: Tensor | None,
) -> Tensor:
    """Return y_TD, the weighted sum of each token's K rows of w2[e] @ act, plus shared and residual."""
    (T, K), D = topk_scores_TK.shape, w2_EDF.shape[1]
    rows_ND = grouped_rows(act_NF, w2_EDF, offsets, True)
    y_TD = rows_ND.new_empty(T, D)
    if T == 0:
        return y_TD
    grid, blocks = _token_blocks(T, D, K)
    with torch.cuda.device_of(y_TD):
        _combine_kernel[grid](
            rows_ND, scatter_idx_TK, topk_scores_TK, shared_TD, residual_TD, y_TD, T,
            D=D, TOP_K=K, SHARED=shared_TD is not None, RESIDUAL=residual_TD is not None, **blocks,
        )  # fmt: skip
    return y_TD


@expert_down.register_fake
def _(act_NF, w2_EDF, topk_scores_TK, scatter_idx_TK, offsets, shared_TD, residual_TD):
    return act_NF.new_empty(topk_scores_TK.shape[0], w2_EDF.shape[1])


@torch.library.custom_op("acceleron_triton::hidden_grad", mutates_args=())
def hidden_grad(
    dy_ND: Tensor, w2_EDF: Tensor, h_N2F: Tensor, topk_scores_TK: Tensor, gather_idx: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh_N2F, act_NF times the score of its row, and dtopk_scores_TK.

    Two programs per SM: the epilogue of one, at memory bandwidth, overlaps the GEMM of the other.
    """
    (N, D), (E, _, F) = dy_ND.shape, w2_EDF.shape
    act_NF, dh_N2F = h_N2F.new_empty(N, F), torch.empty_like(h_N2F)
    if N == 0:
        return dh_N2F, act_NF, torch.empty_like(topk_scores_TK)
    device = device_of(dy_ND)
    config, tma = choose("hidden_grad", device, (E, D, F), D, dy_ND, w2_EDF)
    dy, w = dy_ND, w2_EDF
    if tma:
        dy = TensorDescriptor.from_tensor(dy_ND, [config.block_m, config.block_k])
        w = TensorDescriptor.from_tensor(w2_EDF.flatten(0, 1), [config.block_k, config.block_n])
    sums = topk_scores_TK.new_empty(triton.cdiv(F, config.block_n), *topk_scores_TK.shape)
    with torch.cuda.device_of(dy_ND):
        _hidden_grad_kernel[persistent_grid(device, config, N, E, F)](
            dy, offsets, w, h_N2F, gather_idx, topk_scores_TK, act_NF, dh_N2F, sums, N,
            E=E, D=D, F=F, TMA=tma, E_PAD=triton.next_power_of_2(E), **config.blocks(),
        )  # fmt: skip
    return dh_N2F, act_NF, sums.sum(dim=0)


@hidden_grad.register_fake
def _(dy_ND, w2_EDF, h_N2F, topk_scores_TK, gather_idx, offsets):
    return torch.empty_like(h_N2F), h_N2F.new_empty(dy_ND.shape[0], w2_EDF.shape[2]), torch.empty_like(topk_scores_TK)


@torch.library.custom_op("acceleron_triton::token_grad", mutates_args=())
def token_grad(
    rows_ND: Tensor,
    scatter_idx_TK: Tensor,
    shared_TD: Tensor | None,
    dlogits_TE: Tensor | None,
    router_ED: Tensor | None,
) -> Tensor:
    """Return dx_TD, the sum of each token's K rows, plus shared, plus dlogits @ router."""
    (T, K), D = scatter_idx_TK.shape, rows_ND.shape[1]
    dx_TD = rows_ND.new_empty(T, D)
    if T == 0:
        return dx_TD
    E = 1 if router_ED is None else router_ED.shape[0]
    grid, blocks = _token_blocks(T, D, K)
    with torch.cuda.device_of(dx_TD):
        _token_grad_kernel[grid](
            rows_ND, scatter_idx_TK, shared_TD, dlogits_TE, router_ED, dx_TD, T,
            D=D, E=E, TOP_K=K, SHARED=shared_TD is not None, ROUTER=router_ED is not None, **blocks,
        )  # fmt: skip
    return dx_TD


@token_grad.register_fake
def _(rows_ND, scatter_idx_TK, shared_TD, dlogits_TE, router_ED):
    return rows_ND.new_empty(scatter_idx_TK.shape[0], rows_ND.shape[1])


def expert_grads(
    dy_TD: Tensor,
    x_TD: Tensor,
    h_N2F: Tensor,
    topk_scores_TK: Tensor,
    gather_idx: Tensor,
    scatter_idx_TK: Tensor,
    offsets: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    target13: torch.dtype | Tensor | None,
    target2: torch.dtype | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the expert-sorted rows of dx, dtopk_scores_TK, and dw13 and dw2.

    A weight gradient's target is a dtype, a tensor to add it to (the result is then None), or None to skip it.
    """
    dy_ND = scatter_rows(dy_TD, scatter_idx_TK)
    dh_N2F, act_NF, dtopk_scores_TK = hidden_grad(dy_ND, w2_EDF, h_N2F, topk_scores_TK, gather_idx, offsets)
    dw2_EDF = _weight_grad(dy_ND, act_NF, offsets, None, target2)
    del act_NF, dy_ND
    dw13_E2FD = _weight_grad(dh_N2F, x_TD, offsets, scatter_idx_TK, target13)
    rows_ND = grouped_rows(dh_N2F, w13_E2FD, offsets, False)
    return rows_ND, dtopk_scores_TK, dw13_E2FD, dw2_EDF


def _weight_grad(a_NO, b_NI, offsets, scatter_idx_TK, target: torch.dtype | Tensor | None) -> Tensor | None:
    if isinstance(target, Tensor):
        return add_weight_grad(a_NO, b_NI, offsets, scatter_idx_TK, target)
    return None if target is None else grouped_weight_grad(a_NO, b_NI, offsets, scatter_idx_TK, target)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, topk_scores_TK, gather_idx, scatter_idx_TK, offsets, w13_E2FD, w2_EDF, with_h):
        w13, w2 = w13_E2FD.to(x_TD.dtype), w2_EDF.to(x_TD.dtype)
        h_N2F, act_NF = expert_up(x_TD, w13, gather_idx, offsets, with_h)
        if with_h:
            ctx.save_for_backward(x_TD, h_N2F, topk_scores_TK, gather_idx, scatter_idx_TK, offsets, w13, w2)
            ctx.dtypes = w13_E2FD.dtype, w2_EDF.dtype
        return expert_down(act_NF, w2, topk_scores_TK, scatter_idx_TK, offsets, None, None)

    @staticmethod
    @first_order("expert_mlp")
    def backward(ctx, dy_TD):
        # Read once: with checkpointing, every access recomputes.
        *saved, scatter_idx_TK, offsets, w13, w2 = ctx.saved_tensors
        dtypes = (dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad[5:7], strict=True))
        rows_ND, dtopk_scores_TK, dw13_E2FD, dw2_EDF = expert_grads(
            dy_TD.contiguous(), *saved, scatter_idx_TK, offsets, w13, w2, *dtypes
        )
        dx_TD = token_grad(rows_ND, scatter_idx_TK, None, None, None)
        return dx_TD, dtopk_scores_TK, None, None, None, dw13_E2FD, dw2_EDF, None


def expert_mlp(x_TD: Tensor, topk_scores_TK: Tensor, plan: Plan, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """`ops.expert_mlp` on contiguous tensors."""
    check_launch("expert_mlp", x_TD=x_TD, topk_scores_TK=topk_scores_TK, w13_E2FD=w13_E2FD, w2_EDF=w2_EDF)
    # Only backward needs h.
    with_h = torch.is_grad_enabled() and any(x.requires_grad for x in (x_TD, topk_scores_TK, w13_E2FD, w2_EDF))
    return _ExpertMLP.apply(x_TD, topk_scores_TK, *plan, w13_E2FD, w2_EDF, with_h)
