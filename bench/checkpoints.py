"""The cost of a checkpoint: wall clock of some steps with one written in the background, over the same without.

The steps with a checkpoint begin with saving it, as train.py does, and end when it is on the disk of the temporary
directory (TMPDIR) and was read back. Details are medians of interval_seconds (without a checkpoint), blocked_seconds
(until training went on) and write_seconds, and a checkpoint's bytes. The error is the number of checkpoints that differ
in a bit from the state to be saved. The exit status is 1 if there are any.
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
from acceleron.training.loop import Trainer
from acceleron.training.options import TrainOptions
from acceleron.training.signals import StopSignals

from .command import compete, parse
from .corpus import write_corpus
from .rows import Results, Row
from .shapes import CPU_BATCH, CPU_SEQ_LEN, MICRO_BATCH, NANO_VOCAB, SEQ_LEN

CORPUS_CHARACTERS = 4_000_000
LEARNING_RATE = 3e-4


def frozen(state: dict) -> dict:
    """The nested state with dtype, shape and bytes of each tensor in its place."""
    return tree_map_only(Tensor, lambda t: (t.dtype, t.shape, t.detach().cpu().numpy().tobytes()), state)


def entry(trainer: Trainer, interval: int, row: Row) -> Iterator:
    """For `compete`."""
    run, manager, alone, blocked, writing, wrong = trainer.run, trainer.checkpoints, [], [], [], 0
    yield row

    def steps() -> float:
        start = time.perf_counter()
        for _ in range(interval):
            run.step(LEARNING_RATE)
        synchronize(run.device)
        return time.perf_counter() - start

    def ratio() -> float:
        nonlocal wrong
        alone.append(steps())
        saved, start = frozen(run.state_dict()), time.perf_counter()
        trainer._save()
        blocked.append(time.perf_counter() - start)
        steps()
        manager.wait()
        seconds, result = time.perf_counter() - start, manager.result()
        if result.error:
            raise RunFailed(f"no checkpoint could be written to TMPDIR ({result.error})")
        writing.append(result.seconds)
        found = frozen(load_checkpoint(result.path))
        wrong += any(found[name] != value for name, value in saved.items())
        row.details["bytes"] = result.bytes
        return seconds / alone[-1]

    yield ratio
    row.details |= {"interval_seconds": median(alone), "blocked_seconds": median(blocked)}
    row.details |= {"write_seconds": median(writing)}
    row.check, row.error, row.allowed = "checkpoints that differ in a bit from the state to be saved", wrong, 0


def main():
    arguments = parse(__doc__, model_size="nano", interval=100, rounds=5)
    size, device = arguments.model_size, arguments.device
    results = Results(arguments.output, device)
    batch_size, seq_len = (MICRO_BATCH[size], SEQ_LEN) if device.type == "cuda" else (CPU_BATCH[size], CPU_SEQ_LEN)
    shape = dict(batch_size=batch_size, seq_len=seq_len)
    with tempfile.TemporaryDirectory() as name:
        print(write_corpus(f"{name}/data", NANO_VOCAB, CORPUS_CHARACTERS), flush=True)
        options = TrainOptions(
            f"{name}/data",
            size,
            device=str(device),
            no_gradient_checkpointing=True,
            save_dir=name,
            keep_last=1,
            **shape,
        )
        trainer = Trainer(options, None, StopSignals())
        trainer.open_outputs()
        case = dict(size=size, dtype=dtype_name(trainer.run.model.compute_dtype), **shape, interval=arguments.interval)
        row = Row("checkpoints", "checkpoint in the background", case, "ratio", group="checkpoints")
        with closing(trainer.run.loader), closing(trainer.metrics), trainer.run.context():
            compete([entry(trainer, arguments.interval, row)], arguments.rounds, results, ours=1)
