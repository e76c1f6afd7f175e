"""Learning rate schedules."""

import math

from .options import TrainOptions

DECAY_SHARE = 0.2  # fraction of all steps, for warmup-stable-decay (Hägele et al. 2024)


def learning_rate(step: int, options: TrainOptions) -> float:
    """The learning rate of optimizer step 0, 1, …: linear warmup to lr, then a cosine or wsd decay to min_lr.

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
