"""Memory: the bytes that a block saves for its backward pass, and the peak of a training step.

A row's value is, by `what` of its case:
  saved  the storages that autograd holds after the block's forward pass, each once, the input included; not the
         parameters, their copies in the compute dtype (weight_copies of the details), or RoPE's tables.
  peak   the most that torch allocates for the model and two steps of forward, backward and AdamW.

formula_bytes of the details is what the Triton kernels have to save. --tokens are a batch: up to 2048, or sequences of
2048. The exit status is 1 if one of ours failed.
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
from acceleron.kernels.contract import TOP_K
from acceleron.training.optimizer import build_optimizer

from .command import failures_in, parse
from .peers import Contender, our_backend
from .rows import Results, Row, progress, say
from .shapes import SEQ_LEN

VARIANTS = ({}, {"dense": True}, {"checkpointing": True}, {"compiled": True})


def saved_per_token(config: ModelConfig, itemsize: int, checkpointing: bool) -> int:
    """Bytes per token that the Triton kernels save for the backward pass of an MoE block, by design.

    The MoE: x; the pre-activations (2 F) of K routed experts and the shared one, and the shared one's activation;
    4 bytes per logit, and for score, expert id, gather index and scatter index of each of the K assignments. Around it:
    the block's input and the sum after attention, with 4 bytes of RMS each; the first norm's output; qkv; rotated q and
    k; attention's output, and 4 bytes of logsumexp per head. With checkpointing: the block's input and the routing.
    """
    D, kv, routing = config.d_model, config.num_kv_heads * config.head_dim, 16 * TOP_K
    if checkpointing:
        return itemsize * D + routing
    moe = itemsize * (D + 2 * TOP_K * config.d_ff + 3 * config.d_ff_shared) + 4 * config.num_experts + routing
    return moe + itemsize * (6 * D + 3 * kv) + 8 + 4 * config.num_heads


def saved_bytes(block: nn.Module, run: Callable) -> dict[str, int]:
    """The bytes that autograd saves in calls of the block while `run` runs, apart from its "weight_copies"."""
    tensors, parameters, call = {}, list(block.parameters()), type(block).__call__

    def keep(tensor: Tensor) -> Tensor:
        # The tensor lives as long as its entry, so that no other gets its address.
        tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    class Routing(TorchDispatchMode):  # selective checkpointing keeps the routing itself, unseen by autograd's hooks
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            return tree_map_only(Tensor, keep, results) if function in ops.ROUTING_OPS else results

    def counted(self, x: Tensor, *tables, **others):
        recompute = any(argument is True for argument in tables)
        with saved_tensors_hooks(keep, lambda tensor: tensor), Routing() if recompute else nullcontext():
            y = call(self, x, *tables, **others)
        for known in tree_leaves((parameters, tables, others)):
            if isinstance(known, Tensor):
                tensors.pop(known.untyped_storage().data_ptr(), None)
        return y

    with mock.patch.object(type(block), "__call__", counted):
        run()
    found = {"bytes": 0, "weight_copies": 0}
    for tensor in tensors.values():
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        alike = [p for p in parameters if p.numel() == flat.numel() and flat.is_floating_point()]
        is_copy = any(torch.equal(p.detach().to(flat.dtype).flatten(), flat) for p in alike)
        found["weight_copies" if is_copy else "bytes"] += flat.nbytes
    return found


def peak_bytes(run: Callable, device: torch.device) -> int:
    """The most that torch had allocated while `run` ran, above what it had before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        run()
    # Each allocation or release, compiled code's included, is an event with a positive or negative number of bytes.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def measure(contender: Contender, device: torch.device) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The bytes and details, and the gradients to check."""
    if contender.block:
        model, run, gradients = contender.build(device)
        layers = model.model.layers if contender.source == "transformers" else model.blocks
        return saved_bytes(layers[0], run), gradients()

    def two_steps():
        nonlocal gradients
        model, run, gradients = contender.build(device)
        optimizer = build_optimizer(model, 0.1)  # with learning rate 0: a check knows the weights
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            run()
            optimizer.step()

    return {"bytes": peak_bytes(two_steps, device)}, gradients()


def row_of(contender: Contender, device: torch.device) -> Row:
    """A contender's row: measured and checked, or with the reason why not."""
    tokens, checkpointing = contender.batch_size * contender.seq_len, contender.checkpointing
    case = dict(what="saved", part="block") if contender.block else dict(what="peak", part="model step")
    case |= dict(tokens=tokens, checkpointing=checkpointing, compiled=contender.compiled)
    row = contender.row("memory", "bytes", **case)
    with failures_in(row):
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler prints two lines each time
    arguments = parse(__doc__, model_size="tiny", tokens=SEQ_LEN, dtype="auto")
    device, dtype, tokens, failed = arguments.device, arguments.dtype, arguments.tokens, False
    if tokens < 2 or (tokens > SEQ_LEN and tokens % SEQ_LEN):
        raise InputError(f"--tokens {tokens}: expected 2 to {SEQ_LEN}, or a multiple of {SEQ_LEN}")
    results, ours = Results(arguments.output, device), our_backend(device, dtype)
    shape = (arguments.model_size, dtype, max(1, tokens // SEQ_LEN), min(tokens, SEQ_LEN))
    variants = [(ours, variant) for variant in VARIANTS[: 3 if missing_compiler(device) else 4]]
    variants += [("transformers", {}), ("transformers", {"dense": True})]
    for block, (source, variant) in progress(list(product((True, False), variants)), "contenders"):
        row = row_of(Contender(source, *shape, block=block, **variant), device)
        failed |= not results.write(row) and source == ours
        result = row.complaint() or f"{row.details['bytes_per_token']:,.0f} bytes per token"
        say(f"{row.case['what']}: {row.provider}{', checkpointed' * row.case['checkpointing']}: {result}")
    print(f"wrote {results.path}")
    if failed:
        sys.exit(1)
