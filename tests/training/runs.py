"""Small runs, in this process or a child process, and helpers to inspect their results."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from waiting import TIMEOUT, wait_until

from acceleron.checkpoint import load_checkpoint
from acceleron.config import PRESETS
from acceleron.errors import run_command
from acceleron.model import Acceleron
from acceleron.training import TrainOptions, train

# The fork server has imported everything, so child processes start in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["acceleron.training", "torch._dynamo"])
SMALL_NANO = dataclasses.replace(
    PRESETS["nano"], d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=4, d_ff=32, d_ff_shared=32
)
# Fields of metrics.jsonl that depend on the clock and the machine.
MEASURED = {"tokens_per_second", "mfu", "memory_bytes", "data_wait", "save_wait"}


def write_shard(directory: Path, rows: int = 100) -> Path:
    """A Markov chain over 64 tokens with four successors each: a model's loss can fall from log 64 to log 4."""
    directory.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    successors, token, ids = rng.integers(64, size=(64, 4)), 0, []
    for choice in rng.integers(4, size=rows * 256).tolist():
        token = int(successors[token, choice])
        ids.append(token)
    np.save(directory / "shard_00000.npy", np.array(ids, dtype=np.int32).reshape(rows, 256))
    return directory


def options(data_dir, save_dir, **changes) -> TrainOptions:
    settings = dict(model_size="nano", vocab_size=64, seq_len=64, batch_size=4, max_steps=12, lr=4e-3, num_workers=1)
    settings |= dict(no_compile=True, device="cpu", dtype="fp32", log_interval=1, eval_interval=6, save_interval=6)
    return TrainOptions(data_dir=str(data_dir), save_dir=str(save_dir), **settings | changes)


def records(save_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]


def final_state(save_dir: Path, step: int) -> tuple[list[dict], dict]:
    """Return a run's log and checkpoint contents. Interruptions must not change them."""
    log = [{name: value for name, value in line.items() if name not in MEASURED} for line in records(save_dir)]
    contents = load_checkpoint(save_dir / f"checkpoint_{step}.pt")
    kept = ("step", "tokens", "config", "model", "optimizer", "data", "statistics")
    return log, {name: contents[name] for name in kept}


def assert_bitwise_equal(found, expected, where: str = ""):
    """Assert that nested dicts and lists with tensors are equal. The message names the first difference."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_bitwise_equal(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_bitwise_equal(a, b, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        # Compare bytes, so NaN equals NaN and 0.0 differs from -0.0.
        assert found.contiguous().numpy().tobytes() == expected.contiguous().numpy().tobytes(), where
    else:
        assert found == expected, where


def shrink_nano():
    """Does the same as the fixture small_nano, but in a child process."""
    PRESETS["nano"] = SMALL_NANO


class SplitWriter:
    """A file that calls `between` halfway through every write."""

    def __init__(self, file, between: Callable[[], None]):
        self.file, self.between = file, between

    def write(self, data):
        half = len(data) // 2
        written = self.file.write(data[:half])
        self.file.flush()
        self.between()
        return written + self.file.write(data[half:])

    def flush(self):
        self.file.flush()


def call_during_writes(between: Callable[[], None]):
    """Call `between` halfway through every write to a checkpoint. Each checkpoint takes hundreds of writes."""
    save = torch.save
    torch.save = lambda contents, file: save(contents, SplitWriter(file, between))


def pause(gate: str):
    """Print "paused" and wait until the file `gate` exists."""
    print("paused", flush=True)
    wait_until(lambda: os.path.exists(gate))


def pause_at_step(step: int, gate: str):
    """Hook: pause before this step (the first step is 1)."""
    shrink_nano()
    forward, steps = Acceleron.forward, itertools.count(1)

    def paused(*args, **kwargs):
        if next(steps) == step:
            pause(gate)
        return forward(*args, **kwargs)

    Acceleron.forward = paused


def _child(settings: TrainOptions, output: str, hook: Callable[[], None] | None, environment: dict[str, str]):
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if hook:
        hook()
    sys.exit(run_command(lambda: train(settings)))


class Child:
    """A child process that runs train() like train.py does. `output` is the path of its output file."""

    def __init__(
        self, settings: TrainOptions, output: Path, hook: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ):  # fmt: skip
        self.output = output
        output.touch()
        self.process = CONTEXT.Process(target=_child, args=(settings, str(output), hook, environment or {}))
        self.process.start()

    def wait_for(self, text: str):
        """Wait until the output contains this text."""
        wait_until(lambda: text in self.output.read_text() or not self.process.is_alive())
        assert text in self.output.read_text(), self.output.read_text()

    def signal(self, number: int):
        os.kill(self.process.pid, number)

    def status(self) -> int:
        """Wait for the process to exit and return its exit status."""
        self.process.join(TIMEOUT)
        assert not self.process.is_alive(), self.output.read_text()
        return self.process.exitcode
