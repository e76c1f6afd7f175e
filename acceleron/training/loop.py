"""A training run, top to bottom."""

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
from ..data.tokenizer import TextBytes, find_tokenizer, load_tokenizer, num_ids
from ..device import cpu_has_bf16, missing_compiler, peak_flops, peak_memory, resolve_device, resolve_dtype
from ..errors import OUT_OF_MEMORY, InputError, RunFailed, RunStopped, file_error, is_out_of_memory
from ..files import replacing
from ..log import say
from ..self_check import require_correct_kernels
from .lock import DirectoryLock
from .metrics import Metrics, describe, flops_per_token
from .options import TrainOptions
from .resume import check_paths, checkpoint_of, warn_of_changes
from .run import POLL_SECONDS, Run
from .saver import Saver
from .schedule import learning_rate
from .stop import StopSignals

# After a checkpoint that could not be written, until the next attempt.
RETRY_SECONDS = 60.0
# A run's last checkpoint has no later one to make up for it: it is tried so often, and for so long unless a stop is
# asked for. The wait between two attempts doubles up to RETRY_SECONDS.
LAST_ATTEMPTS, LAST_RETRY_SECONDS, LAST_PATIENCE = 3, 3.0, 900.0


def train(options: TrainOptions, scripts_dir: Path | None = None):
    """Train as the options say. `scripts_dir` is where a pile_tokenizer.json is looked for, after the data directory.

    All input is checked, and the first batch read, before anything but a lock is written. Raises InputError for bad
    input, RunFailed if the run can't go on, and RunStopped after SIGTERM, SIGINT or SIGUSR1; what was learned is saved
    first, unless its last steps had no finite loss or gradient. A signal before the first step, and a second SIGINT,
    end the process.
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
                say(f"{trainer.resumed_from} is of step {trainer.run.steps}: nothing is left to do")
                return
            trainer.check_kernels()
            trainer.begin()
            trainer.train()


class Trainer:
    """A run with all that is around it: its data and checkpoints, its log, its end.

    Making one checks all input, builds the run, or takes it up where it was, and reads the first batch; it writes
    nothing. Then `begin` opens the files, and `train` trains up to the last step.
    """

    def __init__(self, options: TrainOptions, scripts_dir: Path | None, stop: StopSignals):
        self.options, self.stop = options, stop
        self.save_dir = Path(options.save_dir)
        self.device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, self.device)
        try:
            provider = ops.set_backend(options.kernels, self.device)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.resumed_from, checkpoint = checkpoint_of(options)
        # What could not be read before is still a part of the data, if it is to be skipped.
        known = checkpoint["data"].get("shards") if checkpoint and options.bad_data == "skip" else None
        self.shards = Shards(options.data_dir, known)
        self.tokenizer_path, tokenizer = _open_tokenizer(options, scripts_dir)
        self.tokenizer_checked = not self.tokenizer_path or self.shards.check_tokenizer(self.tokenizer_path)
        self.config = model_config(options, tokenizer)
        if options.seq_len > self.config.max_seq_len:
            raise InputError(f"--seq_len {options.seq_len} is longer than the model's {self.config.max_seq_len}")
        self.tokenizer_copy = self.save_dir / "tokenizer.json"
        copy, given = self.tokenizer_copy, self.tokenizer_path
        if given and copy.is_file() and copy.read_bytes() != given.read_bytes():
            raise InputError(f"{copy} is another tokenizer than {given}: name another --save_dir")
        self.text_bytes = TextBytes(tokenizer, self.config.vocab_size) if tokenizer else None
        if self.text_bytes and not self.text_bytes.exact:
            say("val_bits_per_byte is not reported: the tokenizer does not reproduce its text")
            self.text_bytes = None
        self.environment = {
            "torch": str(torch.__version__),
            "device": self._device_name(),
            "threads": torch.get_num_threads(),
            "kernels": provider,
        }

        self.run = Run(options, self.config, self.shards, self.device, dtype)
        if checkpoint:
            self.run.load_state_dict(checkpoint, self.resumed_from)
            warn_of_changes(options, self.environment, checkpoint)
            step = self.run.steps
            if step >= options.max_steps and options.resume != "auto":
                raise InputError(f"--resume {options.resume} is at step {step}: pass --max_steps above {step}")
        self._announce(dtype, provider)
        self.run.fetch()

    def check_kernels(self):
        """Raises InputError if --kernels auto selects Triton and its gradients are wrong on this device."""
        options, model = self.options, self.run.model
        if options.kernels == "auto" and ops.uses_triton(self.device, model.compute_dtype):
            about = (model.config, self.device, model.compute_dtype)
            require_correct_kernels(*about, options.batch_size, options.seq_len, options.model_size)

    def begin(self):
        """Open what the run writes to. Raises InputError if save_dir can't be written, RunFailed for a full disk."""
        try:
            self.saver = Saver(self.save_dir, self.options.keep_last, self.device)
            if self.tokenizer_path and not self.tokenizer_copy.exists():
                with replacing(self.tokenizer_copy) as file:
                    file.write(self.tokenizer_path.read_bytes())
            if self.options.resume is None:
                _move_aside(self.save_dir / "metrics.jsonl")
            self.metrics = Metrics(self.save_dir, self.run.steps - (self.run.unread_steps > 0))
        except OSError as error:
            raise file_error(f"--save_dir {self.save_dir}: cannot be written", error) from error
        # Checkpoints that are whole, by step. They are good once a later step was.
        self.saved: dict[int, Path] = {}
        self.diverged = False  # the last evaluation's loss was not finite
        # Nothing to save before the first step, unless a line of the log was left to this process.
        self.saved_step = -1 if self.run.unread_steps else self.run.steps
        self.save_begun = self.run.steps
        self.save_due, self.retry_at = False, math.inf
        peak, peak_source = peak_flops(self.device, resolve_dtype(self.options.dtype, self.device))
        flops = flops_per_token(self.config, self.run.model.num_parameters()[1], self.options.seq_len)
        self.mfu_of_a_token = flops / peak
        say(f"utilisation (MFU) is against {peak / 1e12:.3g} TFLOP/s, {peak_source}")
        board = ", tensorboard/" if self.metrics.has_tensorboard else "; tensorboard is not installed: no event files"
        say(f"writing to {self.save_dir}: checkpoints, metrics.jsonl{board}")
        self._begin_interval()

    def train(self):
        """Raises InputError, RunFailed and RunStopped as `train` above says."""
        run, options = self.run, self.options
        # The bar is for people: in a pipe there are only the log lines, which carry the ETA too.
        about = dict(total=options.max_steps, initial=run.steps, unit="step", dynamic_ncols=True)
        try:
            with tqdm(**about, disable=None if sys.stderr else True) as bar, run.context():
                while True:
                    self._after_step()
                    if self._stopped() or run.steps >= options.max_steps:
                        break
                    with self._saved_before_errors():
                        if run.fetch(self._stopped):
                            run.step(learning_rate(run.steps, options))
                            self.stop.learned = True
                            bar.update()
            saved = self._save_last()
        finally:
            self.saver.wait()
            self.metrics.close()
            run.loader.close()
        if self._stopped() and (run.steps < options.max_steps or run.unread_steps):
            raise RunStopped(f"{self.stop.requested}: stopped at step {run.steps}; {saved}; go on with --resume auto")

    def _stopped(self) -> bool:
        return self.stop.requested is not None

    def _after_step(self):
        """What is due after the run's last step, be it of this process or of the one before."""
        run, options = self.run, self.options
        last = run.steps >= options.max_steps
        evaluate = last or run.steps % options.eval_interval == 0
        save = last or run.steps % options.save_interval == 0
        log = evaluate or save or run.steps % options.log_interval == 0
        if log or run.unread_steps % options.max_bad_steps == 0:
            self._report_bad_steps()
        if log and run.unread_steps:
            self._log(evaluate)
        self._report_save()
        due = (save and run.steps > self.save_begun) or self.save_due or time.monotonic() >= self.retry_at
        if due and not last:
            self._report_bad_steps()
            # After bad steps: at the next good one.
            self.save_due = run.guard.in_a_row > 0
            if not self.save_due:
                self._save()

    def _begin_interval(self):
        self.interval_start, self.interval_steps, self.save_wait = time.perf_counter(), self.run.steps, 0.0

    def _log(self, evaluate: bool):
        """A line of the log. An evaluation that a signal cuts short is left, with its line, to the run that resumes."""
        run, options = self.run, self.options
        seconds = time.perf_counter() - self.interval_start  # the device has been waited for, by _report_bad_steps
        validation = {}
        if evaluate:
            validation = None
            with self._saved_before_errors():
                validation = validate(run, self.shards, self.text_bytes, self._stopped)
            if validation is None:
                return
            self.diverged = validation["val_loss"] is None
        steps = run.steps - self.interval_steps
        speed = steps * options.tokens_per_step / (seconds - self.save_wait)
        record = {"step": run.steps, "lr": learning_rate(run.steps - 1, options), "tokens": run.tokens}
        record |= run.read_statistics() | {"tokens_per_second": speed, "mfu": speed * self.mfu_of_a_token}
        record["data_wait"] /= seconds
        record |= {"save_wait": self.save_wait / seconds, "memory_bytes": peak_memory(self.device)} | validation
        self.metrics.write(record)
        left = seconds / max(1, steps) * (options.max_steps - run.steps)
        say(describe(record, options.max_steps, left), sys.stdout)
        self._begin_interval()

    def _report_bad_steps(self):
        """Raises RunFailed after too many in a row."""
        run, options = self.run, self.options
        for judgement in run.judgements():
            what = "skipped" if judgement.skipped else "a spike"
            if math.isfinite(judgement.loss + judgement.grad_norm):
                what += f", above {judgement.threshold:.4f}"
            say(
                f"warning: step {judgement.step}: loss {judgement.loss:.4f}, gradient norm {judgement.grad_norm:.3g}: "
                f"{what}; trained on {run.origin(judgement)}"
            )
        if run.guard.longest >= options.max_bad_steps:
            self._fail_diverged(f"after {run.guard.longest} skipped steps in a row")

    def _fail_diverged(self, why: str):
        """End a run whose model is not worth saving; nor are the checkpoints that no good step came after."""
        self._settle_save()
        good = self._good_step()
        for path in (path for step, path in self.saved.items() if step > good):
            try:
                path.replace(path.with_name(path.name + ".diverged"))
                say(f"warning: no good step came after {path}: it is now {path.name}.diverged")
            except OSError as error:
                say(f"warning: no good step came after {path}, but it can't be renamed ({error.strerror})")
        raise RunFailed(
            f"stopped at step {self.run.steps}, {why}, and not saved; {self._last_good()}: "
            "go on with --resume auto and a smaller --lr, or other data"
        )

    def _good_step(self) -> int:
        """Of the newest model known to be good, as the next step on it was."""
        return self.run.guard.last_good - 1

    def _last_good(self) -> str:
        path = self.saved.get(max((step for step in self.saved if step <= self._good_step()), default=None))
        path = path or self.resumed_from
        return f"the last good checkpoint is {path}" if path else "there is no good checkpoint yet"

    def _save(self):
        start = time.perf_counter()
        self._settle_save()
        self.metrics.flush(to_disk=True)
        contents = {"format": FORMAT, "config": self.config.to_dict(), "options": asdict(self.options)}
        contents |= self.run.state_dict() | {"environment": self.environment}
        self.saver.save(contents, self._good_step())
        self.save_begun, self.retry_at = self.run.steps, math.inf
        self.save_wait += time.perf_counter() - start

    def _settle_save(self, quiet: bool = False):
        self.saver.wait()
        self._report_save(quiet)

    def _report_save(self, quiet: bool = False):
        """Say how the last attempt to save ended, once it has; quiet: unless it failed."""
        outcome = self.saver.outcome()
        if outcome is None:
            return
        if outcome.error is None:
            self.saved_step = outcome.step
            self.saved[outcome.step] = outcome.path
            say(f"saved {outcome.path}: {outcome.bytes / 1e6:,.1f} MB in {outcome.seconds:.2f} s", sys.stdout)
        else:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            if not quiet:
                say(f"warning: {outcome.path} could not be written ({outcome.error}); {self._last_good()}")

    def _save_last(self) -> str:
        """Save what is not saved yet, and wait until that is done; says what holds the run now.

        After bad steps too, as they left the weights as they were; but not after an evaluation without a finite loss.
        Raises RunFailed then, and if it can't be written for long.
        """
        run, attempts, give_up = self.run, 0, time.monotonic() + LAST_PATIENCE
        self._report_bad_steps()
        if self.diverged and run.steps >= self.options.max_steps and self.saved_step < run.steps:
            self._fail_diverged("the last one, with a validation loss that is not finite")
        while True:
            self._settle_save(quiet=attempts > 1)
            if self.saved_step == run.steps:
                path = self.saved.get(run.steps, self.resumed_from)
                return f"{path} holds all of it" if path else "nothing was learned yet"
            if attempts >= LAST_ATTEMPTS and (self._stopped() or time.monotonic() > give_up):
                raise RunFailed(
                    f"step {run.steps} could not be saved in {attempts} attempts; {self._last_good()}: make room, or "
                    "mend the disk, and go on with --resume auto"
                )
            if attempts == 1:
                minutes = LAST_PATIENCE / 60
                say(f"trying again for {minutes:.0f} minutes, every {LAST_RETRY_SECONDS:.0f} to {RETRY_SECONDS:.0f} s")
            if attempts:
                self._wait_to_retry(min(LAST_RETRY_SECONDS * 2 ** (attempts - 1), RETRY_SECONDS))
            self._save()
            attempts += 1

    def _wait_to_retry(self, seconds: float):
        """Once a stop is asked for, at most LAST_RETRY_SECONDS."""
        start = time.monotonic()
        while time.monotonic() < start + (min(seconds, LAST_RETRY_SECONDS) if self._stopped() else seconds):
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _saved_before_errors(self):
        """What fails between two updates of the weights ends the run, but loses nothing of it.

        Where a stop was asked for, it is taken for a part of it: a signal to all processes of a group ends the compiler
        too, and with it the compilation.
        """
        try:
            yield
        except Exception as error:
            run = self.run
            if not run.whole:
                raise
            if self._stopped():
                say(f"note: {type(error).__name__}: {str(error).strip()[:200]}".splitlines()[0])
                return
            if run.steps == self.saved_step:
                raise
            try:
                saved = self._save_last()
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

    def _announce(self, dtype: torch.dtype, provider: str):
        """Say what runs and who serves it; compile if asked for and possible."""
        options, config, device, model = self.options, self.config, self.device, self.run.model
        chunks = self.run.loader.chunks
        total, active = model.num_parameters()
        kind = "dense baseline" if config.dense else f"MoE of {config.num_experts} experts, top-2, and a shared one"
        say(f"{options.model_size}: {kind}; {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active")
        say(f"device {device}, {str(dtype).removeprefix('torch.')}; kernels: {provider}")
        say(f"attention: {attention_name(device, dtype, config.head_dim)}")
        if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_has_bf16():
            say("warning: this CPU has no native bf16, which makes its GEMMs many times slower than --dtype fp32")
        if not options.no_compile:
            missing = missing_compiler(device)
            if missing:
                say(f"warning: torch.compile needs the compiler {missing}, which is not installed: eager mode")
            else:
                model.compile_blocks()
                say("compiling the blocks: the first step takes a while")
        rows = int(self.shards.num_rows.sum())
        say(
            f"data: {len(self.shards.paths)} shards, {rows:,} rows of {self.shards.row_length}; "
            f"an epoch is {len(chunks) * options.seq_len:,} tokens, a step {options.tokens_per_step:,}"
        )
        if not self.tokenizer_checked:
            say(f"note: {options.data_dir} has no {METADATA}, so {self.tokenizer_path} can't be checked against it")
        if self.resumed_from:
            say(f"continuing from {self.resumed_from}, step {self.run.steps}")


@torch.no_grad()
def validate(run: Run, shards: Shards, text_bytes: TextBytes | None, stopped: Callable[[], bool]) -> dict | None:
    """val_loss, nats a token over the held-out batches; val_bits_per_byte with `text_bytes`.

    Both are None if the loss is not finite; the result is None if `stopped` became true before the end.
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
            batch = run.next_batch(loader, stopped)
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
    nats = total.item() if total.isfinite() else None
    record = {"val_loss": nats and nats / targets}
    if num_bytes:
        record["val_bits_per_byte"] = nats and nats / math.log(2) / num_bytes
    return record


def _move_aside(path: Path):
    """A new run's log does not go on with another's."""
    if path.exists():
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
        free = next(name for name in names if not name.exists())
        path.replace(free)
        say(f"note: {path}, of another run, is now {free.name}")


def model_config(options: TrainOptions, tokenizer) -> ModelConfig:
    """The preset with its vocabulary. Raises InputError if the tokenizer has more entries, or nano has none."""
    entries = num_ids(tokenizer) if tokenizer else None
    overrides = {"debug_force_load_balance": options.debug_force_load_balance}
    if options.vocab_size:
        overrides["vocab_size"] = options.vocab_size
    elif options.model_size == "nano":
        if entries is None:
            raise InputError("nano takes its vocabulary from the tokenizer, and there is none: pass --tokenizer")
        overrides["vocab_size"] = round_up(entries, 128)
    config = ModelConfig.preset(options.model_size, dense=options.dense, **overrides)
    if entries and entries > config.vocab_size:
        raise InputError(
            f"the tokenizer has {entries} entries, more than the model's vocabulary of {config.vocab_size}: "
            "pass a larger --vocab_size or another --tokenizer"
        )
    return config


def _open_tokenizer(options: TrainOptions, scripts_dir: Path | None):
    path = find_tokenizer(options.tokenizer, Path(options.data_dir), scripts_dir)
    return path, load_tokenizer(path) if path else None
