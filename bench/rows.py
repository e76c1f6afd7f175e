"""Benchmark results: one row type for every command, appended as JSON lines to DIR/results.jsonl.

A row is valid only if it passes a correctness check in the run that measures it. Failures are also rows.
"""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from acceleron.errors import InputError, file_error, path_error

FILE = "results.jsonl"
# Packages that affect results, and environment variables that change which kernels run.
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "moe-ops", "cut-cross-entropy", "flash-attn")
SWITCHES = ("ACCELERON_NO_TMA", "ACCELERON_REFERENCE_OPS", "ACCELERON_TUNED")


@dataclass
class Row:
    """One measurement. Rows with equal benchmark and case are comparable."""

    benchmark: str  # the command
    provider: str  # the implementation measured
    case: dict = field(default_factory=dict)  # the measured configuration, as flat JSON values
    unit: str = ""
    values: list[float] = field(default_factory=list)  # one per round, in `unit`
    group: str = ""  # rows of one command and group share interleaved rounds
    check: str = ""  # what the check compares
    error: float | None = None
    allowed: float | None = None  # the largest error that passes
    details: dict = field(default_factory=dict)  # further values
    failed: str = ""
    absent: str = ""
    about: dict = field(default_factory=dict)  # command, date, commit, device, versions; set by `Results.write`

    @property
    def median(self) -> float:
        return spread(self.values)[0]

    def problem(self) -> str:
        """Return why the row is invalid (failed, absent, or wrong), or an empty string if it is valid."""
        if self.failed or self.absent:
            return self.failed or self.absent
        if not self.check or self.error is None or self.allowed is None:
            return "no correctness check"
        if not self.error <= self.allowed:  # NaN fails
            return f"wrong: {self.check}: error {self.error:.3g}, allowed {self.allowed:.3g}"
        if not all(math.isfinite(value) for value in self.values):
            return f"not finite: {self.values}"
        return ""


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return the median, 20th and 80th percentiles, with linear interpolation."""
    return tuple(float(value) for value in np.percentile(values, [50, 20, 80]))


def ratio(row: Row, other: Row) -> tuple[float, float, float]:
    """Return median, p20 and p80 of the per-round ratio row / other. Slowdowns that hit both cancel out."""
    return spread([a / b for a, b in zip(row.values, other.values, strict=True)])


def number(value: float) -> str:
    """Format a number with four significant digits, or as an integer if it is at least 1,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ranged(values: tuple[float, float, float], size: float = 1) -> str:
    """Format (middle, low, high) as "middle (low .. high)", in units of `size`."""
    middle, low, high = (number(value / size) for value in values)
    return middle if low == high else f"{middle} ({low} .. {high})"


def device_name(device: torch.device) -> str:
    """Name the device, for example "NVIDIA H100 80GB HBM3" or "AMD EPYC 9R14, 2 cores, AVX512"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "") or [platform.machine()]
    amx = " AMX" if getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16") else ""
    return f"{models[0]}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}{amx}"


def default_directory() -> Path:
    """Return the parent directory for results without --output. It is outside the checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acceleron" / "bench"


class Results:
    """Appends rows to <directory>/results.jsonl.

    The default directory is <default_directory()>/<date>-<device>. Raises InputError if the file cannot be written, and
    RunFailed if the disk is full.
    """

    def __init__(self, directory: str | None, device: torch.device):
        name, date = device_name(device), datetime.now(UTC).isoformat(timespec="seconds")
        command = re.sub(r" --output[ =]('[^']*'|\S+)", "", shlex.join(["python", *sys.orig_argv[1:]]))
        git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --exclude='*' --dirty=+ 2>/dev/null"
        commit = subprocess.getoutput(f"{git} || echo ${{ACCELERON_COMMIT:-unknown}}")  # "+": with local changes
        installed = {package.name.lower().replace("_", "-"): package.version for package in distributions()}
        versions = [f"python {platform.python_version()}", *(f"{p} {installed[p]}" for p in PACKAGES if p in installed)]
        self.about = dict(command=command, date=date, commit=commit, device=name, versions=", ".join(versions))
        if switches := {switch: os.environ[switch] for switch in SWITCHES if os.environ.get(switch)}:
            self.about["switches"] = switches
        slug = re.sub(r"[^a-z0-9]+", "-", f"{date[:10]} {name}".lower()).strip("-")
        self.directory = Path(directory or default_directory() / slug)
        self.path = self.directory / FILE
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            text = self.path.read_bytes() if self.path.exists() else b""
            with self.path.open("a") as file:  # drop a partial last line
                file.truncate(text.rfind(b"\n") + 1)
        except OSError as error:
            raise file_error(f"--output {self.directory}: cannot be written", error) from error

    def write(self, row: Row) -> bool:
        """Append the row. Returns False if it is invalid. The `values` of a row that fails its check are dropped."""
        if not row.absent and row.problem():
            unchecked = {"unchecked_values": row.values} if row.values else {}  # for debugging; reports ignore them
            row.failed = row.problem()
            row.values = []
            row.details = row.details | unchecked
        row.about = self.about
        fields = {name: value for name, value in asdict(row).items() if value not in ("", [], {}, None)}
        if row.values:
            fields |= dict(zip(("median", "p20", "p80"), spread(row.values), strict=True))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")
        return not row.failed


def read(directory: Path, what: str = "DIR") -> list[Row]:
    """Read the rows of a directory. Skips a partial last line, which a killed process leaves.

    what: the directory's flag, for error messages. Raises InputError if a line is not a row, or there are no rows.
    """
    path, rows = directory / FILE, []
    if not directory.is_dir():
        raise path_error(what, directory, "directory")
    if not path.is_file():
        raise InputError(f"{what} {directory} has no {FILE}: choose the --output directory of a benchmark")
    try:
        for line in path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines():
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise TypeError("not an object")
            row = Row(**{name: fields[name] for name in fields if name in Row.__dataclass_fields__})
            row.problem()  # raises TypeError if error, allowed or values are not numbers
            if not all(isinstance(value, dict) for value in (row.case, row.details, row.about)):
                raise TypeError("case, details and about must be objects")
            rows.append(row)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot read line {len(rows) + 1} ({error})") from error
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


TERMINAL = bool(sys.stderr and sys.stderr.isatty())
# Return a progress bar with an ETA. Without a terminal it prints a line at most every five seconds.
progress = partial(tqdm, dynamic_ncols=True, mininterval=0.1 if TERMINAL else 5.0)
say = tqdm.write if TERMINAL else partial(print, flush=True)  # prints a line above the bar


def describe(error: BaseException) -> str:
    """Format an exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def print_rows(rows: list[Row], baseline: str = ""):
    """Print one line per written row: median (p20 .. p80) and the ratio to the baseline provider, or the problem."""
    width = max(len(row.provider) for row in rows)
    bases = {row.group: row for row in rows if row.provider == baseline and row.values}
    for row in rows:
        text = row.problem() or f"passed: error {row.error:.2g}, allowed {row.allowed:.2g}"
        if row.values:
            base = bases.get(row.group, row)
            text = f"{ranged(spread(row.values))} {row.unit}"
            text += f", {ranged(ratio(row, base))} of {baseline}" if base is not row else ""
        say(f"{row.provider:{width}}  {text}")
