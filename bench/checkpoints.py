"""The cost of a checkpoint: wall clock of some steps with one written in the background, over the same without.

The steps with a checkpoint begin with saving it, and end when it is on the disk and was read back, as in a run that
saves at every interval. The disk is that of the temporary directory, which TMPDIR names. Details are medians of
interval_seconds (without a checkpoint), blocked_seconds (until training went on) and write_seconds, and a checkpoint's
bytes. Checked is each checkpoint: the error is the number of its tensors that differ in a bit from those to be saved.
The exit status is 1 if there are any.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import median

from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from acceleron import ModelConfig, kernels
from acceleron.data import Shards
from acceleron.device import dtype_name, missing_compiler, resolve_dtype, synchronize
from acceleron.errors import InputError
from acceleron.training.checkpoint import FORMAT, load_checkpoint
from acceleron.training.options import TrainOptions
from acceleron.training.run import Run
from acceleron.training.saver import Saver

from .command import compete, parse
from .corpus import write_corpus
from .rows import Results, Row
from .shapes import CPU_BATCH, CPU_SEQ_LEN, MICRO_BATCH, NANO_VOCAB, SEQ_LEN

CORPUS_CHARACTERS = 4_000_000
LEARNING_RATE = 3e-4


def tensors_of(state: dict) -> dict[str, tuple]:
    """Dtype, shape and bytes of all tensors of a nested state, by the path of their keys."""
    leaves = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(state)[0] if isinstance(leaf, Tensor)]
    return {name: (leaf.dtype, leaf.shape, leaf.detach().cpu().numpy().tobytes()) for name, leaf in leaves}


def wrong_tensors(path: Path, saved: dict[str, tuple]) -> int:
    """The number of tensors that differ from those saved, are missing or too many; all if it cannot be loaded."""
    try:
        found = tensors_of(load_checkpoint(path))
    except InputError:
        return len(saved)
    return sum(saved.get(name) != found.get(name) for name in saved | found)


def entry(run: Run, interval: int, directory: Path, row: Row) -> Iterator:
    saver, outcomes, alone, blocked, wrong = Saver(directory, keep_last=1, device=run.device), [], [], [], []
    yield row

    def steps() -> float:
        start = time.perf_counter()
        for _ in range(interval):
            run.step(LEARNING_RATE)
        synchronize(run.device)
        return time.perf_counter() - start

    def ratio() -> float:
        alone.append(steps())
        saved, start = tensors_of(run.state_dict()), time.perf_counter()
        run.judgements()
        about = {"format": FORMAT, "config": run.model.config.to_dict(), "options": asdict(run.options)}
        saver.save(about | run.state_dict() | {"environment": {}}, run.steps)
        blocked.append(time.perf_counter() - start)
        steps()
        saver.wait()
        seconds = time.perf_counter() - start
        outcomes.append(saver.outcome())
        if outcomes[-1].error:
            raise InputError(f"{directory}: no checkpoint could be written ({outcomes[-1].error}): see TMPDIR")
        wrong.append(wrong_tensors(outcomes[-1].path, saved))
        return seconds / alone[-1]

    yield ratio
    row.details = {"interval_seconds": median(alone), "blocked_seconds": median(blocked)}
    row.details |= {"write_seconds": median(o.seconds for o in outcomes), "bytes": outcomes[-1].bytes}
    row.check, row.error, row.allowed = "tensors that differ from the saved in a bit", sum(wrong), 0


def main():
    arguments = parse(__doc__, size="nano", interval=100, rounds=5)
    size, device, interval = arguments.size, arguments.device, arguments.interval
    results, dtype = Results(arguments.output, device), resolve_dtype("auto", device)
    compiled = missing_compiler(device) is None
    batch_size, seq_len = (MICRO_BATCH[size], SEQ_LEN) if device.type == "cuda" else (CPU_BATCH[size], CPU_SEQ_LEN)
    shape = dict(batch_size=batch_size, seq_len=seq_len)
    case = dict(size=size, dtype=dtype_name(dtype), compiled=compiled, **shape, interval=interval)
    row = Row("checkpoints", "checkpoint in the background", case, "ratio", group="checkpoints")
    with tempfile.TemporaryDirectory() as name:
        print(write_corpus(f"{name}/data", NANO_VOCAB, CORPUS_CHARACTERS), flush=True)
        options = TrainOptions(f"{name}/data", size, device=str(device), no_gradient_checkpointing=True, **shape)
        kernels.select("auto", device)
        run = Run(options, ModelConfig.preset(size), Shards(options.data_dir), device, dtype)
        if compiled:
            run.model.compile_blocks()
        with closing(run.loader), run.context():
            compete([entry(run, interval, Path(name), row)], arguments.rounds, results, ours=1)
