"""Rotary position embedding of q and k in one launch. The same kernel rotates back in the backward pass.

If q, k and v are views of one qkv tensor, backward also copies v's gradient, so the qkv gradient needs no extra kernel.

Legend: B batch, S sequence, H query heads, G key/value heads, A = H + 2 G, C head_dim. Channels i and i + C/2 are a
pair.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import first_order
from .launch import check_launch

# Bytes of q per program: in bf16, 8 positions at the tiny size and 2 at the large size. Twice as many spills in fp32.
TILE_BYTES, WARPS = 8192, 4


@triton.jit
def _rotate(
    x_ptr, stride_b, stride_s, stride_h, out_ptr, cos_ptr, sin_ptr, b, s_start, S,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, OUT_HEADS: tl.constexpr,
    HALF: tl.constexpr, HALF_P2: tl.constexpr, POSITIONS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """TURN: 1 rotates, -1 rotates back, 0 copies. out_ptr points to the first of OUT_HEADS heads per position."""
    row = tl.arange(0, POSITIONS * HEADS_P2)[:, None]
    col = tl.arange(0, HALF_P2)[None, :]
    s = s_start + row // HEADS_P2
    head = row % HEADS_P2
    mask = (s < S) & (head < HEADS) & (col < HALF)
    if TURN != 0:
        # The heads of a position share their angles, so all but the first read them from L1.
        angle = s * (2 * HALF) + col
        cos = tl.load(cos_ptr + angle, mask, other=0.0).to(tl.float32)
        sin = TURN * tl.load(sin_ptr + angle, mask, other=0.0).to(tl.float32)
    x_ptr += b * stride_b + s.to(tl.int64) * stride_s + head * stride_h + col
    first = tl.load(x_ptr, mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF, mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    out_ptr += ((b * S + s) * OUT_HEADS + head) * (2 * HALF) + col
    if TURN == 0:
        tl.store(out_ptr, first.to(dtype), mask)
        tl.store(out_ptr + HALF, second.to(dtype), mask)
    else:
        tl.store(out_ptr, (first * cos - second * sin).to(dtype), mask)
        tl.store(out_ptr + HALF, (second * cos + first * sin).to(dtype), mask)


@triton.jit
def _rope_kernel(
    q_ptr, q_stride_b, q_stride_s, q_stride_h, q_out_ptr, k_ptr, k_stride_b, k_stride_s, k_stride_h, k_out_ptr,
    v_ptr, v_stride_b, v_stride_s, v_stride_h, v_out_ptr, cos_ptr, sin_ptr, S,
    H: tl.constexpr, H_P2: tl.constexpr, G: tl.constexpr, G_P2: tl.constexpr,
    HALF: tl.constexpr, HALF_P2: tl.constexpr, POSITIONS: tl.constexpr, TURN: tl.constexpr, HAS_V: tl.constexpr,
):  # fmt: skip
    """Each program rotates the query and key heads of POSITIONS positions of one sequence.

    HAS_V: also copy the value heads; the outputs are parts of one qkv tensor.
    """
    blocks = tl.cdiv(S, POSITIONS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s_start = tl.program_id(0) % blocks * POSITIONS
    _rotate(
        q_ptr, q_stride_b, q_stride_s, q_stride_h, q_out_ptr, cos_ptr, sin_ptr, b, s_start, S,
        H, H_P2, H + 2 * G if HAS_V else H, HALF, HALF_P2, POSITIONS, TURN,
    )  # fmt: skip
    _rotate(
        k_ptr, k_stride_b, k_stride_s, k_stride_h, k_out_ptr, cos_ptr, sin_ptr, b, s_start, S,
        G, G_P2, H + 2 * G if HAS_V else G, HALF, HALF_P2, POSITIONS, TURN,
    )  # fmt: skip
    if HAS_V:
        _rotate(
            v_ptr, v_stride_b, v_stride_s, v_stride_h, v_out_ptr, cos_ptr, sin_ptr, b, s_start, S,
            G, G_P2, H + 2 * G, HALF, HALF_P2, POSITIONS, 0,
        )  # fmt: skip


def _launch(inputs: list[Tensor], outputs: list[Tensor], cos: Tensor, sin: Tensor, turn: int):
    """Rotate q and k into contiguous outputs, or rotate q and k and copy v into the parts of one qkv tensor."""
    (B, S, H, C), G = inputs[0].shape, inputs[1].shape[2]
    H_P2, G_P2, HALF_P2 = (triton.next_power_of_2(size) for size in (H, G, C // 2))
    positions = max(1, TILE_BYTES // (2 * inputs[0].element_size() * H_P2 * HALF_P2))
    arguments = []
    for x, out in zip(inputs, outputs, strict=True):
        # Gradients can have any strides; those of `out.sum()` have stride 0.
        x = x if x.stride(-1) == 1 else x.contiguous()
        arguments += [x, *x.stride()[:3], out]
    has_v = len(inputs) == 3
    if not has_v:
        arguments += [None, 0, 0, 0, None]
    if B * S:
        with torch.cuda.device_of(cos):
            _rope_kernel[(B * triton.cdiv(S, positions),)](
                *arguments, cos, sin, S,
                H=H, H_P2=H_P2, G=G, G_P2=G_P2, HALF=C // 2, HALF_P2=HALF_P2, POSITIONS=positions, TURN=turn,
                HAS_V=has_v, num_warps=WARPS,
            )  # fmt: skip


@torch.library.custom_op("acceleron_triton::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """`inverse` negates the angles, for the backward pass."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch([q, k], [q_out, k_out], cos, sin, -1 if inverse else 1)
    return q_out, k_out


@_rope.register_fake
def _(q, k, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("acceleron_triton::split_rope_backward", mutates_args=())
def _split_rope_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the qkv gradient as one tensor. torch would copy separate gradients of q, k and v again."""
    (B, S, H, C), G = grad_q.shape, grad_k.shape[2]
    grad_qkv = grad_q.new_empty(B, S, H + 2 * G, C)
    _launch([grad_q, grad_k, grad_v], grad_qkv.split([H, G, G], dim=2), cos, sin, -1)
    return grad_qkv


@_split_rope_backward.register_fake
def _(grad_q, grad_k, grad_v, cos, sin):
    (B, S, H, C), G = grad_q.shape, grad_k.shape[2]
    return grad_q.new_empty(B, S, H + 2 * G, C)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rope(q, k, cos, sin, False)

    @staticmethod
    @first_order("rope")
    def backward(ctx, grad_q, grad_k):
        return *_rope(grad_q, grad_k, *ctx.saved_tensors, True), None, None


class _SplitRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, num_heads, num_kv_heads):
        ctx.save_for_backward(cos, sin)
        q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
        return *_rope(q, k, cos, sin, False), v

    @staticmethod
    @first_order("split_rope")
    def backward(ctx, *grads):
        return _split_rope_backward(*grads, *ctx.saved_tensors), None, None, None, None


def rope(q_BSHC: Tensor, k_BSGC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.rope`. q and k can be views of one qkv tensor, because only their last axis must be contiguous.

    Only the first half of cos_SC and sin_SC is read. The results are new contiguous tensors.
    """
    check_launch("rope", contiguous=False, q_BSHC=q_BSHC, k_BSGC=k_BSGC)
    check_launch("rope", cos_SC=cos_SC, sin_SC=sin_SC)
    return _Rope.apply(q_BSHC, k_BSGC, cos_SC, sin_SC)


def split_rope(
    qkv_BSAC: Tensor, cos_SC: Tensor, sin_SC: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.split_rope`. Only the last axis of qkv_BSAC must be contiguous."""
    check_launch("split_rope", contiguous=False, qkv_BSAC=qkv_BSAC)
    check_launch("split_rope", cos_SC=cos_SC, sin_SC=sin_SC)
    return _SplitRope.apply(qkv_BSAC, cos_SC, sin_SC, num_heads, num_kv_heads)
