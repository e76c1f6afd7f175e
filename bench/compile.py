"""Compile every kernel as it ships, for GPUs that need not be present, and print what each takes.

The ops run on tensors without data, up to their launches, which compile into Triton's cache: what is checked is what
is launched, and a training on this machine finds its kernels compiled. The token counts are those of `bench
throughput`. --check compiles sm_90 in two more variants, as an argument that is 1 or a multiple of 16 becomes part of
the code: with 256 tokens, and with pointers that are not 16-byte aligned. The exit status is 1 if a kernel does not
compile, and with --check also if sm_90 spills, serialises wgmma, or lacks wgmma or TMA where the design has them, or if
a kernel asks for more shared memory than its device has.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pandas as pd
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from acceleron import ModelConfig, kernels
from acceleron.config import PRESETS
from acceleron.device import DTYPES as TRAINING_DTYPES
from acceleron.errors import InputError
from acceleron.kernels import configs, launch
from acceleron.kernels.launch import Device

from .offline import Launching, Pool, offline
from .rows import progress
from .shapes import MICRO_BATCH, SEQ_LEN
from .worker import Failure

SIZES = ("tiny", "small", "medium", "large")
# Widths that no tile divides, so that most loads are by pointers.
ODD = ModelConfig(
    d_model=104, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=5, d_ff=100, d_ff_shared=36, vocab_size=1000
)
DTYPES = TRAINING_DTYPES | {"fp16": torch.float16}
# The parts of a size that compile in parallel, longest first: each kernel of a GEMM, and the other kernels of a module.
GEMMS = ("_hidden_grad_kernel", "_up_kernel", "_rows_kernel", "_weight_grad_kernel")
MODULES = ("router", "routing", "expert_mlp", "rope", "cross_entropy", "rms_norm", "swiglu")


class Target(NamedTuple):
    triton: GPUTarget
    processors: int
    shared_bytes: int  # the most that one program may have


# H100 SXM, A100, B200 and MI300X.
TARGETS = {
    "sm_90": Target(GPUTarget("cuda", 90, 32), 132, 232448),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 108, 166912),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 148, 232448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 304, 65536),
}


@contextmanager
def compiling(
    arch: str, device_name: str = "any", offset: int = 0, wanted: Callable[[JITFunction], bool] = lambda function: True
) -> Iterator[list]:
    """In this context the launches of the wanted kernels compile for `arch`, and none runs.

    Yields the list of (JITFunction, CompiledKernel, keyword arguments of the launch). offset: see `offline`.
    """
    compiled, run = [], JITFunction.run

    def compile_only(function, *args, grid, warmup, **kwargs):
        if wanted(function):
            compiled.append((function, run(function, *args, grid=grid, warmup=True, **kwargs), kwargs))

    # All that Triton asks of a driver before it compiles.
    asked = {"target": lambda: TARGETS[arch].triton, "device": lambda: arch, "stream": lambda device: 0}
    triton.runtime.driver.set_active(SimpleNamespace(**{f"get_current_{name}": get for name, get in asked.items()}))
    with offline(Device(device_name, arch, TARGETS[arch].processors), compile_only, offset), Launching():
        yield compiled


def describe(arch: str, function: JITFunction, kernel, arguments: dict) -> dict:
    """What a compiled kernel takes, per program or per thread, as its binary says."""
    wgmma, tma, serialised = 0, 0, False
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{f}: +(\d+)", text)[1]) for f in ("count", "spill_count"))
        spilled *= 4
    else:
        text = kernel.asm["ptx"]
        wgmma, tma = text.count("wgmma.mma_async"), text.count("cp.async.bulk.tensor")
        usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", file=kernel.asm["cubin"])
        registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        if wgmma:  # whether ptxas makes each wait for the one before
            serialised = "serialized" in _nvidia_tool("ptxas", "-v", f"--gpu-name={arch}a", "-o", os.devnull, file=text)
    blocks = "x".join(str(value) for name, value in arguments.items() if name.startswith(("BLOCK", "ROWS", "COLS")))
    shape = dict(blocks=blocks, warps=kernel.metadata.num_warps, stages=kernel.metadata.num_stages)
    memory = dict(registers=registers, spilled_bytes=spilled, shared_bytes=kernel.metadata.shared)
    return dict(kernel=function.__name__) | shape | memory | dict(wgmma=wgmma, tma=tma, serialised=serialised)


def _nvidia_tool(tool: str, *arguments: str, file: bytes | str) -> str:
    """What a tool of Triton's wheel prints about a file of these contents."""
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile() as temporary:
        temporary.write(file if isinstance(file, bytes) else file.encode())
        temporary.flush()
        command = [binary, *arguments, temporary.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def run_ops(config: ModelConfig, tokens: int, dtype: torch.dtype):
    """Every op of a size, forward and backward."""
    T, D, E, F = tokens, config.d_model, config.num_experts, config.d_ff
    H, G, C = config.num_heads, config.num_kv_heads, config.head_dim

    def empty(*shape, dtype=dtype, grad=True) -> Tensor:
        return torch.empty(shape, dtype=dtype).requires_grad_(grad)

    def both(outputs):
        outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])

    both(kernels.router_logits(empty(T, D), empty(E, D, dtype=torch.float32)))
    routing = kernels.route_top2(empty(T, E, dtype=torch.float32))
    both([routing.weights_TK, routing.z_loss, routing.balance_loss])
    plan = kernels.dispatch_plan(routing.experts_TK, E)
    w13, w2 = empty(E, 2 * F, D, dtype=torch.float32), empty(E, D, F, dtype=torch.float32)
    x, residual, router = empty(T, D), empty(T, D), empty(E, D, dtype=torch.float32)
    shared = empty(2 * config.d_ff_shared, D), empty(D, config.d_ff_shared)
    both(kernels.moe(x, router, w13, w2, *shared, residual))
    with torch.no_grad():
        kernels.moe(x, router, w13, w2, *shared, residual)
    both(kernels.expert_mlp(x, empty(T, 2, dtype=torch.float32), plan, w13.to(dtype), w2.to(dtype)))
    both(kernels.grouped_gemm(empty(2 * T, D), w13.to(dtype), plan))
    for width in (config.d_ff_shared, config.d_ff_dense):
        both(kernels.swiglu(empty(T, 2 * width)))
    qkv, angles = empty(1, T, H + 2 * G, C), [empty(T, C, dtype=torch.float32, grad=False) for _ in range(2)]
    both(kernels.rope(*qkv.split([H, G, G], dim=2)[:2], *angles))
    both(kernels.split_rope(qkv, *angles, H, G))
    weight = empty(D, dtype=torch.float32)
    both(kernels.rms_norm(empty(T, D), weight, config.norm_eps))
    both(kernels.rms_norm(empty(T, D), weight, config.norm_eps, empty(T, D)))
    both(kernels.rms_norm(empty(T, D), weight, config.norm_eps, empty(T, D))[:1])  # the last norm's sum is not used
    head, labels = empty(config.vocab_size, D, grad=False), torch.empty(T, dtype=torch.int64)
    kernels.linear_cross_entropy(empty(T, D), head, labels)
    kernels.linear_cross_entropy(empty(T, D, grad=False), head, labels)


def compile_part(arch: str, dtype: str, size: str, part: str, variants: list[tuple[int, bool]]) -> list[dict]:
    """Compile a part's kernels for these numbers of tokens, with aligned pointers or not. Returns distinct rows."""
    rows = {}
    names = {"any", *(key[1] for key in configs.table() if key[0] == arch)}

    def wanted(function: JITFunction) -> bool:
        return part == (function.__name__ if function.__name__ in GEMMS else function.__module__.rpartition(".")[2])

    for (tokens, aligned), name in product(variants, names):
        with compiling(arch, name, 0 if aligned else 2, wanted) as compiled:
            run_ops(ODD if size == "odd" else ModelConfig.preset(size), tokens, DTYPES[dtype])
        which = dict(arch=arch, size=size, dtype=dtype, tokens=tokens, aligned=aligned)
        for function, kernel, arguments in compiled:
            if kernel.hash not in rows:
                rows[kernel.hash] = which | describe(arch, function, kernel, arguments)
    return [*rows.values()]


def complaints(row: dict) -> list[str]:
    """What is wrong with a kernel that is to be shipped."""
    found, most = [], TARGETS[row["arch"]].shared_bytes
    if row["shared_bytes"] > most:
        found.append(f"{row['shared_bytes']} bytes of shared memory, of {most}")
    if row["arch"] == "sm_90":
        if row["spilled_bytes"]:
            found.append(f"{row['spilled_bytes']} bytes spilled")
        if row["serialised"]:
            found.append("wgmmas serialised by ptxas")
        if row["dtype"] != "fp32" and row["kernel"] in GEMMS:
            with_tma = row["aligned"] and row["size"] != "odd" and row["kernel"][1:-7] not in configs.without_tma()
            found += ["no wgmma"] * (not row["wgmma"]) + ["no TMA"] * (with_tma and not row["tma"])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--size", nargs="+", choices=[*PRESETS, "odd"], default=[*SIZES, "odd"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tokens", type=int, help="instead of the size's own, and without further variants")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a kernel is not fit to ship")
    parser.add_argument("--output", metavar="DIR", type=Path, help="write the table to DIR/compile.jsonl, too")
    arguments = parser.parse_args()
    if arguments.tokens is not None and arguments.tokens < 1:
        raise InputError(f"--tokens {arguments.tokens}: expected at least 1")
    if launch.INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 is set, under which nothing can be compiled: unset it")
    try:
        if arguments.output:  # now: a wrong path should not cost the compilation
            arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {arguments.output}: cannot be written ({error.strerror})") from error
    tasks = []
    for part, arch, dtype, size in product((*GEMMS, *MODULES), arguments.arch, arguments.dtype, arguments.size):
        tokens = arguments.tokens or MICRO_BATCH.get(size, 1) * SEQ_LEN
        more = [(256, True), (tokens, False)] if arguments.check and not arguments.tokens and arch == "sm_90" else []
        tasks.append((arch, dtype, size, part, [(tokens, True), *more]))
    rows, broken = [], []
    with Pool(min(len(tasks), os.cpu_count() or 1)) as pool:
        futures = {pool.submit(compile_part, *task): task for task in tasks}
        for future in progress(as_completed(futures), "parts", len(tasks)):
            try:
                rows += future.result()
            except Failure as failure:
                broken.append(f"{' '.join(futures[future][:4])}: {failure}")
    table = pd.DataFrame(sorted(rows, key=lambda row: (row["arch"], row["dtype"], row["size"])))
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{table.to_string(index=False)}")
    if arguments.output:
        table.to_json(arguments.output / "compile.jsonl", orient="records", lines=True)
    name = "{arch} {dtype} {size} {kernel}, {tokens} tokens, aligned={aligned}: ".format_map
    wrong = [name(row) + text for row in rows for text in complaints(row)]
    print("\n".join(broken + wrong) or "nothing to complain of")
    sys.exit(bool(broken or (wrong and arguments.check)))


if __name__ == "__main__":
    main()
