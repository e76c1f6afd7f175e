"""Results are JSON lines, one object a measurement, in a directory <date>-<device> below bench/results/.

Every row says what it is of (each command's docstring lists its fields), and how it came about:
  command, date, commit, device, versions   added here
  check, check_error, check_allowed         what was compared with what, the error found, and the largest that passes

A row whose error is above what is allowed is never written as a result: it becomes a row with `failed`, the reason.
What could not be measured stands there too, so that a report can list it: `failed`, or `absent`, each with the reason.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from acceleron.errors import InputError

DIRECTORY = Path(__file__).parent / "results"
# Beside torch: what figures depend on, once it is imported.
MODULES = (
    "triton", "transformers", "liger_kernel", "moe_ops", "cut_cross_entropy", "sonicmoe", "scattermoe", "flash_attn",
    "flash_attn_interface",
)  # fmt: skip


def device_name(device: torch.device) -> str:
    """Of people's and directories' names: "NVIDIA H100 80GB HBM3", "AMD EPYC 9R14, 2 cores, AVX512"."""
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
    """The checkout's commit, with a + if tracked files differ from it; outside git ACCELERON_COMMIT, or `unknown`."""
    git = ["git", "-C", str(Path(__file__).parent)]
    outside = os.environ.get("ACCELERON_COMMIT", "unknown")
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return outside
    if head.returncode:
        return outside
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--"], capture_output=True, check=False).returncode
    return head.stdout.strip() + "+" * bool(changed)


def versions() -> str:
    """Of Python and, of what the figures can depend on, all that is imported."""
    found = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda:
        found.append(f"CUDA {torch.version.cuda}")
    for name in MODULES:
        if name in sys.modules:
            with suppress(PackageNotFoundError):
                found.append(f"{name} {version(name)}")
    return ", ".join(found)


def shown_command() -> str:
    """The command line, less where its output goes."""
    words = ["python", *sys.orig_argv[1:]]
    if "--output" in words:
        del words[words.index("--output") : words.index("--output") + 2]
    return shlex.join(words)


class Results:
    """Appends rows to <directory>/<name>.jsonl, each as soon as it exists.

    Without a directory it is DIRECTORY/<date>-<device>. Raises InputError if it can't be written.
    """

    def __init__(self, directory: str | None, name: str, device: torch.device):
        self.device, self.today = device_name(device), datetime.now(UTC).date().isoformat()
        slug = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        self.path = Path(directory or DIRECTORY / f"{self.today}-{slug}") / f"{name}.jsonl"
        self.about = {
            "command": shown_command(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "device": self.device,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
        except OSError as error:
            raise InputError(f"--output {self.path.parent}: cannot be written ({error.strerror})") from error

    def write(self, row: dict) -> bool:
        """Append a row of fields that JSON knows; one that failed its check as such. Whether it has not failed."""
        if complaint(row):
            kept = {key: value for key, value in row.items() if isinstance(value, (str, bool, int))}
            row = kept | {"failed": complaint(row)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | self.about | {"versions": versions()}) + "\n")
        return "failed" not in row


def complaint(row: dict) -> str | None:
    """Why a row is no result: it has not passed a correctness check. None if it has, or claims no result."""
    if "failed" in row or "absent" in row:
        return None
    error, allowed = row.get("check_error"), row.get("check_allowed")
    if not row.get("check") or not all(isinstance(value, (int, float)) for value in (error, allowed)):
        return "no correctness check"
    if not error <= allowed:  # so that NaN fails
        return f"wrong: {row['check']}: error {error:.3g}, where {allowed:.3g} is allowed"
    return None


def read_results(path: Path) -> list[dict]:
    """The rows of a file, none if it is absent. Raises InputError for a line that is no JSON object."""
    rows = []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object, but found {type(row).__name__}")
        rows.append(row)
    return rows
