"""AdamW with weight decay for matrices only, and the learning rate schedules."""

import math

import torch
from torch import Tensor, nn

from .options import TrainOptions

BETAS = (0.9, 0.95)
DECAY_SHARE = 0.2  # fraction of all steps, for warmup-stable-decay (Hägele et al. 2024)


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


def learning_rate(step: int, options: TrainOptions) -> float:
    """The learning rate at optimizer step 0, 1, …: linear warmup to lr, then a cosine or wsd decay to min_lr.

    The last warmup step uses lr. The last step, max_steps - 1, uses min_lr, unless it is also the first to use lr.
    """
    warmup, last = options.num_warmup_steps, options.max_steps - 1
    if step < warmup:
        return options.lr * (step + 1) / warmup
    start = warmup if options.schedule == "cosine" else max(warmup, int(options.max_steps * (1 - DECAY_SHARE)))
    start = max(0, min(start, last - 1))  # before the last step, so the decay reaches min_lr
    progress = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if options.schedule == "cosine" else 1 - progress
    return options.final_lr + (options.lr - options.final_lr) * decay
