"""A training step's time on an H100, as a lower bound and as a prediction. No GPU is needed.

The steps of the MoE and of its dense baseline are traced (bench/trace.py). A table lists their launches by kind:
  bound ms   the larger of FLOPs / 798 TFLOP/s and bytes / 3.0 TB/s of each launch, rates measured on an H100 SXM
  gap ms     the part of the bound above the FLOPs' time, which no faster kernel can save
  predicted  the time, in ms, at rates that such kernels are known to reach, and 3 us at least
  idle       of the grouped GEMMs: the share of the SMs' time lost as the last wave of tiles is not full
  tiles MB   of the grouped GEMMs: the bytes that their tiles read, most of it from L2
The FLOP floor is the time of the active parameters' FLOPs, as train.py's MFU counts them, at 798 TFLOP/s. Launches are
assumed to run one after another without a pause. None of this has been compared with a measured step yet.
"""

import argparse
import math
import sys

import numpy as np
import pandas as pd

from acceleron.config import PRESETS
from acceleron.kernels.launch import INTERPRETED

from .compile import SIZES
from .shapes import add_batch_flags, batch_shape
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

# The targets on one H100: tokens/s, and the FLOP floor's share of the step; and the MoE's tokens/s / the baseline's.
TARGETS = {"tiny": (700e3, 0.44), "small": (330e3, 0.44), "medium": (135e3, 0.45), "large": (78e3, 0.46)}
RATIO_TARGET = 0.95


def bound(launch: Launch) -> float:
    """Seconds."""
    return max(launch.flops / FLOPS_PER_SECOND, launch.moved / BYTES_PER_SECOND)


def predicted(launch: Launch) -> float:
    """Seconds."""
    rate = FLOPS_PER_SECOND  # of a kernel of few FLOPs, which its bytes bound
    if launch.tiles:
        waves = launch.tiles / launch.programs
        rate = GROUPED_RATE * waves / math.ceil(waves)
    elif launch.head_dim:
        tile = 64 if launch.head_dim <= 64 else 128
        rate = ATTENTION_RATES[tile][launch.name == "attention backward"] * launch.head_dim / tile
    elif launch.name in LIBRARY_GEMMS:
        rate = GEMM_RATE
    return max(launch.flops / rate, launch.moved / MOVED_RATE, LEAST_SECONDS)


def by_kind(launches: list[Launch]) -> pd.DataFrame:
    """A row per name, by predicted time, in FLOPs, bytes and seconds; small ones together; last all launches.

    idle is NaN of all but grouped GEMMs, as of waves of equal length.
    """
    each = pd.DataFrame(launches).assign(launches=1, bound=[*map(bound, launches)])
    each["gap"] = each.bound - each.flops / FLOPS_PER_SECOND
    each["predicted"] = [*map(predicted, launches)]
    each["waves"] = each.tiles / each.programs.clip(lower=1)
    each["whole_waves"] = np.ceil(each.waves)
    small = each.groupby("name").predicted.transform("sum") < SHOWN * each.predicted.sum()
    each.loc[small, "name"] = f"{each.name[small].nunique()} other kinds"
    kinds = each.drop(columns=["head_dim", "programs"]).groupby("name").sum().sort_values("predicted", ascending=False)
    kinds.loc["all"] = kinds.sum()
    return kinds.assign(idle=1 - kinds.waves / kinds.whole_waves)


def print_kinds(title: str, kinds: pd.DataFrame):
    """The table that the module's docstring describes."""
    shown = kinds[["launches"]].astype(int)
    for name, unit in (("flops", "GFLOP"), ("moved", "MB")):
        shown[unit] = (kinds[name] / (1e9 if unit == "GFLOP" else 1e6)).map("{:,.0f}".format)
    for name in ("bound", "gap", "predicted"):
        shown[f"{name} ms"] = (1e3 * kinds[name]).map("{:,.2f}".format)
    shown["idle"] = kinds.idle.map("{:.0%}".format).where(kinds.tiles > 0, "")
    shown["tiles MB"] = (kinds.tile_loads / 1e6).map("{:,.0f}".format).where(kinds.tiles > 0, "")
    shown.index = [name[:44] for name in shown.index]
    print(f"{title}\n{shown.to_string()}\n")


def totals(size: str, steps: list[Step]) -> pd.DataFrame:
    """Of the MoE and its dense baseline: floors, bounds and predictions, with the MoE's targets."""
    tokens_target, share_target = TARGETS.get(size, (None, None))
    every = [by_kind(step.launches).loc["all"] for step in steps]
    floors = [step.model_flops / FLOPS_PER_SECOND for step in steps]
    rows = {"launches": [x.launches for x in every], "FLOP floor, ms": [1e3 * floor for floor in floors]}
    rows["FLOP floor, tokens/s"] = [step.tokens / floor for step, floor in zip(steps, floors, strict=True)]
    for name in ("bound", "predicted"):
        seconds, is_prediction = [x[name] for x in every], name == "predicted"
        rows[f"{name}, ms"] = [1e3 * s for s in seconds]
        rows[f"{name}, tokens/s"] = [steps[0].tokens / s for s in seconds] + [tokens_target] * is_prediction
        shares = [floor / s for floor, s in zip(floors, seconds, strict=True)]
        rows[f"{name}, the FLOP floor's share"] = shares + [share_target] * is_prediction
        rows[f"{name}, tokens/s MoE / dense"] = [seconds[1] / seconds[0], None] + [RATIO_TARGET] * is_prediction
    rows[f"peak memory, GiB of {USABLE_GIB}"] = [step.peak_bytes / 2**30 for step in steps]
    padded = {name: (values + [None, None])[:3] for name, values in rows.items()}
    return pd.DataFrame.from_dict(padded, orient="index", columns=["MoE", "dense baseline", "target"], dtype=float)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*PRESETS], default=list(SIZES))
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    add_batch_flags(parser)
    arguments = parser.parse_args()
    shapes = {size: batch_shape(size, True, arguments) for size in arguments.size}
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 is set, under which kernels are not those that a GPU runs: unset it")
    for size, (batch_size, accum, seq_len) in shapes.items():
        steps = []
        for model in ("MoE", "dense baseline"):
            steps.append(trace_step(size, model != "MoE", batch_size, accum, arguments.checkpointing, seq_len))
            print_kinds(f"{size} {model}, {accum} x {batch_size} x {seq_len}", by_kind(steps[-1].launches))
        print(f"{size}, {steps[0].tokens:,} tokens per step")
        print(totals(size, steps).to_string(na_rep="", float_format="{:,.2f}".format), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
