"""A training run from start to end."""

import logging
import math
import sys
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from tqdm import tqdm

from ..device import peak_flops, peak_memory, synchronize, total_memory
from ..distributed import Ranks, is_first_of_node, join_ranks
from ..errors import OUT_OF_MEMORY, InputError, RunFailed, RunStopped, is_out_of_memory
from ..lock import DirectoryLock
from ..self_check import require_correct_kernels
from .checkpointing import CheckpointManager
from .metrics import Metrics, format_line
from .optimizer import learning_rate
from .options import TrainOptions
from .setup import build_trainer, check_paths, check_same_options, open_outputs
from .signals import StopSignals
from .trainer import Trainer

logger = logging.getLogger(__name__)


class Diverged(RunFailed):
    """Too many steps in a row were skipped, or the last validation loss is not finite. The state is not saved."""


def train(options: TrainOptions, scripts_dir: Path | None = None):
    """Train with these options. If data_dir has no tokenizer, pile_tokenizer.json in `scripts_dir` is used.

    Checks all input and reads the first batch before writing anything except a lock. Raises InputError for bad input,
    RunFailed if the run cannot continue, and RunStopped after a stop signal. Progress is saved first, unless the run
    has diverged. A signal before the first step, or a second SIGINT, ends the process.
    """
    with StopSignals() as stop:
        stop.may_report = is_first_of_node
        with join_ranks(options.device, options.timeout) as ranks:
            stop.quiet, stop.on_request, stop.may_report = ranks.size > 1, ranks.announce_stop, ranks.report
            ranks.on_loss = stop.ignore
            _train(options, scripts_dir, ranks, stop)


def _train(options: TrainOptions, scripts_dir: Path | None, ranks: Ranks, stop: StopSignals):
    check_same_options(options, ranks)
    with ranks.agreed():
        options = check_paths(options)
    if options.memory_test:
        memory_test(build_trainer(options, scripts_dir, ranks)[0])
        return
    with ExitStack() as stack:

        def lock_outputs():
            lock = stack.enter_context(DirectoryLock(Path(options.save_dir)))
            stop.before_exit = lock.release

        ranks.from_first(lock_outputs)
        trainer, tokenizer_path = build_trainer(options, scripts_dir, ranks)
        stack.enter_context(closing(trainer.loader))
        if options.resume == "auto" and trainer.is_complete:
            logger.info(f"{trainer.resumed_from} is at step {trainer.step}: training is complete")
            return
        with ranks.agreed():
            if options.kernels == "auto":
                shape = (options.batch_size, options.seq_len, options.grad_accum > 1)
                require_correct_kernels(trainer.model, *shape)
            metrics, checkpoints = open_outputs(trainer, tokenizer_path)
        if metrics:
            stack.enter_context(closing(metrics))
        stack.enter_context(closing(checkpoints))
        saved = train_and_save(trainer, checkpoints, metrics, stop)
        if not trainer.is_complete:
            name = signal_name(ranks, stop)
            raise RunStopped(f"{name}: stopped at step {trainer.step}; {saved}; continue with --resume auto")


def signal_name(ranks: Ranks, stop: StopSignals) -> str:
    """Return the name of the signal that stops the run, on whichever rank it arrived."""
    return next(filter(None, ranks.gather(stop.requested)), "stop request")


def training_loop(trainer: Trainer, checkpoints: CheckpointManager, metrics: Metrics | None, stop: StopSignals):
    """Train up to the last step or a stop request. On return, the last steps may not have been saved.

    Raises Diverged after max_bad_steps skipped steps in a row, or if the last validation loss is not finite.
    """
    options = trainer.options
    peak, peak_source = peak_flops(trainer.device, trainer.model.compute_dtype)
    logger.info(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s, {peak_source}")
    flops_per_token = trainer.model.flops_per_token(options.seq_len)
    # disable=None shows the bar only in a terminal. The log lines also show the ETA.
    progress = dict(total=options.max_steps, initial=trainer.step, unit="step")
    bar = tqdm(**progress, dynamic_ncols=True, disable=None if sys.stderr and metrics else True)
    with bar, trainer.context():
        while True:
            # After a resume, the previous process trained the last step, and a signal may have ended its evaluation.
            step, last = trainer.step, trainer.step >= options.max_steps
            evaluate = last or step % options.eval_interval == 0
            # A log line precedes each regular checkpoint.
            log = evaluate or step % options.log_interval == 0 or step % options.save_interval == 0
            save = checkpoints.due(step)
            if log or save or trainer.statistics.steps % options.max_bad_steps == 0:
                report_anomalies(trainer, checkpoints)

            if log and trainer.statistics.steps > 0:
                record = trainer.read_statistics()
                record["lr"] = learning_rate(step - 1, options)
                record["mfu"] = record["tokens_per_second"] * flops_per_token / (peak * trainer.ranks.size)
                validation = trainer.validate(stop.is_requested) if evaluate else {}
                if validation is not None:  # else a signal ended the evaluation, and the resumed run repeats it
                    record |= validation
                    if metrics:
                        metrics.write(record)
                        with suppress(OSError, ValueError, AttributeError):  # stdout is closed, full or None
                            tqdm.write(format_line(record, options, trainer.tokens_per_step), file=sys.stdout)
                    trainer.reset_statistics()
                    if last and record["val_loss"] is None:
                        raise divergence(trainer, checkpoints, "because the last validation loss is not finite")

            # train_and_save saves the last step. After a skipped step, the save waits for the next good step.
            if save and not last and trainer.detector.consecutive_skips == 0:
                start = time.perf_counter()
                checkpoints.save(trainer.state_dict(), trainer.detector.good_step)
                trainer.statistics.save_wait += time.perf_counter() - start

            if last:
                return
            if not trainer.fetch(stop.is_requested):
                if trainer.ranks.size > 1:  # a single rank prints this when the signal arrives
                    logger.info(f"{signal_name(trainer.ranks, stop)}: saving and stopping after this step")
                return
            trainer.train_step(learning_rate(step, options))
            stop.has_progress = True
            bar.update()


def train_and_save(trainer: Trainer, checkpoints: CheckpointManager, metrics: Metrics | None, stop: StopSignals) -> str:
    """Run the training loop, save the last step, and return where it is saved.

    After an error in the loop, saves all completed steps and raises the error with a description of what is saved. The
    state is not saved if the run has diverged, or after an error during an optimizer update.
    """

    def finish() -> str:
        report_anomalies(trainer, checkpoints)
        # Skipped steps do not change the weights, so the state is also saved after them.
        return checkpoints.finish(trainer.state_dict(), trainer.detector.good_step, should_stop)

    def should_stop() -> bool:
        return stop.is_requested() or trainer.ranks.stop_announced()

    try:
        training_loop(trainer, checkpoints, metrics, stop)
    except Exception as error:
        if not trainer.consistent or isinstance(error, Diverged):
            raise
        if trainer.ranks.size > 1 and not isinstance(error, (InputError, RunFailed)):
            raise  # the other ranks do not have this error, so the state cannot be gathered
        if trainer.ranks.max(stop.is_requested()):
            # A signal to the process group also kills the compiler, so the compilation fails.
            logger.info(f"note: {type(error).__name__}: {str(error).strip()[:200]}".splitlines()[0])
            return finish()
        if checkpoints.is_saved(trainer.step):
            raise
        try:
            saved = finish()
        except RunFailed as failure:
            saved = str(failure)
        where = f"stopped at step {trainer.step}; {saved}"
        if isinstance(error, (InputError, RunFailed)):
            raise type(error)(f"{error}; {where}") from error
        if is_out_of_memory(error):
            raise RunFailed(f"{OUT_OF_MEMORY}; {where}") from error
        logger.info(where)
        raise
    return finish()


def report_anomalies(trainer: Trainer, checkpoints: CheckpointManager):
    """Log skipped steps and loss spikes. Raises Diverged after max_bad_steps skipped steps in a row."""
    loader, options = trainer.loader, trainer.options
    for anomaly in trainer.detector.read():
        kind = "skipped" if anomaly.skipped else "a spike"
        if math.isfinite(anomaly.loss + anomaly.grad_norm):
            kind += f", above {anomaly.threshold:.4f}"
        losses = f"loss {anomaly.loss:.4f}, gradient norm {anomaly.grad_norm:.3g}"
        size = trainer.ranks.size * loader.batch_size
        starts = range(anomaly.position, anomaly.position + options.grad_accum * size, size)
        rows = "; ".join(loader.describe_rows(start, all_ranks=True) for start in starts)
        logger.warning(f"step {anomaly.step}: {losses}: {kind}; batch from {rows}")
    streak = trainer.detector.longest_streak
    if streak >= options.max_bad_steps:
        raise divergence(trainer, checkpoints, f"after {streak} skipped steps in a row")


def divergence(trainer: Trainer, checkpoints: CheckpointManager, why: str) -> Diverged:
    """Rename the checkpoints that were not followed by a good step, and return the error."""
    last_good = checkpoints.rename_diverged(trainer.detector.good_step)
    return Diverged(
        f"stopped at step {trainer.step} without saving, {why}; {last_good}: continue with --resume auto and a smaller "
        "--lr or different data"
    )


def memory_test(trainer: Trainer):
    """Run two steps and print the peak memory. The optimizer state does not exist until after the first step."""
    with closing(trainer.loader), trainer.context():
        for _ in range(2):
            trainer.train_step(learning_rate(trainer.step, trainer.options))
    synchronize(trainer.device)
    peak, total = max(trainer.ranks.gather(peak_memory(trainer.device))), total_memory(trainer.device)
    if trainer.ranks.is_first:
        print(f"peak memory {peak / 2**30:.2f} GiB of the device's {total / 2**30:.2f} GiB ({peak / total:.0%})")
