"""A training run, top to bottom."""

import math
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import kernels
from ..attention import attention_name, best_sdpa
from ..config import ModelConfig, round_up
from ..data import Loader, Shards, validation_batches
from ..data.tokenizer import find_tokenizer, load_tokenizer, token_bytes
from ..device import (
    cpu_has_bf16,
    missing_compiler,
    peak_flops,
    peak_memory,
    resolve_device,
    resolve_dtype,
    synchronize,
    total_memory,
)
from ..errors import InputError
from ..model import Acceleron
from .checkpoint import load_checkpoint, load_weights, restore_optimizer, save_checkpoint
from .metrics import Metrics, describe, expert_health, flops_per_token
from .optimizer import build_optimizer
from .options import TrainOptions
from .schedule import learning_rate


def train(options: TrainOptions, scripts_dir: Path | None = None):
    """Train as the options say. `scripts_dir` is where a pile_tokenizer.json is looked for, after the data directory.

    All input is checked, and the first batch read, before anything is written. Raises InputError for bad input.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    try:
        provider = kernels.select(options.kernels, device)
    except ValueError as error:
        raise InputError(str(error)) from error
    shards = Shards(options.data_dir)
    tokenizer_path, tokenizer = _open_tokenizer(options, scripts_dir)
    config = model_config(options, tokenizer)
    if options.seq_len > config.max_seq_len:
        raise InputError(f"--seq_len {options.seq_len} is longer than the model's {config.max_seq_len}")
    save_dir = Path(options.save_dir)
    continued = options.resume and Path(options.resume).resolve().parent == save_dir.resolve()
    if not continued and not options.memory_test and any(save_dir.glob("checkpoint_*.pt")):
        raise InputError(
            f"--save_dir {save_dir} holds the checkpoints of another run: continue it with --resume, "
            "or name another directory"
        )
    tokenizer_copy = save_dir / "tokenizer.json"
    if tokenizer_path and tokenizer_copy.is_file() and tokenizer_copy.read_bytes() != tokenizer_path.read_bytes():
        raise InputError(f"{tokenizer_copy} is another tokenizer than {tokenizer_path}: name another --save_dir")

    run = Run(options, config, shards, device, dtype)
    model, optimizer, loader = run.model, run.optimizer, run.loader
    step = tokens = 0
    if options.resume:
        checkpoint = load_checkpoint(options.resume)
        load_weights(model, checkpoint, options.resume)
        restore_optimizer(optimizer, checkpoint, options.resume)
        loader.load_state_dict(checkpoint["data"])
        step, tokens = checkpoint["step"], checkpoint["tokens"]
        _warn_of_changes(options, checkpoint["options"])
        if step >= options.max_steps:
            raise InputError(f"--resume {options.resume} is at step {step}: pass --max_steps above {step}")

    say = _announce(options, config, model, device, dtype, provider, loader)
    run.read_ahead()  # bad data ends here, with nothing written
    if options.memory_test:
        run.memory_test(step)
        return
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save_dir):
            pass
        if tokenizer_path and not tokenizer_copy.exists():
            shutil.copyfile(tokenizer_path, tokenizer_copy)
        metrics = Metrics(save_dir)
    except OSError as error:
        raise InputError(f"--save_dir {save_dir}: cannot be written ({error.strerror or error})") from error
    peak, peak_source = peak_flops(device, dtype)
    flops = flops_per_token(config, model.num_parameters()[1], options.seq_len)
    bytes_of = token_bytes(tokenizer, config.vocab_size) if tokenizer else None
    say(f"utilisation (MFU) is against {peak / 1e12:.3g} TFLOP/s, {peak_source}")
    say(
        f"writing to {save_dir}: checkpoints, metrics.jsonl"
        + (", tensorboard/" if metrics.has_tensorboard else "; tensorboard is not installed, so no event files")
    )

    logged_step, logged_time, logged_tokens = step, time.perf_counter(), tokens
    # The bar is for people: in a pipe there are only the log lines, which carry the ETA too.
    with (
        tqdm(total=options.max_steps, initial=step, unit="step", dynamic_ncols=True, disable=None) as bar,
        run.context(),
    ):
        while step < options.max_steps:
            lr = learning_rate(step, options)
            grad_norm = run.step(lr)
            step, tokens = step + 1, tokens + options.tokens_per_step
            bar.update()
            last = step == options.max_steps
            evaluate = last or step % options.eval_interval == 0
            save = last or step % options.save_interval == 0
            # A step that is saved is looked at first: a diverged model is never saved.
            if evaluate or save or step % options.log_interval == 0:
                record = {"step": step, **run.read_statistics(), "lr": lr, "grad_norm": grad_norm.item()}
                now = time.perf_counter()
                speed = (tokens - logged_tokens) / (now - logged_time)
                pace = (now - logged_time) / (step - logged_step)
                record |= {"tokens": tokens, "tokens_per_second": speed, "mfu": speed * flops / peak}
                record["memory_bytes"] = peak_memory(device)
                if not math.isfinite(record["loss"] + record["grad_norm"]):
                    raise InputError(
                        f"the loss is {record['loss']} and the gradient norm {record['grad_norm']} at step {step}: "
                        "stopped before saving; continue from the last checkpoint with a smaller --lr"
                    )
                if evaluate:
                    record |= validate(model, shards, options, device, bytes_of)
                metrics.write(record)
                tqdm.write(describe(record, options.max_steps, pace * (options.max_steps - step)))
                logged_step, logged_time, logged_tokens = step, time.perf_counter(), tokens
            if save:
                saving = time.perf_counter()
                path = save_checkpoint(
                    save_dir,
                    step=step,
                    tokens=tokens,
                    config=config.to_dict(),
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    data=run.data_state(),
                    options=asdict(options),
                )
                tqdm.write(f"saved {path}")
                logged_time += time.perf_counter() - saving
    metrics.close()


class Run:
    """One optimizer step after another; statistics stay on the device until they are read.

    `context()` is to be entered around the steps. Raises InputError for a seq_len that does not suit the shards.
    """

    def __init__(
        self, options: TrainOptions, config: ModelConfig, shards: Shards, device: torch.device, dtype: torch.dtype
    ):
        self.options, self.device = options, device
        self.loader = Loader(
            shards,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            vocab_size=config.vocab_size,
            seed=options.seed,
            num_workers=options.num_workers,
            pin_memory=device.type == "cuda",
        )
        torch.manual_seed(options.seed)
        self.model = Acceleron(config, compute_dtype=dtype).to(device)
        self.model.gradient_checkpointing = not options.no_gradient_checkpointing
        self.optimizer = build_optimizer(self.model, options.weight_decay)
        self._waiting = None
        self._reset_statistics()

    def _reset_statistics(self):
        config = self.model.config
        self._micro_batches = 0
        self._losses = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._counts_LE = torch.zeros(config.num_layers, config.num_experts, dtype=torch.int64, device=self.device)

    def context(self):
        """A context, good for one use."""
        return best_sdpa() if self.device.type == "cuda" else nullcontext()

    def read_ahead(self) -> torch.Tensor:
        """The batch that the next step will take."""
        if self._waiting is None:
            self._waiting = next(self.loader)
        return self._waiting

    def _next_batch(self) -> torch.Tensor:
        batch, self._waiting = (next(self.loader) if self._waiting is None else self._waiting), None
        return batch.to(self.device, non_blocking=True)

    def data_state(self) -> dict:
        """The loader's state at the next batch to train on."""
        return self.loader.state_dict()

    def step(self, lr: float) -> torch.Tensor:
        """Returns the gradient norm before clipping, on the device."""
        for _ in range(self.options.grad_accum):
            input_ids = self._next_batch()
            output = self.model(input_ids, labels=input_ids)
            (output.loss / self.options.grad_accum).backward()
            losses = (output.cross_entropy, output.z_loss, output.balance_loss)
            self._losses += torch.stack([loss.detach().double() for loss in losses])
            if output.counts_LE is not None:
                self._counts_LE += output.counts_LE
            self._micro_batches += 1
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def read_statistics(self) -> dict:
        """Means of the losses, and the experts' health, since the last call. Waits for the device."""
        names = ("loss", "z_loss", "balance_loss")
        record = dict(zip(names, (self._losses / self._micro_batches).tolist(), strict=True))
        if not self.model.config.dense:
            record |= expert_health(self._counts_LE.cpu())
        self._reset_statistics()
        return record

    def memory_test(self, step: int):
        """Two steps, as the optimizer's state exists only from the second on; prints the peak."""
        with self.context():
            for offset in range(2):
                self.step(learning_rate(step + offset, self.options))
        synchronize(self.device)
        peak, total = peak_memory(self.device), total_memory(self.device)
        print(f"peak memory {peak / 2**30:.2f} GiB of the device's {total / 2**30:.2f} GiB ({peak / total:.0%})")


@torch.no_grad()
def validate(model: Acceleron, shards: Shards, options: TrainOptions, device, bytes_of: np.ndarray | None) -> dict:
    """val_loss, nats a token over the held-out batches; val_bits_per_byte where the tokens' bytes are known."""
    total = targets = num_bytes = 0
    batches = validation_batches(
        shards, seq_len=options.seq_len, batch_size=options.batch_size, vocab_size=model.config.vocab_size
    )
    for batch in batches:
        input_ids = batch.to(device)
        count = batch.numel() - len(batch)
        total += model(input_ids, labels=input_ids).cross_entropy.double() * count
        targets += count
        if bytes_of is not None:
            num_bytes += int(bytes_of[batch[:, 1:].numpy()].sum())
    nats = total.item()
    record = {"val_loss": nats / targets}
    if num_bytes:
        record["val_bits_per_byte"] = nats / math.log(2) / num_bytes
    return record


def model_config(options: TrainOptions, tokenizer) -> ModelConfig:
    """The preset with its vocabulary. Raises InputError if the tokenizer has more entries, or nano has none."""
    entries = tokenizer.get_vocab_size() if tokenizer else None
    overrides = {}
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


def _warn_of_changes(options: TrainOptions, saved: dict):
    """A changed setting is the user's right on resuming, but seldom meant."""
    free = {"resume", "save_dir", "data_dir", "log_interval", "eval_interval", "save_interval", "num_workers", "device"}
    for name, value in asdict(options).items():
        if name not in free and name in saved and saved[name] != value:
            print(f"warning: --{name} is {value}, but was {saved[name]} before", file=sys.stderr)


def _announce(options, config, model, device, dtype, provider, loader):
    """Say what runs and who serves it; compile if asked for and possible. Returns the function that says it."""

    def say(line: str):
        print(line, file=sys.stderr, flush=True)

    total, active = model.num_parameters()
    kind = "dense twin" if config.dense else f"MoE of {config.num_experts} experts, top-2, and a shared one"
    say(f"{options.model_size}: {kind}; {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active")
    say(f"device {device}, {str(dtype).removeprefix('torch.')}; kernels: {provider}")
    say(f"attention: {attention_name(device, dtype, config.head_dim)}")
    if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_has_bf16():
        say("warning: this CPU has no native bf16, which makes its GEMMs many times slower than --dtype fp32")
    if not options.no_compile:
        missing = missing_compiler(device)
        if missing:
            say(f"warning: torch.compile needs the compiler {missing}, which is not installed: training in eager mode")
        else:
            model.compile_blocks()
            say("compiling the blocks: the first step takes a while")
    rows = int(loader.chunks.shards.num_rows.sum())
    say(
        f"data: {len(loader.chunks.shards.paths)} shards, {rows:,} rows of {loader.chunks.shards.row_length}; "
        f"an epoch is {len(loader.chunks) * options.seq_len:,} tokens, a step {options.tokens_per_step:,}"
    )
    return say
