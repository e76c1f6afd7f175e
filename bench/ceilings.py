"""Measured ceilings of this device: FLOP/s of a large GEMM and bytes/s of a large copy, with the GPU's clocks.

python -m bench ceilings [--dtype bf16] [--output DIR]
"""

import subprocess

import torch

from acceleron.device import dtype_name

from . import timing
from .command import parse
from .rows import Results, Row, print_rows

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def gpu_state() -> str:
    """Return the GPU's current clocks, power limit and temperature from nvidia-smi, or nothing without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def main():
    arguments = parse(__doc__, dtype="auto")
    device, dtype = arguments.device, arguments.dtype
    results, before = Results(arguments.output, device), gpu_state()
    flops, bandwidth = timing.ceilings(device, dtype)
    a, b = torch.randn(2, 256, 256, device=device).to(dtype)
    truth = a.double() @ b.double()
    error = ((a @ b).double() - truth).norm() / truth.norm()
    # The rounding of the result, and of the fp32 sums over K = 256: a random walk of sqrt(K) roundings.
    allowed = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    check = dict(check="a small GEMM against float64", error=error.item(), allowed=allowed)
    details = {"card_before": before, "card_after": gpu_state()} if before else {}
    rows = [Row("ceilings", f"GEMM, {dtype_name(dtype)}", {}, "FLOP/s", [flops], details=details, **check)]
    rows.append(Row("ceilings", "copy", {}, "bytes/s", [bandwidth], **check))
    for row in rows:
        results.write(row)
    print(details or "nvidia-smi is not available")
    print_rows(rows)
