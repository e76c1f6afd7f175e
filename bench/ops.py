"""Every op of acceleron.ops, and attention, against plain PyTorch (eager and compiled) and installed peers.

python -m bench ops [--model_size tiny ...] [--op expert_mlp ...] [--provider triton ...] [--check_only]

Each provider is checked, then timed in interleaved rounds. The shapes are those of the model sizes and, for expert_mlp,
the shapes that its peers publish. "forward" saves nothing for backward, as in evaluation. expert_mlp starts from the
top-k ids, so every provider builds its own dispatch plan.

Checks and timings run in a separate process: a crash, a hang or an out-of-memory error costs one provider at one shape.
--check_only times nothing and also checks each grouped GEMM alone. A kernel that fails with TMA is retried without it,
and an op that still fails falls back to the reference. A `fallbacks` row records the values of ACCELERON_NO_TMA and
ACCELERON_REFERENCE_OPS for these fallbacks in training.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby, product
from typing import NamedTuple

import torch
from torch import Tensor

from acceleron.config import PRESETS
from acceleron.device import DTYPES
from acceleron.errors import InputError

from . import timing
from .command import parse
from .op_cases import GEMMS, OPS, PUBLISHED, Case, RandomTensors, gemm_kernel, select_cases
from .op_peers import Provider, plain, providers
from .rows import Results, Row, print_rows, progress, say, spread
from .worker import Failure, Worker, serve_calls

NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float16: "fp16"}
TOKENS = {"cuda": 65536, "cpu": 256}
SIZES = {"cuda": ["tiny", "small", "medium", "large", *PUBLISHED], "cpu": ["nano", "tiny"]}
FORWARD, BOTH = "forward", "forward + backward"
OURS = ("triton", "reference")
# An absolute limit for every provider, even if the reference's error is large.
MAX_ERROR = 0.05


class Settings(NamedTuple):
    """Everything a worker needs to rebuild its parent's cases."""

    sizes: tuple[str, ...]
    ops: tuple[str, ...]
    tokens: int
    dtype: torch.dtype
    device: torch.device

    def cases(self) -> list[Case]:
        return select_cases(self.sizes, self.ops, self.tokens, self.dtype)


class Truth(NamedTuple):
    """The expected results of a case. errors: the errors of plain PyTorch in the case's dtype, by result name."""

    results: dict[str, Tensor]
    output_grads: list[Tensor | None]
    errors: dict[str, float]


def _copies(inputs: tuple, dtype: torch.dtype | None = None) -> tuple:
    """Return detached copies as new leaves. dtype: converts the floating-point tensors."""

    def copy(x):
        if not isinstance(x, Tensor):
            return x
        to = dtype if dtype and x.is_floating_point() else x.dtype
        return x.detach().to(to, copy=True).requires_grad_(x.requires_grad)

    return tuple(copy(x) for x in inputs)


def _outputs(run: Callable, inputs: tuple) -> tuple[Tensor, ...]:
    outputs = run(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _leaves(case: Case, inputs: tuple) -> dict[str, Tensor]:
    """Return the inputs that require gradients, by name."""
    named = zip(case.inputs, inputs, strict=False)
    return {name: x for name, x in named if isinstance(x, Tensor) and x.requires_grad}


def _both(run: Callable, inputs: tuple, leaves: list[Tensor], output_grads: list[Tensor | None]) -> tuple:
    """Return the outputs and the gradients of the leaves."""
    outputs = _outputs(run, inputs)
    pairs = [(out, grad) for out, grad in zip(outputs, output_grads, strict=True) if grad is not None]
    grads = torch.autograd.grad([out for out, _ in pairs], leaves, [g.to(out.dtype) for out, g in pairs])
    return outputs, grads


def _results(case: Case, run: Callable, inputs: tuple, output_grads: list) -> dict[str, Tensor]:
    """Return by name the outputs under no_grad ("... alone"), the outputs with a graph, and the gradients."""
    with torch.no_grad():
        results = {f"{name} alone": x for name, x in zip(case.outputs, _outputs(run, inputs), strict=True)}
    if leaves := _leaves(case, inputs):
        outputs, grads = _both(run, inputs, list(leaves.values()), output_grads)
        results |= {name: x.detach() for name, x in zip(case.outputs, outputs, strict=True)}
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def _error(result: Tensor, truth: Tensor) -> float:
    """Return the relative RMS error or, for integers, the fraction that differs."""
    if result.shape != truth.shape:
        raise ValueError(f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}")
    if not truth.is_floating_point():
        return (result != truth).double().mean().item()
    return ((result.to(truth.dtype) - truth).norm() / truth.norm()).item()


def compute_truth(case: Case, inputs: tuple, randn: RandomTensors) -> Truth:
    """Run plain PyTorch on the same inputs in float64, or in float32 for 16-bit ops on CUDA."""
    fp32 = randn.device.type == "cuda" and case.precision.itemsize == 2
    wide = _copies(inputs, torch.float32 if fp32 else torch.float64)
    outputs = _outputs(plain(case), wide)
    grads = []
    for x in outputs:
        grad = torch.tensor(case.scalar_grad, device=x.device) if x.dim() == 0 else randn(*x.shape, grad=False)
        grads.append(grad if x.requires_grad else None)
    del outputs, x
    truths, plains = (_results(case, plain(case), each, grads) for each in (wide, _copies(inputs)))
    return Truth(truths, grads, {name: _error(plains[name], truth) for name, truth in truths.items()})


def check(case: Case, provider: Provider, inputs: tuple, truth: Truth) -> tuple[str, float, float]:
    """Compare results with the ground truth. Returns (check, error, allowed error) of the worst result."""
    # A floor for results that the reference happens to compute exactly: eps / 8, plus a few fp32 roundings.
    floor = torch.finfo(case.precision).eps / 8 + 8 * torch.finfo(torch.float32).eps
    checked = []
    for name, result in _results(case, provider.run, _copies(inputs), truth.output_grads).items():
        error, floats = _error(result, truth.results[name]), truth.results[name].is_floating_point()
        allowed = min(provider.factor * truth.errors[name] + floor, MAX_ERROR) if floats else 0.0
        passes = error <= allowed  # False for NaN
        checked.append((not passes, error / allowed if allowed and passes else error, name, error, allowed))
    *_, name, error, allowed = max(checked)
    return f"{name} (worst of {len(checked)}): relative RMS error against higher-precision PyTorch", error, allowed


def warm_calls(case: Case, provider: Provider, inputs: tuple, output_grads: list) -> dict[str, Callable]:
    """Return the functions to time, by pass. Each has already run once."""
    leaves, forward = list(_leaves(case, inputs).values()), torch.no_grad()(lambda: _outputs(provider.run, inputs))
    grads = [None if g is None else g.to(out.dtype, copy=True) for out, g in zip(forward(), output_grads, strict=True)]
    calls = {FORWARD: forward}
    if leaves:
        calls[BOTH] = lambda: _both(provider.run, inputs, leaves, grads)
        calls[BOTH]()
    return calls


def min_bytes(case: Case, inputs: tuple) -> dict[str, int]:
    """Return the minimum memory traffic by pass: all inputs, outputs and gradients move once."""
    with torch.no_grad():
        outputs = _outputs(plain(case), inputs)
    floats = [x for x in outputs if x.is_floating_point()]
    forward = sum(x.nbytes for x in (*inputs, *outputs) if isinstance(x, Tensor))
    leaves = _leaves(case, inputs).values()
    return {FORWARD: forward} | ({BOTH: forward + sum(x.nbytes for x in (*leaves, *floats))} if leaves else {})


def roofline_details(case: Case, step: str, moved: int, seconds: list[float], ceilings: tuple[float, float]) -> dict:
    """Return a row's details: FLOPs, bytes, whether compute or memory is the limit, and the share of that ceiling."""
    flops = case.flops * (3 if step == BOTH else 1)
    limits = {"compute": flops / ceilings[0], "memory": moved / ceilings[1]}
    bound = max(limits, key=limits.get)
    return {"flops": flops, "bytes": moved, "bound": bound, "share_of_ceiling": limits[bound] / spread(seconds)[0]}


@lru_cache(maxsize=1)  # consecutive calls share a case
def prepare(settings: Settings, number: int) -> tuple[Case, dict[str, Provider], tuple, Truth]:
    """Build a case with its providers, inputs and ground truth."""
    torch.compiler.reset()  # dynamo stops compiling a function at its ninth shape
    case, randn = settings.cases()[number], RandomTensors(settings.dtype, settings.device)
    inputs = case.make(randn)
    named = {provider.name: provider for provider in providers(case, settings.device)}
    return case, named, inputs, compute_truth(case, inputs, randn)


# Functions that the worker runs.


def find_min_bytes(settings: Settings, number: int) -> dict[str, int]:
    """Return `min_bytes` of a case."""
    case, _, inputs, _ = prepare(settings, number)
    return min_bytes(case, inputs)


def check_provider(settings: Settings, number: int, name: str, timed: bool) -> tuple[str, float, float]:
    """Run `check` on a provider. timed: also run each timed call once."""
    case, named, inputs, truth = prepare(settings, number)
    result = check(case, named[name], inputs, truth)
    if timed:
        warm_calls(case, named[name], inputs, truth.output_grads)
    return result


def time_providers(settings: Settings, number: int, names: list[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time calls. Returns seconds per call by pass and name, one value per round."""
    case, named, inputs, truth = prepare(settings, number)
    calls = {name: warm_calls(case, named[name], inputs, truth.output_grads) for name in names}
    passes = {step: {name: call[step] for name, call in calls.items()} for step in calls[names[0]]}
    return {step: timing.measure(these, settings.device, rounds) for step, these in passes.items()}


class Checker:
    """The parent's side of a worker: turns cases into rows and disables TMA for kernels that fail with it."""

    def __init__(self, settings: Settings, rounds: int, limit: float):
        self.settings, self.rounds, self.limit = settings, rounds, limit
        self.worker = Worker(serve_calls)  # imports while this process measures the ceilings
        self.ceilings = timing.ceilings(settings.device, settings.dtype) if rounds else None

    def ask(self, function: Callable, *arguments):
        return self.worker.ask((function, (self.settings, *arguments)), self.limit)

    def measure(self, number: int, case: Case, names: list[str]) -> list[Row]:
        """Check and time a case. Returns a row per provider and pass, or only the last pass without rounds."""
        steps = {BOTH: 0}
        passed = {}
        seconds = {}
        reasons = {}
        if not names:
            return []
        try:
            steps = self.ask(find_min_bytes, number)
            for name in names:
                try:
                    passed[name] = self.check(number, case, name)
                except Failure as failure:
                    reasons[name] = str(failure)
            timed = [name for name, (_, error, allowed) in passed.items() if error <= allowed]
            if self.rounds and timed:
                seconds = self.ask(time_providers, number, timed, self.rounds)
        except Failure as failure:
            prefix = "" if passed or reasons else "the ground truth: "
            reasons |= {name: f"{prefix}{failure}" for name in names if name not in reasons}
        rows = []
        for step, name in product(steps if self.rounds else list(steps)[-1:], names):
            about = {"op": case.op, "shape": case.shape, "pass": step, "dtype": NAMES[self.settings.dtype]}
            row = Row("ops" if self.rounds else "kernels", name, about, group=f"{case.op} {case.shape} {step}")
            row.failed = reasons.get(name, "")
            row.check, row.error, row.allowed = passed.get(name, ("", None, None))
            if name in seconds.get(step, {}) and not row.failed:
                row.unit, row.values = "s", seconds[step][name]
                row.details = roofline_details(case, step, steps[step], row.values, self.ceilings)
            rows.append(row)
        return rows

    def check(self, number: int, case: Case, name: str) -> tuple[str, float, float]:
        """Check one provider. If a GEMM kernel of ours fails with TMA, disable TMA for it and retry. Raises Failure."""
        kernel = gemm_kernel(case.op)
        try:
            what, error, allowed = self.ask(check_provider, number, name, bool(self.rounds))
            if error <= allowed or not can_disable_tma(case, name):
                return what, error, allowed
            reason = f"error {error:.3g}, allowed {allowed:.3g}"
        except Failure as failure:
            if not can_disable_tma(case, name):
                raise
            reason, kernel = str(failure), "all"  # each further crash or hang would cost a process
        say(f"{case.op}, {case.shape}: fails with TMA ({reason}); retrying without TMA")
        os.environ["ACCELERON_NO_TMA"] = ",".join([*without_tma(), kernel])
        self.worker.close()  # the next worker process inherits the variable
        what, error, allowed = self.ask(check_provider, number, name, bool(self.rounds))
        return f"{what} (without TMA; with TMA: {reason})", error, allowed


def without_tma() -> list[str]:
    return [name for name in os.environ.get("ACCELERON_NO_TMA", "").split(",") if name]


def can_disable_tma(case: Case, name: str) -> bool:
    return name == "triton" and case.op in GEMMS and not {gemm_kernel(case.op), "all"} & set(without_tma())


def fallbacks(rows: list[Row]) -> dict[str, str]:
    """Return the environment variables that disable the failed kernels."""
    wrong = {row.case["op"] for row in rows if row.provider == "triton" and row.failed}
    wrong -= {row.case["op"] for row in rows if row.failed.startswith("the ground truth")}
    names = (wrong & set(OPS)) | ({"expert_mlp", "moe", "grouped_gemm"} if wrong & set(GEMMS) else set())
    return {"ACCELERON_NO_TMA": ",".join(without_tma()), "ACCELERON_REFERENCE_OPS": ",".join(sorted(names))}


def run_cases(checker: Checker, selected: Sequence[str] | None, results: Results) -> list[Row]:
    """Check all cases and, if rounds > 0, time them. Writes each row immediately and returns all rows."""
    rows = []
    absent = {}
    env = None
    for number, case in enumerate(progress(checker.settings.cases(), "cases")):
        found = [p for p in providers(case, checker.settings.device) if not selected or p.name in selected]
        absent |= {(case.op, provider.name): provider.absent for provider in found if provider.absent}
        names = [provider.name for provider in found if not provider.absent]
        if not checker.rounds and case.op in (env or {}).get("ACCELERON_REFERENCE_OPS", "").split(","):
            continue  # the op uses a kernel that failed
        these = checker.measure(number, case, names)
        for row in these:
            results.write(row)
        for step, passes in groupby(these, key=lambda row: row.case["pass"]):
            say(f"{case.op}, {case.shape}, {step}")
            print_rows(list(passes), baseline=names[0])
        rows += these
        if not checker.rounds and env != fallbacks(rows):
            env = fallbacks(rows)
            results.write(Row("fallbacks", "triton", details=env, check="the kernels' checks", error=0.0, allowed=0.0))
            say(f"environment that avoids failed kernels: {env}")
    for (op, name), reason in absent.items():
        results.write(Row("ops", name, {"op": op}, absent=reason))
        say(f"absent: {name} ({op}): {reason}")
    return rows


def main():
    choices = {"model_size": (*PRESETS, *PUBLISHED), "op": (*OPS, *GEMMS), "dtype": ("auto", *DTYPES, "fp16")}
    flags = dict(model_size=[], op=[], provider=[], tokens=int, dtype="auto", rounds=int, limit=120.0, check_only=False)
    arguments = parse(__doc__, choices, **flags)
    device = arguments.device
    check_only = arguments.check_only
    selected = arguments.provider
    if not check_only and os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET=1 makes timings meaningless: unset it, or add --check_only")
    sizes, names = arguments.model_size or SIZES[device.type], arguments.op or [*OPS, *(GEMMS if check_only else [])]
    settings = Settings(tuple(sizes), tuple(names), arguments.tokens or TOKENS[device.type], arguments.dtype, device)
    known = {provider.name for case in settings.cases() for provider in providers(case, device)}
    if unknown := sorted(set(selected or ()) - known):
        raise InputError(f"--provider {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    results = Results(arguments.output, device)
    rounds = 0 if check_only else arguments.rounds or (10 if device.type == "cuda" else 5)
    checker = Checker(settings, rounds, arguments.limit)
    try:
        rows = run_cases(checker, selected or (OURS if check_only else None), results)
    finally:
        checker.worker.close()
    print(f"wrote {results.path}")
    if any(row.failed for row in rows if row.provider in (*OURS, "acceleron")):
        sys.exit(1)
