"""Helpers shared by the kernel tests: device, test data and accuracy checks.

The ground truth is the op's formula in float64. A kernel's error has no absolute tolerance. It is compared with the
error of the PyTorch reference in the same dtype.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A kernel's error can be at most this many times the reference's.
FACTOR = dict.fromkeys(DTYPES, 1.5)
if DEVICE == "cpu":
    FACTOR[torch.bfloat16] *= 2  # the interpreter truncates to bf16 where a GPU rounds
EPS = torch.finfo(torch.float32).eps
# GPUs approximate exp, log, rsqrt and division. The results are off by a few fp32 rounding errors.
FLOOR = 4 * EPS


def sum_floor(length: int) -> float:
    """Return the relative error of adding `length` fp32 products one by one. torch uses a more accurate order.

    A partial sum of i unit products is about sqrt(i), and each rounding adds eps / sqrt(12) times that as error.
    The relative error of the result is sqrt(length / 24) eps.
    """
    return max(FLOOR, (length / 24) ** 0.5 * EPS)


def error(result, truth) -> float:
    """Return the relative root-mean-square error. An all-zeros result has error 1."""
    return ((result.double() - truth).norm() / truth.norm()).item()


def assert_accurate(names, results, plains, truths, factor, floor=FLOOR, luck=0.0):
    """Assert that dtypes match and each result's error is at most factor times the plain result's error, plus floor.

    luck: extra tolerance for results with fewer than 40 values, where the plain error can be small by chance.
    """
    for name, result, plain, truth in zip(names, results, plains, truths, strict=True):
        assert (result.dtype, result.shape, result.is_contiguous()) == (plain.dtype, truth.shape, True), name
        if truth.any():
            allowed = factor * error(plain, truth) + floor + luck * (result.numel() < 40)
            assert error(result, truth) <= allowed, name
        else:
            assert not result.any(), name


def assert_equal(results, expected):
    """Assert equal values and dtypes. Accepts tensors, or nested sequences and dicts of tensors."""
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def randn(*shape, seed=0, dtype=torch.float32):
    """Return unit-scale random values that are the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def opcheck(op, args):
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs that can hold uninitialized memory
    torch.library.opcheck(op, args)


@contextmanager
def saved_tensors():
    """Context manager that collects the tensors saved for backward, keyed by address."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        yield saved


def record_launches(monkeypatch, module, kernel_name):
    """Return a list that collects the grid and keyword arguments of each launch of a kernel."""
    launches, kernel = [], getattr(module, kernel_name)

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((grid, kwargs)) or kernel[grid](*args, **kwargs)

    monkeypatch.setattr(module, kernel_name, Recorded())
    return launches


class LargestTensor(TorchDispatchMode):
    """Context manager that records the size of the largest tensor that any op returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result
