"""Memory: the bytes that a block saves for its backward pass, and the peak memory of a training step.

`what` in a row's case names the measured value:
  saved  bytes that autograd holds after the block's forward pass. Each storage counts once. The input counts;
         parameters, their copies in the compute dtype (`weight_copies` in the details) and RoPE tables do not.
  peak   peak bytes that torch allocates for the model and two steps of forward, backward and AdamW.

`formula_bytes` in the details is the minimum that the Triton kernels must save. --tokens is the batch size: up to 2048,
or a multiple of 2048. The exit status is 1 if one of our models fails.
"""

import gc
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate, product
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from acceleron import ModelConfig, ops
from acceleron.device import missing_compiler
from acceleron.errors import InputError
from acceleron.training.optimizer import build_optimizer

from .command import parse, record_failure
from .peers import Contender, our_backend
from .rows import Results, Row, progress, say
from .shapes import SEQ_LEN

VARIANTS = ({}, {"dense": True}, {"checkpointing": True}, {"compiled": True})


def saved_per_token(config: ModelConfig, itemsize: int, checkpointing: bool) -> int:
    """Return the bytes per token that an MoE block on the Triton kernels should save for its backward pass.

    The MoE: x; pre-activations (2 F) of K routed experts and the shared expert; the shared expert's activation; 4 bytes
    per logit; 4 bytes each for the score, id, gather index and scatter index of K assignments. The rest of the block:
    its input and the sum after attention, with 4 bytes of RMS each; the first norm's output; qkv; rotated q and k; the
    attention output, and 4 bytes of logsumexp per head. With checkpointing: the block's input and the routing.
    """
    D, kv, routing = config.d_model, config.num_kv_heads * config.head_dim, 16 * config.top_k
    if checkpointing:
        return itemsize * D + routing
    widths = 2 * config.top_k * config.d_ff + 3 * config.d_ff_shared
    moe = itemsize * (D + widths) + 4 * config.num_experts + routing
    return moe + itemsize * (6 * D + 3 * kv) + 8 + 4 * config.num_heads


def saved_bytes(block: nn.Module, run: Callable) -> dict[str, int]:
    """Count the bytes that autograd saves in calls of the block during run(): "weight_copies" and all other "bytes"."""
    tensors = {}
    parameters = list(block.parameters())
    call = type(block).__call__

    def keep(tensor: Tensor) -> Tensor:
        # Keeping the tensor alive keeps its address unique.
        tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    class Routing(TorchDispatchMode):  # checkpointing saves the routing without autograd's hooks
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            return tree_map_only(Tensor, keep, results) if function in ops.ROUTING_OPS else results

    def counting_call(self, x: Tensor, *tables, **others):
        recompute = any(argument is True for argument in tables)
        with saved_tensors_hooks(keep, lambda tensor: tensor), Routing() if recompute else nullcontext():
            y = call(self, x, *tables, **others)
        for known in tree_leaves((parameters, tables, others)):
            if isinstance(known, Tensor):
                tensors.pop(known.untyped_storage().data_ptr(), None)
        return y

    with mock.patch.object(type(block), "__call__", counting_call):
        run()
    totals = {"bytes": 0, "weight_copies": 0}
    for tensor in tensors.values():
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        same_size = [p for p in parameters if p.numel() == flat.numel() and flat.is_floating_point()]
        is_copy = any(torch.equal(p.detach().to(flat.dtype).flatten(), flat) for p in same_size)
        totals["weight_copies" if is_copy else "bytes"] += flat.nbytes
    return totals


def peak_bytes(run: Callable, device: torch.device) -> int:
    """Return the peak bytes that torch allocates during run(), minus the bytes allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        run()
    # Each allocation (positive bytes) or release (negative bytes) is an event, in compiled code as well.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def measure(contender: Contender, device: torch.device) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return the bytes, more details, and the gradients to check."""
    if contender.block:
        model, run, gradients = contender.build(device)
        layers = model.model.layers if contender.source == "transformers" else model.blocks
        return saved_bytes(layers[0], run), gradients()

    def two_steps():
        nonlocal gradients
        model, run, gradients = contender.build(device)
        optimizer = build_optimizer(model, 0.1)  # learning rate 0: the check assumes the initial weights
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            run()
            optimizer.step()

    return {"bytes": peak_bytes(two_steps, device)}, gradients()


def measure_row(contender: Contender, device: torch.device) -> Row:
    """Return a contender's row, measured and checked, or with the reason for its failure."""
    tokens, checkpointing = contender.batch_size * contender.seq_len, contender.checkpointing
    case = dict(what="saved", part="block") if contender.block else dict(what="peak", part="model step")
    case |= dict(tokens=tokens, checkpointing=checkpointing, compiled=contender.compiled)
    row = contender.row("memory", "bytes", **case)
    with record_failure(row):
        row.details, gradients = measure(contender, device)
        row.values = [row.details.pop("bytes")]
        contender.check(row, gradients, device)
        row.details["bytes_per_token"] = row.values[0] / tokens
        if contender.source == "triton" and contender.block and not (contender.compiled or contender.dense):
            config = ModelConfig.preset(contender.size)
            row.details["formula_bytes"] = tokens * saved_per_token(config, contender.dtype.itemsize, checkpointing)
    gc.collect()  # models are in reference cycles
    return row


def main():
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler prints two lines per use
    arguments = parse(__doc__, model_size="tiny", tokens=SEQ_LEN, dtype="auto")
    device = arguments.device
    dtype = arguments.dtype
    tokens = arguments.tokens
    failed = False
    if tokens < 2 or (tokens > SEQ_LEN and tokens % SEQ_LEN):
        raise InputError(f"--tokens {tokens}: expected 2 to {SEQ_LEN}, or a multiple of {SEQ_LEN}")
    results, ours = Results(arguments.output, device), our_backend(device, dtype)
    shape = (arguments.model_size, dtype, max(1, tokens // SEQ_LEN), min(tokens, SEQ_LEN))
    variants = [(ours, variant) for variant in VARIANTS[: 3 if missing_compiler(device) else 4]]
    variants += [("transformers", {}), ("transformers", {"dense": True})]
    for block, (source, variant) in progress(list(product((True, False), variants)), "contenders"):
        row = measure_row(Contender(source, *shape, block=block, **variant), device)
        failed |= not results.write(row) and source == ours
        result = row.problem() or f"{row.details['bytes_per_token']:,.0f} bytes per token"
        mode = ", checkpointed" if row.case["checkpointing"] else ""
        say(f"{row.case['what']}: {row.provider}{mode}: {result}")
    print(f"wrote {results.path}")
    if failed:
        sys.exit(1)
