"""Compile every kernel for several GPUs, without a GPU, and print registers, spills, shared memory and instructions.

The ops run on fake tensors up to their launches, which compile into Triton's cache. So the command checks exactly the
kernels that training launches, and a run with the same TRITON_CACHE_DIR reuses them. The token counts match `bench
throughput`. Triton specializes on arguments that are 1 or multiples of 16, so --check compiles two more variants for
sm_90: 256 tokens, and pointers that are not 16-byte aligned. The exit status is 1 if a kernel does not compile. With
--check it is also 1 if an sm_90 kernel spills, has serialized wgmmas, or does not use wgmma or TMA where it should,
or if a kernel exceeds its GPU's shared memory.
"""

import argparse
import os
import re
import struct
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
from unittest import mock

import numpy as np
import pandas as pd
import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from acceleron import ModelConfig, ops
from acceleron.config import PRESETS
from acceleron.device import DTYPES as TRAINING_DTYPES
from acceleron.errors import InputError
from acceleron.flags import Parser
from acceleron.kernels import configs, launch, torch_ops
from acceleron.kernels.contract import ExpertBuffers
from acceleron.kernels.launch import Device

from .op_cases import RandomTensors, cases
from .rows import progress
from .shapes import MICRO_BATCH, SEQ_LEN
from .worker import Failure, pool

RUN = JITFunction.run
SIZES = ("tiny", "small", "medium", "large")
# No tile size divides these widths, so most loads use pointers.
ODD = ModelConfig(
    d_model=104, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=5, d_ff=100, d_ff_shared=36, vocab_size=1000
)
# Kernels that do not depend on K are compiled once for all of these.
TOP_K = [ModelConfig(num_experts=64, top_k=top_k, d_ff=256, d_ff_shared=256) for top_k in (1, 4, 8, 16)]
SHAPES = {size: [config] for size, config in PRESETS.items()} | {"odd": [ODD], "top-k": TOP_K}
DTYPES = TRAINING_DTYPES | {"fp16": torch.float16}
# Parts of a size compile in parallel, longest first: each GEMM kernel alone, then each module's remaining kernels.
GEMMS = ("_up_kernel", "_rows_kernel", "_hidden_grad_kernel", "_weight_grad_kernel")
MODULES = ("router", "routing", "dispatch", "grouped_gemm", "expert_mlp", "rope", "cross_entropy", "rms_norm", "swiglu")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The flag of an ELF code section, and two SASS opcodes.
EXECUTABLE, NOP, BAR = 4, 0x918, 0xB1D


class Target(NamedTuple):
    triton: GPUTarget
    processors: int
    shared_bytes: int  # shared memory limit per program


# H100 SXM, A100, B200 and MI300X.
TARGETS = {
    "sm_90": Target(GPUTarget("cuda", 90, 32), 132, 232448),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 108, 166912),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 148, 232448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 304, 65536),
}


class LaunchMode(TorchDispatchMode):
    """Run custom ops up to their launches. On fake tensors only their fake implementations would run otherwise."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "acceleron_triton":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def offline(arch: str, run: Callable, device_name: str = "any", offset: int = 0) -> Iterator[None]:
    """Use fake CPU tensors, and select the Triton kernels for a GPU of type `arch`.

    Reading a value on the host (`.item()`, a boolean mask index) raises. run: replaces JITFunction.run. offset: bytes
    between each tensor's address and an aligned one.
    """

    def address(x: FakeTensor) -> int:
        return offset + x.storage_offset() * x.element_size()

    driver = SimpleNamespace(get_current_device=lambda: arch, get_current_stream=lambda device: 0)
    driver.get_current_target = lambda: TARGETS[arch].triton  # all that Triton needs from a driver to compile
    triton.runtime.driver.set_active(driver)
    with (
        mock.patch.object(launch, "cpu_device", Device(device_name, arch, TARGETS[arch].processors)),
        ops.using_backend("triton", torch.device("cpu")),
        mock.patch.object(JITFunction, "run", lambda *args, **kwargs: run(*args, **kwargs)),
        mock.patch.object(FakeTensor, "data_ptr", address, create=True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def reject_interpreter():
    """Raise InputError under TRITON_INTERPRET=1: interpreted kernels cannot be compiled."""
    if launch.INTERPRETED:
        raise InputError("TRITON_INTERPRET=1 prevents compilation: unset it")


def compile_only(function: JITFunction, *args, warmup: bool, **kwargs):
    """A replacement for JITFunction.run. Returns the compiled kernel."""
    return RUN(function, *args, warmup=True, **kwargs)


def kernel_stats(arch: str, function: JITFunction, kernel, arguments: dict) -> dict:
    """Return a kernel's resources per program or thread and its instruction counts, read from its binary.

    Instructions and barriers are static counts. They are 0 on AMD, where they are not counted.
    """
    wgmma = 0
    tma = 0
    serialized = False
    instructions = 0
    barriers = 0
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{f}: +(\d+)", text)[1]) for f in ("count", "spill_count"))
        spilled *= 4
    else:
        found = opcodes(kernel.asm["cubin"])
        instructions, barriers = int((found != NOP).sum()), int((found == BAR).sum())
        text = kernel.asm["ptx"]
        wgmma, tma = text.count("wgmma.mma_async"), text.count("cp.async.bulk.tensor")
        usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", file=kernel.asm["cubin"])
        registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        if wgmma:  # serialized: each wgmma waits for the previous one
            serialized = "serialized" in _nvidia_tool("ptxas", "-v", f"--gpu-name={arch}a", "-o", os.devnull, file=text)
    blocks = [str(value) for name, value in arguments.items() if name.startswith(("BLOCK", "ROWS", "COLS"))]
    shape = dict(blocks="x".join(blocks) or "-", warps=kernel.metadata.num_warps, stages=kernel.metadata.num_stages)
    memory = dict(registers=registers, spilled_bytes=spilled, shared_bytes=kernel.metadata.shared)
    code = dict(instructions=instructions, barriers=barriers, wgmma=wgmma, tma=tma, serialized=serialized)
    return dict(kernel=function.__name__) | shape | memory | code


def opcodes(cubin: bytes) -> np.ndarray:
    """Return each instruction's opcode in the ELF code sections: since Volta, the low 12 of its 128 bits."""
    (headers,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<QQQQ", cubin, headers + i * size + 8) for i in range(count)]
    code = b"".join(cubin[offset : offset + length] for flags, _, offset, length in sections if flags & EXECUTABLE)
    return np.frombuffer(code, "<u8")[::2] & 0xFFF


def _nvidia_tool(tool: str, *arguments: str, file: bytes | str) -> str:
    """Run a tool from Triton's wheel on a file with these contents and return its output."""
    with tempfile.NamedTemporaryFile() as temporary:
        temporary.write(file if isinstance(file, bytes) else file.encode())
        temporary.flush()
        command = [NVIDIA_TOOLS / tool, *arguments, temporary.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def run_ops(config: ModelConfig, tokens: int, dtype: torch.dtype):
    """Run every op of a size and of its dense baseline, with and without a backward pass."""
    randn = RandomTensors(dtype, torch.device("cpu"))
    inputs = {case.op: case.make(randn) for case in cases("", config, tokens, dtype) if case.op in torch_ops.__all__}
    x, scores, ids, *weights = inputs["expert_mlp"]
    inputs["expert_mlp"] = x, scores, ops.dispatch_plan(ids, config.num_experts), *weights
    x, weight, residual = inputs["rms_norm"]
    inputs["rms_norm"] = x, weight, config.norm_eps, residual
    more = [("rms_norm", (x, weight, config.norm_eps)), ("swiglu", (randn(tokens, 2 * config.d_ff_dense),))]
    x, router, *rest = inputs["moe"]
    more.append(("moe", (x, router.to(dtype), *rest)))  # FSDP can gather the router in 16 bits, too
    for name, values in [*inputs.items(), *more]:
        op = getattr(ops, name)
        with torch.no_grad():
            op(*values)
        outputs = op(*values)
        outputs = [y for y in ([outputs] if isinstance(outputs, Tensor) else outputs) if y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    experts = [w.detach() for w in inputs["moe"][2:4]]
    buffers = ExpertBuffers(*(w.to(dtype) for w in experts), *(w.float() for w in experts))
    y = ops.moe(*inputs["moe"], buffers=buffers).y_TD
    y.backward(torch.empty_like(y))
    normed, _ = ops.rms_norm(*inputs["rms_norm"])  # the final norm: its sum is unused
    normed.backward(torch.empty_like(normed))


def compile_part(arch: str, dtype: str, size: str, part: str, variants: list[tuple[int, bool]]) -> list[dict]:
    """Compile a part's kernels for each (tokens, aligned) variant. Returns one row per distinct kernel."""
    rows = {}
    names = {"any", *(key[1] for key in configs.table() if key[0] == arch)}

    def compile_if_in_part(function: JITFunction, *args, **kwargs):
        if part == (function.__name__ if function.__name__ in GEMMS else function.__module__.rpartition(".")[2]):
            kernel = compile_only(function, *args, **kwargs)
            if kernel.hash not in rows:
                rows[kernel.hash] = which | kernel_stats(arch, function, kernel, kwargs)

    for (tokens, aligned), name in product(variants, names):
        which = dict(arch=arch, size=size, dtype=dtype, tokens=tokens, aligned=aligned)
        with offline(arch, compile_if_in_part, name, 0 if aligned else 2), LaunchMode():
            for config in SHAPES[size]:
                run_ops(config, tokens, DTYPES[dtype])
    return [*rows.values()]


def problems(row: dict) -> list[str]:
    """List the reasons why a kernel is not ready to ship."""
    limit, on_hopper = TARGETS[row["arch"]].shared_bytes, row["arch"] == "sm_90"
    gemm = on_hopper and row["dtype"] != "fp32" and row["kernel"] in GEMMS
    with_tma = gemm and row["aligned"] and row["size"] != "odd" and row["kernel"][1:-7] not in configs.without_tma()
    found = {
        f"{row['shared_bytes']} bytes of shared memory, limit {limit}": row["shared_bytes"] > limit,
        f"{row['spilled_bytes']} bytes spilled": on_hopper and row["spilled_bytes"] > 0,
        "wgmmas serialized by ptxas": on_hopper and row["serialized"],
        "no wgmma": gemm and not row["wgmma"],
        "no TMA": with_tma and not row["tma"],
    }
    return [text for text, wrong in found.items() if wrong]


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--model_size", nargs="+", choices=SHAPES, default=[*SIZES, "odd", "top-k"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tokens", type=int, help="override the size's token count and compile only this variant")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a kernel is not ready to ship")
    arguments = parser.parse_args()
    if arguments.tokens is not None and arguments.tokens < 1:
        raise InputError(f"--tokens {arguments.tokens}: expected at least 1")
    reject_interpreter()
    rows, wrong = [], []
    with pool(os.cpu_count() or 1) as call:
        futures = {}
        chosen = arguments.arch, arguments.dtype, arguments.model_size
        for part, arch, dtype, size in product((*GEMMS, *MODULES), *chosen):
            variants = [(arguments.tokens or MICRO_BATCH.get(size, 32) * SEQ_LEN, True)]
            if arguments.check and not arguments.tokens and arch == "sm_90":
                variants += [(256, True), (variants[0][0], False)]
            futures[call(compile_part, arch, dtype, size, part, variants)] = f"{arch} {dtype} {size} {part}"
        for future in progress(as_completed(futures), "parts", len(futures)):
            try:
                rows += future.result()
            except Failure as failure:
                wrong.append(f"{futures[future]}: {failure}")
    broken = len(wrong)
    table = pd.DataFrame(sorted(rows, key=lambda row: (row["arch"], row["dtype"], row["size"])))
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{table.to_string(index=False)}")
    name = "{arch} {dtype} {size} {kernel}, {tokens} tokens, aligned={aligned}: ".format_map
    wrong += [name(row) + text for row in rows for text in problems(row)]
    print("\n".join(wrong) or "no problems found")
    sys.exit(bool(broken or (wrong and arguments.check)))
