"""A training step's time on an H100, as a lower bound and as a prediction. No GPU is needed.

The steps of the MoE and of its dense baseline are traced (bench/trace.py). A table lists their launches by kind:
  bound ms      the larger of FLOPs / 798 TFLOP/s and bytes / 3.0 TB/s of each launch, rates measured on an H100 SXM
  gap ms        the part of the bound above the FLOPs' time, which no faster kernel can save
  predicted ms  the time at rates that such kernels are known to reach, and 3 us at least
The FLOP floor is the time of the active parameters' FLOPs, as train.py's MFU counts them, at 798 TFLOP/s. Launches are
assumed to run one after another without a pause. None of this has been compared with a measured step yet.
"""

import argparse
import math

import pandas as pd

from acceleron.config import PRESETS

from .compile import GEMMS, SIZES, refuse_interpreter
from .shapes import batch_shape
from .trace import LIBRARY_GEMMS, Launch, Step, trace_step

# Measured on the H100 that the project is for: a cuBLAS GEMM of 8192 cubed in bf16, and a copy.
FLOPS_PER_SECOND, BYTES_PER_SECOND = 798e12, 3.0e12
USABLE_GIB = 79
# The prediction's rates. cuBLAS on an H100, 65536x1024x1024 in bf16, measured by facebookexperimental/triton #1038:
GEMM_RATE = 584e12
# Assumed, of full waves: on that GEMM non-persistent Triton reached 502 and persistent TLX 564 TFLOP/s, and SonicMoE's
# whole MoE layers 402 to 464.
GROUPED_RATE = 450e12
# Assumed, forward and backward, by the width of the tile that a head is padded to, of which a narrower one uses a part:
# about what FlashAttention-3's paper shows for causal attention over 2k tokens.
ATTENTION_RATES = {64: (330e12, 250e12), 128: (450e12, 380e12)}
# Assumed, of kernels that wait for memory; and the least time between the starts of two launches.
MOVED_RATE, LEAST_SECONDS = 0.9 * BYTES_PER_SECOND, 3e-6
SHOWN = 0.005  # the share of the time from which on a kind has a line of its own

# The targets on one H100: the MoE's tokens/s, the FLOP floor's share of its step; and its tokens/s / the baseline's.
TARGETS = {"tiny": (700e3, 0.44), "small": (330e3, 0.44), "medium": (135e3, 0.45), "large": (78e3, 0.46)}
RATIO_TARGET = 0.95


def bound(launch: Launch) -> float:
    """Seconds."""
    return max(launch.flops / FLOPS_PER_SECOND, launch.moved / BYTES_PER_SECOND)


def predicted(launch: Launch) -> float:
    """Seconds."""
    rate = FLOPS_PER_SECOND  # of a kernel of few FLOPs, which its bytes bound
    if launch.name in GEMMS:
        rate = GROUPED_RATE * launch.waves / math.ceil(launch.waves)
    elif launch.head_dim:
        tile = 64 if launch.head_dim <= 64 else 128
        rate = ATTENTION_RATES[tile][launch.name == "attention backward"] * launch.head_dim / tile
    elif launch.name in LIBRARY_GEMMS:
        rate = GEMM_RATE
    return max(launch.flops / rate, launch.moved / MOVED_RATE, LEAST_SECONDS)


def by_kind(launches: list[Launch]) -> pd.DataFrame:
    """The table that the module's docstring describes, by predicted time; small kinds together; last all launches."""
    found = pd.DataFrame(launches)
    table = pd.DataFrame({"name": found.name, "launches": 1, "GFLOP": found.flops / 1e9, "MB": found.moved / 1e6})
    table["bound ms"] = [1e3 * bound(launch) for launch in launches]
    table["gap ms"] = table["bound ms"] - 1e3 * (found.flops / FLOPS_PER_SECOND)
    table["predicted ms"] = [1e3 * predicted(launch) for launch in launches]
    seconds = table.groupby("name")["predicted ms"].transform("sum")
    small = seconds < SHOWN * table["predicted ms"].sum()
    table.loc[small, "name"] = f"{table.name[small].nunique()} other kinds"
    table = table.groupby("name").sum().sort_values("predicted ms", ascending=False)
    table.loc["all"] = table.sum()
    return table.astype({"launches": int}).rename(index=lambda name: name[:44]).rename_axis(None)


def totals(size: str, moe: Step, dense: Step) -> pd.DataFrame:
    """Of the MoE and its dense baseline: floors, bounds and predictions, with the MoE's targets."""
    steps = pd.DataFrame([moe, dense], index=["MoE", "dense baseline"])
    every = pd.DataFrame({name: by_kind(step.launches).loc["all"] for name, step in steps.iterrows()})
    floor, tokens = 1e3 * steps.model_flops / FLOPS_PER_SECOND, 1e3 * steps.tokens
    rows = {"launches": every.loc["launches"], "FLOP floor, ms": floor, "FLOP floor, tokens/s": tokens / floor}
    for name in ("bound", "predicted"):
        ms = every.loc[f"{name} ms"]
        rows |= {f"{name}, ms": ms, f"{name}, tokens/s": tokens / ms, f"{name}, the FLOP floor's share": floor / ms}
        rows[f"{name}, tokens/s MoE / dense"] = (ms["dense baseline"] / ms)[:1]
    rows[f"peak memory, GiB of {USABLE_GIB}"] = steps.peak_bytes / 2**30
    table = pd.DataFrame(rows).T
    if size in TARGETS:
        measures = ("tokens/s", "the FLOP floor's share", "tokens/s MoE / dense")
        table.loc[[f"predicted, {name}" for name in measures], "target"] = *TARGETS[size], RATIO_TARGET
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*PRESETS], default=list(SIZES))
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
            print(by_kind(steps[-1].launches).to_string(float_format="{:,.2f}".format), end="\n\n")
        print(f"{size}, {steps[0].tokens:,} tokens per step")
        print(totals(size, *steps).to_string(na_rep="", float_format="{:,.2f}".format), end="\n\n", flush=True)
