"""The training itself: one optimizer step after another, and the state that a checkpoint keeps."""

import math
import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attention import best_sdpa
from ..checkpoint import is_tensor_of, load_weights, restore_optimizer
from ..config import ModelConfig
from ..data import Loader, Shards
from ..device import deterministic_algorithms, peak_memory, synchronize, total_memory
from ..errors import InputError, RunFailed
from ..log import say
from ..model import Acceleron
from .guard import Judgement, StepGuard
from .metrics import expert_health
from .optimizer import build_optimizer, update
from .options import TrainOptions
from .schedule import learning_rate

POLL_SECONDS = 0.2
STALL_SECONDS = 60.0  # of waiting for data, after which the user is told
COMPLAINTS = 20  # of skipped rows, that are told one by one


class Run:
    """A model in training; statistics stay on the device until they are read.

    `context()` is to be entered around the steps. `steps` and `tokens` count what was done. Raises InputError for a
    seq_len that does not suit the shards.
    """

    def __init__(
        self, options: TrainOptions, config: ModelConfig, shards: Shards, device: torch.device, dtype: torch.dtype
    ):
        self.options, self.device = options, device
        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first GEMM
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
        # Nothing draws from Python's and numpy's own generators; should anything ever, it will be the same each time.
        random.seed(options.seed)
        np.random.seed(options.seed % 2**32)
        torch.manual_seed(options.seed)
        self.model = Acceleron(config, compute_dtype=dtype).to(device)
        self.model.gradient_checkpointing = not options.no_gradient_checkpointing
        self.optimizer = build_optimizer(self.model, options.weight_decay)
        self.guard = StepGuard(device, options.skip_spikes)
        self.steps = self.tokens = 0
        self.whole = True  # but within an update
        self.batches: list[Tensor] = []  # fetched for the next step
        self._untold = COMPLAINTS
        self._data_state = self.loader.state_dict()
        self._grad_norm = torch.zeros((), device=device)
        self._reset_statistics()

    def _reset_statistics(self):
        config = self.model.config
        self.unread_steps = self.skipped_steps = 0
        self.data_wait = 0.0
        self._micro_batches = torch.zeros((), dtype=torch.int64, device=self.device)
        self._losses = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._counts_LE = torch.zeros(config.num_layers, config.num_experts, dtype=torch.int64, device=self.device)

    @contextmanager
    def context(self):
        """A context, good for one use."""
        with ExitStack() as stack:
            if self.options.deterministic:
                stack.enter_context(deterministic_algorithms())
            if self.device.type == "cuda":
                stack.enter_context(best_sdpa())
            yield

    def fetch(self, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the batches of the next step; False if `stopped` became true first.

        Nothing of the step has begun then, so that what was trained can be saved while the data stalls. Raises
        InputError for data that can't be read.
        """
        start = time.perf_counter()
        while len(self.batches) < self.options.grad_accum:
            batch = self.next_batch(self.loader, stopped)
            if batch is None:
                return False
            self.batches.append(batch)
        self.data_wait += time.perf_counter() - start
        return True

    def next_batch(self, loader: Loader, stopped: Callable[[], bool]) -> Tensor | None:
        """Wait for it, telling of stalls and skipped rows; None if `stopped` became true first."""
        start = told = time.perf_counter()
        batch = None
        while batch is None and not stopped():
            try:
                batch = loader.poll(POLL_SECONDS)
            except RuntimeError as error:
                raise RunFailed(str(error)) from error
            now = time.perf_counter()
            if batch is None and now - told > STALL_SECONDS:
                told = now
                say(f"warning: no data for {now - start:.0f} s: {loader.origin(loader.position)}")
        for complaint in loader.complaints[: self._untold]:
            say(f"warning: skipped: {complaint}")
            self._untold -= 1
            if not self._untold:
                say("warning: further skipped rows are not told, but those of the training counted, as skipped_rows")
        loader.complaints.clear()
        return batch

    def step(self, lr: float):
        """Train on the next batches. Raises InputError for data that can't be read.

        What fails before the optimizer's update leaves the run as it was, and `whole`.
        """
        self.fetch()
        losses, tokens_per_expert_LE = torch.zeros_like(self._losses), torch.zeros_like(self._counts_LE)
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
        self.whole = False
        self.steps += 1
        self.tokens += self.options.tokens_per_step
        self._grad_norm = grad_norm
        self._counts_LE += tokens_per_expert_LE
        position = self._data_state["position"]
        skipped = self.guard.judge(self.steps, position, losses[0] / self.options.grad_accum, self._grad_norm)
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
        self.whole = True

    def judgements(self) -> list[Judgement]:
        """The steps since the last call that were skipped or whose loss was a spike. Waits for the device."""
        found = self.guard.read()
        self.skipped_steps += sum(judgement.skipped for judgement in found)
        return found

    def origin(self, judgement: Judgement) -> str:
        """The shards and rows of a step's batches."""
        starts = (judgement.position + i * self.loader.batch_size for i in range(self.options.grad_accum))
        return "; ".join(self.loader.origin(start) for start in starts)

    def read_statistics(self) -> dict:
        """Means of the losses, and the experts' health, since the last call. Waits for the device.

        A step whose loss was not finite is left out of the means, which are None if there was no other.
        """
        means = (self._losses / self._micro_batches).tolist() if self._micro_batches else [None] * 3
        record = dict(zip(("loss", "z_loss", "balance_loss"), means, strict=True))
        norm = self._grad_norm.item()
        record["grad_norm"] = norm if math.isfinite(norm) else None
        if not self.model.config.dense:
            record |= expert_health(self._counts_LE.cpu())
        record |= {"data_wait": self.data_wait, "skipped_steps": self.skipped_steps}
        record["skipped_rows"] = self.loader.skipped_rows
        self._reset_statistics()
        return record

    def state_dict(self) -> dict:
        """All that the next steps depend on, as after the last one. Call `judgements` first."""
        return {
            "step": self.steps,
            "tokens": self.tokens,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self._data_state,
            "statistics": {
                "losses": self._losses,
                "counts": self._counts_LE,
                "micro_batches": self._micro_batches,
                "grad_norm": self._grad_norm,
                "guard": self.guard.mean_variance_count,
                "in_a_row": self.guard.in_a_row,
                "unread_steps": self.unread_steps,
                "skipped_steps": self.skipped_steps,
            },
            "rng": rng_state(self.device),
        }

    def load_state_dict(self, checkpoint: dict, path: str | Path):
        """Continue from a loaded checkpoint. Raises InputError if it is of another model or other data, or damaged."""
        load_weights(self.model, checkpoint, path)
        restore_optimizer(self.optimizer, checkpoint, path)
        self.loader.load_state_dict(checkpoint["data"])
        self.steps, self.tokens = checkpoint["step"], checkpoint["tokens"]
        self._data_state = self.loader.state_dict()
        saved, ours = checkpoint["statistics"], self.state_dict()["statistics"]
        if saved.keys() != ours.keys() or not all(_alike(saved[name], ours[name]) for name in ours):
            raise InputError(f"{path}: its statistics do not fit the model; it is damaged")
        # In memory of their own: the loaded tensors are the file, mapped.
        losses, counts, micro_batches, grad_norm, guard = (
            saved[name].to(self.device, copy=True)
            for name in ("losses", "counts", "micro_batches", "grad_norm", "guard")
        )
        self._losses, self._counts_LE, self._micro_batches = losses, counts, micro_batches
        self._grad_norm, self.guard.mean_variance_count = grad_norm, guard
        self.guard.in_a_row = saved["in_a_row"]
        self.unread_steps, self.skipped_steps = saved["unread_steps"], saved["skipped_steps"]
        try:
            set_rng_state(checkpoint["rng"], self.device)
        except Exception as error:  # each generator refuses in ways of its own
            raise InputError(f"{path}: its states of the random generators are damaged") from error

    def memory_test(self):
        """Two steps, as the optimizer's state exists only from the second on; prints the peak."""
        with self.context():
            for _ in range(2):
                self.step(learning_rate(self.steps, self.options))
        synchronize(self.device)
        peak, total = peak_memory(self.device), total_memory(self.device)
        print(f"peak memory {peak / 2**30:.2f} GiB of the device's {total / 2**30:.2f} GiB ({peak / total:.0%})")


def _alike(value, example) -> bool:
    if isinstance(example, Tensor):
        return is_tensor_of(value, example.shape, example.dtype)
    return type(value) is int and 0 <= value < 2**62


def rng_state(device: torch.device) -> dict:
    """Of every generator that a run could draw from, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {"torch": torch.get_rng_state(), "numpy": [kind, keys.tolist(), *rest], "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device):
    """Raises one of many exceptions for a state that is none."""
    if not 0 <= state["numpy"][2] <= 624:  # which numpy does not check, and then reads memory that is not its own
        raise ValueError("numpy's position")
    torch.set_rng_state(state["torch"].clone())
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].clone(), device)
