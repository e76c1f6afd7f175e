"""AdamW with weight decay for matrices only."""

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Build a fused AdamW, on CUDA and on CPUs. The run sets the learning rate at each step."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=1e-8, fused=True)


def update(optimizer: torch.optim.AdamW, grad_norm: Tensor, grad_clip: float, skipped: Tensor):
    """Update the weights, with gradients clipped to the norm `grad_clip` (0: no clipping), unless `skipped`.

    Like GradScaler, this sets the fused AdamW's grad_scale and found_inf. AdamW scales the gradients as it reads them,
    which saves one pass over them. For a skipped step, it leaves weights and state unchanged. grad_norm and skipped
    are scalars on the device. This never synchronizes.
    """
    # This is the formula of clip_grad_norm_.
    optimizer.grad_scale = ((grad_norm + 1e-6) / grad_clip).clamp(min=1.0) if grad_clip else None
    optimizer.found_inf = skipped.float()
    optimizer.step()
