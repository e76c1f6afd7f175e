"""pytest bench: the ops of `python -m bench ops` under pytest-benchmark. An op must pass its check to be timed.

The size is tiny on a GPU and nano on a CPU. `-k swiglu` selects an op. Providers run one after another here; `python -m
bench ops` interleaves them, and on a GPU times them with device events.
"""

import time

import pytest
import torch

from acceleron.device import resolve_device, resolve_dtype

from .op_cases import OPS
from .op_peers import providers
from .ops import BOTH, FORWARD, TOKENS, Settings, check, prepare, warm_calls

DEVICE = resolve_device("auto")
SIZE = "tiny" if DEVICE.type == "cuda" else "nano"
SETTINGS = Settings((SIZE,), tuple(OPS), TOKENS[DEVICE.type], resolve_dtype("auto", DEVICE), DEVICE)
TESTS = [
    pytest.param(number, step, each.name, id=f"{case.op}-{step}-{each.name}".replace(" ", "_"))
    for number, case in enumerate(SETTINGS.cases())
    for step in ((FORWARD,) if case.op == "dispatch_plan" else (FORWARD, BOTH))
    for each in providers(case, DEVICE)
    if not each.absent
]


def clock() -> float:
    """Return the wall-clock seconds once the GPU is idle."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=clock, max_time=0.25)
@pytest.mark.parametrize(("number", "step", "provider"), TESTS)
def test_op(benchmark, number, step, provider):
    case, providers, inputs, truth = prepare(SETTINGS, number)
    what, error, allowed = check(case, providers[provider], inputs, truth)
    assert error <= allowed, what
    benchmark.group = f"{case.op}, {case.shape}, {step}"
    benchmark.extra_info |= {"check": what, "error": error, "allowed": allowed}
    benchmark(warm_calls(case, providers[provider], inputs, truth.output_grads)[step])
