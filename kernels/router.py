"""Router logits: a skinny fp32 GEMM that reads x in its own dtype, without an fp32 copy of x.

Legend: T tokens, D model width, E experts. Each pass reads x once, which dominates the time at the named sizes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import first_order
from .grouped_gemm import dot, row_tile
from .launch import check_launch, device_of

# Programs for the weight gradient: enough to saturate a large GPU, but few enough that adding their sums is cheap.
WEIGHT_GRAD_PROGRAMS = 512


@triton.jit
def _tile(ptr, rows, columns, num_rows, num_columns):
    """Load these rows and columns of a contiguous matrix in fp32, with zeros outside the matrix."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _parts(w):
    """Split each fp32 row of w into four bf16 rows: three that add up to it, and one of zeros."""
    high = w.to(tl.bfloat16)
    rest = w - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    parts = tl.join(tl.join(high, middle), tl.join(low, tl.zeros_like(low)))
    return tl.reshape(tl.permute(parts, (0, 2, 3, 1)), (4 * w.shape[0], w.shape[1]))


@triton.jit
def _dot_parts(x, w, acc):
    """Return acc + x @ w.T in fp32. For a 16-bit x, acc has a column for each row of `_parts(w)`.

    Three bf16 numbers hold the 24 bits of an fp32 number, and two hold an fp16 number. All products are exact. One GEMM
    computes the products with all parts of w. An fp32 x is multiplied in fp32, without tensor cores.
    """
    if x.dtype == tl.float32:
        acc = dot(x, w.T, acc)
    else:
        parts = _parts(w).T
        high = x.to(tl.bfloat16)
        acc = dot(high, parts, acc)
        if x.dtype == tl.float16:
            acc = dot((x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16), parts, acc)
    return acc


@triton.jit
def _logits_kernel(
    x_ptr, w_ptr, logits_ptr, T,
    D: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """logits[t, e] = x[t] . w[e]."""
    ts = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    es = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_T, BLOCK_E * PARTS), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        x = row_tile(x_ptr, tl.minimum(ts, T - 1), d, D, BLOCK_D)
        acc = _dot_parts(x, _tile(w_ptr, es, d + tl.arange(0, BLOCK_D), E, D), acc)
    logits = tl.sum(tl.reshape(acc, (BLOCK_T, BLOCK_E, PARTS)), axis=2)
    mask = (ts < T)[:, None] & (es < E)[None, :]
    tl.store(logits_ptr + ts.to(tl.int64)[:, None] * E + es[None, :], logits, mask=mask)


@triton.jit
def _input_grad_kernel(
    dlogits_ptr, w_ptr, dx_ptr, T,
    D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dx[t] = sum over e of dlogits[t, e] * w[e]."""
    ts = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dx = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for e in range(0, E, BLOCK_E):
        es = e + tl.arange(0, BLOCK_E)
        dx = tl.dot(_tile(dlogits_ptr, ts, es, T, E), _tile(w_ptr, es, ds, E, D), dx, input_precision=PRECISION)
    mask = (ts < T)[:, None] & (ds < D)[None, :]
    tl.store(dx_ptr + ts.to(tl.int64)[:, None] * D + ds[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _router_grad_kernel(
    dlogits_ptr, x_ptr, partial_ptr, T, blocks,
    D: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute partial[p, e] = sum of dlogits[t, e] * x[t] over program p's tokens, which are `blocks` blocks."""
    d = tl.program_id(1) * BLOCK_D
    es = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_D, BLOCK_E * PARTS), dtype=tl.float32)
    for block in range(blocks):
        ts = (tl.program_id(0) * blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        x = row_tile(x_ptr, tl.minimum(ts, T - 1), d, D, BLOCK_D)
        acc = _dot_parts(x.T, _tile(dlogits_ptr, ts, es, T, E).T, acc)
    grad = tl.sum(tl.reshape(acc, (BLOCK_D, BLOCK_E, PARTS)), axis=2)
    ds = d + tl.arange(0, BLOCK_D)
    partial_ptr += tl.program_id(0).to(tl.int64) * (E * D)
    tl.store(partial_ptr + es[None, :] * D + ds[:, None], grad, mask=(es < E)[None, :] & (ds < D)[:, None])


def _sizes(x_TD: Tensor, E: int) -> tuple[int, int, int, dict]:
    """Return the number of tiles over T, E and D, and the keyword arguments of the kernels that read x.

    The tiles are as large as registers and shared memory allow on sm_80 and later. An fp16 x needs two operands. An
    fp32 x does not use tensor cores.
    """
    (T, D), half = x_TD.shape, x_TD.element_size() == 2
    block_t, block_d = 64 if half else 32, 128 if x_TD.dtype == torch.bfloat16 and E <= 16 else 64
    block_e = min(16 if x_TD.dtype == torch.float16 else 32, max(4, triton.next_power_of_2(E)))
    arguments = dict(
        D=D, E=E, PARTS=4 if half else 1, BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_D=block_d,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return triton.cdiv(T, block_t), triton.cdiv(E, block_e), triton.cdiv(D, block_d), arguments


@torch.library.custom_op("acceleron_triton::router_logits", mutates_args=())
def router_logits_forward(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    T, E = x_TD.shape[0], weight_ED.shape[0]
    logits_TE = x_TD.new_empty(T, E, dtype=torch.float32)
    t_tiles, e_tiles, _, arguments = _sizes(x_TD, E)
    if T:
        with torch.cuda.device_of(x_TD):
            _logits_kernel[(t_tiles, e_tiles)](x_TD, weight_ED, logits_TE, T, **arguments)
    return logits_TE


@router_logits_forward.register_fake
def _(x_TD, weight_ED):
    return x_TD.new_empty(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32)


@torch.library.custom_op("acceleron_triton::router_input_grad", mutates_args=())
def _input_grad(dlogits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """dx_TD."""
    (T, D), dx_TD = x_TD.shape, torch.empty_like(x_TD)
    # For a 16-bit dx, three TF32 products are as accurate as one fp32 product.
    split = x_TD.element_size() == 2 and device_of(x_TD).arch.startswith("sm_")
    block_t, block_d = 64 if split else 32, 64
    if T:
        with torch.cuda.device_of(x_TD):
            _input_grad_kernel[(triton.cdiv(T, block_t), triton.cdiv(D, block_d))](
                dlogits_TE, weight_ED, dx_TD, T, D=D, E=weight_ED.shape[0], PRECISION="tf32x3" if split else "ieee",
                BLOCK_T=block_t, BLOCK_E=16, BLOCK_D=block_d,
            )  # fmt: skip
    return dx_TD


@_input_grad.register_fake
def _(dlogits_TE, x_TD, weight_ED):
    return torch.empty_like(x_TD)


@torch.library.custom_op("acceleron_triton::router_weight_grad", mutates_args=())
def router_weight_grad(dlogits_TE: Tensor, x_TD: Tensor) -> Tensor:
    """Return dweight_ED in fp32."""
    (T, D), E = x_TD.shape, dlogits_TE.shape[1]
    if T == 0:
        return dlogits_TE.new_zeros(E, D)
    t_tiles, e_tiles, d_tiles, arguments = _sizes(x_TD, E)
    blocks = triton.cdiv(t_tiles * d_tiles, WEIGHT_GRAD_PROGRAMS)
    shares = triton.cdiv(t_tiles, blocks)
    partial = dlogits_TE.new_empty(shares, E, D)
    with torch.cuda.device_of(x_TD):
        _router_grad_kernel[(shares, d_tiles, e_tiles)](dlogits_TE, x_TD, partial, T, blocks, **arguments)
    return partial.sum(dim=0)


@router_weight_grad.register_fake
def _(dlogits_TE, x_TD):
    return dlogits_TE.new_empty(dlogits_TE.shape[1], x_TD.shape[1])


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED):
        ctx.save_for_backward(x_TD, weight_ED)
        return router_logits_forward(x_TD, weight_ED)

    @staticmethod
    @first_order("router_logits")
    def backward(ctx, dlogits_TE):
        (x_TD, weight_ED), dlogits_TE = ctx.saved_tensors, dlogits_TE.contiguous()
        return _input_grad(dlogits_TE, x_TD, weight_ED), router_weight_grad(dlogits_TE, x_TD).to(weight_ED.dtype)


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """`ops.router_logits` on contiguous tensors. Infinite values can produce NaN."""
    check_launch("router_logits", x_TD=x_TD, weight_ED=weight_ED)
    return _RouterLogits.apply(x_TD, weight_ED)
