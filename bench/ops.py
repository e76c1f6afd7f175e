"""Every op of acceleron.kernels, and attention, against plain PyTorch, eager and compiled, and installed peers.

python -m bench ops [--model_size tiny ...] [--op expert_mlp ...] [--provider triton ...] [--check_only]

Each provider is checked, then timed in rounds interleaved with the others, at the shapes of the model sizes and, for
expert_mlp, at those that its peers publish. "forward" keeps nothing for backward, as in an evaluation. expert_mlp
starts from the top-k ids: every provider builds its dispatch plan within it.

Checks and timings run in a process of their own, so that a crash, a hang, or an exhausted memory costs one provider at
one shape. With --check_only nothing is timed, the four grouped-GEMM kernels are checked one by one too, and what fails
is replaced: a kernel that fails with TMA is tried without it, and an op that still fails leaves its place to the
reference. A row `fallbacks` then has the values of ACCELERON_NO_TMA and ACCELERON_REFERENCE_OPS that avoid them.
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
from .op_cases import GEMMS, OPS, PUBLISHED, Case, Draw, gemm_kernel, select_cases
from .op_peers import Provider, plain, providers
from .rows import Results, Row, describe, print_rows, progress, say, spread
from .worker import Failure, Worker

NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float16: "fp16"}
TOKENS = {"cuda": 65536, "cpu": 256}
SIZES = {"cuda": ["tiny", "small", "medium", "large", *PUBLISHED], "cpu": ["nano", "tiny"]}
FORWARD, BOTH = "forward", "forward + backward"
OURS = ("triton", "reference")
# However large the reference's own error is, no provider's may be larger.
LARGEST_ERROR = 0.05


class Settings(NamedTuple):
    """What a worker needs to build the same cases as its parent."""

    sizes: tuple[str, ...]
    ops: tuple[str, ...]
    tokens: int
    dtype: torch.dtype
    device: torch.device

    def cases(self) -> list[Case]:
        return select_cases(self.sizes, self.ops, self.tokens, self.dtype)


class Truth(NamedTuple):
    """What a case's results are compared with. errors: plain PyTorch's in the case's dtype, by the result's name."""

    results: dict[str, Tensor]
    output_grads: list[Tensor | None]
    errors: dict[str, float]


def _copies(inputs: tuple, dtype: torch.dtype | None = None) -> tuple:
    """Leaves of the same values, the floats in another dtype if one is given."""

    def copy(x):
        if not isinstance(x, Tensor):
            return x
        to = dtype if dtype and x.is_floating_point() else x.dtype
        return x.detach().to(to, copy=True).requires_grad_(x.requires_grad)

    return tuple(copy(x) for x in inputs)


def _outputs(run: Callable, inputs: tuple) -> tuple[Tensor, ...]:
    found = run(*inputs)
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _leaves(case: Case, inputs: tuple) -> dict[str, Tensor]:
    """The inputs that have a gradient, by name."""
    named = zip(case.inputs, inputs, strict=False)
    return {name: x for name, x in named if isinstance(x, Tensor) and x.requires_grad}


def _both(run: Callable, inputs: tuple, leaves: list[Tensor], output_grads: list[Tensor | None]) -> tuple:
    """Outputs, and the gradients of the leaves."""
    outputs = _outputs(run, inputs)
    pairs = [(out, grad) for out, grad in zip(outputs, output_grads, strict=True) if grad is not None]
    grads = torch.autograd.grad([out for out, _ in pairs], leaves, [g.to(out.dtype) for out, g in pairs])
    return outputs, grads


def _results(case: Case, run: Callable, inputs: tuple, output_grads: list) -> dict[str, Tensor]:
    """Outputs without gradients ("... alone"), and outputs and gradients, by name."""
    with torch.no_grad():
        results = {f"{name} alone": x for name, x in zip(case.outputs, _outputs(run, inputs), strict=True)}
    if leaves := _leaves(case, inputs):
        outputs, grads = _both(run, inputs, list(leaves.values()), output_grads)
        results |= {name: x.detach() for name, x in zip(case.outputs, outputs, strict=True)}
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def _error(result: Tensor, truth: Tensor) -> float:
    """Relative root mean square; for integers the share that differs."""
    if result.shape != truth.shape:
        raise ValueError(f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}")
    if not truth.is_floating_point():
        return (result != truth).double().mean().item()
    return ((result.to(truth.dtype) - truth).norm() / truth.norm()).item()


def truth_of(case: Case, inputs: tuple, draw: Draw) -> Truth:
    """The results of plain PyTorch on the same inputs in float64; in float32 on CUDA for 16-bit ops."""
    wide = _copies(
        inputs, torch.float32 if draw.device.type == "cuda" and case.precision.itemsize == 2 else torch.float64
    )
    outputs = _outputs(plain(case), wide)
    grads = [
        torch.tensor(case.scalar_grad, device=x.device) if x.dim() == 0 else draw(*x.shape, grad=False) for x in outputs
    ]
    grads = [grad if x.requires_grad else None for x, grad in zip(outputs, grads, strict=True)]
    del outputs
    truths, plains = (_results(case, plain(case), each, grads) for each in (wide, _copies(inputs)))
    return Truth(truths, grads, {name: _error(plains[name], truth) for name, truth in truths.items()})


def check(case: Case, provider: Provider, inputs: tuple, truth: Truth) -> tuple[str, float, float]:
    """What was compared, the error and the allowed error of the result that is worst."""
    # Where the reference happens to be exact: an eighth of a unit, and a few of fp32's for sums and exponentials.
    units = torch.finfo(case.precision).eps / 8 + 8 * torch.finfo(torch.float32).eps
    judged = []
    for name, result in _results(case, provider.run, _copies(inputs), truth.output_grads).items():
        error, floats = _error(result, truth.results[name]), truth.results[name].is_floating_point()
        allowed = min(provider.factor * truth.errors[name] + units, LARGEST_ERROR) if floats else 0.0
        passes = error <= allowed  # False for NaN
        judged.append((not passes, error / allowed if allowed and passes else error, name, error, allowed))
    *_, name, error, allowed = max(judged)
    return f"{name}, the worst of {len(judged)}, relative RMS to plain PyTorch in a wider dtype", error, allowed


def bind(case: Case, provider: Provider, inputs: tuple, output_grads: list) -> dict[str, Callable]:
    """The calls to time, by pass, once run."""
    leaves, forward = list(_leaves(case, inputs).values()), torch.no_grad()(lambda: _outputs(provider.run, inputs))
    grads = [None if g is None else g.to(out.dtype, copy=True) for out, g in zip(forward(), output_grads, strict=True)]
    calls = {FORWARD: forward}
    if leaves:
        calls[BOTH] = lambda: _both(provider.run, inputs, leaves, grads)
        calls[BOTH]()
    return calls


def least_bytes(case: Case, inputs: tuple) -> dict[str, int]:
    """By pass, the bytes of all inputs and outputs, and of their gradients: each is moved once at least."""
    with torch.no_grad():
        outputs = _outputs(plain(case), inputs)
    floats = [x for x in outputs if x.is_floating_point()]
    forward = sum(x.nbytes for x in (*inputs, *outputs) if isinstance(x, Tensor))
    leaves = _leaves(case, inputs).values()
    return {FORWARD: forward} | ({BOTH: forward + sum(x.nbytes for x in (*leaves, *floats))} if leaves else {})


def work_of(case: Case, step: str, moved: int, seconds: list[float], ceilings: tuple[float, float]) -> dict:
    """A row's details: FLOPs, bytes, what bounds the op, and its share of this run's measured ceiling."""
    flops = case.flops * (3 if step == BOTH else 1)
    least = {"compute": flops / ceilings[0], "memory": moved / ceilings[1]}
    bound = max(least, key=least.get)
    share = least[bound] / spread(seconds)[0]
    return {"flops": flops, "bytes": moved, "bound": bound, "share_of_ceiling": share}


@lru_cache(maxsize=1)  # the providers of a case follow one another
def prepare(settings: Settings, number: int) -> tuple[Case, dict[str, Provider], tuple, Truth]:
    """A case with its providers, inputs and truth."""
    torch.compiler.reset()  # else a function's ninth shape is not compiled
    case, draw = settings.cases()[number], Draw(settings.dtype, settings.device)
    inputs = case.make(draw)
    named = {provider.name: provider for provider in providers(case, settings.device)}
    return case, named, inputs, truth_of(case, inputs, draw)


def serve(connection, settings: Settings):
    """A worker. It answers (number, name, timed) with the check of one provider, also run as it will be timed;
    (number, names, rounds) with the seconds by pass and name; and (number, None, None) with the least bytes by pass."""
    while True:
        number, wanted, last = connection.recv()
        try:
            case, named, inputs, truth = prepare(settings, number)
            if wanted is None:
                answer = least_bytes(case, inputs)
            elif isinstance(wanted, str):
                answer = check(case, named[wanted], inputs, truth)
                if last:
                    bind(case, named[wanted], inputs, truth.output_grads)
            else:
                calls = {name: bind(case, named[name], inputs, truth.output_grads) for name in wanted}
                passes = {step: {name: call[step] for name, call in calls.items()} for step in calls[wanted[0]]}
                answer = {step: timing.measure(these, settings.device, last) for step, these in passes.items()}
        except Exception as error:  # a peer may raise anything
            answer = Failure(describe(error))
            if settings.device.type == "cuda":
                torch.cuda.synchronize()  # raises, which ends this process, if the CUDA context is lost
        connection.send(answer)


class Checker:
    """The parent's side of a worker: rows of cases, and what to avoid."""

    def __init__(self, settings: Settings, rounds: int, limit: float):
        self.settings, self.rounds, self.limit = settings, rounds, limit
        self.worker = Worker(serve, settings)  # it imports while the ceilings are measured
        self.ceilings = timing.ceilings(settings.device, settings.dtype) if rounds else None

    def ask(self, *message):
        return self.worker.ask(message, self.limit)

    def measure(self, number: int, case: Case, names: list[str]) -> list[Row]:
        """Rows of each pass of each provider, checked and, with rounds, timed; without, of the last pass only."""
        steps, passed, seconds, reasons = {BOTH: 0}, {}, {}, {}
        if not names:
            return []
        try:
            steps = self.ask(number, None, None)
            for name in names:
                try:
                    passed[name] = self.checked(number, case, name)
                except Failure as failure:
                    reasons[name] = str(failure)
            timed = [name for name, (_, error, allowed) in passed.items() if error <= allowed]
            if self.rounds and timed:
                seconds = self.ask(number, timed, self.rounds)
        except Failure as failure:
            what = "" if passed or reasons else "the truth: "
            reasons |= {name: f"{what}{failure}" for name in names if name not in reasons}
        rows = []
        for step, name in product(steps if self.rounds else list(steps)[-1:], names):
            about = {"op": case.op, "shape": case.shape, "pass": step, "dtype": NAMES[self.settings.dtype]}
            row = Row("ops" if self.rounds else "kernels", name, about, group=f"{case.op} {case.shape} {step}")
            row.failed = reasons.get(name, "")
            row.check, row.error, row.allowed = passed.get(name, ("", None, None))
            if name in seconds.get(step, {}) and not row.failed:
                row.unit, row.values = "s", seconds[step][name]
                row.details = work_of(case, step, steps[step], row.values, self.ceilings)
            rows.append(row)
        return rows

    def checked(self, number: int, case: Case, name: str) -> tuple[str, float, float]:
        """The check of one provider. One of our GEMM kernels that fails with TMA is checked again without it, and goes
        without it from then on. Raises Failure."""
        without = gemm_kernel(case.op)
        try:
            found = self.ask(number, name, bool(self.rounds))
            if found[1] <= found[2] or not may_drop_tma(case, name):
                return found
            reason = f"error {found[1]:.3g}, where {found[2]:.3g} is allowed"
        except Failure as failure:
            if not may_drop_tma(case, name):
                raise
            reason, without = str(failure), "all"  # each further crash or hang would cost a process
        say(f"{case.op}, {case.shape}: fails with TMA ({reason}); trying it without")
        os.environ["ACCELERON_NO_TMA"] = ",".join([*without_tma(), without])
        self.worker.close()  # the next process inherits the variable
        what, error, allowed = self.ask(number, name, bool(self.rounds))
        return f"{what} (without TMA; with it: {reason})", error, allowed


def without_tma() -> list[str]:
    return [name for name in os.environ.get("ACCELERON_NO_TMA", "").split(",") if name]


def may_drop_tma(case: Case, name: str) -> bool:
    return name == "triton" and case.op in GEMMS and not {gemm_kernel(case.op), "all"} & set(without_tma())


def fallbacks(rows: list[Row]) -> dict[str, str]:
    """The environment that avoids the kernels that failed."""
    wrong = {row.case["op"] for row in rows if row.provider == "triton" and row.failed}
    wrong -= {row.case["op"] for row in rows if row.failed.startswith("the truth")}
    names = (wrong & set(OPS)) | ({"expert_mlp", "moe", "grouped_gemm"} if wrong & set(GEMMS) else set())
    return {"ACCELERON_NO_TMA": ",".join(without_tma()), "ACCELERON_REFERENCE_OPS": ",".join(sorted(names))}


def run_cases(checker: Checker, wanted: Sequence[str] | None, results: Results) -> list[Row]:
    """Check, and with rounds time, all cases; each row is written as soon as it exists. Returns the rows."""
    rows, absent, avoided = [], {}, None
    for number, case in enumerate(progress(checker.settings.cases(), "cases")):
        found = [p for p in providers(case, checker.settings.device) if not wanted or p.name in wanted]
        absent |= {(case.op, provider.name): provider.absent for provider in found if provider.absent}
        names = [provider.name for provider in found if not provider.absent]
        if not checker.rounds and case.op in (avoided or {}).get("ACCELERON_REFERENCE_OPS", "").split(","):
            continue  # it contains a kernel that failed
        these = checker.measure(number, case, names)
        for row in these:
            results.write(row)
        for step, passes in groupby(these, key=lambda row: row.case["pass"]):
            say(f"{case.op}, {case.shape}, {step}")
            print_rows(list(passes), baseline=names[0])
        rows += these
        if not checker.rounds and avoided != fallbacks(rows):
            avoided = fallbacks(rows)
            results.write(
                Row("fallbacks", "triton", details=avoided, check="the kernels' checks", error=0.0, allowed=0.0)
            )
            say(f"to avoid what failed: {avoided}")
    for (op, name), reason in absent.items():
        results.write(Row("ops", name, {"op": op}, absent=reason))
        say(f"absent: {name} ({op}): {reason}")
    return rows


def main():
    choices = {"model_size": (*PRESETS, *PUBLISHED), "op": (*OPS, *GEMMS), "dtype": ("auto", *DTYPES, "fp16")}
    flags = dict(model_size=[], op=[], provider=[], tokens=int, dtype="auto", rounds=int, limit=120.0, check_only=False)
    arguments = parse(__doc__, choices, **flags)
    device, check_only, wanted = arguments.device, arguments.check_only, arguments.provider
    if not check_only and os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET=1 is set, under which times mean nothing: unset it, or add --check_only")
    sizes, names = arguments.model_size or SIZES[device.type], arguments.op or [*OPS, *(GEMMS if check_only else [])]
    settings = Settings(tuple(sizes), tuple(names), arguments.tokens or TOKENS[device.type], arguments.dtype, device)
    known = {provider.name for case in settings.cases() for provider in providers(case, device)}
    if unknown := sorted(set(wanted or ()) - known):
        raise InputError(f"--provider {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    results = Results(arguments.output, device)
    rounds = 0 if check_only else arguments.rounds or (10 if device.type == "cuda" else 5)
    checker = Checker(settings, rounds, arguments.limit)
    try:
        rows = run_cases(checker, wanted or (OURS if check_only else None), results)
    finally:
        checker.worker.close()
    print(f"wrote {results.path}")
    if any(row.failed for row in rows if row.provider in (*OURS, "acceleron")):
        sys.exit(1)
