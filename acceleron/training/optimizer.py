"""AdamW, with decay for matrices alone."""

import torch
from torch import nn

BETAS = (0.9, 0.95)


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Fused, on CUDA and on a CPU alike. The learning rate is set each step."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=1e-8, fused=True)
