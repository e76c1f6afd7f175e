"""What this device reaches at most: FLOP/s of a large GEMM, bytes/s of a large copy; and its clocks as found.

python -m bench ceilings [--dtype bf16] [--output DIR]
"""

import argparse
import subprocess

import torch

from acceleron.device import DTYPES, resolve_device, resolve_dtype

from . import timing
from .rows import Results, Row, print_rows

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def card() -> str:
    """What nvidia-smi says of the card now; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--output", metavar="DIR", help="directory for results.jsonl (default: below ~/.cache)")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    results = Results(arguments.output, device)
    before = card()
    flops, moved = timing.ceilings(device, dtype)
    after = card()
    a, b = torch.randn(2, 256, 256, device=device).to(dtype)
    error = ((a @ b).double() - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()
    check = dict(check="a small GEMM against float64", error=error.item(), allowed=torch.finfo(dtype).eps)
    details = {"card_before": before, "card_after": after} if before else {}
    rows = [
        Row("ceilings", f"GEMM, {str(dtype).removeprefix('torch.')}", {}, "FLOP/s", [flops], details=details, **check),
        Row("ceilings", "copy", {}, "bytes/s", [moved], details=details, **check),
    ]
    for row in rows:
        results.write(row)
    print(before, after, sep="\n")
    print_rows(rows)
