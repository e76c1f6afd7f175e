"""Devices: parsing of flags, compiler lookup, peak FLOP/s and memory."""

import os
import platform
import re
import resource
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .errors import InputError

# Dense bf16 TFLOP/s from the datasheets. The keys are substrings of the device name.
DATASHEET_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "GH200": 989, "A100": 312, "MI300X": 1307, "RTX 4090": 165}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA if available, else the CPU. Raises InputError for a device that is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and name.split(":")[0] != "cuda":
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:1")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"--device {name} is not available ({reason}); use auto or cpu") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on CUDA and on CPUs with native bf16 arithmetic, else fp32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" or (device.type == "cpu" and cpu_has_bf16()) else "fp32"
    return DTYPES[name]


def cpu_name() -> str:
    """The architecture and vector instructions, for example "x86_64 CPU, AVX512"."""
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bf16 natively. If not, bf16 GEMMs are 10 to 100 times slower than in fp32."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu._is_avx512_bf16_supported()
    return any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's --dtype value, such as "bf16"."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def missing_compiler(device: torch.device) -> str | None:
    """Return the compiler that torch.compile needs for this device if it is missing, or None if it is installed."""
    usual = "gcc" if device.type == "cuda" else "clang++" if sys.platform == "darwin" else "g++"
    command = os.environ.get("CC" if device.type == "cuda" else "CXX", "").split() or [usual]
    return None if shutil.which(command[0]) else command[0]


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return peak FLOP/s for the MFU and their source: the datasheet, or a GEMM timed by this function."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, tflops in DATASHEET_TFLOPS.items():
            if part in name:
                return tflops * 1e12, f"{part} datasheet"
    size = 4096 if device.type == "cuda" else 1024
    # Use a separate generator: the measurement must not change the random numbers of a training run.
    a, b = torch.randn(2, size, size, device=device, dtype=dtype, generator=torch.Generator(device))
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"measured on a GEMM of {size}³"


@contextmanager
def deterministic_algorithms():
    """Context manager that restricts torch to deterministic algorithms. An op without one raises RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling the results of torch.empty takes time and only helps with debugging.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated memory on CUDA, else the resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device):
    """Reset `peak_memory` to the current size. On a CPU this works only on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def total_memory(device: torch.device) -> int:
    """The device's total memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
