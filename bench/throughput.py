"""Training tokens/s of the MoE and its dense baseline in train.py's own loop, with optimizer and data loader.

Each contender is a process that runs `train()` and pauses between interleaved rounds. Ratios are computed per round,
which cancels slowdowns of the machine. Before training, a contender checks the loss and gradients of its model, in its
mode, against the fp32 reference (acceleron/self_check.py).

Modes: compiled (all activations kept), eager, checkpointed (compiled), balanced (--debug_force_load_balance),
deterministic, and predecessor (batch 32, accumulation 4, compiled, checkpointed, as in the predecessor's command). The
text is the source of Python's standard library. MFU counts the FLOPs of the active parameters without recomputation.
--seconds: training time per round. --limit: time limit for starting. --profile: add the kernel times of one step.
The exit status is 1 if anything fails.
"""

import json
import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import chain, product
from unittest import mock

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from acceleron import Acceleron, ops
from acceleron import device as devices
from acceleron.device import dtype_name, peak_memory, synchronize
from acceleron.errors import InputError
from acceleron.self_check import check_gradients
from acceleron.training import TrainOptions, train
from acceleron.training.setup import model_config
from acceleron.training.trainer import Trainer

from .command import parse
from .corpus import write_corpus
from .rows import Results, Row, describe, print_rows, progress, say
from .shapes import NANO_VOCAB, batch_shape
from .worker import Failure, Worker

MODES = {
    "compiled": dict(no_gradient_checkpointing=True),
    "eager": dict(no_gradient_checkpointing=True, no_compile=True),
    "checkpointed": {},
    "balanced": dict(no_gradient_checkpointing=True, debug_force_load_balance=True),
    "deterministic": dict(no_gradient_checkpointing=True, deterministic=True),
    "predecessor": dict(batch_size=32, grad_accum=4),
}
BACKENDS = {"cuda": ["triton"], "cpu": ["reference"]}  # the default of --kernels
GPU_MODES = ("deterministic", "predecessor")  # skipped on a CPU unless selected with --mode
CORPUS_CHARACTERS = 4_000_000
NEVER = 1 << 30


def serve(connection, options: TrainOptions):
    """The worker of a contender: runs the check, then train.py's loop, which pauses between rounds."""
    device = torch.device(options.device)
    step = Trainer.train_step
    left = 1
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent handles signals; the loop would save a checkpoint
        signal.signal(number, signal.SIG_IGN)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the check runs cuBLAS's first GEMM
    connection.recv()
    compiler = devices.missing_compiler(device)
    if not options.no_compile and compiler:
        raise RuntimeError(f"torch.compile needs {compiler}: install it, or use --mode eager")
    config, dtype = model_config(options, None), devices.resolve_dtype(options.dtype, device)
    shape = dict(batch_size=min(2, options.batch_size), seq_len=options.seq_len)
    mode = dict(compiled=not options.no_compile, checkpointing=not options.no_gradient_checkpointing)
    mode |= dict(accumulate=options.grad_accum > 1)
    check = check_gradients(config, device, dtype, options.kernels, **shape, **mode)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    devices.reset_peak_memory(device)
    connection.send(check)
    connection.recv()
    answer, elapsed = {}, stopwatch(device)

    def build(*args, **kwargs) -> Acceleron:
        with device:  # initializing large models is fast on a GPU
            return Acceleron(*args, **kwargs)

    def pause(trainer: Trainer) -> int:
        """Send the round's seconds, answer requests, and return the number of steps in the next round.

        On a GPU, an untimed step precedes the round. It refills the allocator's cache, and the next step's launches
        overlap it, as in training.
        """
        nonlocal answer, elapsed
        answer |= {"seconds": elapsed()}
        while True:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # free the memory for the next contender
            try:
                connection.send(answer)
                message = connection.recv()
            except (EOFError, ConnectionError):
                sys.exit()  # after an exception, the loop would save a checkpoint
            if message == "metrics":
                answer = metrics(trainer)
                continue
            if device.type == "cuda":
                step(trainer, trainer.optimizer.param_groups[0]["lr"])
            if isinstance(message, int):
                break
            synchronize(device)
            answer = profile_step(lambda: step(trainer, 0.0), device)
        answer, elapsed = {}, stopwatch(device)
        return message

    def paused_step(trainer: Trainer, lr: float):
        nonlocal left
        left = left or pause(trainer)
        try:
            step(trainer, lr)
        except Exception as error:
            connection.send(Failure(describe(error)))
            sys.exit()
        left -= 1

    with (
        mock.patch.object(Trainer, "train_step", paused_step),
        mock.patch("acceleron.training.trainer.Acceleron", build),
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        train(options)


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Start a clock and return a function that waits for the device and returns the seconds since.

    On a GPU, the clock starts when the device reaches this point.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        return lambda: time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()

    def elapsed() -> float:
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return elapsed


def metrics(trainer: Trainer) -> dict:
    """Return a contender's metrics after its rounds."""
    flops = trainer.model.flops_per_token(trainer.options.seq_len)
    values = {"peak_memory_bytes": peak_memory(trainer.device), "flops_per_token": flops}
    statistics = trainer.read_statistics() if trainer.statistics.steps else {}
    names = ("loss", "expert_least_share", "expert_most_share")
    return values | {name: statistics[name] for name in names if name in statistics}


def profile_step(step: Callable, device: torch.device) -> dict:
    """Return the 80 most expensive kernels (on a CPU: ops) of a step, with calls and seconds.

    On a GPU, `idle` is the time before a kernel's launches in which no kernel runs. The totals are those of the step.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        step()
        synchronize(device)
    if not on_gpu:
        times = [(op.key, op.count, op.self_cpu_time_total / 1e6) for op in trace.key_averages()]
        rows = pd.DataFrame(times, columns=["kernel", "calls", "seconds"])
        return {"profile": rows.nlargest(80, "seconds").to_dict("records")}
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    times = [(event.name[:120], event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events]
    launches = pd.DataFrame(times, columns=["kernel", "start", "end"]).sort_values("start")
    launches["idle"] = (launches.start - launches.end.cummax().shift(fill_value=launches.start.iloc[0])).clip(lower=0)
    launches["seconds"] = launches.end - launches.start
    rows = launches.groupby("kernel").agg(calls=("idle", "size"), seconds=("seconds", "sum"), idle=("idle", "sum"))
    totals = {"seconds": launches.end.max() - launches.start.min(), "idle": launches.idle.sum(), "calls": len(launches)}
    return {"profile": rows.nlargest(80, "seconds").reset_index().to_dict("records"), "profiled_step": totals}


class Contender:
    """The parent's side of a training process. `row` collects its measurements or its `failed` reason."""

    def __init__(self, options: TrainOptions, mode: str, limit: float):
        self.options = options
        self.limit = limit
        self.step_seconds = 0.0
        case = {"size": options.model_size, "mode": mode, "dtype": options.dtype, "batch_size": options.batch_size}
        case |= {"grad_accum": options.grad_accum, "seq_len": options.seq_len}
        provider = f"{'dense' if options.dense else 'MoE'}, {options.kernels}"
        self.row = Row("throughput", provider, case, "tokens/s", group=f"{options.model_size} {mode}")
        self.worker = Worker(serve, options)

    def ask(self, message, limit: float):
        """Returns the worker's answer, or None once this contender has failed."""
        try:
            return None if self.row.failed else self.worker.ask(message, limit)
        except Failure as failure:
            self.row.failed = str(failure)
            return None

    def check(self):
        """Check the model's loss and gradients. This compiles its kernels."""
        if checked := self.ask("check", self.limit):
            name, self.row.error, self.row.allowed = checked
            self.row.check = f"{name} against the fp32 reference"

    def start(self, with_profile: bool):
        """Build the model, train two steps, and optionally profile a third."""
        row = self.row
        if started := self.ask("start", self.limit):
            row.details["start_seconds"] = started["seconds"]
        if step := self.ask(1, self.limit):
            self.step_seconds = step["seconds"]
        if with_profile and not row.failed:
            try:
                row.details |= self.worker.ask("profile", self.limit)
            except Failure as failure:  # the rounds can continue if the process is alive
                row.details["profile_failed"] = str(failure)

    def round(self, seconds: float):
        """Train whole steps for about `seconds` and record the tokens/s."""
        steps = max(1, round(seconds / self.step_seconds)) if self.step_seconds else 1
        if answer := self.ask(steps, 60 + 10 * steps * self.step_seconds):
            tokens = steps * self.options.batch_size * self.options.grad_accum * self.options.seq_len
            self.row.values.append(tokens / answer["seconds"])

    def finish(self, peak: float):
        if answer := self.ask("metrics", self.limit):
            mfu = self.row.median * answer["flops_per_token"] / peak
            self.row.details |= answer | {"mfu": mfu, "peak_flops": peak}
        self.worker.close()


def contenders(size: str, mode: str, directory: str, arguments: Namespace, stack: ExitStack) -> list[Contender]:
    """Yield the MoE and dense baseline on each selected kernel backend, with the corpus in <directory>/data.

    Their processes end when the stack closes.
    """
    device = arguments.device
    batch_size, grad_accum, seq_len = batch_shape(size, device.type == "cuda", arguments)
    options = TrainOptions(
        data_dir=f"{directory}/data", model_size=size, batch_size=batch_size, grad_accum=grad_accum, seq_len=seq_len,
        dtype=dtype_name(arguments.dtype), device=str(device), max_steps=NEVER, eval_interval=NEVER,
        save_interval=NEVER, vocab_size=NANO_VOCAB if size == "nano" else None,
    )  # fmt: skip
    found = []
    for backend, dense in product(arguments.kernels or BACKENDS[device.type], (False, True)):
        save_dir = f"{directory}/{size}-{mode}-{backend}-{dense}"
        own = replace(options, dense=dense, kernels=backend, save_dir=save_dir, **MODES[mode])
        found.append(Contender(own, mode, arguments.limit))
        stack.callback(found[-1].worker.close, patience=0)
    return found


def run_rounds(found: list[Contender], rounds: int, seconds: float, peak: float, with_profile: bool):
    """Train the contenders in interleaved rounds, one at a time, and fill their rows."""
    for contender in found:
        contender.start(with_profile)
    for count in range(rounds):
        for contender in found[:: -1 if count % 2 else 1]:  # alternate the order between rounds
            contender.round(seconds)
    for contender in found:
        contender.finish(peak)


def main():
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler prints two lines per use
    flags = dict(model_size=[], mode=[], kernels=[], dtype="auto", batch_size=int, grad_accum=int, seq_len=int)
    flags |= dict(rounds=5, seconds=3.0, limit=600.0, profile=False)
    arguments = parse(__doc__, {"mode": tuple(MODES), "kernels": ("triton", "reference")}, **flags)
    device = arguments.device
    on_gpu = device.type == "cuda"
    try:
        for backend in arguments.kernels or ():
            ops.set_backend(backend, device)
    except ValueError as error:
        raise InputError(str(error)) from error
    sizes = arguments.model_size or (["tiny", "small", "medium", "large"] if on_gpu else ["nano", "tiny"])
    modes = arguments.mode or [mode for mode in MODES if on_gpu or mode not in GPU_MODES]
    for size in sizes:
        batch_shape(size, on_gpu, arguments)
    results, failed = Results(arguments.output, device), False
    peak, source = devices.peak_flops(device, arguments.dtype)
    print(f"MFU is against {peak / 1e12:.3g} TFLOP/s, {source}", flush=True)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        groups = (contenders(size, mode, directory, arguments, stack) for size, mode in product(sizes, modes))
        if on_gpu:
            groups = list(groups)  # start all together: imports take many seconds, and a GPU machine has enough cores
        print(write_corpus(f"{directory}/data", NANO_VOCAB, CORPUS_CHARACTERS), flush=True)
        checks = []
        if on_gpu:  # checks compile, so four run at a time; each takes up to 16 GB
            threads = ThreadPoolExecutor(4)
            stack.callback(threads.shutdown, wait=False, cancel_futures=True)
            checks = [threads.submit(contender.check) for contender in chain(*groups)]
        for found in progress(groups, "sizes and modes", total=len(sizes) * len(modes)):
            rows = [contender.row for contender in found]
            try:
                for check in checks:  # the first group waits for all checks
                    check.result()
                for contender in found if not on_gpu else ():
                    contender.check()
                run_rounds(found, arguments.rounds, arguments.seconds, peak, arguments.profile)
            finally:  # keep measurements made before a signal
                for row in rows:
                    if not row.values:
                        row.failed = row.failed or "stopped before its first round"
                    failed |= not results.write(row)
            baselines = [row for row in rows if row.provider.startswith("dense") and row.values]
            say(f"{rows[0].group}: {json.dumps(rows[0].case)}")
            print_rows(rows, baseline=max(baselines, key=lambda row: row.median, default=rows[0]).provider)
    print(f"wrote {results.path}")
    if failed:
        sys.exit(1)
