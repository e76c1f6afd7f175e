"""pytest bench: every op, shape, pass and provider under pytest-benchmark, none without a passed check.

pytest-benchmark's own figures are of its clock, which waits for the GPU; `extra_info` has the row of `python -m bench
ops`, whose times on a GPU are of device events. Providers follow one another here: the command interleaves them.
"""

from functools import cache, lru_cache

import torch

from . import timing
from .op_cases import Case, Draw
from .ops import bind, check, row_of, times_of, truth_of
from .results import complaint

ROUNDS = 20
ceilings = cache(timing.ceilings)


@lru_cache(maxsize=1)  # the tests of a case follow one another
def prepared(case: Case, dtype: torch.dtype, device: torch.device):
    """Inputs and truth of a case."""
    torch.compiler.reset()
    draw = Draw(dtype, device)
    inputs = case.make(draw)
    return inputs, truth_of(case, inputs, draw)


def test_op(benchmark, case, step, provider, pytestconfig):
    device, dtype = pytestconfig.device, pytestconfig.dtype
    inputs, truth = prepared(case, dtype, device)
    checked = check(case, provider, inputs, truth)
    assert complaint(checked) is None, complaint(checked)
    calls, restore = bind(provider, inputs, truth.output_grads)
    if provider.in_place:
        benchmark.pedantic(calls[step], setup=restore, rounds=ROUNDS)
    else:
        benchmark(calls[step])
    if benchmark.disabled:
        return
    if device.type == "cuda":
        before = {provider.name: restore} if restore else {}
        seconds = timing.measure({provider.name: calls[step]}, device, ROUNDS, before)[provider.name]
    else:
        seconds = benchmark.stats.stats.data
    times = times_of(case, step, seconds, ceilings(device, dtype))
    benchmark.extra_info.update(row_of(case, step, provider, dtype, checked) | times)
