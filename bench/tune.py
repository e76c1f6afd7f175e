"""Search the grouped GEMMs' configurations on this GPU, and write those that beat the rule's to DIR/tuned.jsonl.

python -m bench tune [--model_size tiny ...] [--seconds 600] [--output DIR]; then set ACCELERON_TUNED=DIR/tuned.jsonl

bench/candidates.jsonl has up to 12 candidates for each size and GEMM, best estimate first, as the values of
`configs.Config`. They differ from the rule's and compile for sm_90 on Triton 3.6.0 without a complaint of
`bench compile --check`. All CPU cores compile them. A GEMM has an equal share of the seconds that are left. Each
candidate is checked against plain PyTorch, then timed in rounds interleaved with the rule's configuration, in a
separate process. One that is faster in more than four of five rounds, and the best so far, is written at once.
"""

import json
import os
import time
from concurrent.futures import wait
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch

from acceleron.errors import InputError
from acceleron.kernels import configs, launch
from acceleron.kernels.configs import Config

from . import ops
from .command import failures_in, parse
from .compile import SIZES, TARGETS, Launching, compile_only, offline
from .op_cases import GEMMS, Draw
from .rows import Results, Row, progress, say, spread
from .shapes import MICRO_BATCH, SEQ_LEN
from .timing import measure
from .worker import Worker, pool, serve_calls

CANDIDATES = Path(__file__).parent / "candidates.jsonl"
ROUNDS, SHARE = 5, "share of the rule's time"


def compile_candidate(gemm: ops.Settings, arch: str, config: Config):
    """Compile it into Triton's cache."""
    (case,) = gemm.cases()
    with mock.patch.object(configs, "find_config", return_value=config), offline(arch, compile_only), Launching():
        case.ours(*case.make(Draw(gemm.dtype, torch.device("cpu"))))


def attempt(gemm: ops.Settings, config: Config, row: Row) -> tuple[Row, dict]:
    """Check a configuration, and if it passes time it beside the rule's. Returns the completed row, and the entry for
    the tuned table."""
    case, providers, inputs, truth = ops.prepare(gemm, 0)
    with mock.patch.object(configs, "find_config", return_value=config) as find:
        row.check, row.error, row.allowed = ops.check(case, providers["triton"], inputs, truth)
    if row.complaint():
        return row, {}

    def run(find_config):
        with mock.patch.object(configs, "find_config", find_config):
            case.ours(*inputs)

    calls = {"candidate": partial(run, lambda *args: config), "rule": partial(run, configs.rule)}
    row.values, rule = measure(calls, gemm.device, ROUNDS).values()
    row.details[SHARE] = spread([a / b for a, b in zip(row.values, rule, strict=True)])
    op, at, dtype, sizes, _ = find.call_args.args
    key = dict(arch=at.arch, device=at.name, op=op, dtype=str(dtype).removeprefix("torch."), sizes=sizes)
    return row, key | config._asdict() | {"microseconds": round(row.median * 1e6, 1)}


def tune(candidates: dict[ops.Settings, list[Config]], results: Results, seconds: float, limit: float):
    """Try candidates until the seconds are over. Appends each that is the best so far to DIR/tuned.jsonl."""
    end, compiled = time.monotonic() + seconds, {}
    with pool(max(1, (os.cpu_count() or 1) - 1)) as compilers, closing(Worker(serve_calls)) as timer:
        for gemm, found in candidates.items():
            arch = launch.device_of(torch.empty(0, device=gemm.device)).arch
            found = found if arch in TARGETS else []
            compiled[gemm] = {x: compilers(compile_candidate, gemm, arch, x, seconds=limit) for x in found}
        for number, (gemm, found) in enumerate(progress(candidates.items(), "GEMMs")):
            wait(compiled[gemm].values())
            name, best, now = f"{gemm.sizes[0]} {gemm.ops[0]}", 1.0, time.monotonic()
            case = dict(size=gemm.sizes[0], op=gemm.ops[0], dtype=ops.NAMES[gemm.dtype], tokens=gemm.tokens)
            for config in found:
                if time.monotonic() > now + (end - now) / (len(candidates) - number):
                    say(f"{name}: not all candidates were tried within --seconds {seconds:g}")
                    break
                row, entry = Row("tune", " ".join(map(str, config)), case, "s"), {}
                with failures_in(row):
                    if config in compiled[gemm]:
                        compiled[gemm][config].result()
                    row, entry = timer.ask((attempt, (gemm, config, row)), limit)
                results.write(row)
                middle, _, high = row.details.get(SHARE, (1, 1, 1))
                if high < 1 and middle < best:
                    best = middle
                    say(f"{name}: {config} takes {middle:.3f} of the rule's time")
                    with (results.directory / "tuned.jsonl").open("a") as file:
                        file.write(json.dumps(entry) + "\n")


def main():
    choices = {"dtype": ("auto", "bf16", "fp16")}
    arguments = parse(__doc__, choices, model_size=list(SIZES), dtype="auto", tokens=int, seconds=600.0, limit=60.0)
    device, dtype = arguments.device, arguments.dtype
    at, x = launch.device_of(torch.empty(0, device=device)), torch.empty(0, 8, dtype=dtype, device=device)
    if not (at and configs.tma_available("rows", at, x)):
        raise InputError("tuning needs a GPU of sm_90 or later, and a 16-bit dtype")
    lines = map(json.loads, CANDIDATES.read_text().splitlines())
    known = {(line["size"], line["op"]): [Config(*config) for config in line["configs"]] for line in lines}
    candidates = {}
    for size, op in product(arguments.model_size, GEMMS):
        tokens = arguments.tokens or MICRO_BATCH[size] * SEQ_LEN
        candidates[ops.Settings((size,), (op,), tokens, dtype, device)] = known.get((size, op), [])
    tune(candidates, Results(arguments.output, device), arguments.seconds, arguments.limit)
