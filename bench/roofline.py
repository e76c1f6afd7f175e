"""A training step's time on an H100, as a lower bound and as a prediction. No GPU is needed.

The steps of the MoE and of its dense baseline are traced (bench/trace.py). A table lists their launches by kind:
  bound ms      the larger of FLOPs / 798 TFLOP/s and bytes / 3.0 TB/s of each launch, rates measured on an H100 SXM
  gap ms        the part of the bound above the FLOPs' time, which no faster kernel can save
  predicted ms  the time at rates that such kernels are known or estimated to reach, and 3 us at least
The FLOP floor is the time of the active parameters' FLOPs, as train.py's MFU counts them, at 798 TFLOP/s. Launches are
assumed to run one after another without a pause. cuBLAS's rate decides how fast the dense baseline is, so predictions
are given for two. The kernel that limits the MoE is the MoE-only kernel whose predicted time most exceeds its bound.
None of this has been compared with a measured step yet.
"""

import argparse
import math
from collections import Counter

import pandas as pd

from .compile import SIZES, refuse_interpreter
from .shapes import batch_shape
from .trace import LIBRARY_GEMMS, Launch, Step, trace_step

# Measured on the H100 that the project is for: a cuBLAS GEMM of 8192 cubed in bf16, and a copy.
FLOPS_PER_SECOND, BYTES_PER_SECOND = 798e12, 3.0e12
USABLE_GIB = 79
# The prediction's rates. cuBLAS on an H100, 65536x1024x1024 in bf16, as two measurements have it
# (facebookexperimental/triton #1038 and #1065); the table of launches uses the first.
GEMM_RATES = (584e12, 687e12)
# Estimated from the SASS, within 15 %, for launches that fill all SMs (bench/LOG.md, 2026-11-26).
GROUPED_RATES = {
    "_up_kernel": dict(zip(SIZES, (447e12, 489e12, 513e12, 539e12), strict=True)),
    "_rows_kernel": dict.fromkeys(SIZES, 520e12),
    "_weight_grad_kernel": dict.fromkeys(SIZES, 505e12),
}
# Assumed, forward and backward, by the width of the tile that a head is padded to, of which a narrower one uses a part:
# about what FlashAttention-3's paper shows for causal attention over 2k tokens.
ATTENTION_RATES = {64: (330e12, 250e12), 128: (450e12, 380e12)}
# Assumed, of kernels that wait for memory; and the least time between the starts of two launches.
MOVED_RATE, LEAST_SECONDS = 0.9 * BYTES_PER_SECOND, 3e-6
SHOWN = 0.005  # the share of the time from which on a kind has a line of its own


def bound(launch: Launch) -> float:
    """Seconds."""
    return max(launch.flops / FLOPS_PER_SECOND, launch.moved / BYTES_PER_SECOND)


def predicted(launch: Launch, size: str, gemm_rate: float) -> float:
    """Seconds, at this rate of cuBLAS."""
    rate = FLOPS_PER_SECOND  # of a kernel of few FLOPs, which its bytes bound
    if launch.name in GROUPED_RATES:
        rate = GROUPED_RATES[launch.name][size] * launch.waves / math.ceil(launch.waves)
    elif launch.head_dim:
        tile = 64 if launch.head_dim <= 64 else 128
        rate = ATTENTION_RATES[tile][launch.name == "attention backward"] * launch.head_dim / tile
    elif launch.name in LIBRARY_GEMMS:
        rate = gemm_rate
    return max(launch.flops / rate, launch.moved / MOVED_RATE, LEAST_SECONDS)


def by_kind(launches: list[Launch], size: str) -> pd.DataFrame:
    """The table that the module's docstring describes, by predicted time; small kinds together; last all launches."""
    found = pd.DataFrame(launches)
    table = pd.DataFrame({"name": found.name, "launches": 1, "GFLOP": found.flops / 1e9, "MB": found.moved / 1e6})
    table["bound ms"] = [1e3 * bound(launch) for launch in launches]
    table["gap ms"] = table["bound ms"] - 1e3 * (found.flops / FLOPS_PER_SECOND)
    table["predicted ms"] = [1e3 * predicted(launch, size, GEMM_RATES[0]) for launch in launches]
    seconds = table.groupby("name")["predicted ms"].transform("sum")
    small = seconds < SHOWN * table["predicted ms"].sum()
    table.loc[small, "name"] = f"{table.name[small].nunique()} other kinds"
    table = table.groupby("name").sum().sort_values("predicted ms", ascending=False)
    table.loc["all"] = table.sum()
    return table.astype({"launches": int}).rename(index=lambda name: name[:44]).rename_axis(None)


def limiting_kernel(moe: Step, dense: Step, size: str) -> tuple[str, float]:
    """The MoE-only kernel whose predicted time most exceeds its bound, and by how many seconds."""
    excess, common = Counter(), {launch.name for launch in dense.launches}
    for launch in moe.launches:
        if launch.name not in common:
            excess[launch.name] += predicted(launch, size, GEMM_RATES[0]) - bound(launch)
    return excess.most_common(1)[0]


def totals(size: str, moe: Step, dense: Step) -> pd.DataFrame:
    """Floors, bounds and predictions of the MoE and of its dense baseline."""
    steps = {"MoE": moe, "dense baseline": dense}
    floor = {name: step.model_flops / FLOPS_PER_SECOND for name, step in steps.items()}
    times = {"FLOP floor": floor, "bound": {name: sum(map(bound, step.launches)) for name, step in steps.items()}}
    for rate in GEMM_RATES:
        times[f"predicted, cuBLAS at {rate / 1e12:.0f} TFLOP/s"] = {
            name: sum(predicted(launch, size, rate) for launch in step.launches) for name, step in steps.items()
        }
    rows = {"launches": {name: len(step.launches) for name, step in steps.items()}}
    for kind, seconds in times.items():
        rows[f"{kind}, ms"] = {name: 1e3 * x for name, x in seconds.items()}
        rows[f"{kind}, tokens/s"] = {name: steps[name].tokens / x for name, x in seconds.items()}
        if kind != "FLOP floor":
            rows[f"{kind}, the FLOP floor's share"] = {name: floor[name] / x for name, x in seconds.items()}
            rows[f"{kind}, tokens/s MoE / dense"] = {"MoE": seconds["dense baseline"] / seconds["MoE"]}
    rows[f"peak memory, GiB of {USABLE_GIB}"] = {name: step.peak_bytes / 2**30 for name, step in steps.items()}
    return pd.DataFrame(rows).T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    for name in ("batch_size", "grad_accum", "seq_len"):
        parser.add_argument(f"--{name}", type=int, help="default: as in bench throughput on a GPU")
    arguments = parser.parse_args()
    shapes = {size: batch_shape(size, True, arguments) for size in arguments.size}
    refuse_interpreter()
    for size, (batch_size, accum, seq_len) in shapes.items():
        steps = []
        for model in ("MoE", "dense baseline"):
            steps.append(trace_step(size, model != "MoE", batch_size, accum, seq_len))
            print(f"{size} {model}, {accum} x {batch_size} x {seq_len}")
            print(by_kind(steps[-1].launches, size).to_string(float_format="{:,.2f}".format), end="\n\n")
        print(f"{size}, {steps[0].tokens:,} tokens per step")
        print(totals(size, *steps).to_string(na_rep="", float_format="{:,.2f}".format))
        name, seconds = limiting_kernel(*steps, size)
        print(f"{size} is limited by {name}: {1e3 * seconds:.1f} ms above its bound", end="\n\n", flush=True)
