"""Memory: the bytes a layer saves for its backward pass, and the peaks of a training step and of the cross-entropy.

python -m bench memory [--size tiny small] [--tokens 65536] [--dtype auto] [--output DIR]

Rows of memory.jsonl: `what`, and `part`, `size`, `model` (moe or dense), `provider`, `kernels` (None of a peer),
`tokens`, `dtype`, `checkpointing`, `compiled`, and

what "saved": one "moe layer" or one "block" (attention, norms and the MoE or the twin's MLP).
  bytes          of the storages that autograd holds at the end of the forward pass, each once and whole, its input
                 too where that is saved. Not parameters, nor the tables of RoPE: they are there anyhow.
  weight_copies  bytes of copies of parameters in the compute dtype, held as well. They do not grow with the tokens and
                 are not in `bytes`. A peer whose parameters are in that dtype has none, and no fp32 ones either.
  formula_bytes  what the Triton kernels have to save (`saved_per_token`), uncompiled
what "peak": of a "model step" (two of forward, backward and AdamW, whose state is there from the second on), or of the
"cross-entropy" of a model's head with its gradients.
  bytes          the most that torch had allocated at any time, above what it had before the model (or after the head's
                 inputs). On a CPU this is the sum of torch's allocations too, as its profiler records them, and not the
                 resident size: that has what is imported and compiled in it, 100 to 250 MB, which nano's step has not.
  state_bytes    of these the parameters, gradients and optimizer state: of ours in fp32, of the peers in `dtype`

`bytes_per_token_per_layer` is of `bytes` less `state_bytes`. The learning rate is 0, so that the last step's gradients
are of weights that a check knows: checked are the gradients of the very passes measured, as bench/passes.py says.
"""

import argparse
import gc
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from acceleron import ModelConfig, kernels
from acceleron.config import PRESETS
from acceleron.device import DTYPES, missing_compiler, resolve_device, resolve_dtype
from acceleron.errors import InputError
from acceleron.kernels import reference

from . import passes
from .passes import SEQ_LEN, Run, Truths
from .results import Results, complaint


def saved_per_token(config: ModelConfig, part: str, itemsize: int, checkpointing: bool = False) -> int:
    """Bytes a token that the Triton kernels save for the backward pass of a "moe layer" or a "block" (design, eager).

    The MoE: x, which router and experts share; of the K routed experts and of the shared one the pre-activation of 2 F
    values, and of the shared one the activation too, as its down-projection is a plain GEMM; 4 bytes for each logit,
    and for weight, expert, order and inverse of each of the K assignments. The twin's MLP: what the shared expert
    saves. Around it: the block's input and the sum after attention, with 4 bytes of RMS each; the first norm's output;
    qkv as one tensor, as v is a view of it; rotated q and k; attention's output and its logsumexp of 4 bytes a head.
    With checkpointing: the block's input, and the routing without its logits.
    """
    D, K, heads = config.d_model, reference.TOP_K, config.num_heads
    kv = config.num_kv_heads * config.head_dim
    assignments = 16 * K
    if checkpointing:
        return itemsize * D + (0 if config.dense else assignments)
    if config.dense:
        layer = itemsize * (D + 3 * config.d_ff_dense)
    else:
        routed, shared = 2 * K * config.d_ff, 3 * config.d_ff_shared
        layer = itemsize * (D + routed + shared) + 4 * config.num_experts + assignments
    if part == "moe layer":
        return layer
    return layer + itemsize * (6 * D + 3 * kv) + 8 + 4 * heads


class Saved(TorchDispatchMode):
    """A context that collects what autograd saves in it: `storages`, by address.

    Selective checkpointing keeps the routing by itself, unseen by autograd: with `routing` it counts too.
    """

    def __init__(self, routing: bool = False):
        super().__init__()
        self.storages: dict[int, Tensor] = {}
        self.routing = routing
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        # The tensor lives as long as its entry, so that no other one gets its address.
        self.storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function in kernels.ROUTING_OPS:
            for result in results if isinstance(results, tuple) else (results,):
                self.keep(result)
        return results

    def __enter__(self):
        self.hooks.__enter__()
        return super().__enter__() if self.routing else self

    def __exit__(self, *error):
        if self.routing:
            super().__exit__(*error)
        self.hooks.__exit__(*error)

    def count(self, parameters: list[Tensor], tables: list[Tensor]):
        """Sets `bytes`, of what is neither a parameter nor a table, and `copies`, of copies of parameters, apart."""
        known = {tensor.untyped_storage().data_ptr() for tensor in (*parameters, *tables)}
        self.bytes = self.copies = 0
        for address, tensor in self.storages.items():
            if address in known:
                continue
            storage = tensor.untyped_storage()
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
            alike = (p for p in parameters if p.numel() == whole.numel() and whole.is_floating_point())
            if any(torch.equal(p.detach().to(whole.dtype).flatten(), whole) for p in alike):
                self.copies += storage.nbytes()
            else:
                self.bytes += storage.nbytes()
        self.storages.clear()


class Peak:
    """A context; `bytes` are then the most that torch had allocated within it above what it had before."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False)
            self.profiler.__enter__()
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        self.profiler.__exit__(*error)
        # A positive or negative number of bytes each time that torch allocates or frees, the compiler's code included.
        events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.bytes, self.left = max(accumulate(sizes), default=0), sum(sizes)


def measure(run: Run, device: torch.device) -> tuple[dict, dict[str, Tensor]]:
    """The figures of the run's row, and the gradients to check."""
    if run.part == "model step":
        with Peak(device) as peak:
            model, optimizer = passes.train_steps(run, device, 2)
        state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
        state += [tensor for weight in model.parameters() for tensor in (weight, weight.grad) if tensor is not None]
        return {"bytes": peak.bytes, "state_bytes": sum(tensor.nbytes for tensor in state)}, passes.gradients(model)
    if run.part == "cross-entropy":
        x, weight, labels = passes.head_inputs(run, device)
        with Peak(device) as peak:
            passes.head_backward(run, x, weight, labels)
        return {"bytes": peak.bytes}, {"x": x.grad, "weight": weight.grad}
    saved = Saved(routing=run.checkpointing and not run.compiled)
    grads = passes.layer_gradients(run, device, saved)
    return {"bytes": saved.bytes, "weight_copies": saved.copies}, grads


def planned(size: str, tokens: int, dtype: str, device: torch.device) -> list[Run]:
    """Every run of a size."""
    ours = ["triton"] if kernels_run("triton", device) is None else []
    cuda = device.type == "cuda"
    # On a CPU, where compiling takes longest, one block is compiled.
    compiled = [False, True] if missing_compiler(device) is None else [False]
    runs = []
    for choice in [*ours, "reference"]:
        of = dict(size=size, source="ours", kernels=choice, tokens=tokens, dtype=dtype)
        for model in ("moe", "dense"):
            if model == "moe":
                runs.append(Run("saved", "moe layer", model=model, **of))
            for checkpointing in (False, True):
                for compile_it in compiled:
                    if compile_it and choice != (ours or ["reference"])[0]:
                        continue  # one provider's is enough: each takes seconds
                    flags = dict(model=model, checkpointing=checkpointing, compiled=compile_it)
                    if cuda or not (compile_it and (checkpointing or model == "dense")):
                        runs.append(Run("saved", "block", **flags, **of))
                    if cuda or not (compile_it or choice == "triton"):
                        runs.append(Run("peak", "model step", **flags, **of))
        runs.append(Run("peak", "cross-entropy", model="moe", **of | {"tokens": head_tokens(tokens, device)}))
    peers = dict(size=size, kernels=None, tokens=tokens, dtype=dtype)
    for source in ("eager", "grouped_mm"):
        runs += [Run("saved", part, model="moe", source=source, **peers) for part in ("moe layer", "block")]
        runs.append(Run("peak", "model step", model="moe", source=source, **peers))
    runs.append(Run("saved", "block", model="dense", source="llama", **peers))
    runs.append(Run("peak", "model step", model="dense", source="llama", **peers))
    runs.append(Run("saved", "moe layer", model="moe", source="liger", **peers))
    runs.append(
        Run("peak", "cross-entropy", model="moe", source="torch", **peers | {"tokens": head_tokens(tokens, device)})
    )
    # Compiled ones, which take longest, come last; runs of one model, part and number of tokens share their truth.
    return sorted(runs, key=lambda run: (run.compiled, run.what != "saved", run.part, run.model))


def head_tokens(tokens: int, device: torch.device) -> int:
    """On a CPU more than a step's: of few tokens the reference's cross-entropy holds all logits too."""
    return tokens if device.type == "cuda" else 8 * tokens


def kernels_run(choice: str, device: torch.device) -> str | None:
    """Why these kernels can't run here, or None."""
    try:
        kernels.select(choice, device)
    except ValueError as error:
        return str(error)
    return None


def absent(run: Run, device: torch.device) -> str | None:
    """Why a peer can't run here, or None."""
    if run.source == "liger":
        if device.type != "cuda":
            return "Liger's fused_moe needs a GPU"
        if find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
    elif not run.is_ours and run.source != "torch" and find_spec("transformers") is None:
        return "transformers is not installed"
    return None


def attempt(run: Run, device: torch.device, truths: Truths) -> dict:
    """The run's row: measured and checked, or failed, or absent. A peer that runs out of memory gets half the tokens.

    Peers fail in their own ways, and the other rows are still wanted: whatever is raised becomes the row's reason.
    """
    reason = absent(run, device)
    if reason:
        return run.row() | {"absent": reason}
    try:
        figures, grads = measure(run, device)
        found = passes.sample(grads)
        del grads
        verdict = passes.check(run, found, truths.of(run))
    except Exception as error:
        failed = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    else:
        config = ModelConfig.preset(run.size)
        layers = config.num_layers if run.part == "model step" else 1
        each = (figures["bytes"] - figures.get("state_bytes", 0)) / run.tokens / layers
        row = run.row() | figures | {"bytes_per_token_per_layer": each} | verdict
        if run.what == "saved" and run.is_ours and run.kernels == "triton" and not run.compiled:
            config = ModelConfig.preset(run.size, run.model == "dense")
            itemsize = DTYPES[run.dtype].itemsize
            row["formula_bytes"] = run.tokens * saved_per_token(config, run.part, itemsize, run.checkpointing)
        return row
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if out_of_memory and not run.is_ours and run.tokens > SEQ_LEN:
        return attempt(replace(run, tokens=run.tokens // 2 // SEQ_LEN * SEQ_LEN), device, truths)
    return run.row() | {"failed": failed}


def print_table(rows: list[dict]):
    print(f"{'':6}{'part':14}{'provider':52}{'check-':>7}{'tokens':>8}{'MiB':>10}{'B/token/layer':>15}{'formula':>9}")
    for row in rows:
        start = f"{row['size']:6}{row['part']:14}{row['provider']:52}{'pointed' if row['checkpointing'] else '':>7}"
        reason = row.get("failed") or row.get("absent") or complaint(row)
        if reason:
            print(f"{start}  {reason[:80]}")
            continue
        formula = f"{row['formula_bytes'] / row['tokens']:.0f}" if "formula_bytes" in row else ""
        figures = f"{row['tokens']:8}{row['bytes'] / 2**20:10.1f}{row['bytes_per_token_per_layer']:15.0f}{formula:>9}"
        print(start + figures)


def main():
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler prints two lines each time that it is used
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=tuple(PRESETS), help="nano and tiny; on a GPU tiny and small")
    parser.add_argument("--tokens", type=int, help="a batch: at most 2048, or a multiple of it (256; on a GPU 65536)")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", help="directory for memory.jsonl (default bench/results/<date>-<device>)")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    cuda = device.type == "cuda"
    tokens = arguments.tokens or (65536 if cuda else 256)
    if tokens < 2 or (tokens > SEQ_LEN and tokens % SEQ_LEN):
        raise InputError(f"--tokens {tokens}: must be 2 to {SEQ_LEN}, or a multiple of {SEQ_LEN}")
    dtype = next(name for name, value in DTYPES.items() if value == resolve_dtype(arguments.dtype, device))
    results, truths, rows = Results(arguments.output, "memory", device), Truths(device), []
    sizes = arguments.size or (["tiny", "small"] if cuda else ["nano", "tiny"])
    missing, failed = kernels_run("triton", device), False
    for run in tqdm([run for size in sizes for run in planned(size, tokens, dtype, device)], disable=None):
        rows.append(attempt(run, device, truths))
        failed |= not results.write(rows[-1]) and run.is_ours
    if missing:
        for size in sizes:
            run = Run("saved", "block", size, "moe", "ours", "triton", tokens, dtype)
            rows.append(run.row() | {"absent": missing})
            results.write(rows[-1])
    print_table(rows)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
