"""Benchmark results: one row type for every command, appended as JSON lines to DIR/results.jsonl.

A row is a result only if it passed a correctness check in the run that measured it. A failed check turns it into a
row with `failed`, the reason. What could not be measured is a row too, with `failed` or `absent`, so that a report
lists it.
"""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from acceleron.errors import InputError

FILE = "results.jsonl"
# Packages that a figure can depend on, beside torch.
PACKAGES = ("triton", "transformers", "liger-kernel", "moe-ops", "cut-cross-entropy", "flash-attn")
# Environment variables that change which kernels run.
SWITCHES = ("ACCELERON_NO_TMA", "ACCELERON_REFERENCE_OPS", "ACCELERON_TUNED")


@dataclass
class Row:
    """One measurement.

    benchmark: the command. provider: the implementation measured. case: what was measured, as flat JSON values; rows of
    equal benchmark and case are comparable. values: one per round, in `unit`; their median, p20 and p80 are written
    beside them. group: rows of one command and group were measured in the same interleaved rounds, so that their ratio
    is taken round by round. check: what was compared with what; error: the error found; allowed: the largest that
    passes. details: further figures. failed, absent: why there is no result. about: command, date, commit, device,
    versions and switches, which `Results.write` fills in.
    """

    benchmark: str
    provider: str
    case: dict = field(default_factory=dict)
    unit: str = ""
    values: list[float] = field(default_factory=list)
    group: str = ""
    check: str = ""
    error: float | None = None
    allowed: float | None = None
    details: dict = field(default_factory=dict)
    failed: str = ""
    absent: str = ""
    about: dict = field(default_factory=dict)

    @property
    def median(self) -> float:
        return spread(self.values)[0]

    def complaint(self) -> str:
        """Why this row is no result: it failed, is absent, or has not passed a check. Empty if it is one."""
        if self.failed or self.absent:
            return self.failed or self.absent
        if not self.check or self.error is None or self.allowed is None:
            return "no correctness check"
        if not self.error <= self.allowed:  # so that NaN fails
            return f"wrong: {self.check}: error {self.error:.3g}, where {self.allowed:.3g} is allowed"
        if not all(math.isfinite(value) for value in self.values):
            return f"not finite: {self.values}"
        return ""


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, interpolated between values."""
    return tuple(float(value) for value in np.percentile(values, [50, 20, 80]))


def ratio(row: Row, other: Row) -> tuple[float, float, float]:
    """Median, p20 and p80 of row / other taken round by round, which cancels what slows a whole round."""
    return spread([a / b for a, b in zip(row.values, other.values, strict=True)])


def device_name(device: torch.device) -> str:
    """As people and directories name it: "NVIDIA H100 80GB HBM3", "AMD EPYC 9R14, 2 cores, AVX512"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    capability = torch.backends.cpu.get_cpu_capability()
    amx = torch.cpu.get_capabilities().get("amx_bf16") if hasattr(torch.cpu, "get_capabilities") else False
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {capability}{' AMX' if amx else ''}"


def commit() -> str:
    """The checkout's commit, with a + if tracked files differ from it. Outside git: ACCELERON_COMMIT, or "unknown"."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return os.environ.get("ACCELERON_COMMIT", "unknown")


def versions() -> str:
    """Python's, torch's, and those of the installed packages in PACKAGES."""
    found = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def shown_command() -> str:
    """The command line, without --output and its directory."""
    words = ["python", *sys.orig_argv[1:]]
    if "--output" in words:
        del words[words.index("--output") : words.index("--output") + 2]
    return shlex.join(words)


def default_directory() -> Path:
    """Where results go unless --output names a directory: outside the checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acceleron" / "bench"


class Results:
    """Appends rows to <directory>/results.jsonl, each as soon as it exists.

    Without a directory, it is <default_directory()>/<date>-<device>. Raises InputError if it cannot be written.
    """

    def __init__(self, directory: str | None, device: torch.device):
        now, name = datetime.now(UTC), device_name(device)
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.directory = Path(directory or default_directory() / f"{now.date()}-{slug}")
        self.path = self.directory / FILE
        date = now.isoformat(timespec="seconds")
        self.about = {"command": shown_command(), "date": date, "commit": commit(), "device": name}
        switches = {switch: os.environ[switch] for switch in SWITCHES if os.environ.get(switch)}
        self.about |= {"switches": switches} if switches else {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
        except OSError as error:
            raise InputError(f"--output {self.directory}: cannot be written ({error.strerror})") from error

    def write(self, row: Row) -> bool:
        """Append the row. Returns True unless it failed; a row that did not pass its check loses its figures."""
        if not row.absent and row.complaint():
            row.failed, row.values = row.complaint(), []
        row.about = self.about | {"versions": versions()}
        fields = {name: value for name, value in asdict(row).items() if value not in ("", [], {}, None)}
        if row.values:
            fields |= dict(zip(("median", "p20", "p80"), spread(row.values), strict=True))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")
        return not row.failed


def read(directory: Path) -> list[Row]:
    """The rows of a directory. Raises InputError if there are none, or a line is not a row."""
    path, rows = directory / FILE, []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{directory}: no {FILE} that can be read there ({error})") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append(Row(**{name: row[name] for name in row if name not in ("median", "p20", "p80")}))
            rows[-1].complaint()  # raises TypeError for figures that are none
            if not all(isinstance(value, dict) for value in (rows[-1].case, rows[-1].details, rows[-1].about)):
                raise TypeError("case, details and about are objects")
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not a row ({error})") from error
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


TERMINAL = bool(sys.stderr and sys.stderr.isatty())
# A bar with an ETA: on a terminal at once, elsewhere a line at most every five seconds.
progress = partial(tqdm, dynamic_ncols=True, mininterval=0.1 if TERMINAL else 5.0)


def say(line: str):
    """Print a line, above the bar if there is one."""
    if TERMINAL:
        tqdm.write(line)
    else:
        print(line, flush=True)


def describe(error: BaseException) -> str:
    """An exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def print_rows(rows: list[Row], baseline: str = ""):
    """A line per row: provider, median (p20 .. p80) or the complaint; and the ratio to the baseline provider."""
    width = max((len(row.provider) for row in rows), default=0)
    bases = {row.group: row for row in rows if row.provider == baseline and not row.complaint()}
    for row in rows:
        if row.complaint() or not row.values:
            passed = "" if row.complaint() else f"passed: error {row.error:.2g} of {row.allowed:.2g} allowed"
            say(f"{row.provider:{width}}  {row.complaint() or passed}")
            continue
        middle, low, high = (f"{value:,.5g}" for value in spread(row.values))
        base = bases.get(row.group)
        against = "" if base in (None, row) else "  {:.3f} ({:.3f} .. {:.3f}) of {}".format(*ratio(row, base), baseline)
        say(f"{row.provider:{width}}  {middle} {row.unit} ({low} .. {high}){against}")
