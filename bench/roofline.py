"""What a training step launches on an H100, the least time that it can take there, and a prediction; no GPU is needed.

The step is traced (bench/trace.py): the MoE's, and its dense twin's. A table lists its launches by kind:
  bound      the larger of FLOPs / 798 TFLOP/s and bytes / 3.0 TB/s of each launch, rates measured on an H100 SXM
  gap        what of it the FLOPs alone would not take: how far the design, and not a kernel, is from the floor
  predicted  the time at rates that such kernels are known to reach, and 3 us at least
  idle       of the grouped GEMMs: the share of the processors' time lost as the last wave of tiles is not full
  tiles MB   of the grouped GEMMs: what their tiles read, most of it from L2
The FLOP floor is the time of the active parameters' FLOPs, as train.py's MFU counts them, at 798 TFLOP/s. Bounds and
predictions take launches for one after another without a pause, and were held against no measurement of this model yet.
"""

import argparse
import math
import sys
from collections import defaultdict
from typing import NamedTuple

from acceleron.config import PRESETS
from acceleron.kernels.launch import INTERPRETED

from .compile import SIZES
from .throughput import GPU_SEQ_LEN, GPU_STEP, check_batch, shape_of
from .trace import LIBRARY_GEMMS, Launch, Step, trace_step

# Measured on the H100 that the project is for: a cuBLAS GEMM of 8192 cubed in bf16, and a copy.
FLOPS_PER_SECOND, BYTES_PER_SECOND = 798e12, 3.0e12
USABLE_BYTES = 79 * 2**30
# The prediction's rates. cuBLAS on an H100, 65536x1024x1024 in bf16, measured by facebookexperimental/triton #1038:
GEMM_RATE = 584e12
# Assumed, of full waves: on that GEMM non-persistent Triton reached 502 and persistent TLX 564 TFLOP/s, and SonicMoE's
# whole MoE layers 402 to 464.
GROUPED_RATE = 450e12
# Assumed, forward and backward, by the width of the tile that a head is padded to, of which a narrower one uses a part:
# about what FlashAttention-3's paper shows for causal attention over 2k tokens.
ATTENTION_RATES = {64: (330e12, 250e12), 128: (450e12, 380e12)}
# Assumed, of kernels that wait for memory; and the time from one launch's begin to the next one's at the least.
MOVED_RATE, LEAST_SECONDS = 0.9 * BYTES_PER_SECOND, 3e-6
SHOWN = 0.005  # the share of the time from which on a kind has a line of its own

# What the project is to reach on one H100: tokens/s, and the FLOP floor's share of the step.
TARGETS = {"tiny": (700e3, 0.44), "small": (330e3, 0.44), "medium": (135e3, 0.45), "large": (78e3, 0.46)}
RATIO_TARGET = 0.95  # of the MoE's tokens/s to the twin's


class Kind(NamedTuple):
    """Launches of one name. Times are in seconds; idle and tile_loads are of grouped GEMMs, and None of others."""

    name: str
    launches: int
    flops: float
    moved: float
    bound: float
    gap: float
    predicted: float
    idle: float | None
    tile_loads: float | None


def idle_share(gemms: list[Launch]) -> float:
    """Of the time of grouped GEMMs of equally long waves of tiles, what is lost in those that are not full."""
    waves = [gemm.tiles / gemm.programs for gemm in gemms]
    return 1 - sum(waves) / sum(math.ceil(wave) for wave in waves)


def bound(launch: Launch) -> float:
    """Seconds."""
    return max(launch.flops / FLOPS_PER_SECOND, launch.moved / BYTES_PER_SECOND)


def predicted(launch: Launch) -> float:
    """Seconds."""
    rate = FLOPS_PER_SECOND  # of a kernel of few FLOPs, which its bytes bound
    if launch.tiles:
        rate = GROUPED_RATE * (1 - idle_share([launch]))
    elif launch.head_dim:
        tile = 64 if launch.head_dim <= 64 else 128
        rate = ATTENTION_RATES[tile][launch.name == "attention backward"] * launch.head_dim / tile
    elif launch.name in LIBRARY_GEMMS:
        rate = GEMM_RATE
    return max(launch.flops / rate, launch.moved / MOVED_RATE, LEAST_SECONDS)


def summed(name: str, launches: list[Launch]) -> Kind:
    gemms = [x for x in launches if x.tiles]
    return Kind(
        name=name,
        launches=len(launches),
        flops=sum(x.flops for x in launches),
        moved=sum(x.moved for x in launches),
        bound=sum(map(bound, launches)),
        gap=sum(bound(x) - x.flops / FLOPS_PER_SECOND for x in launches),
        predicted=sum(map(predicted, launches)),
        idle=idle_share(gemms) if gemms else None,
        tile_loads=sum(x.tile_loads for x in gemms) if gemms else None,
    )


def by_kind(launches: list[Launch]) -> list[Kind]:
    """The kinds, by predicted time; those below SHOWN of all together; and last all launches together."""
    whole = summed("all", launches)
    groups = defaultdict(list)
    for launch in launches:
        groups[launch.name].append(launch)
    kinds = [summed(name, group) for name, group in groups.items()]
    shown = [kind for kind in kinds if kind.predicted >= SHOWN * whole.predicted]
    names = {kind.name for kind in shown}
    rest = [launch for launch in launches if launch.name not in names]
    others = [summed(f"{len(kinds) - len(shown)} other kinds", rest)] if rest else []
    return [*sorted(shown, key=lambda kind: -kind.predicted), *others, whole]


def print_kinds(title: str, kinds: list[Kind]):
    form = "{:44} {:>8} {:>9} {:>9} {:>8} {:>8} {:>9} {:>5} {:>9}"
    print(form.format(title, "launches", "GFLOP", "MB", "bound ms", "gap ms", "predicted", "idle", "tiles MB"))
    for kind in kinds:
        times = [f"{1e3 * seconds:.2f}" for seconds in (kind.bound, kind.gap, kind.predicted)]
        gemm = ["", ""] if kind.idle is None else [f"{kind.idle:.0%}", f"{kind.tile_loads / 1e6:.0f}"]
        work = [f"{kind.flops / 1e9:.0f}", f"{kind.moved / 1e6:.0f}"]
        print(form.format(kind.name[:44], kind.launches, *work, *times, *gemm).rstrip())


def print_totals(size: str, steps: list[Step], wholes: list[Kind]):
    """Of the MoE and its twin."""
    form = "{:44} {:>12} {:>12} {:>12}"
    tokens = steps[0].tokens
    print(form.format(f"{size}, {tokens:,} tokens a step", "MoE", "dense twin", "MoE's target"))

    def line(name: str, values: list[float], digits: int = 0, target: float | None = None):
        figures = [f"{value:,.{digits}f}" for value in (*values, *([] if target is None else [target]))]
        gap = [""] * (3 - len(figures))
        print(form.format(name, *figures[: len(values)], *gap, *figures[len(values) :]).rstrip())

    line("launches", [whole.launches for whole in wholes])
    floors = [step.model_flops / FLOPS_PER_SECOND for step in steps]
    line("FLOP floor, ms", [1e3 * floor for floor in floors], 2)
    line("  tokens/s", [tokens / floor for floor in floors])
    for name, targets in (("bound", (None,) * 3), ("predicted", (*TARGETS.get(size, (None,) * 2), RATIO_TARGET))):
        seconds = [getattr(whole, name) for whole in wholes]
        line(f"{name}, ms", [1e3 * s for s in seconds], 2)
        line("  tokens/s", [tokens / s for s in seconds], 0, targets[0])
        line("  the FLOP floor's share", [f / s for f, s in zip(floors, seconds, strict=True)], 2, targets[1])
        line("  MoE's tokens/s / the twin's", [seconds[1] / seconds[0]], 2, targets[2])
    line(f"peak memory, GiB (of {USABLE_BYTES / 2**30:.0f})", [step.peak_bytes / 2**30 for step in steps], 1)


def print_size(size: str, arguments: argparse.Namespace):
    micro, accum, seq_len = shape_of(size, True, arguments)
    steps, wholes = [], []
    for model in ("MoE", "dense twin"):
        steps.append(trace_step(size, model != "MoE", micro, accum, arguments.checkpointing, seq_len))
        kinds = by_kind(steps[-1].launches)
        wholes.append(kinds[-1])
        print_kinds(f"{size} {model}, {accum} x {micro} x {seq_len}", kinds)
        print()
    print_totals(size, steps, wholes)
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*PRESETS], default=list(SIZES))
    parser.add_argument("--batch_size", type=int, help="sequences a micro-batch (default: that of bench throughput)")
    parser.add_argument("--grad_accum", type=int, help=f"micro-batches a step (default: those of {GPU_STEP} sequences)")
    parser.add_argument("--seq_len", type=int, help=f"default: {GPU_SEQ_LEN}")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    arguments = parser.parse_args()
    check_batch(arguments)
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 is set, under which kernels are not those that a GPU runs: unset it")
    for size in arguments.size:
        print_size(size, arguments)


if __name__ == "__main__":
    main()
