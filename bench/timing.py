"""Timing: one call on its own, calls in turns, their spread, and the most that this device does.

Interleaved: every provider once a round, so that a noisy machine is noisy for all of them.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

FLUSH_BYTES = 1 << 28  # more than any L2 holds
# The device waits for 2 ms or so before what is timed: by then the host has queued the launches of any of our ops.
WAIT_CYCLES = 4_000_000
# A sample on a CPU repeats a call until it has lasted this long: the clock and its call cost less than 1e-4 of it.
CPU_SAMPLE_SECONDS = 5e-3
# Of the ceilings: the GEMM's side and the copied bytes, on CUDA and on a CPU, where the copy is past the L3.
GEMM_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}


def seconds_of(call: Callable[[], object], device: torch.device, flush: Callable[[], object] | None = None) -> float:
    """Seconds of one call. `flush` runs before it, untimed: `flush_l2(device)` leaves nothing of the call's in the L2.

    On CUDA these are seconds of the device between two events, with the call's launches queued before it starts, so
    that the host's time does not count unless the call waits for the device. On a CPU a short call is repeated, and
    the mean of the sample is returned.
    """
    if flush:
        flush()
    if device.type == "cuda":
        torch.cuda._sleep(WAIT_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    count, began = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - began
        if elapsed >= CPU_SAMPLE_SECONDS:
            return elapsed / count


def flush_l2(device: torch.device) -> Callable[[], object] | None:
    """A function that overwrites the L2 of a CUDA device; None for a CPU, whose caches are left as calls find them."""
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_ if device.type == "cuda" else None


def measure(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    before: dict[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in each of the rounds, interleaved, after a round that warms up.

    `before` has what a call of the same name needs done, untimed, before each of its samples.
    """
    flush, before = flush_l2(device), before or {}

    def sample(name: str) -> float:
        if name in before:
            before[name]()
        return seconds_of(calls[name], device, flush)

    return interleave({name: lambda name=name: sample(name) for name in calls}, rounds)


def interleave(providers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each provider in each round; a first round warms up and is not counted."""
    seconds = {name: [] for name in providers}
    for count in tqdm(range(rounds + 1), desc="rounds", dynamic_ncols=True, leave=False, disable=None):
        for name, run in providers.items():
            elapsed = run()
            if count:
                seconds[name].append(elapsed)
    return seconds


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, interpolated between values."""
    return tuple(float(value) for value in np.percentile(values, [50, 20, 80]))


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large GEMM on random data in this dtype, and bytes/s of a large copy, read and written: the best of
    ten each, measured now."""
    side, size = GEMM_SIDE[device.type], COPY_BYTES[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    product = torch.empty_like(a)
    gemm = measure({"gemm": lambda: torch.mm(a, b, out=product)}, device, 10)["gemm"]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure({"copy": lambda: target.copy_(source)}, device, 10)["copy"]
    return 2 * side**3 / min(gemm), 2 * size / min(copy)
