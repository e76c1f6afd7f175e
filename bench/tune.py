"""Tune the grouped GEMMs on this GPU: write configurations that beat the default rule to DIR/tuned.jsonl.

python -m bench tune [--model_size tiny ...] [--seconds 600] [--output DIR]; then set ACCELERON_TUNED=DIR/tuned.jsonl

bench/candidates.jsonl has up to 12 candidates for each size and GEMM, best estimate first, as values of
`configs.Config`. They differ from the rule's configuration and pass `bench compile --check` for sm_90 on Triton 3.6.0.
All CPU cores compile candidates. The remaining time is divided equally among the remaining GEMMs. A separate process
checks each candidate against plain PyTorch and times it against the rule in interleaved rounds. A
candidate is written immediately if it is the fastest so far and its p80 of candidate / rule is below 1.
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
from .command import parse, record_failure
from .compile import SIZES, TARGETS, LaunchMode, compile_only, offline
from .op_cases import GEMMS, RandomTensors
from .rows import Results, Row, progress, say, spread
from .shapes import MICRO_BATCH, SEQ_LEN
from .timing import measure
from .worker import Worker, pool, serve_calls

CANDIDATES = Path(__file__).parent / "candidates.jsonl"
ROUNDS, SHARE = 5, "share of the rule's time"


def compile_candidate(gemm: ops.Settings, arch: str, config: Config):
    """Compile a candidate into Triton's cache."""
    (case,) = gemm.cases()
    with mock.patch.object(configs, "find_config", return_value=config), offline(arch, compile_only), LaunchMode():
        case.ours(*case.make(RandomTensors(gemm.dtype, torch.device("cpu"))))


def try_candidate(gemm: ops.Settings, config: Config, row: Row) -> tuple[Row, dict]:
    """Check a candidate and, if it passes, time it against the rule. Returns its row and its tuned-table entry."""
    case, providers, inputs, truth = ops.prepare(gemm, 0)
    with mock.patch.object(configs, "find_config", return_value=config) as find:
        row.check, row.error, row.allowed = ops.check(case, providers["triton"], inputs, truth)
    if row.problem():
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
    """Try candidates until time runs out. Appends each new best candidate to DIR/tuned.jsonl."""
    end, compiled = time.monotonic() + seconds, {}
    with pool(max(1, (os.cpu_count() or 1) - 1)) as compilers, closing(Worker(serve_calls)) as timer:
        for gemm, listed in candidates.items():
            arch = launch.device_of(torch.empty(0, device=gemm.device)).arch
            listed = listed if arch in TARGETS else []
            compiled[gemm] = {x: compilers(compile_candidate, gemm, arch, x, seconds=limit) for x in listed}
        for number, (gemm, listed) in enumerate(progress(candidates.items(), "GEMMs")):
            wait(compiled[gemm].values())
            name = f"{gemm.sizes[0]} {gemm.ops[0]}"
            best = 1.0
            now = time.monotonic()
            case = dict(size=gemm.sizes[0], op=gemm.ops[0], dtype=ops.NAMES[gemm.dtype], tokens=gemm.tokens)
            for config in listed:
                if time.monotonic() > now + (end - now) / (len(candidates) - number):
                    say(f"{name}: out of time before all candidates were tried; raise --seconds {seconds:g}")
                    break
                row, entry = Row("tune", " ".join(map(str, config)), case, "s"), {}
                with record_failure(row):
                    if config in compiled[gemm]:
                        compiled[gemm][config].result()
                    row, entry = timer.ask((try_candidate, (gemm, config, row)), limit)
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
        raise InputError("tuning needs a GPU with sm_90 or later and a 16-bit --dtype")
    lines = map(json.loads, CANDIDATES.read_text().splitlines())
    known = {(line["size"], line["op"]): [Config(*config) for config in line["configs"]] for line in lines}
    candidates = {}
    for size, op in product(arguments.model_size, GEMMS):
        tokens = arguments.tokens or MICRO_BATCH[size] * SEQ_LEN
        candidates[ops.Settings((size,), (op,), tokens, dtype, device)] = known.get((size, op), [])
    tune(candidates, Results(arguments.output, device), arguments.seconds, arguments.limit)
