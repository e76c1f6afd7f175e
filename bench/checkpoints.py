"""The cost of a background checkpoint: time of --interval steps with one / time of the same steps without one.

A timed interval starts with a save, as in train.py, and ends once the checkpoint is on disk (in TMPDIR) and verified.
The details are medians: interval_seconds (without a checkpoint), blocked_seconds (how long training waits) and
write_seconds. The error is the number of checkpoints that differ from the saved state in any bit. The exit status is 1
unless it is 0.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from statistics import median

from torch import Tensor
from torch.utils._pytree import tree_map_only

from acceleron.checkpoint import load_checkpoint
from acceleron.device import dtype_name, synchronize
from acceleron.errors import RunFailed
from acceleron.training.checkpointing import CheckpointManager
from acceleron.training.options import TrainOptions
from acceleron.training.setup import build_trainer, open_outputs
from acceleron.training.trainer import Trainer

from .command import parse, run_entries
from .corpus import write_corpus
from .rows import Results, Row
from .shapes import CPU_BATCH, CPU_SEQ_LEN, MICRO_BATCH, NANO_VOCAB, SEQ_LEN

CORPUS_CHARACTERS = 4_000_000
LEARNING_RATE = 3e-4


def snapshot(state: dict) -> dict:
    """Copy a nested state, with each tensor replaced by its (dtype, shape, bytes)."""
    return tree_map_only(Tensor, lambda t: (t.dtype, t.shape, t.detach().cpu().numpy().tobytes()), state)


def entry(trainer: Trainer, manager: CheckpointManager, interval: int, row: Row) -> Iterator:
    """Yield an entry for `run_entries`."""
    baseline = []
    blocked = []
    written = []
    wrong = 0
    yield row

    def steps() -> float:
        start = time.perf_counter()
        for _ in range(interval):
            trainer.train_step(LEARNING_RATE)
        synchronize(trainer.device)
        return time.perf_counter() - start

    def ratio() -> float:
        nonlocal wrong
        baseline.append(steps())
        trainer.detector.read()
        saved = snapshot(trainer.state_dict() | {"config": trainer.model.config})
        start = time.perf_counter()
        manager.save(trainer.state_dict(), trainer.detector.good_step)
        blocked.append(time.perf_counter() - start)
        steps()
        result, seconds = manager.poll(wait=True), time.perf_counter() - start
        if result.error:
            raise RunFailed(f"cannot write a checkpoint to TMPDIR ({result.error}): choose a different TMPDIR")
        written.append(result.seconds)
        loaded = snapshot(load_checkpoint(result.path))
        wrong += any(loaded[name] != value for name, value in saved.items())
        row.details["bytes"] = result.bytes
        return seconds / baseline[-1]

    yield ratio
    medians = {"interval_seconds": baseline, "blocked_seconds": blocked, "write_seconds": written}
    row.details |= {name: median(values) for name, values in medians.items()}
    row.check, row.error, row.allowed = "checkpoints that differ from the saved state", wrong, 0


def main():
    arguments = parse(__doc__, model_size="nano", interval=100, rounds=5)
    size, device = arguments.model_size, arguments.device
    results = Results(arguments.output, device)
    batch_size, seq_len = (MICRO_BATCH[size], SEQ_LEN) if device.type == "cuda" else (CPU_BATCH[size], CPU_SEQ_LEN)
    shape = dict(batch_size=batch_size, seq_len=seq_len)
    with tempfile.TemporaryDirectory() as name:
        print(write_corpus(f"{name}/data", NANO_VOCAB, CORPUS_CHARACTERS), flush=True)
        settings = dict(device=str(device), no_gradient_checkpointing=True, save_dir=name, keep_last=1)
        options = TrainOptions(f"{name}/data", size, **settings, **shape)
        trainer, _ = build_trainer(options, None)
        metrics, manager = open_outputs(trainer, None)
        case = dict(size=size, dtype=dtype_name(trainer.model.compute_dtype), **shape, interval=arguments.interval)
        row = Row("checkpoints", "checkpoint in the background", case, "ratio", group="checkpoints")
        with closing(trainer.loader), closing(metrics), closing(manager), trainer.context():
            run_entries([entry(trainer, manager, arguments.interval, row)], arguments.rounds, results, ours=1)
