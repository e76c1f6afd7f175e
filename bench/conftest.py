"""pytest bench: what the command line adds, and which cases it makes. TRITON_INTERPRET stays as the user has set it."""

import time
from functools import cache

import pytest
import torch

from acceleron.config import PRESETS
from acceleron.device import resolve_device, resolve_dtype

from .op_cases import OPS, PUBLISHED, select_cases
from .op_peers import Provider, providers
from .ops import DTYPES, TOKENS

DEFAULT_SIZES = {"cuda": ["tiny"], "cpu": ["nano"]}


def pytest_addoption(parser):
    group = parser.getgroup("acceleron's op benchmarks")
    group.addoption("--size", nargs="+", choices=[*PRESETS, *PUBLISHED], help="default: tiny on a GPU, nano on a CPU")
    group.addoption("--op", nargs="+", choices=OPS, default=OPS)
    group.addoption("--tokens", type=int, help="at the model sizes; default 65536 on a GPU, 256 on a CPU")
    group.addoption("--dtype", choices=("auto", *DTYPES), default="auto")


def pytest_configure(config):
    config.device = resolve_device("auto")
    name = config.getoption("--dtype")
    config.dtype = DTYPES[name] if name in DTYPES else resolve_dtype(name, config.device)


@cache
def _providers(op: str, device: torch.device) -> list[Provider]:
    return providers(op, device)


def _clock():
    """Seconds, once the GPU is done with what was launched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_generate_tests(metafunc):
    if "provider" not in metafunc.fixturenames:
        return
    config = metafunc.config
    tokens = config.getoption("--tokens") or TOKENS[config.device.type]
    sizes = config.getoption("--size") or DEFAULT_SIZES[config.device.type]
    params = []
    for case in select_cases(sizes, config.getoption("--op"), tokens, config.dtype):
        for step in case.work:
            timed = pytest.mark.benchmark(group=f"{case.op}, {case.shape}, {step}", timer=_clock, max_time=0.25)
            for provider in _providers(case.op, config.device):
                name = "-".join((case.op, case.shape, step, provider.name)).replace(" ", "_")
                marks = [timed, pytest.mark.skip(provider.absent)] if provider.absent else [timed]
                params.append(pytest.param(case, step, provider, id=name, marks=marks))
    metafunc.parametrize(("case", "step", "provider"), params)


def pytest_report_header(config):
    found = [(op, provider) for op in config.getoption("--op") for provider in _providers(op, config.device)]
    lines = [f"absent: {provider.name} ({op}): {provider.absent}" for op, provider in found if provider.absent]
    return [f"ops on {config.device}, {str(config.dtype).removeprefix('torch.')}", *lines]
