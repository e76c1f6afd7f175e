"""Shared code for tests with hostile files: resource limits, a small run with a checkpoint, and a tokenizer."""

import json
import signal
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from acceleron import ModelConfig
from acceleron.checkpoint import load_checkpoint
from acceleron.data import Shards
from acceleron.data.tokenizer import train_tokenizer
from acceleron.generation import load_model
from acceleron.training import TrainOptions
from acceleron.training.checkpointing import CheckpointManager
from acceleron.training.setup import warn_about_changes
from acceleron.training.trainer import Trainer

resource = pytest.importorskip("resource")

SECONDS, BYTES = 10, 1 << 30  # limits on CPU time and memory per case
VOCAB_SIZE, ROW_LENGTH = 64, 32
CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=2, d_ff=16, d_ff_shared=16
)

TOKENIZER = json.loads(train_tokenizer([" ".join(f"word{number}" for number in range(200))], 300).to_str())
PADDING = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 1, "pad_type_id": 0}
PADDING["pad_token"] = "<|pad|>"
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}


@contextmanager
def limits(case: str):
    """Exceeding the memory limit raises MemoryError; exceeding the time limit fails the test."""

    def too_slow(*_):
        pytest.fail(f"{case}: above {SECONDS} s of CPU time")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)


def small_run(directory: Path) -> Trainer:
    """A run of CONFIG on data written to `directory`."""
    np.save(directory / "shard_00000.npy", np.arange(40 * ROW_LENGTH, dtype=np.int32).reshape(40, -1) % VOCAB_SIZE)
    options = TrainOptions(data_dir=str(directory), batch_size=2, seq_len=ROW_LENGTH, num_workers=1)
    return Trainer(options, CONFIG, Shards(directory), torch.device("cpu"), torch.float32)


def write_checkpoint(run: Trainer, directory: Path) -> Path:
    """Train a new run for two steps and save a checkpoint in train.py's format."""
    for _ in range(2):
        run.train_step(1e-3)
    run.detector.read()
    manager = CheckpointManager(directory)
    manager.save(run.state_dict(), 0)
    assert manager.poll(wait=True).error is None
    return directory / "checkpoint_2.pt"


def use_checkpoint(run: Trainer, path: Path):
    """Load and use a checkpoint as train.py and generate.py do."""
    contents = load_checkpoint(path)
    load_model(contents, path, torch.device("cpu"), torch.float32)
    run.load_state_dict(contents, path)
    warn_about_changes(run, contents)
    assert 0 <= run.step < 2**62
    run.train_step(1e-3)


def rewrite(original: Path, path: Path, change, **kwargs):
    """Copy an archive and replace each record with the (name, content) pairs from `change`, with valid checksums."""
    with zipfile.ZipFile(original) as archive, zipfile.ZipFile(path, "w", **kwargs) as output:
        for record in archive.infolist():
            for name, content in change(record.filename, archive.read(record)):
                output.writestr(name, content)


def exponential_list(depth: int) -> list:
    """A list of a few objects that a naive traversal visits 2^depth times."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value
