"""Compile every kernel at every shipped configuration for GPUs that need not be there, and print what it takes.

The ops run for real on CPU tensors, up to the launch, which compiles instead: what is checked is what is launched. Of
each kernel: registers a thread, bytes spilled, shared memory, warps and stages, and for Hopper the tensor-core (wgmma)
and TMA instructions. With --check the exit status is 1 if sm_90 spills or lacks wgmma or TMA where the design has them,
or if any kernel asks for more shared memory than its device has.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from acceleron import ModelConfig, kernels
from acceleron.config import PRESETS
from acceleron.device import DTYPES as TRAINING_DTYPES
from acceleron.kernels import configs, launch
from acceleron.kernels.launch import Device

SIZES = ("tiny", "small", "medium", "large")
# Widths that no tile divides, which go by pointers.
ODD = ModelConfig(
    d_model=104, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=5, d_ff=100, d_ff_shared=36, vocab_size=1000
)
DTYPES = TRAINING_DTYPES | {"fp16": torch.float16}
GEMMS = ("_up_kernel", "_hidden_grad_kernel", "_rows_kernel", "_weight_grad_kernel")


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


class Compiled(NamedTuple):
    """What one kernel takes, in one specialisation."""

    arch: str
    size: str
    kernel: str
    blocks: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    tma: int
    serialised: bool  # whether ptxas made the wgmmas wait for one another


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch].triton

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device) -> int:
        return 0


@contextmanager
def compiling(arch: str, device_name: str = "any"):
    """In this context launches on CPU tensors compile for `arch` and run nothing; yields the list of their kernels.

    The list has (JITFunction, CompiledKernel, keyword arguments of the launch).
    """
    launched = []
    run, cpu_device = JITFunction.run, launch.cpu_device

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        for x in args:
            if isinstance(x, Tensor) and not x.is_floating_point():
                x.zero_()  # torch's ops index by what the kernels would have written
        launched.append((self, kernel, kwargs))
        return kernel

    JITFunction.run = compile_only
    launch.cpu_device = Device(device_name, arch, TARGETS[arch].processors)
    triton.runtime.driver.set_active(_Driver(arch))
    try:
        yield launched
    finally:
        JITFunction.run, launch.cpu_device = run, cpu_device


def describe(arch: str, size: str, function: JITFunction, kernel, arguments: dict) -> Compiled:
    """The resources of a compiled kernel, as its binary says."""
    wgmma, tma, serialised = 0, 0, False
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{f}: +(\d+)", text)[1]) for f in ("count", "spill_count"))
        spilled *= 4
    else:
        text = kernel.asm["ptx"]
        wgmma, tma = text.count("wgmma.mma_async"), text.count("cp.async.bulk.tensor")
        usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", file=kernel.asm["cubin"])
        if wgmma:
            serialised = "serialized" in _nvidia_tool("ptxas", "-v", f"--gpu-name={arch}a", "-o", os.devnull, file=text)
        registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    blocks = "x".join(str(value) for name, value in arguments.items() if name.startswith(("BLOCK", "ROWS", "COLS")))
    metadata = kernel.metadata
    return Compiled(
        arch, size, function.__name__, blocks, metadata.num_warps, metadata.num_stages,
        registers, spilled, metadata.shared, wgmma, tma, serialised,
    )  # fmt: skip


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
    """Every op of a size, forward and backward, on memory that nobody reads."""
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
    head = empty(config.vocab_size, D, grad=False)
    rows = min(T, 16)  # as this one's GEMMs do run
    labels = torch.zeros(rows, dtype=torch.int64)
    kernels.linear_cross_entropy(empty(rows, D), head, labels)
    kernels.linear_cross_entropy(empty(rows, D, grad=False), head, labels)


def compile_size(arch: str, size: str, dtype: str, tokens: int, device_name: str) -> list[Compiled]:
    """Compile all kernels of a named size. Each distinct kernel is listed once."""
    with compiling(arch, device_name) as launched:
        kernels.select("triton", torch.device("cpu"))
        run_ops(ODD if size == "odd" else ModelConfig.preset(size), tokens, DTYPES[dtype])
    distinct = {id(kernel): (function, kernel, kwargs) for function, kernel, kwargs in launched}
    return [describe(arch, size, *each) for each in distinct.values()]


def complaints(row: Compiled, dtype: str) -> list[str]:
    """What is wrong with a kernel that is to be shipped."""
    found = []
    if row.shared_bytes > TARGETS[row.arch].shared_bytes:
        found.append(f"{row.shared_bytes} bytes of shared memory, of {TARGETS[row.arch].shared_bytes}")
    if row.arch == "sm_90":
        if row.spilled_bytes:
            found.append(f"{row.spilled_bytes} bytes spilled")
        if dtype != "fp32" and row.kernel in GEMMS and not row.wgmma:
            found.append("no wgmma")
        if dtype != "fp32" and row.kernel in GEMMS and not row.tma and row.size != "odd":
            found.append("no TMA")
        if row.serialised:
            found.append("wgmmas serialised by ptxas")
    return found


def print_table(rows: list[Compiled]):
    form = "{:7} {:7} {:28} {:14} {:>5} {:>6} {:>9} {:>7} {:>6} {:>5} {:>4}"
    print(
        form.format(
            "arch", "size", "kernel", "blocks", "warps", "stages", "registers", "spilled", "shared", "wgmma", "tma"
        )
    )
    for row in rows:
        print(form.format(*row[:-1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--size", nargs="+", choices=[*PRESETS, "odd"], default=[*SIZES, "odd"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tokens", type=int, default=256, help="compiled in are only: 1, a multiple of 16, or another")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a kernel is not fit to ship")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON lines, too")
    arguments = parser.parse_args()
    if arguments.tokens < 1:
        parser.error(f"--tokens {arguments.tokens}: expected at least 1")
    try:
        if arguments.json:  # now, and keeping what is there: a wrong path should not cost the compilation
            open(arguments.json, "a").close()
    except OSError as error:
        parser.error(f"--json {arguments.json}: cannot be written ({error.strerror})")
    if launch.INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 is set, under which nothing can be compiled: unset it")
    tasks = [
        (arch, size, dtype, arguments.tokens, name)
        for arch in arguments.arch
        for dtype in arguments.dtype
        for size in arguments.size
        for name in sorted({"any", *(key[1] for key in configs.table() if key[0] == arch)})
    ]
    rows, wrong = [], []
    # Processes of their own, as a compiler holds the interpreter's lock.
    with ProcessPoolExecutor(min(len(tasks), os.cpu_count() or 1), get_context("spawn")) as pool:
        futures = [pool.submit(compile_size, *task) for task in tasks]
        for task, future in tqdm(zip(tasks, futures, strict=True), "sizes", len(tasks), disable=None):
            for row in future.result():
                rows.append(row)
                wrong += [f"{row.arch} {row.size} {task[2]} {row.kernel}: {text}" for text in complaints(row, task[2])]
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print_table(rows)
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows))
    print("\n".join(wrong) or "nothing to complain of")
    sys.exit(bool(wrong and arguments.check))


if __name__ == "__main__":
    main()
