"""Elementwise part of SwiGLU: silu(gate) * up. Only the pre-activation is saved for backward.

Legend: N rows (all leading axes), F expert width. A row of 2F values holds the gate first, then up.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import first_order
from .launch import check_launch

# 256 columns are 16-byte bf16 loads for one warp. They leave 0% to 8% of the lanes idle at the named sizes. A block of
# a full row, rounded up to a power of two, would leave up to half idle. 8 rows keep 8 KB per program in flight.
ROWS, COLS, WARPS = 8, 256, 4


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)) in fp32 as a squared reciprocal square root, which takes two instructions. The division
    in tl.sigmoid takes eight. The relative error is below 1e-6 for |x| <= 10. Infinities are exact; NaN gives NaN.
    """
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _tile(N, F, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the offsets of this program's tile in (N, 2F) and in (N, F), and their mask."""
    column_blocks = tl.cdiv(F, COLS)
    program = tl.program_id(0)
    # 64 bits, because N * 2F exceeds 2**31 at 2**20 expert-sorted rows of the large size.
    row = (program // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = program % column_blocks * COLS + tl.arange(0, COLS)[None, :]
    return row * (2 * F) + col, row * F + col, (row < N) & (col < F)


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, N, F, ROWS: tl.constexpr, COLS: tl.constexpr):
    wide, narrow, mask = _tile(N, F, ROWS, COLS)
    gate = tl.load(gate_up_ptr + wide, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + wide + F, mask, other=0.0).to(tl.float32)
    # This rounds once; torch rounds both silu(gate) and the product.
    out = gate * sigmoid(gate) * up
    tl.store(out_ptr + narrow, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _swiglu_backward_kernel(grad_ptr, gate_up_ptr, grad_gate_up_ptr, N, F, ROWS: tl.constexpr, COLS: tl.constexpr):
    wide, narrow, mask = _tile(N, F, ROWS, COLS)
    grad = tl.load(grad_ptr + narrow, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + wide, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + wide + F, mask, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    grad_gate = grad * up * s * (1 + gate * (1 - s))
    grad_up = grad * gate * s
    dtype = grad_gate_up_ptr.dtype.element_ty
    tl.store(grad_gate_up_ptr + wide, grad_gate.to(dtype), mask)
    tl.store(grad_gate_up_ptr + wide + F, grad_up.to(dtype), mask)


def _launch(kernel, gate_up: Tensor, *tensors: Tensor):
    N, F = prod(gate_up.shape[:-1]), gate_up.shape[-1] // 2
    if N * F:
        grid = (triton.cdiv(N, ROWS) * triton.cdiv(F, COLS),)
        with torch.cuda.device_of(gate_up):
            kernel[grid](*tensors, N, F, ROWS=ROWS, COLS=COLS, num_warps=WARPS)


@torch.library.custom_op("acceleron_triton::swiglu", mutates_args=())
def swiglu_forward(gate_up: Tensor) -> Tensor:
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _launch(_swiglu_kernel, gate_up, gate_up, out)
    return out


@swiglu_forward.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("acceleron_triton::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    grad_gate_up = gate_up.new_empty(gate_up.shape)
    _launch(_swiglu_backward_kernel, gate_up, grad.contiguous(), gate_up, grad_gate_up)
    return grad_gate_up


@swiglu_backward.register_fake
def _(grad, gate_up):
    return gate_up.new_empty(gate_up.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    @first_order("swiglu")
    def backward(ctx, grad):
        return swiglu_backward(grad, *ctx.saved_tensors)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """`ops.swiglu` on a contiguous tensor. Only gate_up_N2F is saved for backward."""
    check_launch("swiglu", gate_up_N2F=gate_up_N2F)
    return _SwiGLU.apply(gate_up_N2F)
