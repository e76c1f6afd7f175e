"""Forward and backward of MoE and dense twin against transformers' models of their dimensions, on the same weights.

python -m bench peers [--size tiny] [--dtype fp32] [--no_compile] [--rounds 5] [--output DIR]

Rows of peers.jsonl: provider, size, model (moe or dense), kernels (None of a peer), dtype, compiled, batch_size,
seq_len; `rounds`, tokens/s a round, the same round of all providers of a `group` run in turns; their median
`tokens_per_second`, `tokens_per_second_p20` and `_p80`. A rate's check is of the gradients that a last round, untimed,
gives (bench/passes.py). No checkpointing and no optimizer.
"""

import argparse
import time
from dataclasses import replace

import torch
from tqdm import tqdm

from acceleron import kernels
from acceleron.config import PRESETS
from acceleron.device import DTYPES, missing_compiler, resolve_device, resolve_dtype, synchronize
from acceleron.errors import InputError

from .passes import Run, Truths, build, check, gradients, sample, sdpa, token_ids
from .results import Results
from .rounds import print_race, rates
from .timing import interleave


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=tuple(PRESETS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--kernels", default="auto", choices=("auto", "triton", "reference"))
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no_compile", action="store_true", help="run ours in eager mode too, as the peers run")
    parser.add_argument("--output", help="directory for peers.jsonl (default bench/results/<date>-<device>)")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    dtype = next(name for name, value in DTYPES.items() if value == resolve_dtype(arguments.dtype, device))
    longest = PRESETS[arguments.size].max_seq_len
    for name, most in (("batch_size", 1 << 20), ("seq_len", longest), ("rounds", 1 << 20)):
        least = 2 if name == "seq_len" else 1
        if not least <= getattr(arguments, name) <= most:
            raise InputError(f"--{name} {getattr(arguments, name)}: must be {least} to {most}")
    try:
        served = "triton" if kernels.select(arguments.kernels, device).startswith("Triton") else "reference"
    except ValueError as error:
        raise InputError(str(error)) from error
    results = Results(arguments.output, "peers", device)
    compiled = not arguments.no_compile and missing_compiler(device) is None
    batch = (arguments.batch_size, arguments.seq_len)
    common = dict(what="speed", part="model step", size=arguments.size, tokens=batch[0] * batch[1], batch=batch)
    ours = Run(**common, model="moe", source="ours", kernels=served, dtype=dtype, compiled=compiled)
    peer = replace(ours, kernels=None, compiled=False)
    # batched_mm copies an expert's weights for each token: it is made for decoding, and never the fastest here.
    runs = [ours, replace(ours, model="dense")]
    runs += [replace(peer, source="eager"), replace(peer, source="grouped_mm")]
    runs.append(replace(peer, source="llama", model="dense"))
    rows = race(runs, device, arguments.rounds)
    for row in rows:
        results.write(row)
    print(f"{arguments.size}, {dtype}, {served} kernels, forward and backward of {batch}")
    moe, twin, *experts, llama = [row["provider"] for row in rows]
    print_race(rows, [(moe, twin), (twin, llama), *((moe, other) for other in experts)])


def race(runs: list[Run], device: torch.device, rounds: int) -> list[dict]:
    """The rows of runs of one shape, raced against each other and checked. What can't be built or run has failed."""
    models, calls, failed = {}, {}, {}
    for run in runs:
        try:
            kernels.select(run.kernels or "auto", device)
            models[run] = build(run, device)
            calls[run] = timed(run, models[run], device)
            calls[run]()
        except Exception as error:  # a peer's, of any kind: the others still run
            reason = "absent" if isinstance(error, ImportError) else "failed"
            failed[run] = {reason: " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            models.pop(run, None), calls.pop(run, None)
    seconds = interleave(calls, rounds)
    truths, rows = Truths(device), {run: run.row() | failed[run] for run in failed}
    for run in tqdm(sorted(models, key=lambda run: run.model), desc="checks", leave=False, disable=None):
        calls[run](keep=True)
        found = sample(gradients(models[run]))
        del models[run], calls[run]
        group = f"{run.size}, {run.dtype}, {run.shape()[0]} x {run.shape()[1]}"
        rows[run] = run.row() | {"group": group} | rates(seconds[run], run.tokens) | check(run, found, truths.of(run))
    return [rows[run] for run in runs]


def timed(run: Run, model: torch.nn.Module, device: torch.device):
    """A function that runs one forward and backward pass and returns its seconds; the gradients go unless kept."""
    ids = token_ids(run, model.config.vocab_size).to(device)

    def call(keep: bool = False) -> float:
        kernels.select(run.kernels or "auto", device)
        synchronize(device)
        start = time.perf_counter()
        with sdpa(device):
            model(input_ids=ids, labels=ids).loss.backward()
        synchronize(device)
        elapsed = time.perf_counter() - start
        if not keep:
            model.zero_grad(set_to_none=True)
        return elapsed

    return call


if __name__ == "__main__":
    main()
