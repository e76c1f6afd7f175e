"""The Mixture-of-Experts layer: a router, K of E routed experts per token, and an optional shared expert."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .config import ModelConfig
from .kernels.contract import ExpertBuffers, wide
from .kernels.torch_ops import expert_mlp_token


def compute_balance_loss(mean_probabilities_E: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """Return E · Σ_e f_e P_e (Switch Transformer, Fedus et al. 2021), which is 1 for uniform routing.

    P_e is the mean probability of expert e, and f_e its share of all assignments. Both arguments are (E,) or (L, E);
    for L layers, the result is (L,). The gradient flows through P_e only.
    """
    counts_E = tokens_per_expert_E.to(mean_probabilities_E.dtype)
    fraction_E = counts_E / tokens_per_expert_E.sum(dim=-1, keepdim=True)
    return counts_E.shape[-1] * (fraction_E * mean_probabilities_E).sum(dim=-1)


class MoEStats(NamedTuple):
    """The router statistics of one layer and batch. The losses are unweighted.

    mean_probabilities_E is the mean over the tokens of the softmax over all experts, and tokens_per_expert_E the number
    of assignments to each expert.
    """

    z_loss: Tensor
    mean_probabilities_E: Tensor
    tokens_per_expert_E: Tensor

    @property
    def balance_loss(self) -> Tensor:
        return compute_balance_loss(self.mean_probabilities_E, self.tokens_per_expert_E)


class SwiGLU(nn.Module):
    """w2 (silu(w1 x) * (w3 x)): the shared expert, or the feed-forward layer of the dense baseline."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(2 * d_ff, d_model))  # gate rows (w1), then up rows (w3)
        self.w2 = nn.Parameter(torch.empty(d_model, d_ff))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(ops.swiglu(F.linear(x, self.w13.to(x.dtype))), self.w2.to(x.dtype))


class MoE(nn.Module):
    """`MoE(config)(x) -> (y, stats)` for x of shape (..., d_model); y has the shape and dtype of x.

    The layer is dropless: every token gets its K experts, weighted by the softmax of their logits, and the shared
    expert, unless `config.d_ff_shared` is 0. To train it in your own model, add `config.z_loss_coef * stats.z_loss +
    config.balance_loss_coef * stats.balance_loss` to the loss. ops.py has the legend of the shapes.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, width = config.num_experts, config.d_model, config.d_ff
        self.router = nn.Parameter(torch.empty(E, D))
        self.w13_E2FD = nn.Parameter(torch.empty(E, 2 * width, D))  # gate rows (w1), then up rows (w3)
        self.w2_EDF = nn.Parameter(torch.empty(E, D, width))
        self.shared = SwiGLU(D, config.d_ff_shared) if config.d_ff_shared else None
        self.top_k = config.top_k
        self.force_load_balance = config.debug_force_load_balance
        self.expert_buffers: ExpertBuffers | None = None
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, MoEStats]:
        """Return y, plus the residual if given, and the router statistics. kernels/formulas.py shows the steps.

        Under torch.autocast, y has the autocast dtype, and the router computes in fp32 from the uncast x. Raises
        ValueError if x has the wrong width or the residual the wrong shape.
        """
        if x.shape[-1:] != self.router.shape[1:]:
            raise ValueError(f"MoE: expected x of width {self.router.shape[1]}, but got shape {tuple(x.shape)}")
        if residual is not None and residual.shape != x.shape:
            raise ValueError(f"MoE: expected a residual of shape {tuple(x.shape)}, but got {tuple(residual.shape)}")
        x_TD, residual_TD = (v if v is None else v.reshape(-1, v.shape[-1]).contiguous() for v in (x, residual))
        shared = (self.shared.w13, self.shared.w2) if self.shared else (None, None)
        y_TD, *stats = ops.moe(
            x_TD, self.router, self.w13_E2FD, self.w2_EDF, *shared, residual_TD,
            top_k=self.top_k, force_load_balance=self.force_load_balance and self.training, buffers=self.expert_buffers,
        )  # fmt: skip
        return y_TD.view_as(x), MoEStats(*stats)

    def can_add_gradients(self) -> bool:
        """Whether the kernels can add to .grad of the routed experts' weights: both are trained, and in fp32."""
        return all(w.requires_grad and w.dtype == torch.float32 for w in (self.w13_E2FD, self.w2_EDF))

    def allocate_buffers(self, dtype: torch.dtype):
        """Cast the routed experts' weights to `dtype` once for several micro-batches, and set their .grad.

        While `expert_buffers` is set, backward passes on Triton kernels add to .grad directly.
        """
        weights = self.w13_E2FD, self.w2_EDF
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.contiguous()
        self.expert_buffers = ExpertBuffers(*(w.detach().to(dtype) for w in weights), *(w.grad for w in weights))

    def decode_token(self, x: Tensor) -> Tensor:
        """A faster `forward` for a single token, x (1, 1, D), on a CPU and without gradients."""
        dtype = wide(self.router.dtype)
        logits_E = F.linear(x.to(dtype), self.router.to(dtype)).flatten()
        y = expert_mlp_token(x, logits_E, self.w13_E2FD, self.w2_EDF, self.top_k)
        return y + self.shared(x) if self.shared else y
