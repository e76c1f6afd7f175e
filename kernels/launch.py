"""What the launch of every Triton kernel needs: the device it is for, and checks of the arguments before it."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

# With TRITON_INTERPRET=1 kernels run on CPU tensors, if it is set before triton is imported: triton's own functions are
# interpreted or not from then on, and ours must be as they are.
INTERPRETED = triton.knobs.runtime.interpret
_SET_LATE = isinstance(tl.sigmoid, JITFunction) == INTERPRETED


# Programs of a kernel whose sums a second kernel adds: few enough that 256 x 256 of them take 5 µs to read.
MAX_PROGRAMS = 256


class Device(NamedTuple):
    """What decides a launch. arch: "sm_90", "gfx942", … or "interpreter"; processors: SMs or compute units."""

    name: str
    arch: str
    processors: int


# Whom CPU tensors are for: nobody, unless the interpreter runs. Three programs: in a test of a few tiles, a persistent
# program then runs through more than one. `python -m bench compile` puts a GPU here, and compiles without running.
cpu_device = Device("interpreter", "interpreter", 3) if INTERPRETED and not _SET_LATE else None


@cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    arch = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    return Device(properties.name, arch, properties.multi_processor_count)


def device_of(x: Tensor) -> Device:
    """The device that a launch on x is for."""
    return _cuda_device(x.device.index) if x.device.type == "cuda" else cpu_device


def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels can't run on tensors of this device, or None if they can."""
    if _SET_LATE:
        return "TRITON_INTERPRET was changed after triton was imported: set it before"
    if device.type == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET=1 is set, under which kernels are for the CPU: unset it"
    if device.type == "cuda":
        if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
            return None
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if device.type == "cpu" and cpu_device:
        return None
    return f"Triton needs a GPU, and this is a {device.type}; TRITON_INTERPRET=1 interprets the kernels on it, slowly"


def check_launch(op: str, contiguous: bool = True, **tensors: Tensor | None):
    """Raise a ValueError that names the argument unless a kernel can read it. An argument that is None is skipped.

    It must not be float64, must be where Triton can run, and contiguous, or at least so along its last axis.
    """
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype == torch.float64:
            raise ValueError(f"{op}: {name}: expected bfloat16 or float16 or float32, but got float64")
        if x.device.type != "cuda" and cpu_device is None:
            raise ValueError(f"{op}: {name}: Triton needs a GPU, but it is on {x.device}; use the reference")
        if contiguous and not x.is_contiguous():
            raise ValueError(
                f"{op}: {name}: expected a contiguous tensor, but strides are {x.stride()}; call .contiguous()"
            )
        if not contiguous and x.numel() and x.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name}: expected a last axis of stride 1, but the strides are {x.stride()}; call .contiguous()"
            )
