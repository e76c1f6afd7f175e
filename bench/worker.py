"""Trainings that are measured in turns, each in a process of its own: a crash ends but one, and memory is its own."""

import math
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from acceleron import ModelConfig, kernels
from acceleron.data import Shards
from acceleron.device import missing_compiler, peak_memory, reset_peak_memory, resolve_dtype, synchronize
from acceleron.errors import InputError
from acceleron.training.metrics import flops_per_token
from acceleron.training.options import TrainOptions
from acceleron.training.run import Run

from .op_shares import op_shares

CONTEXT = get_context("spawn")
NANO_VOCAB = 2048
LEARNING_RATE = 3e-4
# The error that a gradient may have: FLOOR and this multiple of the plain reference's in the same dtype.
FACTOR, FLOOR = 2.0, 1e-4


class Case(NamedTuple):
    """What one process trains. `balanced`: its router is made to choose all experts alike."""

    options: TrainOptions
    balanced: bool = False

    @property
    def truth_key(self) -> tuple:
        """Equal for cases whose gradients should be."""
        o = self.options
        return o.model_size, o.dense, o.batch_size, o.seq_len, o.dtype


def build(case: Case, plain_dtype: torch.dtype | None = None) -> Run:
    """The run of a case. With `plain_dtype`: as the plain reference, eager and checkpointed, in this dtype."""
    options = case.options
    device = torch.device(options.device)
    dtype = plain_dtype or resolve_dtype(options.dtype, device)
    kernels.select("reference" if plain_dtype else options.kernels, device)
    overrides = {"vocab_size": NANO_VOCAB} if options.model_size == "nano" else {}
    config = ModelConfig.preset(options.model_size, dense=options.dense, **overrides)
    run = Run(options, config, Shards(options.data_dir), device, dtype)
    if plain_dtype:
        run.model.gradient_checkpointing = True
    elif not options.no_compile:
        if missing_compiler(device):
            raise RuntimeError(f"torch.compile needs the compiler {missing_compiler(device)}, which is not installed")
        run.model.compile_blocks()
    return run


def gradients(run: Run) -> dict[str, Tensor]:
    """Of the first micro-batch, once the device has them. The run still begins with that batch."""
    run.fetch()
    input_ids = run.batches[0].to(run.device)
    with run.context():
        run.model(input_ids, labels=input_ids).loss.backward()
    found = {name: weight.grad for name, weight in run.model.named_parameters()}
    run.model.zero_grad(set_to_none=True)
    synchronize(run.device)
    return found


def error(result: Tensor, truth: Tensor) -> float:
    """Relative root mean square."""
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


@contextmanager
def balanced_routing(device: torch.device):
    """Yields a scalar on the device; when it is 4, each token's two experts are given, by turns, and when 0 learned.

    It is added to the logits of those two, of which a fresh router's have a spread of 0.5. Compiled graphs read it like
    any tensor, so that the graph that is checked with one value is the graph that is timed with the other.
    """
    strength = torch.zeros((), device=device)

    def balanced(router_logits: Callable) -> Callable:
        def logits(x_TD, weight_ED):
            logits_TE = router_logits(x_TD, weight_ED)
            T, E = logits_TE.shape
            turns = torch.arange(T, device=x_TD.device)[:, None] - torch.arange(E, device=x_TD.device)
            return logits_TE + strength * (turns.remainder(E) < 2)

        return logits

    # Where `moe` calls it: in the reference, and in the kernels where they can be imported.
    moe = sys.modules.get("acceleron.kernels.moe")
    with ExitStack() as stack:
        for module, name in ((kernels.reference, "router_logits"), (moe, "router_logits_forward")):
            if module:
                stack.enter_context(mock.patch.object(module, name, balanced(getattr(module, name))))
        yield strength


def write_truth(case: Case, path: str):
    """Save the gradients of fp32 by the plain reference, and its errors in the case's own dtype."""
    truth = {name: grad.cpu() for name, grad in gradients(build(case, torch.float32)).items()}
    dtype = resolve_dtype(case.options.dtype, torch.device(case.options.device))
    allowed = dict.fromkeys(truth, FLOOR)
    if dtype != torch.float32:
        plain = gradients(build(case, dtype))
        allowed = {name: FLOOR + FACTOR * error(plain[name].cpu(), truth[name]) for name in truth}
    torch.save({"truth": truth, "allowed": allowed}, path)


def check(found: dict[str, Tensor], path: str) -> dict:
    """The fields of the check: the gradient that is worst in comparison with what is allowed."""
    saved = torch.load(path, mmap=True)
    errors = {name: error(found[name], truth) for name, truth in saved["truth"].items()}
    worst = max(errors, key=lambda name: errors[name] / saved["allowed"][name] if errors[name] >= 0 else math.inf)
    return {
        "check": f"gradient of {worst} (the worst) against fp32 by the plain reference",
        "check_error": errors[worst],
        "check_allowed": saved["allowed"][worst],
    }


class Training:
    """A case in training, in a process of its own."""

    def __init__(self, case: Case):
        began = time.perf_counter()
        self.case, self.run = case, build(case)
        self.build_seconds = time.perf_counter() - began

    def begin(self, truth: str, strength: Tensor) -> dict:
        """Compile and check, with the file of true gradients; the fields of the check, and seconds.

        `start_seconds` are those of building the run and of the first forward and backward pass, which compiles what
        is in no cache yet: in the first mode of a size, nearly all. Imports are not in them. `step_seconds` are a
        step's.

        The check is with given experts: in 16 bits tokens near a tie choose others, and what they change in a gradient
        would hide an error of a kernel.
        """
        strength.fill_(4.0)
        began = time.perf_counter()
        found = gradients(self.run)
        start_seconds = self.build_seconds + time.perf_counter() - began
        about = check({name: grad.cpu() for name, grad in found.items()}, truth) | {"start_seconds": start_seconds}
        del found
        strength.fill_(4.0 * self.case.balanced)
        reset_peak_memory(self.run.device)
        with self.run.context():
            self.run.step(LEARNING_RATE)  # the optimizer's state is made
        return about | {"step_seconds": self.round(1)["seconds"]}

    def round(self, steps: int) -> dict:
        """Seconds of this many steps."""
        device = self.run.device
        with self.run.context():
            if device.type == "cuda":
                self.run.step(LEARNING_RATE)  # fills the allocator's cache, which was emptied for the others
            synchronize(device)
            began = time.perf_counter()
            for _ in range(steps):
                self.run.step(LEARNING_RATE)
            synchronize(device)
            seconds = time.perf_counter() - began
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return {"seconds": seconds}

    def finish(self) -> dict:
        """What is known at the end."""
        run, options = self.run, self.case.options
        found = {"peak_memory_bytes": peak_memory(run.device)}
        statistics = run.read_statistics()
        names = ("loss", "expert_least_share", "expert_most_share")
        found |= {name: statistics[name] for name in names if name in statistics}
        found["flops_per_token"] = flops_per_token(run.model.config, run.model.num_parameters()[1], options.seq_len)
        with run.context():
            found["op_shares"] = op_shares(lambda: run.step(LEARNING_RATE), run.device)
        return found


def serve(connection, case: Case, makes_truth: bool):
    """A process: waits for a truth's path, and makes it; or trains, and answers until it is told to finish."""
    try:
        device = torch.device(case.options.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with balanced_routing(device) as strength:
            training = None if makes_truth else Training(case)
            truth = connection.recv()
            if makes_truth:
                strength.fill_(4.0)
                write_truth(case, truth)
                connection.send({})
                return
            connection.send(training.begin(truth, strength))
            while steps := connection.recv():
                connection.send(training.round(steps))
            connection.send(training.finish())
    except EOFError:  # the parent has ended, or needs this one no more
        return
    except Exception as error:
        if not isinstance(error, InputError):
            traceback.print_exc()
        reason = (str(error).strip().splitlines() or [""])[0]
        with suppress(BrokenPipeError):
            connection.send({"failed": f"{type(error).__name__}: {reason}"})


class Worker:
    """The parent's end of a process, which builds its model at once and does nothing more before `begin`.

    `row` then has its figures, or `failed`.
    """

    def __init__(self, case: Case, makes_truth: bool = False):
        self.case, self.rounds, self.row = case, [], {}
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs, case, makes_truth))
        self.process.start()
        theirs.close()

    def _ask(self, message: str | int) -> dict:
        """The answer; of a process that has died, that it has."""
        with suppress(ConnectionError):  # it may have said why before it ended
            self.connection.send(message)
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return {"failed": f"the process ended with status {self.process.exitcode}"}

    def begin(self, truth: str):
        self.row = self._ask(truth)

    def round(self, seconds: float):
        """Train for about this long, in whole steps, and note the tokens/s."""
        if "failed" in self.row:
            return
        steps = max(1, round(seconds / self.row["step_seconds"]))
        answer = self._ask(steps)
        if "failed" in answer:
            self.row = answer
        else:
            self.rounds.append(steps * self.case.options.tokens_per_step / answer["seconds"])

    def finish(self):
        """Ask for the last figures of one that trains, and wait for the process's end."""
        if self.rounds and "failed" not in self.row:
            self.row |= self._ask(0)
        self.connection.close()
        self.process.join()


def train_in_turns(
    cases: list[Case], truths: dict[tuple, str], directory: str, rounds: int, seconds: float
) -> list[Worker]:
    """Finished workers of the cases. `truths` has the files made so far, by Case.truth_key; missing ones are made.

    All processes start together, as importing and building takes many seconds; the device is one's at a time.
    """
    makers = {case.truth_key: Worker(case, makes_truth=True) for case in cases if case.truth_key not in truths}
    workers = [Worker(case) for case in cases]
    reasons = {}
    for key, maker in makers.items():
        truths[key] = f"{directory}/truth{len(truths)}.pt"
        maker.begin(truths[key])
        maker.finish()
        if "failed" in maker.row:
            del truths[key]
            reasons[key] = f"the plain reference: {maker.row['failed']}"
    for worker in workers:
        key = worker.case.truth_key
        if key in truths:
            worker.begin(truths[key])
        else:
            worker.row = {"failed": reasons[key]}
    for count in range(rounds):
        for worker in workers[:: -1 if count % 2 else 1]:  # back and forth, lest one always follow the same other
            worker.round(seconds)
    for worker in workers:
        worker.finish()
    return workers
