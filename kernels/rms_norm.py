"""RMSNorm with a fused residual addition, forward and backward.

Legend: N rows (all leading axes), D model width.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import first_order
from .launch import check_launch, device_of

# A row is a single block and can have at most this many bytes: 32,768 values in bf16.
MAX_ROW_BYTES = 65536
# Values per tile. A tile has several rows if the model is narrow. Forward uses 16 values per lane. Backward uses 8,
# because it holds four tiles in registers; with 16, Triton 3.6 spills at the tiny size.
FORWARD_TILE, BACKWARD_TILE = 2048, 1024
# Backward programs per SM: as many as fit in its registers (56 per lane). They keep 32 to 48 KB in flight. Each writes
# a row of partial sums, which is 2% of the traffic on an H100 at 65,536 tokens.
PROGRAMS_PER_PROCESSOR = 8


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, norm_ptr, total_ptr, rstd_ptr, N, D, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < N)[:, None] & (col < D)[None, :]
    offset = row[:, None] * D + col[None, :]
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + offset, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offset, mask, other=0.0).to(tl.float32)
        # The norm uses the rounded sum, as the next layer does.
        total = x.to(dtype)
        tl.store(total_ptr + offset, total, mask)
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + row, rstd, row < N)
    # Llama's order: cast back, then multiply by the weight in x's dtype.
    weight = tl.load(weight_ptr + col, col < D, other=0.0).to(dtype).to(tl.float32)
    normed = (x * rstd[:, None]).to(dtype).to(tl.float32)
    tl.store(norm_ptr + offset, (normed * weight[None, :]).to(dtype), mask)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr, grad_total_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, N, D, tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_GRAD_TOTAL: tl.constexpr,
):  # fmt: skip
    """Each program processes `tiles` consecutive tiles of rows and writes a partial weight gradient."""
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, col < D, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < N)[:, None] & (col < D)[None, :]
        offset = row[:, None] * D + col[None, :]
        grad = tl.load(grad_ptr + offset, mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offset, mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < N, other=0.0)[:, None]
        normed = x * rstd
        grad_weight += grad * normed
        grad *= weight[None, :]
        grad_x = rstd * (grad - normed * (tl.sum(grad * normed, axis=1) / D)[:, None])
        if HAS_GRAD_TOTAL:
            grad_x += tl.load(grad_total_ptr + offset, mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask)
    tl.store(partial_ptr + program.to(tl.int64) * D + col, tl.sum(grad_weight, axis=0), col < D)


def _blocks(D: int, tile: int) -> tuple[int, int, int]:
    """Return the rows, columns and warps of a tile: 4 warps per `tile` values, at most 16 (1024 lanes on AMD)."""
    block = triton.next_power_of_2(D)
    return max(1, tile // block), block, min(16, max(4, 4 * block // tile))


@torch.library.custom_op("acceleron_triton::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm, x + residual (empty without a residual), and each row's fp32 reciprocal root mean square."""
    N, D = prod(x.shape[:-1]), x.shape[-1]
    norm = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows, block, warps = _blocks(D, FORWARD_TILE)
    if x.data_ptr() % 16:  # scalar loads: with 16 values per lane, Triton 3.6 spills at the large size
        warps = min(16, 2 * warps)
    if N * D:
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(triton.cdiv(N, rows),)](
                x, residual, weight, norm, total, rstd, N, D, eps,
                ROWS=rows, BLOCK=block, HAS_RESIDUAL=residual is not None, num_warps=warps,
            )  # fmt: skip
    return norm, total, rstd


@_rms_norm.register_fake
def _(x, weight, eps, residual):
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("acceleron_triton::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (also that of the residual) and the weight. x is the sum, grad_total its gradient."""
    N, D = prod(x.shape[:-1]), x.shape[-1]
    rows, block, warps = _blocks(D, BACKWARD_TILE)
    programs = min(PROGRAMS_PER_PROCESSOR * device_of(x).processors, triton.cdiv(N, rows))
    grad_x = x.new_empty(x.shape)
    # The partial sums are added in fp32 in a fixed order, unlike atomics.
    partial = x.new_empty(programs, D, dtype=torch.float32)
    if N * D:
        tiles = triton.cdiv(triton.cdiv(N, rows), programs)
        with torch.cuda.device_of(x):
            _rms_norm_backward_kernel[(programs,)](
                grad.contiguous(), None if grad_total is None else grad_total.contiguous(), x, weight, rstd,
                grad_x, partial, N, D, tiles,
                ROWS=rows, BLOCK=block, HAS_GRAD_TOTAL=grad_total is not None, num_warps=warps,
            )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(grad, grad_total, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        norm, total, rstd = _rms_norm(x, weight, eps, residual)
        total = x if residual is None else total
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)  # the unused sum of the last norm has no gradient to read
        return norm, total

    @staticmethod
    @first_order("rms_norm")
    def backward(ctx, grad, grad_total):
        grad_x, grad_weight = grad_total, None
        if grad is not None:
            grad_x, grad_weight = _rms_norm_backward(grad, grad_total, *ctx.saved_tensors)
        return grad_x, grad_weight, None, grad_x if ctx.needs_input_grad[3] else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`ops.rms_norm` on contiguous tensors. Saves the (summed) input and 4 bytes per row for backward."""
    check_launch("rms_norm", x=x, weight=weight, residual=residual)
    D = x.shape[-1]
    if D * x.element_size() > MAX_ROW_BYTES:
        raise ValueError(
            f"rms_norm: x: expected rows of at most {MAX_ROW_BYTES // x.element_size()} values, but got {D}; "
            "use --kernels reference"
        )
    return _RMSNorm.apply(x, weight, eps, residual)
