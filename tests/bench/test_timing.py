"""The timing harness against clocks, copies and percentiles taken by hand."""

import time

import numpy as np
import pytest
import torch

from bench import timing

CPU = torch.device("cpu")


def test_a_sleep_is_measured_as_long_as_it_is():
    # Sleeping never ends early; how late it ends is up to the machine, so the least of a few counts.
    measured = min(timing.seconds_of(lambda: time.sleep(0.02), CPU) for _ in range(10))
    assert 0.02 <= measured < 0.0215


def test_a_short_call_is_measured_as_the_mean_of_many():
    calls = []

    def spin():
        calls.append(None)
        end = time.perf_counter() + 100e-6
        while time.perf_counter() < end:
            pass

    measured = min(timing.seconds_of(spin, CPU) for _ in range(20))
    assert len(calls) >= 20 * 10
    assert 100e-6 <= measured < 108e-6


def test_what_precedes_a_sample_is_not_timed_and_comes_once():
    flushes = []

    def flush():
        flushes.append(None)
        time.sleep(0.05)

    assert timing.seconds_of(lambda: time.sleep(0.001), CPU, flush) < 0.02
    assert len(flushes) == 1


def test_a_copy_moves_the_bytes_per_second_that_a_clock_around_it_shows():
    source = np.ones(1 << 24, dtype=np.float32)
    target = np.zeros_like(source)
    by_hand = []

    def copy():
        began = time.perf_counter()
        np.copyto(target, source)
        by_hand.append(time.perf_counter() - began)

    # The same copies by both clocks, so that what else the machine does is in both.
    measured = timing.seconds_of(copy, CPU)
    moved = 2 * source.nbytes
    assert moved / measured == pytest.approx(moved / np.mean(by_hand), rel=0.02)
    assert 1e8 < moved / measured < 1e12


def test_providers_take_turns_after_a_round_that_is_not_counted():
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    restored = []
    calls = {"slow": call("slow", 0.02), "fast": call("fast", 0.006)}
    seconds = timing.measure(calls, CPU, 3, before={"fast": lambda: restored.append(len(order))})
    assert order == ["slow", "fast"] * 4
    assert restored == [1, 3, 5, 7]
    assert {name: len(values) for name, values in seconds.items()} == {"slow": 3, "fast": 3}
    assert min(seconds["slow"]) >= 0.02 > min(seconds["fast"]) >= 0.006


def test_spread_is_numpys_percentiles():
    values = np.random.default_rng(0).exponential(size=37)
    assert timing.spread(values.tolist()) == pytest.approx(tuple(np.percentile(values, q) for q in (50, 20, 80)))
    assert timing.spread([3.0]) == (3.0, 3.0, 3.0)
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 2.0, 5.0)


def test_ceilings_agree_with_numpys_gemm_and_copy():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for one another on a busy machine would be measured instead
    try:
        found = [timing.ceilings(CPU, torch.float32) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    flops, copied = (max(values) for values in zip(*found, strict=True))
    a = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    source = np.ones(timing.COPY_BYTES["cpu"], dtype=np.uint8)
    target = np.zeros_like(source)
    gemms, copies = [], []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        middle = time.perf_counter()
        np.copyto(target, source)
        gemms.append(middle - began)
        copies.append(time.perf_counter() - middle)
    # numpy brings its own BLAS, which has as many threads as it likes: another measure of about the same thing.
    assert 1 / 5 < flops / (2 * 1024**3 / min(gemms)) < 5
    assert 1 / 3 < copied / (2 * source.nbytes / min(copies)) < 3
