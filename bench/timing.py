"""Timing of single calls and interleaved rounds, and this device's ceilings."""

from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from .rows import progress

# Matrix side length and bytes copied when measuring the ceilings. The CPU's copy is larger than its L3 cache.
GEMM_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds per call over about 10 ms of calls. CUDA: device events, cold L2; CPU: wall clock."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=1, rep=10, return_mode="median") / 1e3
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.01).median


def interleave(samples: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call the samples in interleaved rounds. Returns one value per round, without the warmup round."""
    values = {name: [] for name in samples}
    for count in progress(range(rounds + 1), desc="rounds", leave=False, disable=None):
        for name, sample in samples.items():
            value = sample()
            if count:
                values[name].append(value)
    return values


def measure(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Return the seconds per call, timed in interleaved rounds, with one value per round."""
    return interleave({name: lambda call=call: seconds_of(call, device) for name, call in calls.items()}, rounds)


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return FLOP/s of a large GEMM and bytes/s (read + written) of a large copy, both the best of ten runs."""
    side, size = GEMM_SIDE[device.type], COPY_BYTES[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    product, target = torch.empty_like(a), torch.empty_like(source)
    calls = {"gemm": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    seconds = measure(calls, device, 10)
    return 2 * side**3 / min(seconds["gemm"]), 2 * size / min(seconds["copy"])
