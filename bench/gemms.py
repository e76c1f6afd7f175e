"""The six grouped GEMMs of a training step, each paired with plain PyTorch on the same tensors."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from acceleron import ModelConfig
from acceleron.kernels import torch_ops
from acceleron.kernels.expert_mlp import expert_up, hidden_grad
from acceleron.kernels.grouped_gemm import grouped_rows, grouped_weight_grad
from acceleron.kernels.torch_ops import grouped_gemm


class Gemm(NamedTuple):
    """The Triton and plain PyTorch functions of `tensors`. Each returns a tensor or a tuple of tensors."""

    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    plain: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]


def gemm_cases(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Gemm]:
    """Build the GEMMs at a model's widths, with random unit-scale data in `dtype` and random routing."""
    T, D, E, K, F = tokens, config.d_model, config.num_experts, config.top_k, config.d_ff
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    routing = torch_ops.route_topk(torch.randn(T, E, generator=generator, device=device), K)
    gather_idx, scatter_idx_TK, offsets = plan = torch_ops.dispatch_plan(routing.topk_ids_TK, E)
    tokens_N, scores_TK = gather_idx // K, routing.topk_scores_TK
    scores_N1 = scores_TK.flatten()[gather_idx][:, None]
    x_TD, dy_ND, h_N2F, act_NF = randn(T, D), randn(K * T, D), randn(K * T, 2 * F), randn(K * T, F)
    w13, w2 = randn(E, 2 * F, D, scale=D**-0.5), randn(E, D, F, scale=F**-0.5)

    def plain_up(x, w):
        h = grouped_gemm(x[tokens_N], w, plan)
        return h, torch_ops.swiglu(h)

    def plain_transposed(x, w):
        return grouped_gemm(x, w.transpose(1, 2).contiguous(), plan)

    def plain_hidden_grad(dy, w, h):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            act = torch_ops.swiglu(h)
        r = plain_transposed(dy, w)
        (dh,) = torch.autograd.grad(act, h, (r * scores_N1).to(h.dtype))
        act = act.detach()
        dscores = scores_TK.new_empty(K * T).index_copy_(0, gather_idx.long(), (r * act).float().sum(dim=-1))
        return dh, (act * scores_N1).to(h.dtype), dscores.view(T, K)

    def weight_grad(a, b, idx: Tensor | None = None) -> Tensor:  # fp32, like the parameters
        return grouped_weight_grad(a, b, offsets, idx, torch.float32)

    def plain_weight_grad(a, b) -> Tensor:
        return torch_ops._grouped_weight_grad(a, b, offsets)

    return [
        Gemm(lambda x, w: expert_up(x, w, gather_idx, offsets, True), plain_up, (x_TD, w13)),
        Gemm(lambda x, w: grouped_rows(x, w, offsets, True), lambda x, w: grouped_gemm(x, w, plan), (act_NF, w2)),
        Gemm(lambda *x: hidden_grad(*x, scores_TK, gather_idx, offsets), plain_hidden_grad, (dy_ND, w2, h_N2F)),
        Gemm(lambda x, w: grouped_rows(x, w, offsets, False), plain_transposed, (h_N2F, w13)),
        Gemm(partial(weight_grad, idx=scatter_idx_TK), lambda a, b: plain_weight_grad(a, b[tokens_N]), (h_N2F, x_TD)),
        Gemm(weight_grad, plain_weight_grad, (dy_ND, act_NF)),
    ]
