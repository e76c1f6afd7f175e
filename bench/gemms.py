"""The six grouped GEMMs of a training step, each a launch on its own, beside plain PyTorch on the same tensors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from acceleron import ModelConfig
from acceleron.kernels import reference
from acceleron.kernels.expert_mlp import expert_up, hidden_grad
from acceleron.kernels.grouped_gemm import GATHERS, grouped_rows, grouped_weight_grad


class Gemm(NamedTuple):
    """name: up, rows, hidden_grad or weight_grad, which with `sizes` is a configuration's key (kernels/configs.py).

    ours and plain take `tensors` and return a tuple of results, which agree but for rounding.
    """

    name: str
    sizes: tuple[int, ...]
    ours: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]


def gemm_cases(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Gemm]:
    """The GEMMs at a model's widths, on unit-scale data in this dtype and a random router's choices."""
    T, D, E, F = tokens, config.d_model, config.num_experts, config.d_ff
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    routing = reference.route_top2(torch.randn(T, E, generator=generator, device=device))
    order, _, offsets = plan = reference.dispatch_plan(routing.experts_TK, E)
    token_N, scores_TK = order // 2, routing.weights_TK
    scores_N1 = scores_TK.flatten()[order][:, None]
    x_TD, dy_TD, h_N2F, act_NF = randn(T, D), randn(T, D), randn(2 * T, 2 * F), randn(2 * T, F)
    w13, w2 = randn(E, 2 * F, D, scale=D**-0.5), randn(E, D, F, scale=F**-0.5)

    def plain_up(x, w):
        h = reference.grouped_gemm(x[token_N], w, plan)
        return h, reference.swiglu(h)

    def our_rows(out_first: bool):
        return lambda x, w: (grouped_rows(x, w, offsets, out_first),)

    def plain_hidden_grad(dy, w, h):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            act = reference.swiglu(h)
        r = reference.grouped_gemm(dy[token_N], w.transpose(1, 2).contiguous(), plan)
        (dh,) = torch.autograd.grad(act, h, (r * scores_N1).to(h.dtype))
        act = act.detach()
        dscores = scores_TK.new_empty(2 * T).index_copy_(0, order.long(), (r * act).float().sum(dim=-1))
        return dh, (act * scores_N1).to(h.dtype), dscores.view(T, 2)

    def our_weight_grad(gather: str):  # in fp32, as parameters are
        return lambda a, b: (grouped_weight_grad(a, b, offsets, order, gather, torch.float32),)

    def plain_weight_grad(a, b):
        return (reference._grouped_weight_grad(a, b, offsets),)

    return [
        Gemm("up", (E, D, F), lambda x, w: expert_up(x, w, order, offsets, True), plain_up, (x_TD, w13)),
        Gemm(
            "rows", (E, F, D, 1), our_rows(True), lambda x, w: (reference.grouped_gemm(x, w, plan),), (act_NF, w2)
        ),
        Gemm(
            "hidden_grad", (E, D, F), lambda dy, w, h: hidden_grad(dy, w, h, scores_TK, order, offsets),
            plain_hidden_grad, (dy_TD, w2, h_N2F),
        ),
        Gemm(
            "rows", (E, 2 * F, D, 0), our_rows(False),
            lambda x, w: (reference.grouped_gemm(x, w.transpose(1, 2).contiguous(), plan),), (h_N2F, w13),
        ),
        Gemm(
            "weight_grad", (E, 2 * F, D, GATHERS.index("b")), our_weight_grad("b"),
            lambda a, b: plain_weight_grad(a, b[token_N]), (h_N2F, x_TD),
        ),
        Gemm(
            "weight_grad", (E, D, F, GATHERS.index("a")), our_weight_grad("a"),
            lambda a, b: plain_weight_grad(a[token_N], b), (dy_TD, act_NF),
        ),
    ]  # fmt: skip
