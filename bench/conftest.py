"""pytest bench: its command-line flags, and the cases they select. TRITON_INTERPRET stays as the user has set it."""

import time

import pytest
import torch

from acceleron.config import PRESETS
from acceleron.device import resolve_device, resolve_dtype

from .op_cases import OPS, PUBLISHED
from .op_peers import providers
from .ops import BOTH, DTYPES, FORWARD, TOKENS, Settings

DEFAULT_SIZES = {"cuda": ["tiny"], "cpu": ["nano"]}


def pytest_addoption(parser):
    group = parser.getgroup("acceleron's op benchmarks")
    group.addoption("--size", nargs="+", choices=[*PRESETS, *PUBLISHED], help="default: tiny on a GPU, nano on a CPU")
    group.addoption("--op", nargs="+", choices=OPS, default=OPS)
    group.addoption("--tokens", type=int, help="at the model sizes; default 65536 on a GPU, 256 on a CPU")
    group.addoption("--dtype", choices=("auto", *DTYPES), default="auto")


def pytest_configure(config):
    device, name = resolve_device("auto"), config.getoption("--dtype")
    dtype = DTYPES[name] if name in DTYPES else resolve_dtype(name, device)
    sizes = config.getoption("--size") or DEFAULT_SIZES[device.type]
    tokens = config.getoption("--tokens") or TOKENS[device.type]
    config.settings = Settings(tuple(sizes), tuple(config.getoption("--op")), tokens, dtype, device)


def _clock():
    """Seconds, once the GPU has finished what was launched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_generate_tests(metafunc):
    if "provider" not in metafunc.fixturenames:
        return
    settings, params = metafunc.config.settings, []
    for number, case in enumerate(settings.cases()):
        for provider in providers(case, settings.device):
            for step in (FORWARD,) if case.op == "dispatch_plan" else (FORWARD, BOTH):
                group = f"{case.op}, {case.shape}, {step}"
                marks = [pytest.mark.benchmark(group=group, timer=_clock, max_time=0.25)]
                marks += [pytest.mark.skip(provider.absent)] if provider.absent else []
                name = "-".join((case.op, case.shape, step, provider.name)).replace(" ", "_")
                params.append(pytest.param(number, step, provider.name, id=name, marks=marks))
    metafunc.parametrize(("number", "step", "provider"), params)


def pytest_report_header(config):
    return f"ops on {config.settings.device}, {str(config.settings.dtype).removeprefix('torch.')}"
