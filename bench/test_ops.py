"""pytest bench: every op, shape, pass and provider under pytest-benchmark, none without a passed check.

The providers follow one another here; `python -m bench ops` interleaves them, and on a GPU times device events.
"""

from .ops import bind, check, prepare


def test_op(benchmark, number, step, provider, pytestconfig):
    case, providers, inputs, truth = prepare(pytestconfig.settings, number)
    what, error, allowed = check(case, providers[provider], inputs, truth)
    assert error <= allowed, what
    benchmark.extra_info |= {"op": case.op, "shape": case.shape, "pass": step, "check": what, "error": error}
    benchmark(bind(providers[provider], inputs, truth.output_grads)[step])
