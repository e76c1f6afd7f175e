"""Interleaved timing: every provider once a round, so that a noisy machine is noisy for all of them."""

import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm


def interleave(providers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each provider in each round; a first round warms up and is not counted."""
    seconds = {name: [] for name in providers}
    for count in tqdm(range(rounds + 1), desc="rounds", dynamic_ncols=True, disable=None):
        for name, run in providers.items():
            elapsed = run()
            if count:
                seconds[name].append(elapsed)
    return seconds


def report(seconds: dict[str, list[float]], tokens: int, ratios: list[tuple[str, str]]):
    """Tokens/s of each provider, and ratios taken round by round, which drops what slowed a whole round."""
    width = max(map(len, seconds))
    for name, values in seconds.items():
        print(f"{name:{width}}  {_spread([tokens / s for s in values], '{:.1f}')} tokens/s")
    for fast, slow in ratios:
        values = [b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)]
        print(f"{fast} / {slow}: {_spread(values, '{:.2f}')}")


def _spread(values: list[float], form: str) -> str:
    low, middle, high = (form.format(v) for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} .. {high})"


def print_machine():
    """The command, machine, versions and commit that the figures belong to."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0] if lines else cpu
    command = " ".join(sys.orig_argv[1:])
    print(f"$ python {command}")
    print(f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, commit {commit}")
