"""A training run from start to end."""

import math
import platform
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

from .. import ops
from ..attention import attention_name
from ..checkpoint import FORMAT
from ..config import ModelConfig, round_up
from ..data import Shards, validation_loader
from ..data.shards import METADATA
from ..data.tokenizer import ByteCounter, find_tokenizer, load_tokenizer, num_ids
from ..device import cpu_has_bf16, missing_compiler, peak_flops, peak_memory, resolve_device, resolve_dtype
from ..errors import OUT_OF_MEMORY, InputError, RunFailed, RunStopped, file_error, is_out_of_memory
from ..files import atomic_write
from ..log import say
from ..self_check import require_correct_kernels
from .checkpointing import CheckpointManager
from .lock import DirectoryLock
from .metrics import Metrics, flops_per_token, format_line
from .options import TrainOptions
from .resume import check_paths, select_checkpoint, warn_about_changes
from .run import POLL_SECONDS, Run
from .schedule import learning_rate
from .signals import StopSignals

# Wait before retrying a failed save.
RETRY_SECONDS = 60.0
# The final save is attempted at least FINAL_ATTEMPTS times, for up to FINAL_TIMEOUT seconds or until a stop request.
# The wait between attempts doubles from FINAL_RETRY_SECONDS up to RETRY_SECONDS.
FINAL_ATTEMPTS, FINAL_RETRY_SECONDS, FINAL_TIMEOUT = 3, 3.0, 900.0


def train(options: TrainOptions, scripts_dir: Path | None = None):
    """Train with these options. If data_dir has no tokenizer, pile_tokenizer.json in `scripts_dir` is used.

    Checks all input and reads the first batch before writing anything except a lock. Raises InputError for bad input,
    RunFailed if the run cannot continue, and RunStopped after a stop signal. Progress is saved first, unless the last
    steps had no finite loss or gradient. A signal before the first step, or a second SIGINT, ends the process.
    """
    with StopSignals() as stop:
        options = check_paths(options)
        if options.memory_test:
            Trainer(options, scripts_dir, stop).run.memory_test()
            return
        with DirectoryLock(Path(options.save_dir)) as lock:
            stop.before_exit = lock.release
            trainer = Trainer(options, scripts_dir, stop)
            if options.resume == "auto" and trainer.run.steps >= options.max_steps and not trainer.run.unread_steps:
                say(f"{trainer.resumed_from} is at step {trainer.run.steps}: training is complete")
                return
            trainer.check_kernels()
            trainer.open_outputs()
            trainer.train()


class Trainer:
    """A run with its data, checkpoints and metrics.

    The constructor checks all input, builds or resumes the run, and reads the first batch. It writes nothing.
    `open_outputs` opens the output files. `train` trains through the last step.
    """

    def __init__(self, options: TrainOptions, scripts_dir: Path | None, stop: StopSignals):
        self.options, self.stop = options, stop
        self.save_dir = Path(options.save_dir)
        self.device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, self.device)
        try:
            backend = ops.set_backend(options.kernels, self.device)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.resumed_from, checkpoint = select_checkpoint(options)
        # With --bad_data skip, shards that become unreadable still count as part of the data.
        known = checkpoint["data"].get("shards") if checkpoint and options.bad_data == "skip" else None
        self.shards = Shards(options.data_dir, known)
        self.tokenizer_path, tokenizer = _open_tokenizer(options, scripts_dir)
        self.tokenizer_checked = not self.tokenizer_path or self.shards.check_tokenizer(self.tokenizer_path)
        self.config = model_config(options, tokenizer)
        if options.seq_len > self.config.max_seq_len:
            raise InputError(f"--seq_len {options.seq_len} is above the model's maximum of {self.config.max_seq_len}")
        self.tokenizer_copy = self.save_dir / "tokenizer.json"
        copy, path = self.tokenizer_copy, self.tokenizer_path
        if path and copy.is_file() and copy.read_bytes() != path.read_bytes():
            raise InputError(f"{copy} differs from the tokenizer {path}: choose another --save_dir")
        self.text_bytes = ByteCounter(tokenizer, self.config.vocab_size) if tokenizer else None
        if self.text_bytes and not self.text_bytes.exact:
            say("val_bits_per_byte is not reported: the tokenizer does not reproduce the text exactly")
            self.text_bytes = None
        self.environment = {
            "torch": str(torch.__version__),
            "device": self._device_name(),
            "threads": torch.get_num_threads(),
            "kernels": backend,
        }

        self.run = Run(options, self.config, self.shards, self.device, dtype)
        if checkpoint:
            self.run.load_state_dict(checkpoint, self.resumed_from)
            warn_about_changes(options, self.environment, checkpoint)
            step = self.run.steps
            if step >= options.max_steps and options.resume != "auto":
                raise InputError(f"--resume {options.resume} is at step {step}: pass --max_steps above {step}")
        self._announce(dtype, backend)
        self.run.fetch()

    def check_kernels(self):
        """Raise InputError if --kernels auto selects Triton and its gradients are wrong on this device."""
        options, model = self.options, self.run.model
        if options.kernels == "auto" and ops.uses_triton(self.device, model.compute_dtype):
            step = (options.batch_size, options.seq_len, options.grad_accum > 1)
            require_correct_kernels(model.config, self.device, model.compute_dtype, options.model_size, *step)

    def open_outputs(self):
        """Open the output files. Raises InputError if save_dir is not writable, or RunFailed if the disk is full."""
        try:
            self.checkpoints = CheckpointManager(self.save_dir, self.options.keep_last, self.device)
            if self.tokenizer_path and not self.tokenizer_copy.exists():
                with atomic_write(self.tokenizer_copy) as file:
                    file.write(self.tokenizer_path.read_bytes())
            if self.options.resume is None:
                _move_aside(self.save_dir / "metrics.jsonl")
            self.metrics = Metrics(self.save_dir, self.run.steps - (self.run.unread_steps > 0))
        except OSError as error:
            raise file_error(f"--save_dir {self.save_dir}: cannot be written", error) from error
        # Valid checkpoints by step. A checkpoint is good if the step after it was not skipped.
        self.saved: dict[int, Path] = {}
        self.diverged = False  # the last validation loss was not finite
        # Before the first step there is nothing to save, unless the previous process stopped before writing a log line.
        self.saved_step = -1 if self.run.unread_steps else self.run.steps
        self.attempted_step = self.run.steps
        self.save_due, self.retry_at = False, math.inf
        peak, peak_source = peak_flops(self.device, resolve_dtype(self.options.dtype, self.device))
        flops = flops_per_token(self.config, self.run.model.num_parameters()[1], self.options.seq_len)
        self.peak_seconds_per_token = flops / peak
        say(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s, {peak_source}")
        board = ", tensorboard/" if self.metrics.has_tensorboard else "; tensorboard is not installed"
        say(f"writing to {self.save_dir}: checkpoints, metrics.jsonl{board}")
        self._begin_interval()

    def train(self):
        """Train up to the last step. Raises the same errors as the function `train`."""
        run, options = self.run, self.options
        # Show the progress bar only in a terminal. The log lines also show the ETA.
        bar_options = dict(total=options.max_steps, initial=run.steps, unit="step", dynamic_ncols=True)
        try:
            with tqdm(**bar_options, disable=None if sys.stderr else True) as bar, run.context():
                while True:
                    self._after_step()
                    if self._stop_requested() or run.steps >= options.max_steps:
                        break
                    with self._save_on_error():
                        if run.fetch(self._stop_requested):
                            run.step(learning_rate(run.steps, options))
                            self.stop.has_progress = True
                            bar.update()
            saved = self._save_final()
        finally:
            self.checkpoints.wait()
            self.metrics.close()
            run.loader.close()
        if self._stop_requested() and (run.steps < options.max_steps or run.unread_steps):
            where = f"{self.stop.requested}: stopped at step {run.steps}"
            raise RunStopped(f"{where}; {saved}; continue with --resume auto")

    def _stop_requested(self) -> bool:
        return self.stop.requested is not None

    def _after_step(self):
        """Evaluate, log and save if due. After a resume, the previous process trained the last step."""
        run, options = self.run, self.options
        last = run.steps >= options.max_steps
        evaluate = last or run.steps % options.eval_interval == 0
        save = last or run.steps % options.save_interval == 0
        log = evaluate or save or run.steps % options.log_interval == 0
        if log or run.unread_steps % options.max_bad_steps == 0:
            self._report_anomalies()
        if log and run.unread_steps:
            self._log(evaluate)
        self._report_save()
        due = (save and run.steps > self.attempted_step) or self.save_due or time.monotonic() >= self.retry_at
        if due and not last:
            self._report_anomalies()
            # After a skipped step, wait for the next good step.
            self.save_due = run.detector.consecutive_skips > 0
            if not self.save_due:
                self._save()

    def _begin_interval(self):
        self.interval_start = time.perf_counter()
        self.interval_steps = self.run.steps
        self.save_wait = 0.0

    def _log(self, evaluate: bool):
        """Write a log line. If a signal interrupts the evaluation, the resumed run repeats it and writes the line."""
        run, options = self.run, self.options
        seconds = time.perf_counter() - self.interval_start  # _report_anomalies has synchronized
        validation = {}
        if evaluate:
            validation = None
            with self._save_on_error():
                validation = validate(run, self.shards, self.text_bytes, self._stop_requested)
            if validation is None:
                return
            self.diverged = validation["val_loss"] is None
        steps = run.steps - self.interval_steps
        tokens_per_second = steps * options.tokens_per_step / (seconds - self.save_wait)
        record = {"step": run.steps, "lr": learning_rate(run.steps - 1, options), "tokens": run.tokens}
        record |= run.read_statistics() | {"tokens_per_second": tokens_per_second}
        record["mfu"] = tokens_per_second * self.peak_seconds_per_token
        record["data_wait"] /= seconds
        record |= {"save_wait": self.save_wait / seconds, "memory_bytes": peak_memory(self.device)} | validation
        self.metrics.write(record)
        seconds_left = seconds / max(1, steps) * (options.max_steps - run.steps)
        say(format_line(record, options.max_steps, seconds_left), sys.stdout)
        self._begin_interval()

    def _report_anomalies(self):
        """Log skipped steps and loss spikes. Raises RunFailed after max_bad_steps skipped steps in a row."""
        run, options = self.run, self.options
        for anomaly in run.read_anomalies():
            kind = "skipped" if anomaly.skipped else "a spike"
            if math.isfinite(anomaly.loss + anomaly.grad_norm):
                kind += f", above {anomaly.threshold:.4f}"
            say(
                f"warning: step {anomaly.step}: loss {anomaly.loss:.4f}, gradient norm {anomaly.grad_norm:.3g}: "
                f"{kind}; batch from {run.origin(anomaly)}"
            )
        if run.detector.longest_streak >= options.max_bad_steps:
            self._fail_diverged(f"after {run.detector.longest_streak} skipped steps in a row")

    def _fail_diverged(self, why: str):
        """End the run without saving, and rename the checkpoints that were not followed by a good step."""
        self._finish_save()
        for path in (path for step, path in self.saved.items() if step > self._last_good_step()):
            try:
                path.replace(path.with_name(path.name + ".diverged"))
                say(f"warning: no good step followed {path}: renamed to {path.name}.diverged")
            except OSError as error:
                say(f"warning: no good step followed {path}, but it cannot be renamed ({error.strerror})")
        raise RunFailed(
            f"stopped at step {self.run.steps} without saving, {why}; {self._last_good_checkpoint()}: "
            "continue with --resume auto and a smaller --lr or different data"
        )

    def _last_good_step(self) -> int:
        """Return the newest good step: the step after it was not skipped."""
        return self.run.detector.last_good_step - 1

    def _last_good_checkpoint(self) -> str:
        path = self.saved.get(max((step for step in self.saved if step <= self._last_good_step()), default=None))
        path = path or self.resumed_from
        return f"the last good checkpoint is {path}" if path else "there is no good checkpoint yet"

    def _save(self):
        start = time.perf_counter()
        self._finish_save()
        self.metrics.flush(to_disk=True)
        contents = {"format": FORMAT, "config": self.config.to_dict(), "options": asdict(self.options)}
        contents |= self.run.state_dict() | {"environment": self.environment}
        self.checkpoints.save(contents, self._last_good_step())
        self.attempted_step, self.retry_at = self.run.steps, math.inf
        self.save_wait += time.perf_counter() - start

    def _finish_save(self, quiet: bool = False):
        self.checkpoints.wait()
        self._report_save(quiet)

    def _report_save(self, quiet: bool = False):
        """Log the result of the last save once it has ended. quiet: do not log failures."""
        result = self.checkpoints.result()
        if result is None:
            return
        if result.error is None:
            self.saved_step = result.step
            self.saved[result.step] = result.path
            say(f"saved {result.path}: {result.bytes / 1e6:,.1f} MB in {result.seconds:.2f} s", sys.stdout)
        else:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            if not quiet:
                say(f"warning: {result.path} could not be written ({result.error}); {self._last_good_checkpoint()}")

    def _save_final(self) -> str:
        """Save any unsaved progress, wait for the write, and return a description of the result.

        Also saves after skipped steps, because they do not change the weights. Raises RunFailed if the last validation
        loss is not finite, or if the save keeps failing.
        """
        run, attempts, give_up = self.run, 0, time.monotonic() + FINAL_TIMEOUT
        self._report_anomalies()
        if self.diverged and run.steps >= self.options.max_steps and self.saved_step < run.steps:
            self._fail_diverged("because the last validation loss is not finite")
        while True:
            self._finish_save(quiet=attempts > 1)
            if self.saved_step == run.steps:
                path = self.saved.get(run.steps, self.resumed_from)
                return f"everything is saved in {path}" if path else "there is nothing to save yet"
            if attempts >= FINAL_ATTEMPTS and (self._stop_requested() or time.monotonic() > give_up):
                raise RunFailed(
                    f"step {run.steps} could not be saved in {attempts} attempts; {self._last_good_checkpoint()}: free "
                    "space or repair the disk, then continue with --resume auto"
                )
            if attempts == 1:
                minutes = FINAL_TIMEOUT / 60
                say(f"retrying for {minutes:.0f} minutes, every {FINAL_RETRY_SECONDS:.0f} to {RETRY_SECONDS:.0f} s")
            if attempts:
                self._wait_to_retry(min(FINAL_RETRY_SECONDS * 2 ** (attempts - 1), RETRY_SECONDS))
            self._save()
            attempts += 1

    def _wait_to_retry(self, seconds: float):
        """Wait, but no longer than FINAL_RETRY_SECONDS once a stop is requested."""
        start = time.monotonic()
        while time.monotonic() < start + (min(seconds, FINAL_RETRY_SECONDS) if self._stop_requested() else seconds):
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _save_on_error(self):
        """Save the run if an error between two weight updates ends it.

        After a stop request, errors are only logged: a signal to the process group also kills the compiler, so the
        compilation fails.
        """
        try:
            yield
        except Exception as error:
            run = self.run
            if not run.consistent:
                raise
            if self._stop_requested():
                say(f"note: {type(error).__name__}: {str(error).strip()[:200]}".splitlines()[0])
                return
            if run.steps == self.saved_step:
                raise
            try:
                saved = self._save_final()
            except RunFailed as failure:
                saved = str(failure)
            where = f"stopped at step {run.steps}; {saved}"
            if isinstance(error, (InputError, RunFailed)):
                raise type(error)(f"{error}; {where}") from error
            if is_out_of_memory(error):
                raise RunFailed(f"{OUT_OF_MEMORY}; {where}") from error
            say(where)
            raise

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"

    def _announce(self, dtype: torch.dtype, backend: str):
        """Log the run's setup, and compile the model if requested and possible."""
        options, config, device, model = self.options, self.config, self.device, self.run.model
        total, active = model.num_parameters()
        kind = "dense baseline" if config.dense else f"MoE, {config.num_experts} routed experts, top-2, 1 shared expert"
        say(f"{options.model_size}: {kind}; {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active")
        say(f"device {device}, {str(dtype).removeprefix('torch.')}; kernels: {backend}")
        say(f"attention: {attention_name(device, dtype, config.head_dim)}")
        if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_has_bf16():
            say("warning: this CPU has no native bf16: GEMMs are many times slower than with --dtype fp32")
        if not options.no_compile:
            if missing := missing_compiler(device):
                say(f"warning: torch.compile needs the compiler {missing}, which is not installed: using eager mode")
            else:
                model.compile_blocks()
                say("compiling the blocks; the first step takes a while")
        rows, epoch = int(self.shards.num_rows.sum()), len(self.run.loader.chunks) * options.seq_len
        say(f"data: {len(self.shards.paths)} shards, {rows:,} rows of {self.shards.row_length}")
        say(f"{epoch:,} tokens per epoch, {options.tokens_per_step:,} per step")
        if not self.tokenizer_checked:
            say(f"note: {options.data_dir} has no {METADATA}, so {self.tokenizer_path} cannot be checked")
        if self.resumed_from:
            say(f"continuing from {self.resumed_from}, step {self.run.steps}")


@torch.no_grad()
def validate(run: Run, shards: Shards, text_bytes: ByteCounter | None, should_stop: Callable[[], bool]) -> dict | None:
    """Return val_loss in nats per token over the held-out batches and, with `text_bytes`, val_bits_per_byte.

    Both are None if the loss is not finite. The result is None if `should_stop` returned true before the end.
    """
    model, options = run.model, run.options
    loader, num_batches = validation_loader(
        shards,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        vocab_size=model.config.vocab_size,
        bad_data=options.bad_data,
    )
    total = targets = num_bytes = 0
    try:
        for _ in range(num_batches):
            batch = run.next_batch(loader, should_stop)
            if batch is None:
                return None
            input_ids = batch.to(run.device)
            scored = batch.numel() - len(batch)
            total += model(input_ids, labels=input_ids).cross_entropy.double() * scored
            targets += scored
            if text_bytes:
                num_bytes += text_bytes.count(batch.numpy())
    finally:
        loader.close()
    nats = total.item()
    finite = math.isfinite(nats)
    record = {"val_loss": nats / targets if finite else None}
    if num_bytes:
        record["val_bits_per_byte"] = nats / math.log(2) / num_bytes if finite else None
    return record


def _move_aside(path: Path):
    """Rename the log of a previous run."""
    if path.exists():
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
        free = next(name for name in names if not name.exists())
        path.replace(free)
        say(f"note: {path} is from a different run: renamed to {free.name}")


def model_config(options: TrainOptions, tokenizer) -> ModelConfig:
    """Return the preset with its vocabulary size. Raises InputError if it is unknown or too small for the tokenizer."""
    entries = num_ids(tokenizer) if tokenizer else None
    overrides = {"debug_force_load_balance": options.debug_force_load_balance}
    if options.vocab_size:
        overrides["vocab_size"] = options.vocab_size
    elif options.model_size == "nano":
        if entries is None:
            raise InputError("nano needs a tokenizer for its vocabulary size: pass --tokenizer or --vocab_size")
        overrides["vocab_size"] = round_up(entries, 128)
    config = ModelConfig.preset(options.model_size, dense=options.dense, **overrides)
    if entries and entries > config.vocab_size:
        raise InputError(
            f"the tokenizer has {entries} entries, more than the model's vocabulary of {config.vocab_size}: "
            "pass a larger --vocab_size or a different --tokenizer"
        )
    return config


def _open_tokenizer(options: TrainOptions, scripts_dir: Path | None):
    path = find_tokenizer(options.tokenizer, Path(options.data_dir), scripts_dir)
    return path, load_tokenizer(path) if path else None
