"""The validation loss of a model."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from .data.tokenizer import ByteCounter
from .model import Acceleron


@torch.no_grad()
def evaluate(model: Acceleron, batches: Iterable[Tensor], text_bytes: ByteCounter | None = None) -> dict:
    """Return val_loss in nats per token and, with `text_bytes`, val_bits_per_byte. A non-finite value is None.

    batches: int64 (B, S) token ids on the CPU. With data parallelism, this rank's share: all ranks have the same number
    of batches, and get the result for all of them.
    """
    total = targets = num_bytes = 0
    for batch in batches:
        input_ids = batch.to(model.embedding.device)
        scored = batch.numel() - len(batch)
        total += model(input_ids, labels=input_ids).cross_entropy.double() * scored
        targets += scored
        num_bytes += text_bytes.count(batch.numpy()) if text_bytes else 0
    if model.data_parallel_group is not None:
        sums = torch.tensor([total, targets, num_bytes], dtype=torch.float64, device=model.embedding.device)
        dist.all_reduce(sums, group=model.data_parallel_group)
        total, targets, num_bytes = sums.tolist()
    nats = float(total)
    finite = targets > 0 and math.isfinite(nats)
    record = {"val_loss": nats / targets if finite else None}
    if num_bytes:
        record["val_bits_per_byte"] = nats / math.log(2) / num_bytes if finite else None
    return record
