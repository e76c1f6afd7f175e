"""Rotary position embedding of q and k in one launch; its backward is the inverse rotation, by the same kernel.

Legend: B batch, S sequence, H query heads, G key heads, C head_dim. Channels i and i + C/2 are one pair.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FLOATS, check

# Pairs of q in a program's tile, 8 KB of bf16: 8 positions at the tiny size, 2 at the large one.
PAIRS, WARPS = 2048, 4


@triton.jit
def _rotate(
    x_ptr, stride_b, stride_s, stride_h, out_ptr, cos_ptr, sin_ptr, b, s_start, S,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, HALF: tl.constexpr, HALF_P2: tl.constexpr,
    POSITIONS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, POSITIONS * HEADS_P2)[:, None]
    col = tl.arange(0, HALF_P2)[None, :]
    s = s_start + row // HEADS_P2
    head = row % HEADS_P2
    mask = (s < S) & (head < HEADS) & (col < HALF)
    # The heads of a position read the same angles: all but the first from L1.
    angle = s * (2 * HALF) + col
    cos = tl.load(cos_ptr + angle, mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    x_ptr += b * stride_b + s.to(tl.int64) * stride_s + head * stride_h + col
    first = tl.load(x_ptr, mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF, mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    out_ptr += ((b * S + s) * HEADS + head) * (2 * HALF) + col
    tl.store(out_ptr, (first * cos - second * sin).to(dtype), mask)
    tl.store(out_ptr + HALF, (second * cos + first * sin).to(dtype), mask)


@triton.jit
def _rope_kernel(
    q_ptr, q_stride_b, q_stride_s, q_stride_h, q_out_ptr, k_ptr, k_stride_b, k_stride_s, k_stride_h, k_out_ptr,
    cos_ptr, sin_ptr, S,
    H: tl.constexpr, H_P2: tl.constexpr, G: tl.constexpr, G_P2: tl.constexpr,
    HALF: tl.constexpr, HALF_P2: tl.constexpr, POSITIONS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """A program turns all query and key heads of POSITIONS positions of one sequence."""
    blocks = tl.cdiv(S, POSITIONS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s_start = tl.program_id(0) % blocks * POSITIONS
    _rotate(
        q_ptr, q_stride_b, q_stride_s, q_stride_h, q_out_ptr, cos_ptr, sin_ptr, b, s_start, S,
        H, H_P2, HALF, HALF_P2, POSITIONS, INVERSE,
    )  # fmt: skip
    _rotate(
        k_ptr, k_stride_b, k_stride_s, k_stride_h, k_out_ptr, cos_ptr, sin_ptr, b, s_start, S,
        G, G_P2, HALF, HALF_P2, POSITIONS, INVERSE,
    )  # fmt: skip


@torch.library.custom_op("acceleron_triton::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """With `inverse` the rotation by the negated angles, which is the backward pass."""
    # Gradients come with any strides; `out.sum().backward()` gives them a last axis of stride 0.
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    (B, S, H, C), G = q.shape, k.shape[2]
    H_P2, G_P2, HALF_P2 = (triton.next_power_of_2(size) for size in (H, G, C // 2))
    positions = max(1, PAIRS // (H_P2 * HALF_P2))
    if B * S:
        with torch.cuda.device_of(q):
            _rope_kernel[(B * triton.cdiv(S, positions),)](
                q, *q.stride()[:3], q_out, k, *k.stride()[:3], k_out, cos, sin, S,
                H=H, H_P2=H_P2, G=G, G_P2=G_P2, HALF=C // 2, HALF_P2=HALF_P2, POSITIONS=positions, INVERSE=inverse,
                num_warps=WARPS,
            )  # fmt: skip
    return q_out, k_out


@_rope.register_fake
def _(q, k, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rope(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        return *_rope(grad_q, grad_k, *ctx.saved_tensors, True), None, None


def rope(q_BSHC: Tensor, k_BSGC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated q and k: x * cos + rotate_half(x) * sin (RoFormer, Su et al. 2021; halves as in GPT-NeoX and Llama).

    q_BSHC, k_BSGC: one dtype of bf16, fp16 and fp32, an even head_dim C, last axis contiguous, other strides as they
    come: views of one qkv tensor are read in place. cos_SC, sin_SC: one dtype, fp32 for its precision, contiguous, the
    angles of the S positions; both halves must be alike, as only the first is read, and they get no gradient. Computed
    in fp32. Returns new contiguous tensors. Raises ValueError for anything else, and for a device that Triton can't
    run on.
    """
    check("rope: q_BSHC", q_BSHC, (None, None, None, None), contiguous=False)
    B, S, _, C = q_BSHC.shape
    if C % 2:
        raise ValueError(f"rope: q_BSHC: expected an even head_dim, but got {tuple(q_BSHC.shape)}")
    check("rope: k_BSGC", k_BSGC, (B, S, None, C), q_BSHC.dtype, like=q_BSHC, contiguous=False)
    if not q_BSHC.shape[2] or not k_BSGC.shape[2]:
        raise ValueError(f"rope: expected heads, but got {tuple(q_BSHC.shape)} and {tuple(k_BSGC.shape)}")
    check("rope: cos_SC", cos_SC, (S, C), FLOATS, like=q_BSHC)
    check("rope: sin_SC", sin_SC, (S, C), cos_SC.dtype, like=q_BSHC)
    return _Rope.apply(q_BSHC, k_BSGC, cos_SC, sin_SC)
