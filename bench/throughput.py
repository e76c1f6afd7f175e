"""Training tokens/s end to end: forward, backward, optimizer and the real data loader, for the MoE and its dense twin.

Each size is trained as MoE and as dense twin, by the Triton kernels where they can run, and on a CPU by the reference
too. On a GPU the reference has to be asked for (--kernels triton reference), with half the default --batch_size: its
activations are half as large again, and the states of four trainings are on the device (large's don't fit). Modes:
  compiled            torch.compile, all activations kept
  eager               without torch.compile
  checkpointed        compiled, with gradient checkpointing
  eager-checkpointed  both
  balanced            compiled, and the MoE's router is made to choose all experts alike
  deterministic       compiled, with --deterministic: what it costs on a GPU; on a CPU it changes next to nothing
  predecessor         batch 32, accumulation 4, compiled, with gradient checkpointing: the predecessor's own command

All that is trained in one mode of one size is measured in turns, round by round, each in a process of its own, so that
what slows the machine for a while slows all, and ratios are taken round by round. The text is the source of Python's
library; learned routing is that of a router after a few dozen steps on it. Before its timing each process takes the
gradients of one batch, with given experts, which are compared with those of an fp32 run of the plain reference: the
error may be twice that of the plain reference in the same dtype. Utilisation (MFU) is of the FLOPs of the active
parameters; recomputation does not count. The exit status is 1 if anything failed.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from typing import NamedTuple

import torch
from tqdm import tqdm

from acceleron import kernels
from acceleron.config import PRESETS
from acceleron.data.shards import ROW_LENGTH
from acceleron.device import DTYPES, peak_flops, resolve_device, resolve_dtype
from acceleron.errors import InputError
from acceleron.training.options import TrainOptions

from .corpus import write_corpus
from .results import Results
from .timing import spread
from .worker import NANO_VOCAB, Case, Worker, train_in_turns


class Mode(NamedTuple):
    compiled: bool
    checkpointing: bool
    balanced: bool = False
    deterministic: bool = False


MODES = {
    "compiled": Mode(True, False),
    "eager": Mode(False, False),
    "checkpointed": Mode(True, True),
    "eager-checkpointed": Mode(False, True),
    "balanced": Mode(True, False, balanced=True),
    "deterministic": Mode(True, False, deterministic=True),
    "predecessor": Mode(True, True),
}
GPU_MODES = ("deterministic", "predecessor")  # measured on a CPU only if asked for
# Sequences a micro-batch, and their length. On a GPU 128, or as many as an H100 holds by `python -m bench roofline`: of
# its 79 GiB at most 70 are for the peak of the MoE or its twin and the state of the other, which waits there for a turn
# (12 bytes a parameter, 22 GiB of large's MoE); the rest is for CUDA's contexts, workspaces and fragmentation. So they
# are 63, 60, 47 and 66 GiB, from tiny to large; 128 sequences of small would take 113, 32 of medium 77, 16 of large 73.
GPU_BATCH, GPU_SEQ_LEN = {"nano": 128, "tiny": 128, "small": 64, "medium": 16, "large": 12}, 2048
# And at most of a whole step: 262,144 tokens, as many as of the predecessor's own command.
GPU_STEP = 128
CPU_BATCH, CPU_SEQ_LEN = {"nano": 8, "tiny": 4, "small": 2, "medium": 1, "large": 1}, 512
CORPUS_CHARACTERS = 4_000_000


def shape_of(size: str, on_gpu: bool, arguments: argparse.Namespace) -> tuple[int, int, int]:
    """Sequences a micro-batch, micro-batches a step, and tokens a sequence: as asked for, or by size and device."""
    batch_size = arguments.batch_size or (GPU_BATCH if on_gpu else CPU_BATCH)[size]
    grad_accum = arguments.grad_accum or (max(1, GPU_STEP // batch_size) if on_gpu else 1)
    return batch_size, grad_accum, arguments.seq_len or (GPU_SEQ_LEN if on_gpu else CPU_SEQ_LEN)


def served_by(asked: list[str] | None, device: torch.device) -> list[str]:
    """The kernels that train. Raises InputError if Triton's are asked for where they can't run."""
    try:
        kernels.select("triton", device)
    except ValueError as error:
        if "triton" in (asked or ()):
            raise InputError(str(error)) from error
        return ["reference"]
    return asked or (["triton"] if device.type == "cuda" else ["triton", "reference"])


def make_cases(size: str, mode: str, device: torch.device, data_dir: str, arguments) -> list[Case]:
    """MoE and dense twin, by each of the kernels asked for; on a GPU by Triton's alone unless asked.

    The twin too: traced with the reference's ops, as inductor fuses them, it is predicted 4 % slower (bench/LOG.md).
    """
    compiled, checkpointing, balanced, deterministic = MODES[mode]
    on_gpu, predecessor = device.type == "cuda", mode == "predecessor"
    batch_size, grad_accum, seq_len = shape_of(size, on_gpu, arguments)
    options = TrainOptions(
        data_dir=data_dir,
        model_size=size,
        batch_size=32 if predecessor else batch_size,
        grad_accum=4 if predecessor else grad_accum,
        seq_len=seq_len,
        dtype=arguments.dtype,
        device=str(device),
        deterministic=deterministic,
        no_compile=not compiled,
        no_gradient_checkpointing=not checkpointing,
        num_workers=2 if on_gpu else 1,
    )
    return [
        Case(dataclasses.replace(options, dense=dense, kernels=by), balanced)
        for by in served_by(arguments.kernels, device)
        for dense in (False, True)
    ]


def row_of(worker: Worker, mode: str, dtype: str, peak: float) -> dict:
    """A row of throughput.jsonl, of a finished worker."""
    case, options, figures = worker.case, worker.case.options, worker.row
    row = {
        "size": options.model_size,
        "model": "dense" if options.dense else "moe",
        "kernels": options.kernels,
        "mode": mode,
        "compiled": not options.no_compile,
        "checkpointing": not options.no_gradient_checkpointing,
        "deterministic": options.deterministic,
        "batch_size": options.batch_size,
        "grad_accum": options.grad_accum,
        "seq_len": options.seq_len,
        "dtype": dtype,
        "routing": None if options.dense else "balanced" if case.balanced else "learned",
        "group": f"{options.model_size} {mode} {dtype} {options.batch_size}x{options.grad_accum}x{options.seq_len}",
        **figures,
    }
    if "failed" not in figures:
        median, low, high = spread(worker.rounds)
        row |= {"rounds": worker.rounds}
        row |= {"tokens_per_second": median, "tokens_per_second_p20": low, "tokens_per_second_p80": high}
        row |= {"mfu": median * figures["flops_per_token"] / peak, "peak_flops": peak}
    return row


def print_rows(rows: list[dict]):
    """Of one group: tokens/s, and the MoE's ratio to the dense twin, taken round by round."""
    twins = [row for row in rows if row["model"] == "dense" and "failed" not in row]
    for row in rows:
        name = f"{row['group']:44} {row['model']:5} {row['kernels']:9}"
        if "failed" in row:
            tqdm.write(f"{name} FAILED: {row['failed']}")
            continue
        ratio = ""
        if twins and row["model"] == "moe":
            twin = max(twins, key=lambda twin: twin["tokens_per_second"])
            ratios = [a / b for a, b in zip(row["rounds"], twin["rounds"], strict=True)]
            ratio = "  MoE / dense twin {:.3f} ({:.3f} .. {:.3f})".format(*spread(ratios))
        tqdm.write(
            f"{name} {row['tokens_per_second']:>11,.0f} tokens/s ({row['tokens_per_second_p20']:,.0f} .. "
            f"{row['tokens_per_second_p80']:,.0f})  MFU {row['mfu']:.1%}  {row['peak_memory_bytes'] / 2**30:.2f} GiB"
            + ratio
        )


def check_batch(arguments: argparse.Namespace):
    """Raise InputError for a --batch_size, --grad_accum or --seq_len, where given, that no training can have."""
    for name in ("batch_size", "grad_accum", "seq_len"):
        value = getattr(arguments, name)
        if value is not None and (value < 1 or (name == "seq_len" and (value < 2 or ROW_LENGTH % value))):
            wanted = f"a divisor of {ROW_LENGTH} above 1" if name == "seq_len" else "at least 1"
            raise InputError(f"--{name} {value}: expected {wanted}")


def main():
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler prints two lines each time that it is used
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*PRESETS], help="default: all on a GPU, nano and tiny on a CPU")
    text = f"default: all on a GPU, all but {' and '.join(GPU_MODES)} on a CPU"
    parser.add_argument("--mode", nargs="+", choices=MODES, help=text)
    text = "default: triton, and on a CPU both; the reference alone where Triton can't run"
    parser.add_argument("--kernels", nargs="+", choices=("triton", "reference"), help=text)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--batch_size", type=int, help="sequences a micro-batch (default: by size and device)")
    text = f"micro-batches a step (default: those of {GPU_STEP} sequences on a GPU, 1 on a CPU)"
    parser.add_argument("--grad_accum", type=int, help=text)
    parser.add_argument("--seq_len", type=int, help=f"default: {GPU_SEQ_LEN} on a GPU, {CPU_SEQ_LEN} on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of training a round, in whole steps")
    parser.add_argument("--output", metavar="DIR", help="for throughput.jsonl (default: bench/results/<date>-<device>)")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or not 0 < arguments.seconds < float("inf"):
        raise InputError("--rounds and --seconds: expected at least one round of some seconds")
    check_batch(arguments)
    device = resolve_device(arguments.device)
    on_gpu = device.type == "cuda"
    sizes = arguments.size or ([*GPU_BATCH][1:] if on_gpu else ["nano", "tiny"])
    modes = arguments.mode or [mode for mode in MODES if on_gpu or mode not in GPU_MODES]
    dtype = resolve_dtype(arguments.dtype, device)
    served_by(arguments.kernels, device)  # now, before anything is written
    results, failed = Results(arguments.output, "throughput", device), False
    peak, source = peak_flops(device, dtype)
    with tempfile.TemporaryDirectory() as directory:
        print(write_corpus(f"{directory}/data", NANO_VOCAB, CORPUS_CHARACTERS))
        print(f"utilisation is against {peak / 1e12:.3g} TFLOP/s, {source}")
        truths = {}
        groups = [(size, mode) for mode in modes for size in sizes]
        for size, mode in tqdm(groups, "sizes and modes", dynamic_ncols=True, disable=None):
            cases = make_cases(size, mode, device, f"{directory}/data", arguments)
            workers = train_in_turns(cases, truths, directory, arguments.rounds, arguments.seconds)
            rows = [row_of(worker, mode, str(dtype).removeprefix("torch."), peak) for worker in workers]
            for row in rows:
                failed |= not results.write(row)
            print_rows(rows)
    print(f"wrote {results.path}")
    if failed:
        sys.exit(1)
