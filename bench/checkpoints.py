"""What a checkpoint costs: wall clock of some steps with one written in the background, against the same without.

python -m bench checkpoints [--size nano] [--interval 100] [--rounds 5] [--output DIR]

The steps with a checkpoint begin with saving it, and end when it is on the disk and was read back: a run that saves at
every interval. The two are timed in turns, and their ratio is taken round by round. The disk is that of the temporary
directory, which TMPDIR names.

A row of checkpoints.jsonl: size, dtype, compiled, batch_size, seq_len, interval (steps); `rounds`, the ratios; their
median `ratio`, `ratio_p20` and `ratio_p80`; medians of `interval_seconds` (of the steps alone), `blocked_seconds` (that
the training waited until the state was copied) and `write_seconds`; `bytes` of a checkpoint. Checked is each
checkpoint: loaded back, its tensors must be, bit for bit, what they were when it was saved. The error is the number of
those that are not. The exit status is 1 if there is any.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from acceleron.config import PRESETS
from acceleron.device import DTYPES, missing_compiler, resolve_device, synchronize
from acceleron.errors import InputError
from acceleron.training.checkpoint import FORMAT, load_checkpoint
from acceleron.training.options import TrainOptions
from acceleron.training.run import Run
from acceleron.training.saver import Saver

from .corpus import write_corpus
from .results import Results, complaint
from .throughput import CORPUS_CHARACTERS, CPU_BATCH, CPU_SEQ_LEN, GPU_BATCH, GPU_SEQ_LEN
from .timing import spread
from .worker import LEARNING_RATE, NANO_VOCAB, Case, build

TARGET = 1.05  # at an interval of 100 steps
WARM_UP_STEPS = 3


def tensors(contents, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts and lists, by the path of their keys."""
    if isinstance(contents, Tensor):
        yield name, contents
    elif isinstance(contents, (dict, list, tuple)):
        items = contents.items() if isinstance(contents, dict) else enumerate(contents)
        for key, value in items:
            yield from tensors(value, f"{name}/{key}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of two tensors on the CPU; a comparison of numbers would take -0.0 for 0.0, and NaN for no NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def wrong_tensors(path: Path, saved: dict[str, Tensor]) -> int:
    """How many of the checkpoint's tensors are missing, too many or not those saved: all, if it can't be loaded."""
    try:
        found = dict(tensors(load_checkpoint(path)))
    except InputError:
        return len(saved)
    both = saved.keys() & found.keys()
    return len(saved.keys() ^ found.keys()) + sum(not same_bits(saved[name], found[name]) for name in both)


def seconds_of(run: Run, steps: int, saver: Saver | None = None) -> tuple[float, float]:
    """Seconds of so many steps, and of what the training waited for a checkpoint, if a saver is to write one."""
    synchronize(run.device)
    start, blocked = time.perf_counter(), 0.0
    if saver:
        run.judgements()
        about = {"format": FORMAT, "config": run.model.config.to_dict(), "options": asdict(run.options)}
        saver.save(about | run.state_dict() | {"environment": {}}, run.steps)
        blocked = time.perf_counter() - start
    for _ in range(steps):
        run.step(LEARNING_RATE)
    synchronize(run.device)
    if saver:
        saver.wait()
    return time.perf_counter() - start, blocked


def measure(run: Run, interval: int, rounds: int, directory: Path) -> dict:
    """The figures and the check of a row. Raises InputError if a checkpoint can't be written to the directory."""
    saver, wrong = Saver(directory, keep_last=1), 0
    alone, blocked, writes, ratios = [], [], [], []
    with run.context():
        seconds_of(run, WARM_UP_STEPS)
        seconds_of(run, WARM_UP_STEPS, saver)  # the saver's memory is made
        saver.outcome()
        for count in tqdm(range(rounds), "rounds", dynamic_ncols=True, leave=False, disable=None):
            pair = {}
            for saving in (False, True)[:: -1 if count % 2 else 1]:
                if not saving:
                    pair[saving], _ = seconds_of(run, interval)
                    continue
                saved = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors(run.state_dict())}
                pair[saving], waited = seconds_of(run, interval, saver)
                outcome = saver.outcome()
                if outcome.error:
                    raise InputError(f"{directory}: no checkpoint could be written ({outcome.error}): see TMPDIR")
                blocked.append(waited)
                writes.append(outcome.seconds)
                wrong += wrong_tensors(outcome.path, saved)
            alone.append(pair[False])
            ratios.append(pair[True] / pair[False])
    ratio, low, high = spread(ratios)
    return {
        "rounds": ratios,
        "ratio": ratio,
        "ratio_p20": low,
        "ratio_p80": high,
        "interval_seconds": statistics.median(alone),
        "blocked_seconds": statistics.median(blocked),
        "write_seconds": statistics.median(writes),
        "bytes": outcome.path.stat().st_size,
        "check": "tensors of the checkpoints that are not, bit for bit, what was to be saved",
        "check_error": wrong,
        "check_allowed": 0,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="nano", choices=tuple(PRESETS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--interval", type=int, default=100, help="steps between checkpoints (default: 100)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="directory for checkpoints.jsonl (default bench/results/<date>-<device>)")
    arguments = parser.parse_args()
    for name in ("interval", "rounds"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    size, interval, device = arguments.size, arguments.interval, resolve_device(arguments.device)
    on_gpu = device.type == "cuda"
    results = Results(arguments.output, "checkpoints", device)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        print(write_corpus(directory / "data", NANO_VOCAB, CORPUS_CHARACTERS))
        options = TrainOptions(
            data_dir=str(directory / "data"),
            model_size=size,
            batch_size=(GPU_BATCH if on_gpu else CPU_BATCH)[size],
            seq_len=GPU_SEQ_LEN if on_gpu else CPU_SEQ_LEN,
            device=str(device),
            no_compile=bool(missing_compiler(device)),
            no_gradient_checkpointing=True,
        )
        run = build(Case(options))
        try:
            figures = measure(run, interval, arguments.rounds, directory)
        finally:
            run.loader.close()
        dtype = next(name for name, dtype in DTYPES.items() if dtype == run.model.compute_dtype)
        row = {"size": size, "dtype": dtype, "compiled": not options.no_compile, "batch_size": options.batch_size}
        row |= {"seq_len": options.seq_len, "interval": interval} | figures
    passed = results.write(row)
    print(f"{size}, {dtype}, {options.batch_size} x {options.seq_len}: a checkpoint every {interval} steps")
    if not passed:
        print(complaint(row))
        sys.exit(1)
    print(
        f"wall clock with / without {row['ratio']:.3f} ({row['ratio_p20']:.3f} .. {row['ratio_p80']:.3f}; "
        f"target: {TARGET} every 100 steps), without {row['interval_seconds']:.2f} s\n"
        f"training waits {row['blocked_seconds']:.3f} s, {row['bytes'] / 1e6:.1f} MB are written in "
        f"{row['write_seconds']:.2f} s"
    )
    print(f"wrote {results.path}")


if __name__ == "__main__":
    main()
