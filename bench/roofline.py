"""Lower bound and prediction of a training step's time on an H100 or H200, without a GPU.

bench/trace.py traces a step of the MoE and of its dense baseline. A table lists the launches by kind:
  bound ms      per launch, the larger of its FLOPs and its bytes divided by the GPU's measured ceilings
  gap ms        the part of the bound above the FLOP time: memory traffic that no faster kernel avoids
  predicted ms  the time at rates measured in training steps on an H100, at least 3 us per launch
The FLOP floor is the time for the FLOPs that train.py's MFU counts. Launches are assumed to run back to back. The
limiting kernel is the MoE-only kernel with the largest gap between predicted time and bound. bench/README.md compares
predictions with measurements. train.py's shape flags change the size: for example, --model_size tiny --num_experts 64
--top_k 8 --d_ff 352 has tiny's active FLOPs. The predictions then use rates measured at the size itself.
"""

import argparse
from collections import Counter
from dataclasses import replace

import pandas as pd

from acceleron import ModelConfig
from acceleron.config import SHAPE_FIELDS
from acceleron.flags import Parser

from .compile import SIZES, reject_interpreter
from .shapes import batch_shape
from .trace import LIBRARY_GEMMS, Launch, Step, trace_step

# Measured FLOP/s of an 8192^3 bf16 cuBLAS GEMM, and bytes/s of a copy.
CEILINGS = {"h100": (798e12, 3.0e12), "h200": (796e12, 4.23e12)}
USABLE_GIB = 79  # usable part of an H100's memory
# Rates in profiled training steps on an H100 (bench/LOG.md, 2026-11-27): cuBLAS GEMMs and our grouped GEMMs; and on an
# H200 (2026-11-26): attention (forward, backward) by the tile width that cuDNN pads head_dim to.
GEMM_RATE = 690e12
GROUPED_RATES = {
    "_up_kernel": dict(zip(SIZES, (462e12, 496e12, 536e12, 536e12), strict=True)),
    "_rows_kernel": dict(zip(SIZES, (712e12, 707e12, 705e12, 705e12), strict=True)),
    "_hidden_grad_kernel": dict(zip(SIZES, (209e12, 277e12, 313e12, 380e12), strict=True)),
    "_weight_grad_kernel": dict(zip(SIZES, (710e12, 685e12, 679e12, 663e12), strict=True)),
}
ATTENTION_RATES = {64: (385e12, 335e12), 128: (470e12, 413e12)}
# The share of peak bandwidth that memory-bound kernels reach, and the minimum seconds per launch.
BANDWIDTH_SHARE, MIN_SECONDS = 0.95, 3e-6
MIN_SHARE = 0.005  # kinds below this share of the predicted time are merged into one line


def bound(launch: Launch, gpu: str) -> float:
    """Return a lower bound on a launch's time, in seconds."""
    flops_per_second, bytes_per_second = CEILINGS[gpu]
    return max(launch.flops / flops_per_second, launch.bytes_moved / bytes_per_second)


def predicted(launch: Launch, size: str, gpu: str) -> float:
    """Return the predicted time of a launch, in seconds."""
    rate, bytes_per_second = CEILINGS[gpu]  # other kernels are memory-bound, so their FLOP rate does not matter
    if launch.name in GROUPED_RATES:
        rate = GROUPED_RATES[launch.name][size]
    elif launch.head_dim:
        tile = 64 if launch.head_dim <= 64 else 128
        rate = ATTENTION_RATES[tile][launch.name == "attention backward"] * launch.head_dim / tile
    elif launch.name in LIBRARY_GEMMS:
        rate = GEMM_RATE
    return max(launch.flops / rate, launch.bytes_moved / (BANDWIDTH_SHARE * bytes_per_second), MIN_SECONDS)


def by_kind(launches: list[Launch], size: str, gpu: str) -> pd.DataFrame:
    """Return the docstring's table, sorted by predicted time. Small kinds share a row; the last row is the total."""
    frame = pd.DataFrame(launches)
    table = pd.DataFrame({"name": frame.name, "launches": 1, "GFLOP": frame.flops / 1e9, "MB": frame.bytes_moved / 1e6})
    table["bound ms"] = [1e3 * bound(launch, gpu) for launch in launches]
    table["gap ms"] = table["bound ms"] - 1e3 * (frame.flops / CEILINGS[gpu][0])
    table["predicted ms"] = [1e3 * predicted(launch, size, gpu) for launch in launches]
    seconds = table.groupby("name")["predicted ms"].transform("sum")
    small = seconds < MIN_SHARE * table["predicted ms"].sum()
    table.loc[small, "name"] = f"{table.name[small].nunique()} other kinds"
    table = table.groupby("name").sum().sort_values("predicted ms", ascending=False)
    table.loc["all"] = table.sum()
    return table.astype({"launches": int}).rename(index=lambda name: name[:44]).rename_axis(None)


def limiting_kernel(moe: Step, dense: Step, size: str, gpu: str) -> tuple[str, float]:
    """Return the MoE-only kernel with the largest gap between predicted time and bound, and the gap in seconds."""
    excess, common = Counter(), {launch.name for launch in dense.launches}
    for launch in moe.launches:
        if launch.name not in common:
            excess[launch.name] += predicted(launch, size, gpu) - bound(launch, gpu)
    return excess.most_common(1)[0]


def totals(size: str, gpu: str, moe: Step, dense: Step) -> pd.DataFrame:
    """Return FLOP floors, bounds and predictions for the MoE and its dense baseline."""
    steps = {"MoE": moe, "dense baseline": dense}
    floor = {name: step.model_flops / CEILINGS[gpu][0] for name, step in steps.items()}
    times = {"FLOP floor": floor, "bound": {}, "predicted": {}}
    for name, step in steps.items():
        times["bound"][name] = sum(bound(launch, gpu) for launch in step.launches)
        times["predicted"][name] = sum(predicted(launch, size, gpu) for launch in step.launches)
    rows = {"launches": {name: len(step.launches) for name, step in steps.items()}}
    for kind, seconds in times.items():
        rows[f"{kind}, ms"] = {name: 1e3 * x for name, x in seconds.items()}
        rows[f"{kind}, tokens/s"] = {name: steps[name].tokens / x for name, x in seconds.items()}
        if kind != "FLOP floor":
            rows[f"FLOP floor / {kind}"] = {name: floor[name] / x for name, x in seconds.items()}
            rows[f"{kind}, MoE / dense tokens/s"] = {"MoE": seconds["dense baseline"] / seconds["MoE"]}
    rows[f"peak memory, GiB of {USABLE_GIB}"] = {name: step.peak_bytes / 2**30 for name, step in steps.items()}
    return pd.DataFrame(rows).T


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--gpu", choices=CEILINGS, default="h100")
    for name in ("batch_size", "grad_accum", "seq_len"):
        parser.add_argument(f"--{name}", type=int, help="default: the batch shape of bench throughput on a GPU")
    for name in SHAPE_FIELDS:
        parser.add_argument(f"--{name}", type=int, help="default: the size's")
    arguments = parser.parse_args()
    overrides = {name: value for name in SHAPE_FIELDS if (value := getattr(arguments, name)) is not None}
    configs = {size: ModelConfig.preset(size, **overrides) for size in arguments.model_size}
    shapes = {size: batch_shape(size, True, arguments) for size in arguments.model_size}
    reject_interpreter()
    for size, (batch_size, accum, seq_len) in shapes.items():
        steps = []
        for model in ("MoE", "dense baseline"):
            config = replace(configs[size], dense=model != "MoE")
            steps.append(trace_step(config, batch_size, accum, seq_len))
            print(f"{size} {model}, {accum} x {batch_size} x {seq_len}")
            print(by_kind(steps[-1].launches, size, arguments.gpu).to_string(float_format="{:,.2f}".format), end="\n\n")
        print(f"{size}, {steps[0].tokens:,} tokens per step")
        print(totals(size, arguments.gpu, *steps).to_string(na_rep="", float_format="{:,.2f}".format))
        name, seconds = limiting_kernel(*steps, size, arguments.gpu)
        print(f"{size} is limited by {name}: {1e3 * seconds:.1f} ms above its bound", end="\n\n", flush=True)
