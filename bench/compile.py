"""Compile every kernel as it ships, for GPUs that need not be present, and print what each takes.

The ops run on tensors without data, up to their launches, which compile into Triton's cache: what is checked is what
is launched, and a run with the same TRITON_CACHE_DIR finds its kernels compiled. The token counts are those of `bench
throughput`. --check compiles sm_90 in two more variants, as an argument that is 1 or a multiple of 16 becomes part of
the code: with 256 tokens, and with pointers that are not 16-byte aligned. The exit status is 1 if a kernel does not
compile, and with --check also if sm_90 spills, serialises wgmma, or lacks wgmma or TMA where the design has them, or if
a kernel asks for more shared memory than its device has.
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
from acceleron.kernels.launch import Device

from .op_cases import Draw, cases
from .rows import progress
from .shapes import MICRO_BATCH, SEQ_LEN
from .worker import Failure, pool

RUN = JITFunction.run
SIZES = ("tiny", "small", "medium", "large")
# Widths that no tile divides, so that most loads are by pointers.
ODD = ModelConfig(
    d_model=104, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=5, d_ff=100, d_ff_shared=36, vocab_size=1000
)
DTYPES = TRAINING_DTYPES | {"fp16": torch.float16}
# The parts of a size that compile in parallel, longest first: each kernel of a GEMM, and the other kernels of a module.
GEMMS = ("_up_kernel", "_rows_kernel", "_weight_grad_kernel")
MODULES = ("router", "routing", "grouped_gemm", "expert_mlp", "rope", "cross_entropy", "rms_norm", "swiglu")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The flag of an ELF section with code, and opcodes of NVIDIA's instructions.
EXECUTABLE, NOP, BAR = 4, 0x918, 0xB1D


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


class Launching(TorchDispatchMode):
    """In this context custom ops run as far as their launches, where fake tensors alone would skip them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "acceleron_triton":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def offline(arch: str, run: Callable, device_name: str = "any", offset: int = 0) -> Iterator[None]:
    """In this context CPU tensors have no data, and the Triton kernels are those for a GPU of `arch`.

    An op that reads a value on the host (`.item()`, a mask as index) raises. run: replaces JITFunction.run, with its
    arguments. offset: of each tensor's memory, in bytes from an aligned address, which CUDA's allocator returns.
    """

    def address(x: FakeTensor) -> int:
        return offset + x.storage_offset() * x.element_size()

    driver = SimpleNamespace(get_current_device=lambda: arch, get_current_stream=lambda device: 0)
    driver.get_current_target = lambda: TARGETS[arch].triton  # all that Triton asks of a driver before it compiles
    triton.runtime.driver.set_active(driver)
    with (
        mock.patch.object(launch, "cpu_device", Device(device_name, arch, TARGETS[arch].processors)),
        mock.patch.object(ops, "_backend", "triton"),
        mock.patch.object(JITFunction, "run", lambda *args, **kwargs: run(*args, **kwargs)),
        mock.patch.object(FakeTensor, "data_ptr", address, create=True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def refuse_interpreter():
    """Raise InputError under TRITON_INTERPRET=1, where kernels are not those that a GPU runs."""
    if launch.INTERPRETED:
        raise InputError("TRITON_INTERPRET=1 is set, under which nothing can be compiled: unset it")


def compile_only(function: JITFunction, *args, warmup: bool, **kwargs):
    """Replaces JITFunction.run. Returns the compiled kernel."""
    return RUN(function, *args, warmup=True, **kwargs)


def describe(arch: str, function: JITFunction, kernel, arguments: dict) -> dict:
    """What a compiled kernel takes, per program or per thread, as its binary says.

    instructions and barriers are static counts; 0 for AMD, which is not counted.
    """
    wgmma, tma, serialised, instructions, barriers = 0, 0, False, 0, 0
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
        if wgmma:  # whether ptxas makes each wait for the one before
            serialised = "serialized" in _nvidia_tool("ptxas", "-v", f"--gpu-name={arch}a", "-o", os.devnull, file=text)
    blocks = [str(value) for name, value in arguments.items() if name.startswith(("BLOCK", "ROWS", "COLS"))]
    shape = dict(blocks="x".join(blocks) or "-", warps=kernel.metadata.num_warps, stages=kernel.metadata.num_stages)
    memory = dict(registers=registers, spilled_bytes=spilled, shared_bytes=kernel.metadata.shared)
    code = dict(instructions=instructions, barriers=barriers, wgmma=wgmma, tma=tma, serialised=serialised)
    return dict(kernel=function.__name__) | shape | memory | code


def opcodes(cubin: bytes) -> np.ndarray:
    """The opcode of every instruction: the lowest 12 of its 128 bits (since Volta), in the ELF file's code sections."""
    (headers,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<QQQQ", cubin, headers + i * size + 8) for i in range(count)]
    code = b"".join(cubin[offset : offset + length] for flags, _, offset, length in sections if flags & EXECUTABLE)
    return np.frombuffer(code, "<u8")[::2] & 0xFFF


def _nvidia_tool(tool: str, *arguments: str, file: bytes | str) -> str:
    """What a tool of Triton's wheel prints about a file of these contents."""
    with tempfile.NamedTemporaryFile() as temporary:
        temporary.write(file if isinstance(file, bytes) else file.encode())
        temporary.flush()
        command = [NVIDIA_TOOLS / tool, *arguments, temporary.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def run_ops(config: ModelConfig, tokens: int, dtype: torch.dtype):
    """Run every op of a size and of its dense baseline, forward and backward, and forward alone."""
    draw = Draw(dtype, torch.device("cpu"))
    inputs = {case.op: case.make(draw) for case in cases("", config, tokens, dtype) if case.op in torch_ops.__all__}
    x, scores, ids, *weights = inputs["expert_mlp"]
    inputs["expert_mlp"] = x, scores, ops.dispatch_plan(ids, config.num_experts), *weights
    x, weight, residual = inputs["rms_norm"]
    inputs["rms_norm"] = x, weight, config.norm_eps, residual
    more = [("rms_norm", (x, weight, config.norm_eps)), ("swiglu", (draw(tokens, 2 * config.d_ff_dense),))]
    for name, values in [*inputs.items(), *more]:
        op = getattr(ops, name)
        with torch.no_grad():
            op(*values)
        outputs = op(*values)
        outputs = [y for y in ([outputs] if isinstance(outputs, Tensor) else outputs) if y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    normed, _ = ops.rms_norm(*inputs["rms_norm"])  # the model's last, whose sum is not used
    normed.backward(torch.empty_like(normed))


def compile_part(arch: str, dtype: str, size: str, part: str, variants: list[tuple[int, bool]]) -> list[dict]:
    """Compile a part's kernels for these numbers of tokens, with aligned pointers or not. Returns distinct rows."""
    rows = {}
    names = {"any", *(key[1] for key in configs.table() if key[0] == arch)}

    def compile_if_wanted(function: JITFunction, *args, **kwargs):
        if part == (function.__name__ if function.__name__ in GEMMS else function.__module__.rpartition(".")[2]):
            kernel = compile_only(function, *args, **kwargs)
            if kernel.hash not in rows:
                rows[kernel.hash] = which | describe(arch, function, kernel, kwargs)

    for (tokens, aligned), name in product(variants, names):
        which = dict(arch=arch, size=size, dtype=dtype, tokens=tokens, aligned=aligned)
        with offline(arch, compile_if_wanted, name, 0 if aligned else 2), Launching():
            run_ops(ODD if size == "odd" else ModelConfig.preset(size), tokens, DTYPES[dtype])
    return [*rows.values()]


def complaints(row: dict) -> list[str]:
    """What is wrong with a kernel that is to be shipped."""
    most, on_hopper = TARGETS[row["arch"]].shared_bytes, row["arch"] == "sm_90"
    gemm = on_hopper and row["dtype"] != "fp32" and row["kernel"] in GEMMS
    with_tma = gemm and row["aligned"] and row["size"] != "odd" and row["kernel"][1:-7] not in configs.without_tma()
    found = {
        f"{row['shared_bytes']} bytes of shared memory, of {most}": row["shared_bytes"] > most,
        f"{row['spilled_bytes']} bytes spilled": on_hopper and row["spilled_bytes"] > 0,
        "wgmmas serialised by ptxas": on_hopper and row["serialised"],
        "no wgmma": gemm and not row["wgmma"],
        "no TMA": with_tma and not row["tma"],
    }
    return [text for text, wrong in found.items() if wrong]


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--model_size", nargs="+", choices=[*PRESETS, "odd"], default=[*SIZES, "odd"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tokens", type=int, help="instead of the size's own, and without further variants")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a kernel is not fit to ship")
    arguments = parser.parse_args()
    if arguments.tokens is not None and arguments.tokens < 1:
        raise InputError(f"--tokens {arguments.tokens}: expected at least 1")
    refuse_interpreter()
    rows, wrong = [], []
    with pool(os.cpu_count() or 1) as call:
        futures = {}
        chosen = arguments.arch, arguments.dtype, arguments.model_size
        for part, arch, dtype, size in product((*GEMMS, *MODULES), *chosen):
            variants = [(arguments.tokens or MICRO_BATCH.get(size, 1) * SEQ_LEN, True)]
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
    wrong += [name(row) + text for row in rows for text in complaints(row)]
    print("\n".join(wrong) or "nothing to complain of")
    sys.exit(bool(broken or (wrong and arguments.check)))
