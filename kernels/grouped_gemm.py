"""Grouped GEMM: multiplies each expert's rows by its weight, and computes the weight gradients.

Legend: T tokens, D model width, E experts, K experts per token, N = T * K expert-sorted rows, I and O input and output
width of a GEMM. Expert e owns the rows offsets[e]:offsets[e + 1]; its last tile of BLOCK_M rows can be partly empty.

Each program finds the expert of a tile from the E + 1 offsets, in registers. The reduction over E values costs as much
as reading a tile-to-expert map from L2, and there is no map to build or save. Except for the weight gradients, programs
are persistent: the host launches as many as fit on the device and needs no tile count.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged, to_ragged_indices
from triton.tools.tensor_descriptor import TensorDescriptor

from .autograd import first_order
from .configs import Config, choose
from .contract import Plan
from .launch import INTERPRETED, Device, check_launch, device_of

# The interpreter's dot silently returns garbage for two bf16 tiles (up to Triton 3.9), so it gets fp32 tiles.
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b in fp32. fp32 operands are multiplied in fp32, not in tf32."""
    if _WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def expert_rows(offsets_ptr, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return each expert's first row begin_E and end row end_E, and last_E, the number of tiles through this expert."""
    experts = tl.arange(0, E_PAD)
    begin_E = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    end_E = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    last_E = tl.cumsum((end_E - begin_E + BLOCK_M - 1) // BLOCK_M, axis=0)
    return begin_E, end_E, last_E


@triton.jit
def locate(tile, begin_E, end_E, last_E, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the expert of a row tile, the first row of the tile, and the end of the expert's rows."""
    expert = tl.sum((last_E <= tile).to(tl.int32), axis=0)
    mine = tl.arange(0, E_PAD) == expert
    begin = tl.sum(tl.where(mine, begin_E, 0), axis=0)
    end = tl.sum(tl.where(mine, end_E, 0), axis=0)
    last = tl.sum(tl.where(mine, last_E, 0), axis=0)
    # Count back from the expert's last tile.
    row = begin + (tile - last + (end - begin + BLOCK_M - 1) // BLOCK_M) * BLOCK_M
    return expert, row, end


@triton.jit
def _weight_tile(
    w, expert, o, i, O: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load the [BLOCK_K, BLOCK_N] tile at (i, o) of the expert's weight. w is a pointer, or a descriptor with TMA.

    LAYOUT is the order of the weight's axes. "E2OI" has O gate rows, then O up rows. Its tile has BLOCK_N // 2 gate
    columns starting at o, then the same up columns. Its descriptor [2 * E, O, I] reads zeros past O. The descriptors of
    "EOI" and "EIO" can read into the next expert, but those outputs are never stored, and BLOCK_K divides I.
    """
    if LAYOUT == "E2OI":
        if TMA:
            tile = tl.reshape(w.load([2 * expert, o, i]), (BLOCK_N, BLOCK_K)).T
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            column = tl.arange(0, BLOCK_N)[None, :]
            os = o + column % HALF
            ks = i + tl.arange(0, BLOCK_K)[:, None]
            ptrs = w + (expert.to(tl.int64) * (2 * O) + column // HALF * O + os) * I + ks
            tile = tl.load(ptrs, mask=(os < O) & (ks < I), other=0.0)
    elif TMA:
        tile = w.load([expert * O + o, i]).T if LAYOUT == "EOI" else w.load([expert * I + i, o])
    else:
        os = o + tl.arange(0, BLOCK_N)[None, :]
        ks = i + tl.arange(0, BLOCK_K)[:, None]
        e = expert.to(tl.int64)
        ptrs = w + ((e * O + os) * I + ks if LAYOUT == "EOI" else (e * I + ks) * O + os)
        tile = tl.load(ptrs, mask=(os < O) & (ks < I), other=0.0)
    return tile


@triton.jit
def row_tile(x, rows, i, I: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load the [rows, BLOCK_K] tile of x_NI at column i through pointers. Every row index must be valid."""
    ks = i + tl.arange(0, BLOCK_K)
    ptrs = x + rows.to(tl.int64)[:, None] * I + ks[None, :]
    if I % BLOCK_K == 0:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(ks < I)[None, :], other=0.0)


@triton.jit
def grouped_dot(
    x, gather_idx_ptr, w, expert, row, end, o, O: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOP_K: tl.constexpr = 1,
):  # fmt: skip
    """Return the [BLOCK_M, BLOCK_N] tile of x_NI @ w[expert] that starts at row `row` and column `o`, in fp32.

    With gather_idx_ptr, x is a pointer to x_TI, and row n is that of token gather_idx[n] // TOP_K.
    """
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)
    if gather_idx_ptr is not None:
        rows = tl.load(gather_idx_ptr + rows) // TOP_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(0, I, BLOCK_K):
        a = x.load([row, i]) if TMA and gather_idx_ptr is None else row_tile(x, rows, i, I, BLOCK_K)
        acc = dot(a, _weight_tile(w, expert, o, i, O, I, LAYOUT, TMA, BLOCK_N, BLOCK_K), acc)
    return acc


@triton.jit
def _store_rows(y, row, end, column, tile):
    """Store the rows of a tile that are below `end` through a ragged descriptor. The tile's first row is `row`.

    `ragged_tma.store_ragged` does the same, but fails under the interpreter.
    """
    last, past, first = to_ragged_indices(row, end - row, 0)
    y.store([last, past, first, column], tl.reshape(tile, (1, 1, tile.shape[0], tile.shape[1])))


@triton.jit
def _rows_kernel(
    x, w, y, offsets_ptr,
    E: tl.constexpr, I: tl.constexpr, O: tl.constexpr, LAYOUT: tl.constexpr, TMA: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Compute y_NO[n] = x_NI[n] @ w[e]. Programs are persistent. The column tiles of a row tile are consecutive.

    TMA stores a tile while the next one is computed. It stores one half at a time, to save shared memory. A ragged
    descriptor writes nothing past the expert's last row.
    """
    begin_E, end_E, last_E = expert_rows(offsets_ptr, E, E_PAD, BLOCK_M)
    column_tiles: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    tiles = tl.max(last_E, axis=0) * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end = locate(tile // column_tiles, begin_E, end_E, last_E, E_PAD, BLOCK_M)
        o = (tile % column_tiles) * BLOCK_N
        acc = grouped_dot(x, None, w, expert, row, end, o, O, I, LAYOUT, TMA, BLOCK_M, BLOCK_N, BLOCK_K)
        if TMA:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
            _store_rows(y, row, end, o, left.to(y.dtype))
            _store_rows(y, row, end, o + HALF, right.to(y.dtype))
        else:
            rows = row + tl.arange(0, BLOCK_M)
            os = o + tl.arange(0, BLOCK_N)
            y_ptrs = y + rows.to(tl.int64)[:, None] * O + os[None, :]
            tl.store(y_ptrs, acc.to(y.dtype.element_ty), mask=(rows < end)[:, None] & (os < O)[None, :])


@triton.jit
def _weight_tile_of(
    program, whole, split, offsets_ptr,
    E: tl.constexpr, E_PAD: tl.constexpr, O: tl.constexpr, I: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the expert, first row and first column of a program's tile of out_EOI.

    Up to 32 experts, those with more rows come first. After the first `whole` tiles, each tile has `split` consecutive
    programs.
    """
    row_tiles: tl.constexpr = (O + BLOCK_M - 1) // BLOCK_M
    column_tiles: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tile = tl.where(program < whole, program, whole + (program - whole) // split)
    expert = tile // (row_tiles * column_tiles)
    if E <= 32:  # sorting takes E * E comparisons in every program
        es = tl.arange(0, E_PAD)
        begin_E = tl.load(offsets_ptr + es, mask=es < E, other=0)
        end_E = tl.load(offsets_ptr + es + 1, mask=es < E, other=0)
        keys = tl.where(es < E, (end_E - begin_E).to(tl.int64) * E_PAD - es, -E_PAD)
        rank_E = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), axis=1)
        expert = tl.sum(tl.where(rank_E == expert, es, 0), axis=0)
    return expert, tile // column_tiles % row_tiles * BLOCK_M, tile % column_tiles * BLOCK_N


@triton.jit
def _weight_grad_kernel(
    a, b, out_ptr, shares_ptr, offsets_ptr, whole, split,
    E: tl.constexpr, O: tl.constexpr, I: tl.constexpr, TMA: tl.constexpr, E_PAD: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out_EOI[e] = a_NO[rows].T @ b_NI[rows] over expert e's rows. With ADD, add it to out, which is fp32.

    One program per tile, and in the tail, one per share of a tile's rows. The GPU starts a program when another one
    ends, which balances tiles of different length. Ragged TMA descriptors read zeros past the expert's last row;
    without TMA those rows are masked.
    """
    program = tl.program_id(0)
    expert, o, i = _weight_tile_of(program, whole, split, offsets_ptr, E, E_PAD, O, I, BLOCK_M, BLOCK_N)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    if program >= whole:
        share = (end - begin + split * BLOCK_K - 1) // (split * BLOCK_K) * BLOCK_K
        begin += (program - whole) % split * share
        end = tl.minimum(begin + share, end)
    ms = tl.arange(0, BLOCK_M)
    ns = tl.arange(0, BLOCK_N)
    os = o + ms
    ks = i + ns
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in range(begin, end, BLOCK_K):
        if TMA:
            a_tile = load_ragged(a, begin, end - begin, [row - begin, o])
            b_tile = load_ragged(b, begin, end - begin, [row - begin, i])
        else:
            rows = row + tl.arange(0, BLOCK_K).to(tl.int64)[:, None]
            a_tile = tl.load(a + rows * O + os, mask=(rows < end) & (os < O)[None, :], other=0.0)
            b_tile = tl.load(b + rows * I + ks, mask=(rows < end) & (ks < I)[None, :], other=0.0)
        acc = dot(a_tile.T, b_tile, acc)
    if program >= whole:
        share_ptr = shares_ptr + (program - whole).to(tl.int64) * (BLOCK_M * BLOCK_N)
        tl.store(share_ptr + ms[:, None] * BLOCK_N + ns[None, :], acc)
    else:
        out_ptrs = out_ptr + expert.to(tl.int64) * (O * I) + os.to(tl.int64)[:, None] * I + ks[None, :]
        mask = (os < O)[:, None] & (ks < I)[None, :]
        if ADD:
            # One atomic per element, so the sum is deterministic. A load and a store would need twice the registers.
            tl.atomic_add(out_ptrs, acc, mask=mask, sem="relaxed")
        else:
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_shares_kernel(
    shares_ptr, out_ptr, offsets_ptr, whole, split,
    E: tl.constexpr, O: tl.constexpr, I: tl.constexpr, E_PAD: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the shares of a tile in a fixed order, ROWS rows of the tile per program."""
    first = tl.program_id(0) * split
    expert, o, i = _weight_tile_of(whole + first, whole, split, offsets_ptr, E, E_PAD, O, I, BLOCK_M, BLOCK_N)
    ms = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ns = tl.arange(0, BLOCK_N)
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for share in range(split):
        share_ptr = shares_ptr + (first + share).to(tl.int64) * (BLOCK_M * BLOCK_N)
        total += tl.load(share_ptr + ms[:, None] * BLOCK_N + ns[None, :])
    os = o + ms
    ks = i + ns
    out_ptrs = out_ptr + expert.to(tl.int64) * (O * I) + os.to(tl.int64)[:, None] * I + ks[None, :]
    mask = (os < O)[:, None] & (ks < I)[None, :]
    if ADD:
        total += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scatter_kernel(
    x_ptr, scatter_idx_ptr, out_ptr, T,
    D: tl.constexpr, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Read each token's row of x once and write it to the row of each of its assignments."""
    column_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    ts = tl.program_id(0) // column_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    ds = tl.program_id(0) % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (ts < T)[:, None] & (ds < D)[None, :]
    x = tl.load(x_ptr + ts.to(tl.int64)[:, None] * D + ds[None, :], mask=mask)
    for k in tl.static_range(TOP_K):
        rows = tl.load(scatter_idx_ptr + TOP_K * ts + k, mask=ts < T, other=0).to(tl.int64)
        tl.store(out_ptr + rows[:, None] * D + ds[None, :], x, mask=mask)


@torch.library.custom_op("acceleron_triton::scatter_rows", mutates_args=())
def scatter_rows(x_TD: Tensor, scatter_idx_TK: Tensor) -> Tensor:
    """Return x_ND, which holds the token's row of x for each expert-sorted row.

    The GEMMs load tiles of this copy through TMA. `up` gathers its rows instead. For dW13, gathering takes 1.04 to 1.3
    times as long as the copy and the GEMM (bench/LOG.md, 2026-11-27).
    """
    (T, K), D = scatter_idx_TK.shape, x_TD.shape[1]
    x_ND = x_TD.new_empty(T * K, D)
    if T:
        block_d = min(256, triton.next_power_of_2(D))
        block_t = 1024 // block_d
        with torch.cuda.device_of(x_TD):
            _scatter_kernel[(triton.cdiv(T, block_t) * triton.cdiv(D, block_d),)](
                x_TD, scatter_idx_TK, x_ND, T, D=D, TOP_K=K, BLOCK_T=block_t, BLOCK_D=block_d
            )
    return x_ND


@scatter_rows.register_fake
def _(x_TD, scatter_idx_TK):
    return x_TD.new_empty(scatter_idx_TK.numel(), x_TD.shape[1])


def persistent_grid(device: Device, config: Config, rows: int, experts: int, columns: int) -> tuple[int]:
    """Return the grid: as many programs as fit on the device, but no more than the maximum number of tiles."""
    tiles = (triton.cdiv(rows, config.block_m) + experts) * triton.cdiv(columns, config.block_n)
    return (min(tiles, device.processors * config.programs),)


@torch.library.custom_op("acceleron_triton::grouped_rows", mutates_args=())
def grouped_rows(x_NI: Tensor, w: Tensor, offsets: Tensor, out_first: bool) -> Tensor:
    """For the rows n of each expert e, return y_NO[n] = w[e] @ x[n] if w is w_EOI (out_first), x[n] @ w[e] if w_EIO."""
    (N, I), (E, O) = x_NI.shape, (w.shape[0], w.shape[1 if out_first else 2])
    y_NO = x_NI.new_empty(N, O)
    if N == 0:
        return y_NO
    device = device_of(x_NI)
    config, tma = choose("rows", device, (E, I, O, int(out_first)), I, x_NI, w, y_NO)
    x, y, layout = x_NI, y_NO, "EOI" if out_first else "EIO"
    if tma:
        x = TensorDescriptor.from_tensor(x_NI, [config.block_m, config.block_k])
        block = [config.block_n, config.block_k] if out_first else [config.block_k, config.block_n]
        w = TensorDescriptor.from_tensor(w.flatten(0, 1), block)
        y = create_ragged_descriptor(y_NO, [config.block_m, config.block_n // 2])
    with torch.cuda.device_of(x_NI):
        _rows_kernel[persistent_grid(device, config, N, E, O)](
            x, w, y, offsets,
            E=E, I=I, O=O, LAYOUT=layout, TMA=tma, E_PAD=triton.next_power_of_2(E), **config.blocks(),
        )  # fmt: skip
    return y_NO


@grouped_rows.register_fake
def _(x_NI, w, offsets, out_first):
    return x_NI.new_empty(x_NI.shape[0], w.shape[1 if out_first else 2])


def _write_weight_grad(a_NO, b_NI, offsets, scatter_idx_TK, out_EOI: Tensor, add: bool):
    """Write the weight gradient to out_EOI, or add it."""
    (_, O), I, E = a_NO.shape, b_NI.shape[1], offsets.numel() - 1
    b_NI = b_NI if scatter_idx_TK is None else scatter_rows(b_NI, scatter_idx_TK)
    device = device_of(a_NO)
    config, tma = choose("weight_grad", device, (E, O, I), 0, a_NO, b_NI)
    block_m, block_n, split = config.block_m, config.block_n, config.split
    a, b = a_NO, b_NI
    if tma:
        a = create_ragged_descriptor(a_NO, [config.block_k, block_m])
        b = create_ragged_descriptor(b_NI, [config.block_k, block_n])
    tiles = E * triton.cdiv(O, block_m) * triton.cdiv(I, block_n)
    tail = tiles % device.processors if split > 1 else 0
    whole = tiles - tail
    shares = a_NO.new_empty(tail * split, block_m, block_n, dtype=torch.float32)
    shape = dict(E=E, O=O, I=I, E_PAD=triton.next_power_of_2(E), ADD=add, BLOCK_M=block_m, BLOCK_N=block_n)
    with torch.cuda.device_of(a_NO):
        _weight_grad_kernel[(whole + tail * split,)](
            a, b, out_EOI, shares, offsets, whole, split,
            **shape, TMA=tma, BLOCK_K=config.block_k, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if tail:
            rows = min(8, block_m)
            _add_shares_kernel[(tail, block_m // rows)](shares, out_EOI, offsets, whole, split, **shape, ROWS=rows)


@torch.library.custom_op("acceleron_triton::grouped_weight_grad", mutates_args=())
def grouped_weight_grad(
    a_NO: Tensor, b_NI: Tensor, offsets: Tensor, scatter_idx_TK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return out_EOI[e] = a[rows].T @ b[rows] over each expert's rows, in this dtype. An expert without rows gets 0.

    With `scatter_idx_TK`, b is [T, I] and its rows are sorted here. If the caller sorted them, torch.compile would
    reuse the rows sorted in the forward pass and keep them in memory until backward.
    """
    if a_NO.shape[0] == 0:
        return a_NO.new_zeros((offsets.numel() - 1, a_NO.shape[1], b_NI.shape[1]), dtype=dtype)
    out_EOI = a_NO.new_empty((offsets.numel() - 1, a_NO.shape[1], b_NI.shape[1]), dtype=dtype)
    _write_weight_grad(a_NO, b_NI, offsets, scatter_idx_TK, out_EOI, False)
    return out_EOI


@grouped_weight_grad.register_fake
def _(a_NO, b_NI, offsets, scatter_idx_TK, dtype):
    return a_NO.new_empty((offsets.numel() - 1, a_NO.shape[1], b_NI.shape[1]), dtype=dtype)


@torch.library.custom_op("acceleron_triton::add_weight_grad", mutates_args=("total_EOI",))
def add_weight_grad(
    a_NO: Tensor, b_NI: Tensor, offsets: Tensor, scatter_idx_TK: Tensor | None, total_EOI: Tensor
) -> None:
    """Add the result of `grouped_weight_grad` to total_EOI, which is fp32."""
    if a_NO.shape[0]:
        _write_weight_grad(a_NO, b_NI, offsets, scatter_idx_TK, total_EOI, True)


@add_weight_grad.register_fake
def _(a_NO, b_NI, offsets, scatter_idx_TK, total_EOI):
    pass


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_EFD, offsets):
        ctx.save_for_backward(x_ND, w_EFD, offsets)
        return grouped_rows(x_ND, w_EFD, offsets, True)

    @staticmethod
    @first_order("grouped_gemm")
    def backward(ctx, grad_NF):
        x_ND, w_EFD, offsets = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        grad_x_ND = grouped_rows(grad_NF, w_EFD, offsets, False)
        return grad_x_ND, grouped_weight_grad(grad_NF, x_ND, offsets, None, w_EFD.dtype), None


def grouped_gemm(x_ND: Tensor, w_EFD: Tensor, plan: Plan) -> Tensor:
    """`ops.grouped_gemm` on contiguous tensors."""
    check_launch("grouped_gemm", x_ND=x_ND, w_EFD=w_EFD)
    return _GroupedGemm.apply(x_ND, w_EFD, plan.offsets)
