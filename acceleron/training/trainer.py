"""The optimizer steps of a run, and the state that is saved in a checkpoint."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..attention import best_sdpa
from ..checkpoint import FORMAT, is_cpu_tensor, load_weights, restore_optimizer
from ..config import ModelConfig
from ..data import Loader, Shards
from ..data.tokenizer import ByteCounter
from ..device import DTYPES, cpu_name, deterministic_algorithms, peak_memory
from ..distributed import Ranks, full_tensor
from ..errors import InputError, RunFailed
from ..evaluate import evaluate
from ..model import Acceleron
from ..sharding import choose_plan, prepare_backward, shard_model
from .anomaly import AnomalyDetector
from .metrics import Statistics
from .optimizer import build_optimizer, learning_rate, update
from .options import TrainOptions
from .signals import POLL_SECONDS

STALL_SECONDS = 60.0  # seconds without data before each warning
MAX_ROW_WARNINGS = 20  # skipped rows that are logged individually

logger = logging.getLogger(__name__)


class Trainer:
    """A model with its optimizer and data, after `step` optimizer steps on `tokens` tokens.

    Run the steps inside `context()`. `text_bytes` is for val_bits_per_byte. With several `ranks`, all call the same
    methods, and the model is sharded. Raises InputError for a seq_len that does not divide the shards' row length.

    Attributes:
        tokens_per_step: tokens of all ranks in an optimizer step.
        plan: how the model is sharded, with several ranks.
        batches: the micro-batches that were fetched for the next step.
        statistics: means and times since the last log line.
        environment: what can change the last bits of the results.
        consistent: False only during an optimizer update, when the state must not be saved.
        resumed_from: the checkpoint that this run continues, if any.
    """

    def __init__(
        self, options: TrainOptions, config: ModelConfig, shards: Shards, device: torch.device, dtype: torch.dtype,
        text_bytes: ByteCounter | None = None, ranks: Ranks | None = None,
    ):  # fmt: skip
        self.options, self.device, self.text_bytes, self.ranks = options, device, text_bytes, ranks or Ranks()
        self.tokens_per_step = options.batch_size * self.ranks.size * options.grad_accum * options.seq_len
        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at the first GEMM
        self.loader = Loader(
            shards, seq_len=options.seq_len, batch_size=options.batch_size, vocab_size=config.vocab_size,
            seed=options.seed, bad_data=options.bad_data, num_workers=options.num_workers,
            pin_memory=device.type == "cuda", rank=self.ranks.rank, world_size=self.ranks.size,
        )  # fmt: skip
        torch.manual_seed(options.seed)  # for the initial weights; steps use no random numbers
        self.model = Acceleron(config, compute_dtype=dtype).to(device)
        self.model.gradient_checkpointing = not options.no_gradient_checkpointing
        self.plan = None
        if self.ranks.size > 1:
            self.plan = choose_plan(options.data_parallel, self.ranks, device, self.model.num_parameters()[0])
            shard_model(self.model, self.model.blocks, self.plan, DTYPES[options.gather_dtype])
            self.model.data_parallel_group = dist.group.WORLD
        self.optimizer = build_optimizer(self.model, options.weight_decay)
        self.detector = AnomalyDetector(device, options.skip_spikes)
        self.statistics = Statistics(config, device)
        self.step = self.tokens = 0
        self.batches: list[Tensor] = []
        self.consistent = True
        self.resumed_from: Path | None = None
        self.environment = {
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "threads": torch.get_num_threads(),
            "kernels": ops.backend_name(device, dtype),
            "ranks": self.ranks.size,
        }
        self._row_warnings_left = MAX_ROW_WARNINGS
        self._skipped: list[str] = []  # not yet logged: with several ranks, rank 0 logs them with the metrics
        self._data_state = self.loader.state_dict()  # the loader's state before it returned `batches`

    @property
    def is_complete(self) -> bool:
        """Whether all steps are trained and logged."""
        return self.step >= self.options.max_steps and self.statistics.steps == 0

    @contextmanager
    def context(self) -> Iterator[None]:
        """Context manager for the steps. It also starts the statistics' clock."""
        with deterministic_algorithms() if self.options.deterministic else nullcontext(), best_sdpa(self.device):
            self.statistics.start, self.statistics.data_wait = time.perf_counter(), 0.0
            yield

    def fetch(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the batches of the next step. Return False if `should_stop` returns true, on any rank.

        The run can be saved while it waits, because the step has not started. Raises InputError for unreadable data.
        """
        start = time.perf_counter()
        with self.ranks.agreed() as stopped:
            while len(self.batches) < self.options.grad_accum:
                batch = self._next_batch(self.loader, should_stop)
                if batch is None:
                    break
                self.batches.append(batch)
            stopped.value = should_stop() or len(self.batches) < self.options.grad_accum
        self.statistics.data_wait += time.perf_counter() - start
        return not stopped.value

    def _next_batch(self, loader: Loader, should_stop: Callable[[], bool]) -> Tensor | None:
        """Wait for a batch, and log stalls and skipped rows. Return None if `should_stop` returned true first."""
        start = last_warning = time.perf_counter()
        batch = None
        while batch is None and not should_stop():
            try:
                batch = loader.poll(POLL_SECONDS)
            except RuntimeError as error:
                raise RunFailed(str(error)) from error
            if batch is None and self.ranks.stop_announced():
                break
            now = time.perf_counter()
            if batch is None and now - last_warning > STALL_SECONDS:
                last_warning = now
                warn = logger.warning if self.ranks.is_first else logger.error  # other ranks show only errors
                who = f"rank {self.ranks.rank}: " if self.ranks.size > 1 else ""
                warn(f"{who}no data for {now - start:.0f} s: {loader.describe_rows(loader.position)}")
        self._skipped += loader.warnings
        loader.warnings.clear()
        if self.ranks.size == 1:
            self._log_skipped_rows(self._skipped)
        return batch

    def _log_skipped_rows(self, skipped: list[str]):
        for line in skipped[: self._row_warnings_left]:
            logger.warning(f"skipped: {line}")
            self._row_warnings_left -= 1
            if not self._row_warnings_left:
                logger.warning("further skipped rows are not logged; skipped_rows counts those in the training data")
        self._skipped.clear()

    def train_step(self, lr: float):
        """Train on the next batches. Raises InputError for unreadable data.

        A failure before the optimizer update leaves the run unchanged, and `consistent` stays True.
        """
        if len(self.batches) < self.options.grad_accum:
            self.fetch()
        losses = torch.zeros_like(self.statistics.losses)
        tokens_per_expert_LE = torch.zeros_like(self.statistics.tokens_per_expert_LE)
        with self.model.accumulate_gradients() if self.options.grad_accum > 1 else nullcontext():
            for number, batch in enumerate(self.batches, start=1):
                if self.plan:
                    prepare_backward(self.model, self.plan, last=number == len(self.batches))
                input_ids = batch.to(self.device, non_blocking=True)
                output = self.model(input_ids, labels=input_ids)
                (output.loss / self.options.grad_accum).backward()
                parts = (output.cross_entropy, output.z_loss, output.balance_loss)
                losses += torch.stack([loss.detach() for loss in parts]).double()
                if output.tokens_per_expert_LE is not None:
                    tokens_per_expert_LE += output.tokens_per_expert_LE
        grads = [w.grad for w in self.model.parameters() if w.grad is not None]
        grad_norm = full_tensor(torch.nn.utils.get_total_norm(grads))
        if self.plan:  # the tokens per expert are already those of all ranks
            dist.all_reduce(losses)
            losses /= self.ranks.size
        self.consistent = False
        self.step += 1
        self.tokens += self.tokens_per_step
        loss = losses[0] / self.options.grad_accum
        skipped = self.detector.check(self.step, self._data_state["position"], loss, grad_norm)
        self.statistics.add(losses, tokens_per_expert_LE, self.options.grad_accum, grad_norm, skipped)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        update(self.optimizer, grad_norm, self.options.grad_clip, skipped)
        self.optimizer.zero_grad(set_to_none=True)
        self.batches = []
        self._data_state = self.loader.state_dict()
        self.consistent = True

    def validate(self, should_stop: Callable[[], bool]) -> dict | None:
        """Evaluate the model on the held-out batches. Return None if `should_stop` returned true before the end."""
        with closing(self.loader.held_out()) as loader:
            complete = True

            def batches() -> Iterator[Tensor]:
                nonlocal complete
                while loader.position < loader.end:
                    with self.ranks.agreed() as stopped:
                        batch = self._next_batch(loader, should_stop)
                        stopped.value = batch is None
                    if stopped.value:
                        complete = False
                        return
                    yield batch

            record = evaluate(self.model, batches(), self.text_bytes)
            return record if complete else None

    def read_statistics(self) -> dict:
        """Return the fields of metrics.jsonl since the last reset, for all ranks. Synchronizes with the device.

        data_wait and memory_bytes are the largest of all ranks.
        """
        record = {"step": self.step, "tokens": self.tokens} | self.statistics.read(self.tokens_per_step)
        record |= {"skipped_rows": self.loader.skipped_rows, "memory_bytes": peak_memory(self.device)}
        records, skipped = zip(*self.ranks.gather((record, self._skipped)), strict=True)
        self._log_skipped_rows([f"rank {rank}: {line}" for rank, lines in enumerate(skipped) for line in lines])
        record |= {name: max(r[name] for r in records) for name in ("data_wait", "memory_bytes")}
        return record | {"skipped_rows": sum(r["skipped_rows"] for r in records)}

    def reset_statistics(self):
        self.statistics = Statistics(self.model.config, self.device)

    def state_dict(self) -> dict:
        """Return the contents of a checkpoint: everything that later steps depend on. Sharded tensors are DTensors.

        Call `detector.read` first, because the steps that it has not read are not in the state. No step draws random
        numbers. torch.compile can, so generator states differ after resuming; they are not saved.
        """
        return {
            "format": FORMAT,
            "step": self.step,
            "tokens": self.tokens,
            "config": self.model.config.to_dict(),
            "options": asdict(self.options),
            "environment": self.environment,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self._data_state | {"skipped_rows": sum(self.ranks.gather(self._data_state["skipped_rows"]))},
            "statistics": {name: getattr(part, name) for part, name in self._saved_parts()},
        }

    def load_state_dict(self, checkpoint: dict, path: Path):
        """Continue from a checkpoint. Raises InputError if it is damaged or does not fit the model or the data."""
        load_weights(self.model, checkpoint, path)
        restore_optimizer(self.optimizer, checkpoint, path)
        for group in self.optimizer.param_groups:  # so that saving this state again gives an equal checkpoint
            group["lr"] = learning_rate(checkpoint["step"] - 1, self.options)
        self.loader.load_state_dict(checkpoint["data"])
        self.loader.skipped_rows *= self.ranks.is_first  # the checkpoint has the sum of all ranks
        self.step, self.tokens, self.resumed_from = checkpoint["step"], checkpoint["tokens"], path
        self.batches = []
        self._data_state = self.loader.state_dict()
        saved, ours = checkpoint["statistics"], {name: getattr(part, name) for part, name in self._saved_parts()}
        if saved.keys() != ours.keys() or not all(_is_like(saved[name], ours[name]) for name in ours):
            raise InputError(f"{path}: damaged: its statistics do not fit the model")
        for part, name in self._saved_parts():  # copies tensors, because they are memory-mapped from the file
            value = saved[name]
            setattr(part, name, value.to(self.device, copy=True) if isinstance(value, Tensor) else value)

    def _saved_parts(self) -> list[tuple[object, str]]:
        return [(part, name) for part in (self.statistics, self.detector) for name in part.SAVED]


def _is_like(value, example) -> bool:
    if isinstance(example, Tensor):
        return is_cpu_tensor(value, example.shape, example.dtype)
    return type(value) is int and 0 <= value < 2**62
