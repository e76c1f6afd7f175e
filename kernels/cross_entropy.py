"""Output head and cross-entropy, computed in chunks of tokens. The forward pass also computes the gradients.

Legend: T tokens, D model width, V vocabulary. torch computes the GEMMs; the kernel replaces the logits of a chunk with
their gradient. The idea is from Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .autograd import first_order, scale_gradient, split_mean
from .launch import INTERPRETED, check_launch, device_of

# Logits per chunk: 1 GiB in bf16. Each chunk reads and writes the weight's fp32 gradient, V * D * 4 bytes: at 2**29
# logits, that costs about 5% of the chunk's GEMM time for tiny, and twice that at 2**28.
LOGITS_PER_CHUNK = 1 << 29
# A row is read twice, and the second read should hit L2. With 16 logits per thread, the kernel uses 42 registers, so an
# H100 SM runs two rows at a time, which is 26 MB on all SMs. With 8 logits, it uses 32 registers and runs four rows,
# which is 53 MB and does not fit in L2.
BLOCK, WARPS = 8192, 16
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _exp2(x):
    """Return 2**x. A GPU may flush subnormal results to 0; tl.exp2 keeps them but takes three more instructions."""
    return tl.exp2(x) if _INTERPRETED else libdevice.exp2(x)


# The labels and losses of a chunk can have any alignment. Without this, Triton would compile up to four variants.
@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "losses_ptr"])
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, mantissa_ptr, V, ignore_index,
    BLOCK: tl.constexpr, THREADS: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Each program writes the loss of one row and overwrites its logits with (softmax - onehot) / mantissa.

    The softmax is online (Milakov & Gimelshein 2018). Each thread keeps its own maximum and sum and rescales the sum
    once per block. The threads are reduced at the end of the row. Maxima are multiplied by log2(e), so each logit takes
    one FMA and one exp2.
    """
    row = tl.program_id(0).to(tl.int64)  # 64 bits: a chunk can have more than 2**31 values
    logits_ptr += row * V
    col = tl.arange(0, BLOCK)
    dtype = logits_ptr.dtype.element_ty
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if WITH_GRADIENT:
            for start in range(0, V, BLOCK):
                tl.store(logits_ptr + start + col, tl.zeros((BLOCK,), dtype), col < V - start)
    else:
        target = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
        target_logit = tl.load(logits_ptr + target, target >= 0, other=0.0).to(tl.float32)
        scale = 1.0 / tl.load(mantissa_ptr)  # loaded early to hide its latency
        # The lowest float: -inf minus a masked logit would be NaN.
        largest = tl.full((THREADS,), -3.4028234e38, tl.float32)
        total = tl.zeros((THREADS,), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(logits_ptr + start + col, col < V - start, other=float("-inf")).to(tl.float32)
            # With can_reorder, a column belongs to one thread, so its maximum and sum stay in that thread.
            x = tl.reshape(x, (BLOCK // THREADS, THREADS), can_reorder=True)
            larger = tl.maximum(largest, tl.max(x, axis=0) * LOG2_E)
            total = total * _exp2(largest - larger) + tl.sum(_exp2(tl.fma(x, LOG2_E, -larger)), axis=0)
            largest = larger
        row_largest = tl.max(largest, axis=0)
        row_total = tl.sum(total * _exp2(largest - row_largest), axis=0)
        tl.store(losses_ptr + row, tl.log(row_total) - LN_2 * tl.fma(target_logit, LOG2_E, -row_largest))
        if WITH_GRADIENT:
            # Start with the last block, because it is most likely still in a cache.
            last = (V - 1) // BLOCK * BLOCK
            for offset in range(0, V, BLOCK):
                start = last - offset
                x = tl.load(logits_ptr + start + col, col < V - start).to(tl.float32)
                gradient = _exp2(tl.fma(x, LOG2_E, -row_largest)) * (scale / row_total)
                position = target - start
                if (position >= 0) & (position < BLOCK):  # the other blocks skip the comparisons
                    gradient = tl.where(col == position, gradient - scale, gradient)
                tl.store(logits_ptr + start + col, gradient.to(dtype), col < V - start)


@torch.library.custom_op("acceleron_triton::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    ignore_index: int,
    num_tokens: Tensor | None,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean loss, the unscaled gradients of x and the weight (empty unless needed), and their scale."""
    T, V = x_TD.shape[0], weight_VD.shape[0]
    weight = weight_VD.to(x_TD.dtype)
    keep_T1 = (labels_T != ignore_index)[:, None]
    count = keep_T1.sum(dtype=torch.float32) if num_tokens is None else num_tokens.float()
    mantissa, power = split_mean(count)
    losses_T = x_TD.new_empty(T, dtype=torch.float32)
    grad_x = x_TD.new_empty(x_TD.shape if need_x else 0)
    # Sum in fp32, because a bf16 sum over 100k tokens loses small gradients.
    grad_weight = weight_VD.new_zeros(weight_VD.shape if need_weight else 0, dtype=torch.float32)
    # The chunks have about the same size, because a short last chunk would waste tiles of its GEMM. There are at least
    # two, so the full logits are never materialized.
    chunks = max(2, triton.cdiv(T, max(1, LOGITS_PER_CHUNK // V)))
    step = triton.cdiv(T, chunks)
    buffer = x_TD.new_empty(step, V)
    block = min(BLOCK, triton.next_power_of_2(V))
    # AMD data-center GPUs have warps of 64 threads.
    threads = WARPS * (64 if device_of(x_TD).arch.startswith("gfx") else 32)
    for start in range(0, T, max(1, step)):
        chunk = slice(start, start + step)
        # Zero the ignored rows: 0 * inf would be NaN in the gradient of the weight.
        x = torch.where(keep_T1[chunk], x_TD[chunk], 0)
        logits = torch.mm(x, weight.t(), out=buffer[: len(x)])
        with torch.cuda.device_of(x):
            _cross_entropy_kernel[(len(x),)](
                logits, labels_T[chunk], losses_T[chunk], mantissa, V, ignore_index,
                BLOCK=block, THREADS=min(block, threads), WITH_GRADIENT=need_x or need_weight, num_warps=WARPS,
            )  # fmt: skip
        if need_x:
            torch.mm(logits, weight, out=grad_x[chunk])
        if need_weight:
            grad_weight += torch.mm(logits.t(), x)
    return losses_T.sum() / count, grad_x, grad_weight.to(weight_VD.dtype), power


@_linear_cross_entropy.register_fake
def _(x_TD, weight_VD, labels_T, ignore_index, num_tokens, need_x, need_weight):
    loss = x_TD.new_empty((), dtype=torch.float32)
    grad_x = x_TD.new_empty(x_TD.shape if need_x else 0)
    return loss, grad_x, weight_VD.new_empty(weight_VD.shape if need_weight else 0), torch.empty_like(loss)


class _LinearCrossEntropy(torch.autograd.Function):
    """Backward only scales the gradients computed in the forward pass, because the loss is a scalar."""

    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T, ignore_index, num_tokens, need_x, need_weight):
        loss, grad_x, grad_weight, power = _linear_cross_entropy(
            x_TD, weight_VD, labels_T, ignore_index, num_tokens, need_x, need_weight
        )
        ctx.save_for_backward(grad_x if need_x else None, grad_weight if need_weight else None, power)
        return loss

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(ctx, grad_loss):
        *grads, power = ctx.saved_tensors
        grads = (None if grad is None else scale_gradient(grad, grad_loss * power) for grad in grads)
        return *grads, None, None, None, None, None


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int = -100, num_tokens: Tensor | None = None
) -> Tensor:
    """`ops.linear_cross_entropy` on contiguous tensors.

    Logits are computed LOGITS_PER_CHUNK at a time, and their gradients only if x or the weight needs a gradient.
    """
    check_launch("linear_cross_entropy", x_TD=x_TD, weight_VD=weight_VD, labels_T=labels_T)
    need_x, need_weight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x_TD, weight_VD))
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, ignore_index, num_tokens, need_x, need_weight)
