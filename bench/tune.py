"""Search the grouped GEMMs' configurations on this GPU, and write those that beat the rule's to DIR/tuned.jsonl.

ACCELERON_TUNED=DIR/tuned.jsonl then uses them. The candidates are those of bench/candidates.jsonl, most promising
first. They are compiled by all CPU cores, and taken a few at a time, case by case, so that every case gets its share of
--seconds. Each is checked against plain PyTorch in a process of its own, then timed in rounds interleaved with the
rule's configuration, and kept if it is faster in more than four of five rounds. A kept one is written at once.

--dry_run needs no GPU: it writes DIR/candidates.jsonl, the configurations that compile for sm_90 without a complaint of
`bench compile --check`.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from itertools import product, zip_longest
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.device import resolve_device
from acceleron.errors import InputError
from acceleron.kernels import configs, launch
from acceleron.kernels.configs import Config

from . import ops
from .compile import DTYPES, SIZES, TARGETS, compiling, complaints, describe
from .offline import Pool
from .op_cases import GEMMS, Case, Draw, gemm_case, gemm_kernel
from .op_peers import Provider
from .rows import Results, Row, progress, ratio, say
from .shapes import MICRO_BATCH, SEQ_LEN
from .timing import measure
from .worker import Failure

CANDIDATES = Path(__file__).parent / "candidates.jsonl"
AT_ONCE, ROUNDS = 4, 5  # candidates that are timed together, and how often
LIMIT = 60  # seconds of one compilation, check or timing
TILES = {
    "up": [(128, 128, 64, 8), (256, 64, 64, 8), (128, 64, 64, 4), (64, 128, 64, 4)],  # of two matrices
    "hidden_grad": [(128, 128, 64, 8), (64, 128, 64, 4), (128, 64, 64, 4), (64, 256, 64, 8)],
    "rows": [(128, 256, 64, 8), (256, 128, 64, 8), (128, 128, 64, 4), (64, 256, 64, 4)],
    "weight_grad": [(128, 256, 64, 8), (256, 128, 64, 8), (128, 128, 64, 4)],
}
WAYS = [(4, 1, True), (4, 1, False), (3, 1, False), (3, 2, False), (3, 1, True)]  # stages, programs, flatten
SPLITS = [(5, 1), (5, 2), (5, 3), (4, 1), (4, 2), (5, 4), (4, 3)]  # stages, split


class Gemm(NamedTuple):
    """One of bench/op_cases.py's GEMMS at a size."""

    size: str
    op: str
    dtype: str
    tokens: int

    def case(self) -> Case:
        return gemm_case(self.op, self.size, ModelConfig.preset(self.size), self.tokens, DTYPES[self.dtype])


def space(op: str) -> list[Config]:
    """The configurations worth compiling, most promising first."""
    tiles = TILES[gemm_kernel(op)]
    if op.startswith("weight_grad"):
        return [Config(*tile, stages, split=split) for (stages, split), tile in product(SPLITS, tiles)]
    # hidden_grad holds a tile of h through its loop, for which the flattened one has no registers.
    ways = [way for way in WAYS if op != "hidden_grad" or not way[2]]
    return [Config(*tile, *way) for way, tile in product(ways, tiles)]


@contextmanager
def using(config: Config | None) -> Iterator[list]:
    """In this context GEMMs have this configuration, or the rule's (None). Yields the arguments of the look-ups."""
    asked = []

    def find_config(*args) -> Config:
        asked.append(args)
        return config or configs.rule(*args)

    with mock.patch.object(configs, "find_config", find_config):
        yield asked


def compile_candidate(gemm: Gemm, arch: str, config: Config) -> list[str]:
    """Compile it into Triton's cache. Returns the complaints about it, one of which is to be the rule's."""
    case = gemm.case()
    with compiling(arch) as compiled, using(config) as asked:
        case.ours(*case.make(Draw(case.precision, torch.device("cpu"))))
    (row,) = (dict(arch=arch, size=gemm.size, dtype=gemm.dtype, aligned=True) | describe(arch, *x) for x in compiled)
    share = max(row["registers"] * 32 * row["warps"] / 65536, row["shared_bytes"] / TARGETS[arch].shared_bytes)
    found = complaints(row) + ["the rule's"] * (config == configs.rule(*asked[0]))
    return found + ["the programs do not fit an SM"] * (share * config.programs > 1)


@lru_cache(1)
def prepare(gemm: Gemm, device: torch.device) -> tuple[Case, tuple, ops.Truth]:
    case, draw = gemm.case(), Draw(DTYPES[gemm.dtype], device)
    inputs = case.make(draw)
    return case, inputs, ops.truth_of(case, inputs, draw)


def check(gemm: Gemm, device: torch.device, config: Config | None) -> tuple[str, float, float]:
    """What is compared, the error, and the allowed error."""
    case, inputs, truth = prepare(gemm, device)
    with using(config):
        return ops.check(case, Provider("triton", case.ours), inputs, truth)


def time_together(gemm: Gemm, device: torch.device, found: list[Config | None]) -> tuple[dict, list[list[float]]]:
    """The GEMM's key in the tuned table, and the seconds of each configuration, one value per interleaved round."""
    case, inputs, _ = prepare(gemm, device)

    def run(config: Config | None) -> list:
        with using(config) as asked:
            case.ours(*inputs)
        return asked

    ((op, at, dtype, sizes, _),) = run(None)
    key = dict(arch=at.arch, device=at.name, op=op, dtype=str(dtype).removeprefix("torch."), sizes=sizes)
    return key, [*measure({config: lambda config=config: run(config) for config in found}, device, ROUNDS).values()]


def take_turn(gemm: Gemm, found: list[Config], device: torch.device, timer: Pool) -> tuple[dict, dict]:
    """Check and time these configurations beside the rule's (None). Returns the GEMM's key and the rows."""
    rows = {}
    for config in (None, *found):
        row = rows[config] = Row("tune", " ".join(map(str, config)) if config else "rule", gemm._asdict(), "s")
        try:
            row.check, row.error, row.allowed = timer.submit(check, gemm, device, config, seconds=LIMIT).result()
        except Failure as failure:
            row.failed = str(failure)
    right = [config for config, row in rows.items() if not row.complaint()]
    try:
        key, seconds = timer.submit(time_together, gemm, device, right, seconds=LIMIT).result()
        for config, values in zip(right, seconds, strict=True):
            rows[config].values = values
        return key, rows
    except Failure as failure:
        for config in right:
            rows[config].failed = f"not timed: {failure}"
        return {}, rows


def tune(turns: list[tuple[Gemm, list[Config]]], device: torch.device, results: Results, seconds: float):
    """Take turns until the time is over. Appends each configuration that is the best so far to DIR/tuned.jsonl."""
    deadline, best = time.monotonic() + seconds, {}
    arch = launch.device_of(torch.empty(0, device=device)).arch
    with Pool(max(1, (os.cpu_count() or 1) - 1)) as compilers, Pool(1) as timer:
        compiled = {
            (gemm, config): compilers.submit(compile_candidate, gemm, arch, config, seconds=LIMIT)
            for gemm, found in turns
            for config in found
            if arch in TARGETS
        }
        for gemm, found in progress(turns, "turns"):
            if time.monotonic() > deadline:
                say(f"--seconds {seconds:g} are over: not all candidates were timed")
                break
            key, rows = take_turn(gemm, [x for x in found if fits(compiled.get((gemm, x)))], device, timer)
            for row in rows.values():
                results.write(row)
            rule = rows.pop(None)
            for config, row in rows.items():
                middle, _, high = ratio(row, rule) if row.values and rule.values else (1, 1, 1)
                if high < 1 and middle < best.get(gemm, 1):
                    best[gemm] = middle
                    say(f"{gemm.size} {gemm.op}: {config} takes {middle:.3f} of the rule's time")
                    entry = key | config._asdict() | {"microseconds": round(row.median * 1e6, 1)}
                    with (results.directory / "tuned.jsonl").open("a") as file:
                        file.write(json.dumps(entry) + "\n")


def fits(compiling: Future | None) -> bool:
    """Whether a candidate compiled without a complaint; True for one that was not compiled before."""
    try:
        return not (compiling and compiling.result())
    except Failure:
        return False


def in_turns(found: dict[Gemm, list[Config]], at_once: int) -> list[tuple[Gemm, list[Config]]]:
    """The first few of every GEMM, then the next few of every GEMM, and so on."""
    chunks = [[(gemm, some[i : i + at_once]) for i in range(0, len(some), at_once)] for gemm, some in found.items()]
    return [turn for turns in zip_longest(*chunks) for turn in turns if turn]


def list_candidates(gemms: list[Gemm], path: Path, seconds: float):
    """Write the candidates that compile without a complaint, as many as are compiled in this time."""
    deadline, kept = time.monotonic() + seconds, {gemm: [] for gemm in gemms}
    with Pool(os.cpu_count() or 1) as pool:
        turns = in_turns({gemm: space(gemm.op) for gemm in gemms}, 1)
        waiting = [(gemm, one, pool.submit(compile_candidate, gemm, "sm_90", one)) for gemm, (one,) in turns]
        for gemm, config, compiling in progress(waiting, "candidates"):
            if time.monotonic() > deadline:
                break
            kept[gemm] += [config] if fits(compiling) else []
    lines = [{"size": gemm.size, "op": gemm.op, "configs": found} for gemm, found in kept.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    say(f"wrote {sum(map(len, kept.values()))} candidates to {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*PRESETS], default=list(SIZES))
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--tokens", type=int, help="default: those of a micro-batch of bench throughput")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time budget; default: all candidates")
    parser.add_argument("--output", metavar="DIR", help="for tuned.jsonl and results.jsonl")
    parser.add_argument("--dry_run", action="store_true", help="list candidates; needs no GPU")
    arguments = parser.parse_args()
    if not arguments.seconds > 0 or (arguments.tokens is not None and arguments.tokens < 1):
        raise InputError("--seconds and --tokens: expected more than 0")
    if arguments.dry_run and launch.INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 is set, under which nothing can be compiled: unset it")
    device = resolve_device("auto")
    x = torch.empty(0, 8, dtype=torch.float16, device=device)
    if not (arguments.dry_run or (launch.device_of(x) and configs.tma_available("rows", launch.device_of(x), x))):
        sys.exit("tuning needs a GPU of sm_90 or later, and there is none; --dry_run lists the candidates")
    tokens = {size: arguments.tokens or MICRO_BATCH[size] * SEQ_LEN for size in arguments.size}
    gemms = [Gemm(size, op, arguments.dtype, tokens[size]) for size, op in product(arguments.size, GEMMS)]
    results = Results(arguments.output, device)
    if arguments.dry_run:
        list_candidates(gemms, results.directory / CANDIDATES.name, arguments.seconds)
        return
    lines = map(json.loads, CANDIDATES.read_text().splitlines())
    known = {(line["size"], line["op"]): [Config(*config) for config in line["configs"]] for line in lines}
    tune(in_turns({gemm: known.get(gemm[:2], []) for gemm in gemms}, AT_ONCE), device, results, arguments.seconds)


if __name__ == "__main__":
    main()
