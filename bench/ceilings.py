"""What this device reaches at most: FLOP/s of a large GEMM, bytes/s of a large copy; and its clocks as found.

python -m bench ceilings [--dtype bf16] [--output DIR]
"""

import subprocess

import torch

from acceleron.device import dtype_name

from . import timing
from .command import parse
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
    arguments = parse(__doc__, dtype="auto")
    device, dtype = arguments.device, arguments.dtype
    results, before = Results(arguments.output, device), card()
    flops, moved = timing.ceilings(device, dtype)
    a, b = torch.randn(2, 256, 256, device=device).to(dtype)
    truth = a.double() @ b.double()
    error = ((a @ b).double() - truth).norm() / truth.norm()
    check = dict(check="a small GEMM against float64", error=error.item(), allowed=torch.finfo(dtype).eps)
    details = {"card_before": before, "card_after": card()} if before else {}
    rows = [Row("ceilings", f"GEMM, {dtype_name(dtype)}", {}, "FLOP/s", [flops], details=details, **check)]
    rows.append(Row("ceilings", "copy", {}, "bytes/s", [moved], **check))
    for row in rows:
        results.write(row)
    print(details or "no nvidia-smi here")
    print_rows(rows)
