"""Launch helpers: find the target device, and check that a kernel can read its arguments."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

# With TRITON_INTERPRET=1, kernels run on CPU tensors. It must be set before triton is imported, because Triton decides
# at import time whether its own functions are interpreted.
INTERPRETED = triton.knobs.runtime.interpret
_SET_LATE = isinstance(tl.sigmoid, JITFunction) == INTERPRETED

# Maximum number of programs of a kernel that leaves partial sums to a second kernel. Reading 256 x 256 sums takes 5 µs.
MAX_PROGRAMS = 256


class Device(NamedTuple):
    """Target of a launch. arch: "sm_90", "gfx942", … or "interpreter"; processors: number of SMs or compute units."""

    name: str
    arch: str
    processors: int


# Device assumed for CPU tensors; None unless the interpreter is active. With three processors, a persistent program
# runs several tiles even in a small test. `python -m bench compile` sets a GPU here to compile without running.
cpu_device = Device("interpreter", "interpreter", 3) if INTERPRETED and not _SET_LATE else None


@cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    arch = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    return Device(properties.name, arch, properties.multi_processor_count)


def device_of(x: Tensor) -> Device:
    """Return the target device of a launch on x."""
    return _cuda_device(x.device.index) if x.device.type == "cuda" else cpu_device


def unavailable(device: torch.device) -> str | None:
    """Return the reason the Triton kernels cannot run on tensors of this device, or None if they can."""
    if _SET_LATE:
        return "TRITON_INTERPRET was changed after triton was imported: set it earlier"
    if device.type == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU: unset it"
    if device.type == "cuda":
        if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
            return None
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if device.type == "cpu" and cpu_device:
        return None
    return f"Triton needs a GPU, but the device is {device.type}; TRITON_INTERPRET=1 interprets the kernels, slowly"


def check_launch(op: str, contiguous: bool = True, **tensors: Tensor | None):
    """Raise a ValueError that names the argument if a kernel cannot read it. None is skipped.

    A kernel cannot read float64 tensors, tensors on a device without Triton, or non-contiguous tensors. With
    contiguous=False, only the last axis must be contiguous.
    """
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype == torch.float64:
            raise ValueError(f"{op}: {name}: expected bfloat16 or float16 or float32, but got float64")
        if x.device.type != "cuda" and cpu_device is None:
            raise ValueError(f"{op}: {name}: Triton needs a GPU, but it is on {x.device}; use the reference")
        if not (x.is_contiguous() or (not contiguous and (x.numel() == 0 or x.stride(-1) == 1))):
            wanted = "a contiguous tensor" if contiguous else "a last axis of stride 1"
            raise ValueError(f"{op}: {name}: expected {wanted}, but the strides are {x.stride()}; call .contiguous()")
