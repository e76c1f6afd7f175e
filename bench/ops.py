"""Every op of acceleron.kernels, and attention, against plain PyTorch, torch's own ops and installed peers.

python -m bench ops [--size tiny ...] [--op expert_mlp ...] [--provider triton ...] [--check_only]

Each provider is checked, then timed in turns with the others, at the shapes of the model sizes and, for expert_mlp, at
those that its peers publish. "forward" keeps nothing for backward, as in an evaluation. expert_mlp starts from the
chosen experts: the plan of the dispatch is part of it, for everybody.

Rows: op, shape, sizes, pass ("forward" or "forward + backward"), provider, dtype, seconds (median), seconds_p20,
seconds_p80, samples, flops (of the GEMMs), bytes (every input read once and every output written once), bound
("compute" or "memory"), rate (FLOP/s or bytes/s, by the bound), share_of_ceiling (the least seconds by the ceilings
measured in this run / seconds), ceiling_flops, ceiling_bytes. With --check_only, no times but `checked_only`, in
kernels.jsonl. A provider that is not there is a row of op, provider and absent; one that fails has `failed`.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from acceleron import kernels
from acceleron.config import PRESETS
from acceleron.device import DTYPES as TRAINING_DTYPES
from acceleron.device import resolve_device, resolve_dtype
from acceleron.errors import InputError

from . import timing
from .op_cases import BOTH, FORWARD, OPS, PUBLISHED, Case, Draw, select_cases
from .op_peers import Provider, plain, providers
from .results import Results, complaint

DTYPES = TRAINING_DTYPES | {"fp16": torch.float16}
TOKENS = {"cuda": 65536, "cpu": 256}
SIZES = {"cuda": ["tiny", "small", "medium", "large", *PUBLISHED], "cpu": ["nano", "tiny"]}
# However far off the reference is itself, nobody may be farther.
LARGEST_ERROR = 0.05


class Truth(NamedTuple):
    """What a case's results are held against. errors: of plain PyTorch in the case's dtype, by the result's name."""

    results: dict[str, Tensor]
    output_grads: list[Tensor | None]
    errors: dict[str, float]
    dtype: torch.dtype


def _copies(inputs: tuple, dtype: torch.dtype | None = None) -> tuple:
    """Leaves of the same values, the floats in another dtype if one is given."""

    def copy(x):
        if not isinstance(x, Tensor):
            return x
        to = dtype if dtype and x.is_floating_point() else x.dtype
        return x.detach().to(to, copy=True).requires_grad_(x.requires_grad)

    return tuple(copy(x) for x in inputs)


def _leaves(inputs: tuple) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def _outputs(run: Callable, inputs: tuple) -> tuple[Tensor, ...]:
    found = run(*inputs)
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _input_grads(outputs: tuple[Tensor, ...], leaves: list[Tensor], output_grads: list[Tensor | None]):
    pairs = [(out, grad) for out, grad in zip(outputs, output_grads, strict=True) if grad is not None]
    return torch.autograd.grad([out for out, _ in pairs], leaves, [grad.to(out.dtype) for out, grad in pairs])


def _results(case: Case, run: Callable, inputs: tuple, output_grads: list | None, draw: Draw | None = None) -> tuple:
    """Outputs and gradients by name, and the outputs' gradients, which are drawn where none are given."""
    outputs = _outputs(run, inputs)
    results = dict(zip(case.outputs, (x.detach() for x in outputs), strict=True))
    if output_grads is None:
        scalar = torch.tensor(case.scalar_grad, device=draw.device)
        drawn = (scalar if out.dim() == 0 else draw(*out.shape, grad=False) for out in outputs)
        output_grads = [grad if out.requires_grad else None for out, grad in zip(outputs, drawn, strict=True)]
    leaves = _leaves(inputs)
    if leaves:
        names = [name for name, x in zip(case.inputs, inputs, strict=True) if any(x is leaf for leaf in leaves)]
        grads = _input_grads(outputs, leaves, output_grads)
        results |= {f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True)}
    return results, output_grads


def _error(result: Tensor, truth: Tensor) -> float:
    """Relative root mean square; of integers the share that differs."""
    if result.shape != truth.shape:
        raise ValueError(f"shape {tuple(result.shape)} where {tuple(truth.shape)} is right")
    if not truth.is_floating_point():
        return (result != truth).double().mean().item()
    return ((result.to(truth.dtype) - truth).norm() / truth.norm()).item()


def truth_of(case: Case, inputs: tuple, draw: Draw) -> Truth:
    """The case's results from plain PyTorch on the same inputs in float64; in float32 on CUDA for 16-bit ops."""
    wide = torch.float32 if draw.device.type == "cuda" and case.precision.itemsize == 2 else torch.float64
    results, output_grads = _results(case, plain(case.op), _copies(inputs, wide), None, draw)
    plain_results, _ = _results(case, plain(case.op), _copies(inputs), output_grads)
    errors = {name: _error(plain_results[name], results[name]) for name in results}
    return Truth(results, output_grads, errors, wide)


def check(case: Case, provider: Provider, inputs: tuple, truth: Truth) -> dict:
    """The check's fields of a row: of all outputs, with and without gradients, and all gradients the worst one."""

    def laid_out() -> tuple:
        copies = _copies(inputs)
        return copies, provider.layout(*copies) if provider.layout else copies

    with torch.no_grad():
        evaluated = dict(zip(case.outputs, _outputs(provider.run, laid_out()[1]), strict=True))
    copies, native = laid_out()
    # Gradients of what the op got, through the layout, so that they have the reference's shapes.
    results, _ = _results(case, lambda *_: provider.run(*native), copies, truth.output_grads)
    found = {f"{name} alone": (name, x) for name, x in evaluated.items()} | {n: (n, x) for n, x in results.items()}
    # What the reference happens to hit exactly may be an eighth of a unit off, and sums and exponentials in fp32 a few.
    units = torch.finfo(case.precision).eps / 8 + 8 * torch.finfo(torch.float32).eps
    worst, worst_ratio = None, -1.0
    for label, (name, result) in found.items():
        error = _error(result, truth.results[name])
        floats = truth.results[name].is_floating_point()
        allowed = min(provider.factor * truth.errors[name] + units, LARGEST_ERROR) if floats else 0.0
        ratio = error / allowed if allowed else float("inf") if error else 0.0
        if not ratio <= worst_ratio:  # a NaN is the worst
            worst, worst_ratio = (label, error, allowed), ratio
        if ratio != ratio:
            break
    label, error, allowed = worst
    truth_name = str(truth.dtype).removeprefix("torch.")
    against = f"relative RMS against {truth_name}, reference's times {provider.factor:g}" if allowed else "equality"
    return {"check": f"{against}; the worst of {len(found)}: {label}", "check_error": error, "check_allowed": allowed}


def bind(provider: Provider, inputs: tuple, output_grads: list) -> tuple[dict[str, Callable], Callable | None]:
    """The calls to time, by pass, once warmed up; and what restores the inputs of a provider that overwrites them."""
    native = _copies(provider.layout(*inputs) if provider.layout else inputs)
    pristine, leaves = _copies(native) if provider.in_place else (), _leaves(native)

    @torch.no_grad()
    def restore():
        for x, values in zip(native, pristine, strict=True):
            if isinstance(x, Tensor):
                x.copy_(values)

    @torch.no_grad()
    def forward():
        return _outputs(provider.run, native)

    grads = [None if g is None else g.to(out.dtype, copy=True) for out, g in zip(forward(), output_grads, strict=True)]

    def both():
        return _input_grads(_outputs(provider.run, native), leaves, grads)

    if leaves:
        both()
    return {FORWARD: forward} | ({BOTH: both} if leaves else {}), restore if provider.in_place else None


def row_of(case: Case, step: str, provider: Provider, dtype: torch.dtype, checked: dict) -> dict:
    """The fields of a row but for its times; `step` is the pass."""
    name = str(dtype).removeprefix("torch.")
    about = {"op": case.op, "shape": case.shape, "sizes": case.sizes, "pass": step, "provider": provider.name}
    return about | {"dtype": name} | checked


def times_of(case: Case, step: str, seconds: list[float], ceilings: tuple[float, float]) -> dict:
    """The fields of a row that come of its times, and of the ceilings measured in this run."""
    flops, moved = case.work[step]
    median, p20, p80 = timing.spread(seconds)
    least = {"compute": flops / ceilings[0], "memory": moved / ceilings[1]}
    bound = max(least, key=least.get)
    return {
        "seconds": median, "seconds_p20": p20, "seconds_p80": p80, "samples": len(seconds),
        "flops": flops, "bytes": moved, "bound": bound, "rate": (flops if bound == "compute" else moved) / median,
        "share_of_ceiling": least[bound] / median, "ceiling_flops": ceilings[0], "ceiling_bytes": ceilings[1],
    }  # fmt: skip


def reason(error: Exception) -> str:
    """Of a failure, in one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def check_case(case: Case, served: list[Provider], dtype: torch.dtype, device: torch.device):
    """The inputs, the outputs' gradients, and of each provider its check's fields or `failed`, the reason."""
    draw = Draw(dtype, device)
    inputs = case.make(draw)
    truth = truth_of(case, inputs, draw)
    checks = {}
    for provider in served:
        try:
            checks[provider] = check(case, provider, inputs, truth)
        except Exception as error:  # a peer may raise anything; the others go on
            checks[provider] = {"failed": reason(error)}
    return inputs, truth.output_grads, checks


def measure_case(
    case: Case, served: list[Provider], dtype: torch.dtype, device: torch.device, rounds: int, ceilings: tuple
) -> list[dict]:
    """Rows of every pass of every provider: timed in turns if its check passed, else with what went wrong."""
    inputs, output_grads, checks = check_case(case, served, dtype, device)
    bound = {}
    for provider in served:
        if "failed" in checks[provider] or complaint(checks[provider]):
            continue
        try:
            bound[provider] = bind(provider, inputs, output_grads)
        except Exception as error:
            checks[provider] = {"failed": reason(error)}
    rows = []
    for step in case.work:
        calls = {provider.name: calls[step] for provider, (calls, _) in bound.items()}
        before = {provider.name: restore for provider, (_, restore) in bound.items() if restore}
        seconds = timing.measure(calls, device, rounds, before)
        for provider in served:
            row = row_of(case, step, provider, dtype, checks[provider])
            rows.append(row | times_of(case, step, seconds[provider.name], ceilings) if provider in bound else row)
    return rows


def print_table(rows: list[dict]):
    form = "{:21} {:18} {:19} {:18} {:>10} {:>21} {:>13} {:>8} {:>6}"
    print(form.format("op", "shape", "pass", "provider", "ms", "p20 .. p80", "rate", "ceiling", "error"))
    for row in rows:
        names = [row[key] for key in ("op", "shape", "pass", "provider")]
        wrong = row.get("failed") or complaint(row)
        if wrong:
            print(form.format(*names, "failed", "", "", "", "").rstrip(), wrong)
            continue
        error = f"{row['check_error'] / row['check_allowed']:.0%}" if row["check_allowed"] else "0"
        if "seconds" not in row:
            print(form.format(*names, "", "", "", "", error))
            continue
        spread = f"{row['seconds_p20'] * 1e3:.4g} .. {row['seconds_p80'] * 1e3:.4g}"
        rate = f"{row['rate'] / 1e9:.1f} {'GFLOP/s' if row['bound'] == 'compute' else 'GB/s'}"
        print(form.format(*names, f"{row['seconds'] * 1e3:.4g}", spread, rate, f"{row['share_of_ceiling']:.0%}", error))
    print("ceiling: least time by this run's GEMM and copy / time. error: of what is allowed.")


def run_cases(found: list[Case], arguments, dtype: torch.dtype, device: torch.device, results: Results) -> list[dict]:
    """Measure or check all cases, and write each row as soon as it exists; returns those that aren't `absent`."""
    ceilings = None if arguments.check_only else timing.ceilings(device, dtype)
    rows, absent = [], set()
    for case in tqdm(found, "cases", dynamic_ncols=True, disable=None):
        torch.compiler.reset()  # else a function's ninth shape is not compiled
        served = []
        for provider in providers(case.op, device):
            if arguments.provider and provider.name not in arguments.provider:
                continue
            if not provider.absent:
                served.append(provider)
            elif (case.op, provider.name) not in absent:
                absent.add((case.op, provider.name))
                results.write({"op": case.op, "provider": provider.name, "absent": provider.absent})
        if not served:
            continue
        try:
            if arguments.check_only:
                step, checks = list(case.work)[-1], check_case(case, served, dtype, device)[2]
                these = [row_of(case, step, each, dtype, checks[each] | {"checked_only": True}) for each in served]
            else:
                these = measure_case(case, served, dtype, device, arguments.rounds, ceilings)
        except Exception as error:  # the truth itself could not be had, or a call failed that had worked
            failed = {"failed": reason(error)}
            these = [row_of(case, step, each, dtype, failed) for step in case.work for each in served]
        for row in these:
            results.write(row)
        rows += these
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if absent:
        print("absent:", ", ".join(f"{name} ({op})" for op, name in sorted(absent)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*PRESETS, *PUBLISHED], help="default: by the device")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--provider", nargs="+", metavar="NAME", help="these alone, such as triton or 'torch compiled'")
    parser.add_argument("--tokens", type=int, help="at the model sizes; default 65536 on a GPU, 256 on a CPU")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, help="samples of each; default 30 on a GPU, 5 on a CPU")
    parser.add_argument("--check_only", action="store_true", help="triton and reference, no times; 1 if one is wrong")
    parser.add_argument("--output", metavar="DIR")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    for flag in ("tokens", "rounds"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            raise InputError(f"--{flag} {getattr(arguments, flag)}: expected at least 1")
    if not arguments.check_only and not kernels._missing and kernels.launch.INTERPRETED:
        raise InputError("TRITON_INTERPRET=1 is set, under which times mean nothing: unset it, or add --check_only")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    arguments.rounds = arguments.rounds or (30 if device.type == "cuda" else 5)
    if arguments.check_only:
        arguments.provider = arguments.provider or ["triton", "reference"]
    known = {provider.name for op in arguments.op for provider in providers(op, device)}
    if unknown := sorted(set(arguments.provider or ()) - known):
        raise InputError(f"--provider {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    dtype = DTYPES[arguments.dtype] if arguments.dtype in DTYPES else resolve_dtype(arguments.dtype, device)
    tokens = arguments.tokens or TOKENS[device.type]
    found = select_cases(arguments.size or SIZES[device.type], arguments.op, tokens, dtype)
    results = Results(arguments.output, "kernels" if arguments.check_only else "ops", device)
    rows = run_cases(found, arguments, dtype, device, results)
    print_table(rows)
    print(f"written to {results.path}")
    ours = (row for row in rows if row["provider"] in ("triton", "reference", "acceleron"))
    if any("failed" in row or complaint(row) for row in ours):
        sys.exit(1)
