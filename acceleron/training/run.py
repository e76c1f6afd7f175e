"""The optimizer steps of a run, and the state that is saved in a checkpoint."""

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ..attention import best_sdpa
from ..checkpoint import is_cpu_tensor, load_weights, restore_optimizer
from ..config import ModelConfig
from ..data import Loader, Shards
from ..device import deterministic_algorithms, peak_memory, synchronize, total_memory
from ..errors import InputError, RunFailed
from ..log import say
from ..model import Acceleron
from .anomaly import Anomaly, AnomalyDetector
from .metrics import expert_health
from .optimizer import build_optimizer, update
from .options import TrainOptions
from .schedule import learning_rate

POLL_SECONDS = 0.2
STALL_SECONDS = 60.0  # seconds without data before each warning
MAX_ROW_WARNINGS = 20  # skipped rows that are logged individually


class Run:
    """A training run in progress. Its statistics stay on the device until `read_statistics` is called.

    Run the steps inside `context()`. `steps` and `tokens` count completed work. Raises InputError for a seq_len that
    does not divide the shards' row length.
    """

    def __init__(
        self, options: TrainOptions, config: ModelConfig, shards: Shards, device: torch.device, dtype: torch.dtype
    ):
        self.options, self.device = options, device
        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at the first GEMM
        self.loader = Loader(
            shards,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            vocab_size=config.vocab_size,
            seed=options.seed,
            bad_data=options.bad_data,
            num_workers=options.num_workers,
            pin_memory=device.type == "cuda",
        )
        torch.manual_seed(options.seed)  # for the initial weights; steps use no random numbers
        self.model = Acceleron(config, compute_dtype=dtype).to(device)
        self.model.gradient_checkpointing = not options.no_gradient_checkpointing
        self.optimizer = build_optimizer(self.model, options.weight_decay)
        self.detector = AnomalyDetector(device, options.skip_spikes)
        self.steps = self.tokens = 0
        self.consistent = True  # False only during an update
        self.batches: list[Tensor] = []  # fetched for the next step
        self._row_warnings_left = MAX_ROW_WARNINGS
        self._data_state = self.loader.state_dict()
        self._grad_norm = torch.zeros((), device=device)
        self._reset_statistics()

    def _reset_statistics(self):
        self.unread_steps = self.skipped_steps = 0
        self.data_wait = 0.0
        self._micro_batches = torch.zeros((), dtype=torch.int64, device=self.device)
        self._losses = torch.zeros(3, dtype=torch.float64, device=self.device)
        shape_LE = (self.model.config.num_layers, self.model.config.num_experts)
        self._tokens_per_expert_LE = torch.zeros(shape_LE, dtype=torch.int64, device=self.device)

    @contextmanager
    def context(self):
        """Context manager for the steps. Use it only once."""
        with ExitStack() as stack:
            if self.options.deterministic:
                stack.enter_context(deterministic_algorithms())
            if self.device.type == "cuda":
                stack.enter_context(best_sdpa())
            yield

    def fetch(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the batches of the next step. Return False if `should_stop` returned true first.

        The step has not started yet, so the run can be saved during a data stall. Raises InputError for unreadable
        data.
        """
        start = time.perf_counter()
        while len(self.batches) < self.options.grad_accum:
            batch = self.next_batch(self.loader, should_stop)
            if batch is None:
                return False
            self.batches.append(batch)
        self.data_wait += time.perf_counter() - start
        return True

    def next_batch(self, loader: Loader, should_stop: Callable[[], bool]) -> Tensor | None:
        """Wait for a batch, and log stalls and skipped rows. Return None if `should_stop` returned true first."""
        start = last_warning = time.perf_counter()
        batch = None
        while batch is None and not should_stop():
            try:
                batch = loader.poll(POLL_SECONDS)
            except RuntimeError as error:
                raise RunFailed(str(error)) from error
            now = time.perf_counter()
            if batch is None and now - last_warning > STALL_SECONDS:
                last_warning = now
                say(f"warning: no data for {now - start:.0f} s: {loader.describe_rows(loader.position)}")
        for complaint in loader.warnings[: self._row_warnings_left]:
            say(f"warning: skipped: {complaint}")
            self._row_warnings_left -= 1
            if not self._row_warnings_left:
                say("warning: further skipped rows are not logged; skipped_rows counts those in the training data")
        loader.warnings.clear()
        return batch

    def step(self, lr: float):
        """Train on the next batches. Raises InputError for unreadable data.

        A failure before the optimizer update leaves the run unchanged, and `consistent` stays True.
        """
        self.fetch()
        losses, tokens_per_expert_LE = torch.zeros_like(self._losses), torch.zeros_like(self._tokens_per_expert_LE)
        with self.model.accumulate_gradients() if self.options.grad_accum > 1 else nullcontext():
            for batch in self.batches:
                input_ids = batch.to(self.device, non_blocking=True)
                output = self.model(input_ids, labels=input_ids)
                (output.loss / self.options.grad_accum).backward()
                parts = (output.cross_entropy, output.z_loss, output.balance_loss)
                losses += torch.stack([loss.detach().double() for loss in parts])
                if output.tokens_per_expert_LE is not None:
                    tokens_per_expert_LE += output.tokens_per_expert_LE
        grads = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(grads)
        self.consistent = False
        self.steps += 1
        self.tokens += self.options.tokens_per_step
        self._grad_norm = grad_norm
        self._tokens_per_expert_LE += tokens_per_expert_LE
        position = self._data_state["position"]
        skipped = self.detector.check(self.steps, position, losses[0] / self.options.grad_accum, grad_norm)
        finite = losses.isfinite().all()
        self._losses += torch.where(finite, losses, 0.0)
        self._micro_batches += finite * self.options.grad_accum
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        update(self.optimizer, grad_norm, self.options.grad_clip, skipped)
        self.optimizer.zero_grad(set_to_none=True)
        self.batches = []
        self._data_state = self.loader.state_dict()
        self.unread_steps += 1
        self.consistent = True

    def read_anomalies(self) -> list[Anomaly]:
        """Return the skipped steps and loss spikes since the last call. Synchronizes with the device."""
        anomalies = self.detector.read()
        self.skipped_steps += sum(anomaly.skipped for anomaly in anomalies)
        return anomalies

    def origin(self, anomaly: Anomaly) -> str:
        """Return the shards and rows of the step's batches."""
        starts = (anomaly.position + i * self.loader.batch_size for i in range(self.options.grad_accum))
        return "; ".join(self.loader.describe_rows(start) for start in starts)

    def read_statistics(self) -> dict:
        """Return the mean losses and expert load since the last call. Synchronizes with the device.

        The means exclude steps with a non-finite loss. They are None if no step had a finite loss.
        """
        means = (self._losses / self._micro_batches).tolist() if self._micro_batches else [None] * 3
        record = dict(zip(("loss", "z_loss", "balance_loss"), means, strict=True))
        norm = self._grad_norm.item()
        record["grad_norm"] = norm if math.isfinite(norm) else None
        if not self.model.config.dense:
            record |= expert_health(self._tokens_per_expert_LE.cpu())
        record |= {"data_wait": self.data_wait, "skipped_steps": self.skipped_steps}
        record["skipped_rows"] = self.loader.skipped_rows
        self._reset_statistics()
        return record

    def state_dict(self) -> dict:
        """Return everything that later steps depend on. Call `read_anomalies` first.

        No step draws random numbers. torch.compile can, so generator states differ after resuming; they are not saved.
        """
        return {
            "step": self.steps,
            "tokens": self.tokens,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self._data_state,
            "statistics": {
                "losses": self._losses,
                "counts": self._tokens_per_expert_LE,
                "micro_batches": self._micro_batches,
                "grad_norm": self._grad_norm,
                "guard": self.detector.mean_variance_count,
                "in_a_row": self.detector.consecutive_skips,
                "unread_steps": self.unread_steps,
                "skipped_steps": self.skipped_steps,
            },
        }

    def load_state_dict(self, checkpoint: dict, path: str | Path):
        """Continue from a checkpoint. Raises InputError if it is damaged or does not fit the model or the data."""
        load_weights(self.model, checkpoint, path)
        restore_optimizer(self.optimizer, checkpoint, path)
        self.loader.load_state_dict(checkpoint["data"])
        self.steps, self.tokens = checkpoint["step"], checkpoint["tokens"]
        self._data_state = self.loader.state_dict()
        saved, ours = checkpoint["statistics"], self.state_dict()["statistics"]
        if saved.keys() != ours.keys() or not all(_is_like(saved[name], ours[name]) for name in ours):
            raise InputError(f"{path}: damaged: its statistics do not fit the model")
        # Copy the tensors, because they are memory-mapped from the file.
        copies = {name: value.to(self.device, copy=True) for name, value in saved.items() if isinstance(value, Tensor)}
        self._losses, self._tokens_per_expert_LE = copies["losses"], copies["counts"]
        self._micro_batches, self._grad_norm = copies["micro_batches"], copies["grad_norm"]
        self.detector.mean_variance_count = copies["guard"]
        self.detector.consecutive_skips = saved["in_a_row"]
        self.unread_steps, self.skipped_steps = saved["unread_steps"], saved["skipped_steps"]

    def memory_test(self):
        """Run two steps and print the peak memory. The optimizer state does not exist until after the first step."""
        with self.context():
            for _ in range(2):
                self.step(learning_rate(self.steps, self.options))
        synchronize(self.device)
        peak, total = peak_memory(self.device), total_memory(self.device)
        print(f"peak memory {peak / 2**30:.2f} GiB of the device's {total / 2**30:.2f} GiB ({peak / total:.0%})")


def _is_like(value, example) -> bool:
    if isinstance(example, Tensor):
        return is_cpu_tensor(value, example.shape, example.dtype)
    return type(value) is int and 0 <= value < 2**62
