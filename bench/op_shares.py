"""The share of a step's time that each kind of op takes, by torch's profiler."""

import re
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from acceleron.device import synchronize

# Of kernels, and on a CPU of ops, that are not our Triton kernels: the first pattern found in the name says the kind.
KINDS = (
    ("compiled elementwise", r"^triton_|compiled"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("optimizer", r"adam|multi_tensor|foreach|linalg_vector_norm|lpnorm"),
    ("GEMM", r"gemm|nvjet|cutlass|grouped_mm|::mm|::bmm|::addmm|::mv|matmul|linear"),
    ("copies and fills", r"memcpy|memset|copy|::zero_|::fill_|::cat"),
)


def our_kernels() -> dict[str, str]:
    """The file in kernels/ of each Triton kernel, by its name."""
    modules = (module for name, module in sys.modules.items() if name.startswith("acceleron.kernels."))
    return {
        name: f"kernels/{module.__name__.rpartition('.')[2]}"
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }


def op_shares(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Of the device's busy time in one step, or of the threads' time on a CPU; largest first.

    Our Triton kernels go by their file. On a CPU a time is an op's own, less that of the ops it calls: the experts'
    GEMMs are among all GEMMs.
    """
    on_gpu, ours = device.type == "cuda", our_kernels()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        step()
        synchronize(device)
    times: dict[str, float] = {}
    for event in profiled.key_averages():
        patterns = (kind for kind, pattern in KINDS if re.search(pattern, event.key, re.IGNORECASE))
        kind = ours.get(event.key) or next(patterns, "other")
        seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[kind] = times.get(kind, 0.0) + seconds
    total = sum(times.values())
    return {kind: time / total for kind, time in sorted(times.items(), key=lambda item: -item[1]) if time > 0}
