"""The head's cross-entropy, without the logits of all tokens: chunk by chunk, gradients formed in the forward pass.

Legend: T tokens, D model width, V vocabulary. The GEMMs are torch's; the kernel turns a chunk's logits into their own
gradient, in place. The idea is Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import check

# Logits of a chunk, 1 GiB of bf16. Each chunk reads and writes the weight's fp32 gradient, V * D * 4 bytes: at 2**29
# logits that costs about 5 % of the chunk's GEMM for tiny, and twice that at 2**28.
LOGITS_PER_CHUNK = 1 << 29
# A row is read twice, and its second reading should find it in the L2: 16 warps a row, so that the rows at work at one
# time, some three a processor, are 40 MB.
BLOCK, WARPS = 4096, 16


# A chunk's labels and losses begin anywhere; by their alignment it would be compiled up to four times, for nothing.
@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "losses_ptr"])
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, count_ptr, V, ignore_index, BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr
):
    """One program a row: its loss, and (softmax - onehot) / count written over its logits.

    The softmax is online (Milakov & Gimelshein 2018), each lane for itself: one exponential a logit, and no reduction
    before the end of the row.
    """
    row = tl.program_id(0).to(tl.int64)  # 64 bits: a chunk's values may pass 2**31
    logits_ptr += row * V
    col = tl.arange(0, BLOCK)
    blocks = tl.cdiv(V, BLOCK)
    dtype = logits_ptr.dtype.element_ty
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if WITH_GRADIENT:
            for block in range(blocks):
                tl.store(logits_ptr + block * BLOCK + col, tl.zeros((BLOCK,), dtype), block * BLOCK + col < V)
    else:
        target = tl.load(logits_ptr + label, (label >= 0) & (label < V), other=0.0).to(tl.float32)
        # The lowest float and not -inf, whose difference to a masked lane would be NaN.
        largest = tl.full((BLOCK,), -3.4028234e38, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for block in range(blocks):
            cols = block * BLOCK + col
            x = tl.load(logits_ptr + cols, cols < V, other=float("-inf")).to(tl.float32)
            above = x - largest
            exp = tl.exp(-tl.abs(above))
            total = tl.where(above > 0, total * exp + 1, total + exp)
            largest = tl.where(above > 0, x, largest)
        row_largest = tl.max(largest, axis=0)
        row_total = tl.sum(total * tl.exp(largest - row_largest), axis=0)
        log_sum = row_largest + tl.log(row_total)
        tl.store(losses_ptr + row, log_sum - target)
        if WITH_GRADIENT:
            scale = 1.0 / tl.load(count_ptr).to(tl.float32)
            # Last block first: what was read last is likeliest to be in a cache still.
            for block in range(blocks):
                cols = (blocks - 1 - block) * BLOCK + col
                x = tl.load(logits_ptr + cols, cols < V, other=0.0).to(tl.float32)
                gradient = (tl.exp(x - row_largest) / row_total - (cols == label).to(tl.float32)) * scale
                tl.store(logits_ptr + cols, gradient.to(dtype), cols < V)


@torch.library.custom_op("acceleron_triton::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss and the gradients of x and the weight, each empty unless it is needed."""
    T, V = x_TD.shape[0], weight_VD.shape[0]
    weight = weight_VD.to(x_TD.dtype)
    count = (labels_T != ignore_index).sum()
    losses_T = x_TD.new_empty(T, dtype=torch.float32)
    grad_x = x_TD.new_empty(x_TD.shape if need_x else 0)
    # fp32 over the chunks, whatever the compute dtype: a bf16 sum over 100k tokens loses the small ones.
    grad_weight = weight_VD.new_zeros(weight_VD.shape if need_weight else 0, dtype=torch.float32)
    # As many chunks as the limit asks for, all of about the same size: a short last one would waste its GEMM's tiles.
    # Two at the least, so that all logits never exist.
    chunks = max(2, triton.cdiv(T, max(1, LOGITS_PER_CHUNK // V)))
    step = triton.cdiv(T, chunks)
    buffer = x_TD.new_empty(step, V)
    for start in range(0, T, max(1, step)):
        chunk = slice(start, start + step)
        x = x_TD[chunk]
        logits = torch.mm(x, weight.t(), out=buffer[: len(x)])
        with torch.cuda.device_of(x):
            _cross_entropy_kernel[(len(x),)](
                logits, labels_T[chunk], losses_T[chunk], count, V, ignore_index,
                BLOCK=min(BLOCK, triton.next_power_of_2(V)), WITH_GRADIENT=need_x or need_weight, num_warps=WARPS,
            )  # fmt: skip
        if need_x:
            torch.mm(logits, weight, out=grad_x[chunk])
        if need_weight:
            grad_weight += torch.mm(logits.t(), x)
    return losses_T.sum() / count, grad_x, grad_weight.to(weight_VD.dtype)


@_linear_cross_entropy.register_fake
def _(x_TD, weight_VD, labels_T, ignore_index, need_x, need_weight):
    loss = x_TD.new_empty((), dtype=torch.float32)
    grad_x = x_TD.new_empty(x_TD.shape if need_x else 0)
    return loss, grad_x, weight_VD.new_empty(weight_VD.shape if need_weight else 0)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss is a scalar, which only scales the gradients: backward multiplies those that forward formed."""

    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T, ignore_index, need_x, need_weight):
        loss, grad_x, grad_weight = _linear_cross_entropy(x_TD, weight_VD, labels_T, ignore_index, need_x, need_weight)
        ctx.save_for_backward(grad_x if need_x else None, grad_weight if need_weight else None)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grads = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy of the logits x @ weight.T against the labels, without ever holding the logits of all tokens.

    x_TD: bf16, fp16 or fp32, the compute dtype. weight_VD: fp32 or x's dtype; it is cast to x's for the GEMMs, and its
    gradient is accumulated in fp32 and returned in the weight's own dtype. labels_T: int64, `ignore_index` where a
    token does not count; the mean is over the tokens that do (NaN when there are none, as in torch). All contiguous.
    Returns an fp32 scalar. The logits exist for LOGITS_PER_CHUNK values at a time; without gradients (`torch.no_grad`,
    or inputs that need none) theirs are not formed.

    Labels are not checked, which would be a host sync: one outside 0..V-1 matches no logit, and the loss is then
    meaningless. Raises ValueError for other shapes, dtypes and strides, and for a device that Triton can't run on.
    """
    check("linear_cross_entropy: x_TD", x_TD, (None, None))
    T, D = x_TD.shape
    check("linear_cross_entropy: weight_VD", weight_VD, (None, D), tuple({x_TD.dtype, torch.float32}), like=x_TD)
    check("linear_cross_entropy: labels_T", labels_T, (T,), torch.int64, like=x_TD)
    need_x, need_weight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x_TD, weight_VD))
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, ignore_index, need_x, need_weight)
