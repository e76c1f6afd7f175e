"""AdamW, with decay for matrices alone."""

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Fused, on CUDA and on a CPU alike. The learning rate is set each step."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=1e-8, fused=True)


def update(optimizer: torch.optim.AdamW, grad_norm: Tensor, grad_clip: float, skipped: Tensor):
    """A step with the gradients clipped to the norm `grad_clip` (0: not clipped), or none at all where `skipped`.

    Both are the fused AdamW's own ways, which GradScaler uses too: it divides the gradients as it reads them, which
    spares a reading and writing of them all, and leaves weights and state as they are. grad_norm and skipped are
    scalars on the device, which is not waited for.
    """
    # As clip_grad_norm_ has it.
    optimizer.grad_scale = ((grad_norm + 1e-6) / grad_clip).clamp(min=1.0) if grad_clip else None
    optimizer.found_inf = skipped.float()
    optimizer.step()
