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
from concurrent.futures import Future
from functools import lru_cache
from itertools import product, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.device import resolve_device
from acceleron.errors import InputError
from acceleron.kernels import configs, launch
from acceleron.kernels.configs import Config

from .compile import DTYPES, SIZES, TARGETS, compiling, complaints, describe
from .gemms import Gemm, gemm_cases
from .offline import Pool
from .rows import Results, Row, progress, ratio, say
from .shapes import MICRO_BATCH, SEQ_LEN
from .timing import measure
from .worker import Failure

CANDIDATES = Path(__file__).parent / "candidates.jsonl"
OPS = ("up", "rows", "hidden_grad", "rows", "weight_grad", "weight_grad")  # of gemm_cases
AT_ONCE, ROUNDS = 3, 10  # candidates that are timed together, and how often
LIMIT = 60  # seconds of one compilation, check or timing
# A candidate's error may be this many times plain PyTorch's in the same dtype.
FACTOR = 1.5
TILES = {
    "up": [(128, 128, 64, 8), (256, 64, 64, 8), (128, 64, 64, 4), (64, 128, 64, 4)],  # of two matrices
    "hidden_grad": [(128, 128, 64, 8), (64, 128, 64, 4), (128, 64, 64, 4), (64, 256, 64, 8)],
    "rows": [(128, 256, 64, 8), (256, 128, 64, 8), (128, 128, 64, 4), (64, 256, 64, 4)],
    "weight_grad": [(128, 256, 64, 8), (256, 128, 64, 8), (128, 128, 64, 4)],
}
WAYS = [(4, 1, True), (4, 1, False), (3, 1, False), (3, 2, False), (3, 1, True)]  # stages, programs, flatten
SPLITS = [(5, 1), (5, 2), (5, 3), (4, 1), (4, 2), (5, 4), (4, 3)]  # stages, split


class Case(NamedTuple):
    """A grouped GEMM of a size: the index of gemm_cases."""

    size: str
    index: int
    dtype: str
    tokens: int

    def gemm(self, device: torch.device) -> Gemm:
        return gemm_cases(ModelConfig.preset(self.size), self.tokens, DTYPES[self.dtype], device)[self.index]


def space(op: str) -> list[Config]:
    """The configurations worth compiling, most promising first."""
    if op == "weight_grad":
        return [Config(*tile, stages, split=split) for (stages, split), tile in product(SPLITS, TILES[op])]
    # hidden_grad holds a tile of h through its loop, for which the flattened one has no registers.
    ways = [way for way in WAYS if op != "hidden_grad" or not way[2]]
    return [Config(*tile, *way) for way, tile in product(ways, TILES[op])]


def use(gemm: Gemm, dtype: str, config: Config | None) -> tuple:
    """Launch with this configuration from here on in this process, or with the rule's (None). Returns the key."""
    device = launch.device_of(gemm.tensors[0])
    key = device.arch, device.name, gemm.name, str(DTYPES[dtype]).removeprefix("torch."), gemm.sizes
    configs.table().pop(key, None)
    configs.table().update({key: config} if config else {})
    configs.find_config.cache_clear()
    return key


def compile_candidate(case: Case, arch: str, config: Config) -> list[str]:
    """Compile it into Triton's cache. Returns the complaints about it, one of which is to be the rule's."""
    with compiling(arch) as compiled:
        gemm = case.gemm(torch.device("cpu"))
        if config == configs.rule(gemm.name, launch.cpu_device, DTYPES[case.dtype], gemm.sizes, True):
            return ["the rule's"]
        use(gemm, case.dtype, config)
        gemm.ours(*gemm.tensors)
    (row,) = (dict(arch=arch, size=case.size, dtype=case.dtype, aligned=True) | describe(arch, *x) for x in compiled)
    share = max(row["registers"] * 32 * row["warps"] / 65536, row["shared_bytes"] / TARGETS[arch].shared_bytes)
    return complaints(row) + ["the programs do not fit an SM"] * (share * config.programs > 1)


def errors(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """Relative root mean square of each result."""
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(results, truth, strict=True)]


@lru_cache(1)
def prepare(case: Case, device: torch.device) -> tuple[Gemm, tuple[Tensor, ...], list[float]]:
    """The case's tensors, its results in fp32, and the error of each that is allowed."""
    gemm = case.gemm(device)
    truth = gemm.plain(*(x.float() for x in gemm.tensors))
    return gemm, truth, [FACTOR * error + 1e-6 for error in errors(gemm.plain(*gemm.tensors), truth)]


def check(case: Case, device: torch.device, config: Config | None) -> float:
    """The largest error of a result, as a multiple of the allowed one."""
    gemm, truth, allowed = prepare(case, device)
    use(gemm, case.dtype, config)
    found = [error / most for error, most in zip(errors(gemm.ours(*gemm.tensors), truth), allowed, strict=True)]
    return max(found, key=lambda error: (math.isnan(error), error))


def time_together(case: Case, device: torch.device, found: list[Config | None]) -> tuple[tuple, list[list[float]]]:
    """The case's key in the table, and the seconds of each configuration, a value per interleaved round."""
    gemm = prepare(case, device)[0]

    def run(config: Config | None):
        use(gemm, case.dtype, config)
        gemm.ours(*gemm.tensors)

    seconds = measure({config: lambda config=config: run(config) for config in found}, device, ROUNDS)
    return use(gemm, case.dtype, None), [*seconds.values()]


def take_turn(case: Case, found: list[Config], device: torch.device, timer: Pool) -> tuple[tuple, dict]:
    """Check and time these configurations of a case beside the rule's (None). Returns the case's key and the rows."""
    rows, about = {}, case._asdict() | {"op": OPS[case.index]}
    for config in (None, *found):
        provider = "rule" if config is None else " ".join(map(str, config))
        row = rows[config] = Row("tune", provider, about, "s", check="plain PyTorch in fp32", allowed=1.0)
        try:
            row.error = timer.submit(check, case, device, config, seconds=LIMIT).result()
        except Failure as failure:
            row.failed = str(failure)
    right = [config for config, row in rows.items() if not row.complaint()]
    try:
        key, seconds = timer.submit(time_together, case, device, right, seconds=LIMIT).result()
        for config, values in zip(right, seconds, strict=True):
            rows[config].values = values
        return key, rows
    except Failure as failure:
        for config in right:
            rows[config].failed = f"not timed: {failure}"
        return (), rows


def tune(turns: list[tuple[Case, list[Config]]], device: torch.device, results: Results, seconds: float):
    """Take turns until the time is over. Appends each configuration that is the best so far to DIR/tuned.jsonl."""
    deadline, best = time.monotonic() + seconds, {}
    arch = launch.device_of(torch.empty(0, device=device)).arch
    with Pool(max(1, (os.cpu_count() or 1) - 1)) as compilers, Pool(1) as timer:
        compiled = {
            (case, config): compilers.submit(compile_candidate, case, arch, config, seconds=LIMIT)
            for case, found in turns
            for config in found
            if arch in TARGETS
        }
        for case, found in progress(turns, "turns"):
            if time.monotonic() > deadline:
                say(f"--seconds {seconds:g} are over: not all candidates were timed")
                break
            key, rows = take_turn(case, [x for x in found if fits(compiled.get((case, x)))], device, timer)
            for row in rows.values():
                results.write(row)
            rule = rows.pop(None)
            for config, row in rows.items():
                middle, _, high = ratio(row, rule) if row.values and rule.values else (1, 1, 1)
                if high < 1 and middle < best.get(case, 1):
                    best[case] = middle
                    say(f"{case.size} {key[2]} {key[4]}: {config} takes {middle:.3f} of the rule's time")
                    entry = dict(zip(configs.KEY, key, strict=True)) | config._asdict()
                    with (results.directory / "tuned.jsonl").open("a") as file:
                        file.write(json.dumps(entry | {"microseconds": round(row.median * 1e6, 1)}) + "\n")


def fits(compiling: Future | None) -> bool:
    """Whether a candidate compiled without a complaint; True for one that was not compiled before."""
    try:
        return not (compiling and compiling.result())
    except Failure:
        return False


def in_turns(found: dict[Case, list[Config]], at_once: int) -> list[tuple[Case, list[Config]]]:
    """The first few of every case, then the next few of every case, and so on."""
    chunks = [[(case, some[i : i + at_once]) for i in range(0, len(some), at_once)] for case, some in found.items()]
    return [turn for turns in zip_longest(*chunks) for turn in turns if turn]


def list_candidates(cases: list[Case], path: Path, seconds: float):
    """Write the candidates that compile without a complaint, as many as are compiled in this time."""
    deadline, kept = time.monotonic() + seconds, {case: [] for case in cases}
    turns = in_turns({case: space(OPS[case.index]) for case in cases}, 1)
    with Pool(os.cpu_count() or 1) as pool:
        waiting = [(*turn, pool.submit(compile_candidate, turn[0], "sm_90", *turn[1])) for turn in turns]
        for case, some, compiling in progress(waiting, "candidates"):
            if time.monotonic() > deadline:
                break
            kept[case] += some if fits(compiling) else []
    lines = [{"size": case.size, "gemm": case.index, "configs": found} for case, found in kept.items()]
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
    device = resolve_device("auto")
    if arguments.dry_run and launch.INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 is set, under which nothing can be compiled: unset it")
    x = torch.empty(0, 8, dtype=torch.float16, device=device)
    if not (arguments.dry_run or (launch.device_of(x) and configs.tma_available("rows", launch.device_of(x), x))):
        sys.exit("tuning needs a GPU of sm_90 or later, and there is none; --dry_run lists the candidates")
    cases = [
        Case(size, index, arguments.dtype, arguments.tokens or MICRO_BATCH[size] * SEQ_LEN)
        for size, index in product(arguments.size, range(len(OPS)))
    ]
    results = Results(arguments.output, device)
    if arguments.dry_run:
        list_candidates(cases, results.directory / CANDIDATES.name, arguments.seconds)
        return
    lines = map(json.loads, CANDIDATES.read_text().splitlines())
    known = {(line["size"], line["gemm"]): [Config(*config) for config in line["configs"]] for line in lines}
    tune(in_turns({case: known.get(case[:2], []) for case in cases}, AT_ONCE), device, results, arguments.seconds)


if __name__ == "__main__":
    main()
