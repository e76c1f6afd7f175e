"""Search the grouped GEMMs' configurations, and write the best of each named size to kernels/tuned.jsonl.

Every candidate is compiled first; one that spills, has its wgmmas serialised or wants more shared memory than there is
is never launched. The rest are checked against the reference, timed in turns, and the fastest is kept. With --dry_run,
which needs no GPU, the candidates that would be launched are listed, and nothing is written.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from acceleron import ModelConfig, kernels
from acceleron.config import PRESETS
from acceleron.kernels import configs, launch, reference
from acceleron.kernels.configs import Config
from acceleron.kernels.expert_mlp import expert_up, hidden_grad
from acceleron.kernels.grouped_gemm import grouped_rows, grouped_weight_grad

from .compile import DTYPES, SIZES, TARGETS, compiling, complaints, describe
from .timing import FLUSH_BYTES, seconds_of

# A candidate's result may be this many times as far from the fp32 truth as the reference's is in the same dtype.
FACTOR = 1.5
GATHER_LEFT, GATHER_RIGHT = 1, 2


class Case(NamedTuple):
    """A launch to tune: its key in the table, our function and the reference's, of the same tensors."""

    op: str
    sizes: tuple[int, ...]
    ours: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]


def cases(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """The six grouped GEMMs of a training step, on unit-scale data and a random router's choices."""
    T, D, E, F = tokens, config.d_model, config.num_experts, config.d_ff
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    routing = reference.route_top2(torch.randn(T, E, generator=generator, device=device))
    order, _, offsets = plan = reference.dispatch_plan(routing.experts_TK, E)
    tokens_N = order // 2
    weights_N1 = routing.weights_TK.flatten()[order][:, None]
    x_TD, dy_TD, h_N2F, act_NF = randn(T, D), randn(T, D), randn(2 * T, 2 * F), randn(2 * T, F)
    w13, w2 = randn(E, 2 * F, D) * D**-0.5, randn(E, D, F) * F**-0.5

    def plain_up(x, w):
        h = reference.grouped_gemm(x[tokens_N], w, plan)
        return h, reference.swiglu(h)

    def plain_hidden_grad(dy, w, h):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            act = reference.swiglu(h)
        r = reference.grouped_gemm(dy[tokens_N], w.transpose(1, 2).contiguous(), plan)
        (dh,) = torch.autograd.grad(act, h, (r * weights_N1).to(h.dtype))
        return dh, (act.detach() * weights_N1).to(h.dtype), (r * act.detach()).float().sum(dim=-1)

    def our_hidden_grad(dy, w, h):
        dh, act, dots = hidden_grad(dy, w, h, routing.weights_TK, order, offsets)
        return dh, act, dots.sum(dim=-1)

    def plain_weight_grad(a, b):
        return (reference._grouped_weight_grad(a, b, offsets),)

    def our_weight_grad(gather: str):  # in fp32, as parameters are
        return lambda a, b: (grouped_weight_grad(a, b, offsets, order, gather, torch.float32),)

    return [
        Case("up", (E, D, F), lambda x, w: expert_up(x, w, order, offsets, True), plain_up, (x_TD, w13)),
        Case(
            "rows", (E, F, D, 1), lambda x, w: (grouped_rows(x, w, offsets, True),),
            lambda x, w: (reference.grouped_gemm(x, w, plan),), (act_NF, w2),
        ),
        Case("hidden_grad", (E, D, F), our_hidden_grad, plain_hidden_grad, (dy_TD, w2, h_N2F)),
        Case(
            "rows", (E, 2 * F, D, 0), lambda x, w: (grouped_rows(x, w, offsets, False),),
            lambda x, w: (reference.grouped_gemm(x, w.transpose(1, 2).contiguous(), plan),), (h_N2F, w13),
        ),
        Case(
            "weight_grad", (E, 2 * F, D, GATHER_RIGHT), our_weight_grad("b"),
            lambda a, b: plain_weight_grad(a, b[tokens_N]), (h_N2F, x_TD),
        ),
        Case(
            "weight_grad", (E, D, F, GATHER_LEFT), our_weight_grad("a"),
            lambda a, b: plain_weight_grad(a[tokens_N], b), (dy_TD, act_NF),
        ),
    ]  # fmt: skip


def candidates(op: str, arch: str) -> list[Config]:
    """The tiles worth a try, for 16-bit inputs."""
    if arch not in ("sm_90", "sm_100"):
        tiles = product((64, 128), (64, 128), (32, 64), (4, 8), (2, 3, 4))
        return [Config(*tile) for tile in tiles]
    if op == "weight_grad":
        tiles = [(128, 256, 64, 8), (256, 128, 64, 8), (128, 128, 64, 8), (128, 128, 64, 4)]
        return [Config(*tile, stages, split=split) for tile in tiles for stages in (4, 5, 7) for split in (1, 2, 3, 4)]
    tiles = [
        (128, 256, 64, 8),
        (128, 128, 64, 8),
        (128, 128, 64, 4),
        (64, 256, 64, 8),
        (64, 128, 64, 4),
        (128, 64, 64, 4),
    ]
    if op == "up":  # whose tile is twice block_n wide
        tiles = [(m, n // 2, k, warps) for m, n, k, warps in tiles]
    ways = product((3, 4), (1, 2), (False, True))
    return [Config(*tile, stages, programs, flatten) for stages, programs, flatten in ways for tile in tiles]


def key_of(case_op: str, sizes: tuple[int, ...], dtype: str, arch: str, device_name: str) -> tuple:
    """The key of a case in the table of configurations."""
    return arch, device_name, case_op, str(DTYPES[dtype]).removeprefix("torch."), sizes


def use(key: tuple, config: Config):
    """Let the table serve this configuration from here on, in this process."""
    configs.table()[key] = config
    configs.find_config.cache_clear()


def fit_to_launch(arch: str, size: str, dtype: str, index: int) -> list[Config]:
    """The candidates of a size's case that compile without a complaint, all in this process."""
    fit = []
    with compiling(arch) as launched:
        kernels.select("triton", torch.device("cpu"))
        case = cases(ModelConfig.preset(size), 256, DTYPES[dtype], torch.device("cpu"))[index]
        for candidate in candidates(case.op, arch):
            use(key_of(case.op, case.sizes, dtype, arch, "any"), candidate)
            launched.clear()
            try:
                case.ours(*case.tensors)
            except Exception:  # Triton raises many kinds for a tile that it can't compile
                continue
            rows = [describe(arch, size, *each) for each in launched]
            registers = rows[0].registers * 32 * rows[0].warps * candidate.programs
            shared = rows[0].shared_bytes * candidate.programs
            together = arch.startswith("gfx") or (registers <= 65536 and shared <= TARGETS[arch].shared_bytes)
            if together and not any(complaints(row, dtype) for row in rows):
                fit.append(candidate)
    return fit


def error(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """Relative root mean square of each result."""
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(results, truth, strict=True)]


def check(case: Case, truth: tuple[Tensor, ...], allowed: list[float]) -> str | None:
    """What is wrong with our result under the configuration in use, or None. `allowed`: the reference's errors."""
    got = error(case.ours(*case.tensors), truth)
    if all(ours <= FACTOR * plain for ours, plain in zip(got, allowed, strict=True)):
        return None
    return f"errors {got}, where the reference has {allowed}"


def fastest(case: Case, key: tuple, fit: list[Config], rounds: int, flush: Tensor) -> tuple[Config, float] | None:
    """The fastest candidate with a right result, and its median seconds; None if there is none."""
    truth = case.plain(*(x.float() for x in case.tensors))
    allowed = error(case.plain(*case.tensors), truth)
    times = {}
    for candidate in fit:
        use(key, candidate)
        wrong = check(case, truth, allowed)
        if wrong:
            print(f"{case.op} {case.sizes} {candidate}: {wrong}", file=sys.stderr)
        else:
            times[candidate] = []
    for _ in range(rounds):
        for candidate, measured in times.items():
            use(key, candidate)
            measured.append(seconds_of(lambda: case.ours(*case.tensors), flush.device, flush.zero_))
    ranked = sorted((statistics.median(measured), candidate) for candidate, measured in times.items())
    if not ranked:
        return None
    use(key, ranked[0][1])
    return ranked[0][1], ranked[0][0]


def write_table(found: dict[tuple, tuple[Config, float]]):
    """Replace these entries of tuned.jsonl and keep the others."""
    lines = configs.read_table()
    for key, (config, median) in found.items():
        named = dict(zip(configs.KEY, key, strict=True))
        lines[key] = named | config._asdict() | {"microseconds": round(median * 1e6, 1)}
    temporary = configs.TABLE.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(lines[key]) + "\n" for key in sorted(lines)))
    os.replace(temporary, configs.TABLE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*PRESETS], default=list(SIZES))
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--tokens", type=int, default=65536, help="of a micro-batch; 65536 is 32 x 2048")
    parser.add_argument("--rounds", type=int, default=20, help="timings of each candidate")
    parser.add_argument("--dry_run", action="store_true", help="compile and list; needs no GPU")
    parser.add_argument("--arch", choices=TARGETS, help="of a dry run; default: the GPU's, else sm_90")
    arguments = parser.parse_args()
    if arguments.tokens < 1 or arguments.rounds < 1:
        parser.error("--tokens and --rounds: expected at least 1")
    if arguments.arch and not arguments.dry_run:
        parser.error("--arch is for a --dry_run: what is timed runs on the GPU that is there")
    if launch.INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 is set, under which nothing can be compiled: unset it")
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("tuning times kernels on a GPU, and there is none; --dry_run lists the candidates")
    device = launch.device_of(torch.empty(0, device="cuda")) if torch.cuda.is_available() else None
    arch = arguments.arch if arguments.dry_run and arguments.arch else device.arch if device else "sm_90"
    if arch not in TARGETS:
        sys.exit(f"{arch} is not among {', '.join(TARGETS)}: its candidates can't be told from unfit ones")
    tasks = [(size, index) for size in arguments.size for index in range(6)]
    found = {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        futures = [pool.submit(fit_to_launch, arch, size, arguments.dtype, index) for size, index in tasks]
        for (size, index), future in tqdm(zip(tasks, futures, strict=True), "cases", len(tasks), disable=None):
            fit = future.result()
            where = torch.device("cpu" if arguments.dry_run else "cuda")
            tokens = 256 if arguments.dry_run else arguments.tokens
            case = cases(ModelConfig.preset(size), tokens, DTYPES[arguments.dtype], where)[index]
            tqdm.write(f"{size} {case.op} {case.sizes}: {len(fit)} of {len(candidates(case.op, arch))} fit")
            if arguments.dry_run:
                tqdm.write("".join(f"  {config}\n" for config in fit), end="")
                continue
            key = key_of(case.op, case.sizes, arguments.dtype, arch, device.name)
            flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=where)
            best = fastest(case, key, fit, arguments.rounds, flush)
            if best is None:
                tqdm.write("  no candidate is right: the table keeps what it has")
                continue
            tqdm.write(f"  {best[0]}: {best[1] * 1e6:.1f} us")
            found[key] = best
            write_table(found)  # now, lest a later failure lose it


if __name__ == "__main__":
    main()
