"""The learning rate of each step."""

import math

from .options import TrainOptions

DECAY_SHARE = 0.2  # of all steps, in the warmup-stable-decay schedule (Hägele et al. 2024)


def learning_rate(step: int, options: TrainOptions) -> float:
    """Of optimizer step 0, 1, …: linear warm-up to lr, then a cosine, or a plateau and a line, down to min_lr.

    The warm-up's last step has lr, and the last step of all, max_steps - 1, has min_lr if any step is before it that
    has lr.
    """
    warmup, last = options.num_warmup_steps, options.max_steps - 1
    if step < warmup:
        return options.lr * (step + 1) / warmup
    start = warmup if options.schedule == "cosine" else max(warmup, int(options.max_steps * (1 - DECAY_SHARE)))
    start = max(0, min(start, last - 1))  # a step between the two, so that the decay ends on the last one
    progress = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if options.schedule == "cosine" else 1 - progress
    return options.final_lr + (options.lr - options.final_lr) * decay
