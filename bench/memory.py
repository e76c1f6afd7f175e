"""Memory: the bytes a layer saves for its backward pass, and the peaks of a training step and of the cross-entropy.

A row's value is, by `what` of its case:
  saved  the storages that autograd holds after the forward pass, each once, the input included; not the parameters,
         their copies in the compute dtype, or RoPE's tables.
  peak   the most that torch had allocated above what it had before: in two steps of forward, backward and AdamW, model
         included; or in the cross-entropy of given inputs. On a CPU too these are torch's own allocations.

Details: bytes_per_token_per_layer, of the value less state_bytes; state_bytes, of parameters, gradients and AdamW's
moments, fp32 in ours and `dtype` in the peers; weight_copies, bytes of copies in the compute dtype; formula_bytes, what
the Triton kernels have to save. --tokens are a batch: up to 2048, or sequences of 2048. The exit status is 1 if one of
ours failed.
"""

import gc
import os
import sys
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from acceleron import ModelConfig, kernels
from acceleron.device import missing_compiler
from acceleron.errors import InputError
from acceleron.kernels import reference
from acceleron.training.optimizer import build_optimizer

from .command import failures_in, parse
from .peers import GRANITE, TRANSFORMERS, Contender
from .rows import Results, Row, print_rows, progress
from .shapes import SEQ_LEN

PEERS_OF = {"block": TRANSFORMERS, "model step": TRANSFORMERS, "cross-entropy": ["torch"]}
PEERS_OF["moe layer"] = [*GRANITE, "liger"]
# Ours, of blocks and steps.
VARIANTS = [{}, {"dense": True}, {"checkpointing": True}, {"dense": True, "checkpointing": True}, {"compiled": True}]


def saved_per_token(config: ModelConfig, part: str, itemsize: int, checkpointing: bool = False) -> int:
    """Bytes per token that the Triton kernels save for the backward pass of a "moe layer" or a "block", by design.

    The MoE: x, which router and experts share; the pre-activations (2 F) of the K routed experts and of the shared one,
    and the shared one's activation, as its down-projection is a plain GEMM; 4 bytes per logit, and for weight, expert,
    order and inverse of each of the K assignments. The dense MLP: what the shared expert saves. Around it: the block's
    input and the sum after attention, with 4 bytes of RMS each; the first norm's output; qkv as one tensor, of which v
    is a view; rotated q and k; attention's output and its logsumexp, 4 bytes per head. With checkpointing: the block's
    input, and the routing without its logits.
    """
    D, K, kv = config.d_model, reference.TOP_K, config.num_kv_heads * config.head_dim
    if checkpointing:
        return itemsize * D + (0 if config.dense else 16 * K)
    if config.dense:
        layer = itemsize * (D + 3 * config.d_ff_dense)
    else:
        layer = itemsize * (D + 2 * K * config.d_ff + 3 * config.d_ff_shared) + 4 * config.num_experts + 16 * K
    return layer if part == "moe layer" else layer + itemsize * (6 * D + 3 * kv) + 8 + 4 * config.num_heads


@contextmanager
def saved_bytes(found: dict, parameters: list[Tensor], tables: tuple[Tensor, ...] = (), checkpointing: bool = False):
    """A context; at its end, found["bytes"] are those that autograd saved in it, apart from "weight_copies"."""
    tensors = {}

    def keep(tensor: Tensor) -> Tensor:
        # The tensor lives as long as its entry, so that no other gets its address.
        tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    class Routing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            return tree_map_only(Tensor, keep, results) if function in kernels.ROUTING_OPS else results

    # Selective checkpointing keeps the routing by itself, unseen by autograd's hooks.
    with saved_tensors_hooks(keep, lambda tensor: tensor), Routing() if checkpointing else nullcontext():
        yield
    for known in (*parameters, *tables):
        tensors.pop(known.untyped_storage().data_ptr(), None)
    found |= {"bytes": 0, "weight_copies": 0}
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
        alike = [p for p in parameters if p.numel() == flat.numel() and flat.is_floating_point()]
        is_copy = any(torch.equal(p.detach().to(flat.dtype).flatten(), flat) for p in alike)
        found["weight_copies" if is_copy else "bytes"] += storage.nbytes()


@contextmanager
def peak_bytes(found: dict, device: torch.device):
    """A context; at its end, found["bytes"] are the most that torch had allocated in it, above what it had before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        found["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        yield
    # Each allocation or release, compiled code's included, is an event with a positive or negative number of bytes.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    found["bytes"] = max(accumulate(event.nbytes() for event in events), default=0)


def measure(contender: Contender, device: torch.device) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Bytes and details, and the gradients to check."""
    found = {}
    if contender.part == "model step":
        with peak_bytes(found, device):
            one_pass = contender.build(device)
            optimizer = build_optimizer(one_pass.model, 0.1)  # with learning rate 0: a check knows the weights
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                one_pass()
                optimizer.step()
        found["state_bytes"] = 4 * sum(weight.nbytes for weight in one_pass.model.parameters())
        return found, one_pass.gradients()
    one_pass = contender.build(device)
    if contender.part == "cross-entropy":
        with peak_bytes(found, device):
            one_pass()
    else:
        weights = list(one_pass.model.parameters())
        one_pass(saved_bytes(found, weights, one_pass.tables, contender.checkpointing))
    return found, one_pass.gradients()


def row_of(contender: Contender, device: torch.device) -> Row:
    """A contender's row: measured and checked, or with the reason why not."""
    part, tokens, checkpointing = contender.part, contender.tokens, contender.checkpointing
    what = "saved" if part in ("moe layer", "block") else "peak"
    case = dict(what=what, part=part, tokens=tokens, checkpointing=checkpointing, compiled=contender.compiled)
    row = contender.row("memory", "bytes", **case)
    with failures_in(row):
        found, gradients = measure(contender, device)
        contender.check(row, gradients, device)
        config = ModelConfig.preset(contender.size, contender.dense)
        row.values, layers = [found.pop("bytes")], config.num_layers if part == "model step" else 1
        each = (row.values[0] - found.get("state_bytes", 0)) / tokens / layers
        row.details = found | {"bytes_per_token_per_layer": each}
        if what == "saved" and contender.source == "triton" and not contender.compiled:
            formula = saved_per_token(config, part, contender.dtype.itemsize, checkpointing)
            row.details["formula_bytes"] = tokens * formula
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def planned(size: str, dtype: torch.dtype, tokens: int, device: torch.device) -> list[Contender]:
    """The contenders of a size: the peers, and ours by each backend that can run."""
    shape = dict(size=size, dtype=dtype, batch_size=max(1, tokens // SEQ_LEN), seq_len=min(tokens, SEQ_LEN))
    backends, on_gpu = ["reference"], device.type == "cuda"
    with suppress(ValueError):
        kernels.select("triton", device)
        backends.insert(0, "triton")
    found = []
    for part, peers in PEERS_OF.items():
        ours = backends if on_gpu or part != "model step" else ["reference"]  # interpreted, a step takes minutes
        variants = VARIANTS if part in ("block", "model step") else [{}]
        found += [Contender(source, part, **shape, **variant) for variant in variants for source in ours]
        found += [Contender(source, part, **shape, dense=source == "llama") for source in peers]
    return [contender for contender in found if not (contender.compiled and missing_compiler(device))]


def main():
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler prints two lines each time
    arguments = parse(__doc__, size=[], tokens=int, dtype="auto")
    device, shown, failed = arguments.device, [], False
    sizes = arguments.size or (["tiny", "small"] if device.type == "cuda" else ["nano", "tiny"])
    tokens = arguments.tokens or (16 * SEQ_LEN if device.type == "cuda" else SEQ_LEN)
    if tokens < 2 or (tokens > SEQ_LEN and tokens % SEQ_LEN):
        raise InputError(f"--tokens {tokens}: expected 2 to {SEQ_LEN}, or a multiple of {SEQ_LEN}")
    results = Results(arguments.output, device)
    contenders = [each for size in sizes for each in planned(size, arguments.dtype, tokens, device)]
    for contender in progress(contenders, "contenders"):
        row = row_of(contender, device)
        failed |= not results.write(row) and contender.ours
        name = f"{contender.size} {contender.part}: {row.provider}" + ", checkpointed" * contender.checkpointing
        values = [row.details["bytes_per_token_per_layer"]] if row.values else []
        shown.append(replace(row, provider=name, unit="bytes/token/layer", values=values))
    print_rows(shown)
    print(f"wrote {results.path}")
    if failed:
        sys.exit(1)
