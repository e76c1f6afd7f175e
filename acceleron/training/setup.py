"""Builds the trainer and opens its output files. Checks all input and selects the checkpoint to resume from."""

import json
import logging
import math
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .. import ops
from ..attention import attention_name
from ..checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, newest_checkpoint
from ..config import SHAPE_FIELDS, ModelConfig, round_up, short_repr
from ..data import Shards
from ..data.shards import METADATA
from ..data.tokenizer import ByteCounter, find_tokenizer, load_tokenizer, num_ids
from ..device import cpu_has_bf16, missing_compiler, resolve_device, resolve_dtype
from ..distributed import Ranks
from ..errors import InputError, did_you_mean, file_error, path_error
from ..files import atomic_write
from ..pretrained import find_local
from ..sharding import PLANS
from .checkpointing import CheckpointManager
from .initial import InitialModel
from .metrics import Metrics
from .options import TrainOptions
from .trainer import Trainer

# A resumed run can change these options without a warning. The model's config must be equal, however it is given.
FREE_OPTIONS = {"resume", "save_dir", "data_dir", "tokenizer", "log_interval", "eval_interval", "save_interval"}
FREE_OPTIONS |= {"keep_last", "num_workers", "device", "max_bad_steps", "memory_test", "timeout"}
FREE_OPTIONS |= {"model_size", "config", "init_from", "vocab_size", "dense", "debug_force_load_balance", *SHAPE_FIELDS}

logger = logging.getLogger(__name__)


def check_paths(options: TrainOptions) -> TrainOptions:
    """Return the options with --resume as a path or "auto". Raises InputError for a missing path or a bad --config.

    Must run before the lock creates save_dir. Otherwise the error would list save_dir among the existing files.
    """
    if not Path(options.data_dir).is_dir():
        raise path_error("--data_dir", options.data_dir, "directory")
    if options.tokenizer and not Path(options.tokenizer).is_file():
        load_tokenizer(options.tokenizer)  # raises
    if options.config:
        ModelConfig.load(options.config)
    if options.init_from:
        find_local(options.init_from, "--init_from")
    if options.resume in (None, "auto"):
        return options
    path = find_checkpoint(options.resume, Path(options.save_dir))
    if path.is_file():
        return replace(options, resume=str(path))
    if question := did_you_mean(options.resume, ["auto"]).strip():
        raise InputError(f"--resume {path} does not exist: {question}")
    raise path_error("--resume", path, "file")


def check_same_options(options: TrainOptions, ranks: Ranks):
    """Raise InputError if a rank was started with other flags than rank 0."""
    first, *others = map(asdict, ranks.gather(options))
    for rank, other in enumerate(others, start=1):
        for name in first:
            if other[name] != first[name]:
                values = f"{first[name]} on rank 0, but {other[name]} on rank {rank}"
                raise InputError(f"--{name} is {values}: start all nodes with the same flags")


def build_trainer(
    options: TrainOptions, scripts_dir: Path | None, ranks: Ranks | None = None
) -> tuple[Trainer, Path | None]:
    """Build or resume a run and read its first batch. Returns the trainer and the path of the tokenizer, if any.

    Writes nothing. Raises InputError for bad input.
    """
    ranks = ranks or Ranks()
    with ranks.agreed():
        device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, device)
        try:
            backend = ops.set_backend(options.kernels, device)
        except ValueError as error:
            raise InputError(str(error)) from error
    resumed_from, checkpoint = _selected_by_first(options, ranks)
    with ranks.agreed():
        # With --bad_data skip, shards that become unreadable still count as part of the data.
        known = checkpoint["data"].get("shards") if checkpoint and options.bad_data == "skip" else None
        shards = Shards(options.data_dir, known)
        initial = InitialModel(options.init_from) if options.init_from else None
        directories = (Path(options.data_dir), initial and initial.directory, scripts_dir)
        tokenizer_path = find_tokenizer(options.tokenizer, *directories)
        tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
        checked = tokenizer_path is None or shards.check_tokenizer(tokenizer_path)
        if initial and tokenizer:
            initial.check_tokenizer(tokenizer, tokenizer_path)
        config = model_config(options, tokenizer, initial)
    trainer = Trainer(options, config, shards, device, dtype, byte_counter(tokenizer, config.vocab_size), ranks)
    with ranks.agreed():
        if checkpoint:
            trainer.load_state_dict(checkpoint, resumed_from)
            warn_about_changes(trainer, checkpoint)
            if trainer.step >= options.max_steps and options.resume != "auto":
                raise InputError(
                    f"--resume {options.resume} is at step {trainer.step}: pass --max_steps above {trainer.step}"
                )
        elif initial:
            initial.copy_weights(trainer.model)
        if trainer.plan:
            trainer.loader.held_out()  # raises if there are more ranks than held-out sequences
    _announce(trainer, backend)
    if not checked:
        logger.info(f"note: {options.data_dir} has no {METADATA}, so {tokenizer_path} cannot be checked")
    missing = missing_compiler(device)
    if missing and not options.no_compile:
        logger.warning(f"torch.compile needs the compiler {missing}, which is not installed: using eager mode")
    elif not options.no_compile:
        trainer.model.compile_blocks()
        logger.info("compiling the blocks; the first step takes a while")
    try:
        trainer.fetch()
    except Exception:
        trainer.loader.close()  # no reader thread may run while the interpreter exits
        raise
    return trainer, tokenizer_path


def _selected_by_first(options: TrainOptions, ranks: Ranks) -> tuple[Path | None, dict | None]:
    """Return the checkpoint that rank 0 selects. The other ranks load it too."""
    path = checkpoint = None

    def select() -> str | None:
        nonlocal path, checkpoint
        path, checkpoint = select_checkpoint(options)
        return path and str(path)

    name = ranks.from_first(select)
    with ranks.agreed():
        if name and not ranks.is_first:
            path, checkpoint = Path(name), load_checkpoint(name)
    return path, checkpoint


def select_checkpoint(options: TrainOptions) -> tuple[Path | None, dict | None]:
    """Return the checkpoint to resume from, (path, contents), if any. Raises InputError for conflicting checkpoints."""
    save_dir = Path(options.save_dir)
    if options.resume == "auto":
        return newest_checkpoint(save_dir) or (None, None)
    existing = {} if options.memory_test else list_checkpoints(save_dir)
    path = Path(options.resume) if options.resume else None
    if existing and (path is None or path.resolve().parent != save_dir.resolve()):
        raise InputError(
            f"--save_dir {save_dir} has checkpoints of a different run: continue it with --resume auto, or choose "
            "another directory"
        )
    checkpoint = load_checkpoint(path) if path else None
    if existing and max(existing) > checkpoint["step"]:
        raise InputError(
            f"--resume {path} is at step {checkpoint['step']}, but {save_dir} has {existing[max(existing)].name}: "
            "continue with --resume auto, choose another --save_dir, or remove the newer checkpoints"
        )
    return path, checkpoint


def warn_about_changes(trainer: Trainer, checkpoint: dict):
    """Warn about settings and versions that differ from the checkpoint's."""
    saved, options, size = checkpoint["options"], trainer.options, trainer.ranks.size
    ranks = checkpoint["environment"].get("ranks", 1)
    free = FREE_OPTIONS if ranks == size else FREE_OPTIONS | {"batch_size", "grad_accum"}
    for name, value in asdict(options).items():
        if name not in free and name in saved and saved[name] != value:
            logger.warning(f"--{name} is {value}, but was {short_repr(saved[name])} before")
    before = saved.get("grad_accum"), ranks, saved.get("batch_size")
    if ranks != size and all(type(value) is int and value > 0 for value in before):
        _warn_about_global_batch(before, (options.grad_accum, size, options.batch_size))
    for name, value in trainer.environment.items():
        before = checkpoint["environment"].get(name)
        if before != value:
            logger.warning(f"{name} is {value}, but was {short_repr(before)} before: results will not be bitwise equal")


def _warn_about_global_batch(before: tuple[int, int, int], now: tuple[int, int, int]):
    """Warn about other sequences per step, and note other micro-batches. Arguments: (grad_accum, ranks, batch_size)."""
    form = "{} x {} ranks x {} sequences"
    batch_size, rest = divmod(before[1] * before[2], now[1])
    if math.prod(before) != math.prod(now):
        advice = f": pass --batch_size {batch_size} --grad_accum {before[0]} to continue the same trajectory"
        changes = f"the global batch is {form.format(*now)}, but was {form.format(*before)} before"
        logger.warning(changes + ("" if rest or not batch_size else advice))
    elif before[0] != now[0]:
        changes = f"the global batch is now {form.format(*now)} instead of {form.format(*before)}"
        logger.info(f"note: {changes}: the balance loss, a statistic of a micro-batch, changes slightly")


def byte_counter(tokenizer: Tokenizer | None, vocab_size: int) -> ByteCounter | None:
    """Return the counter for val_bits_per_byte, or None if the tokenizer does not reproduce the text exactly."""
    counter = ByteCounter(tokenizer, vocab_size) if tokenizer else None
    if counter and not counter.exact:
        logger.info("val_bits_per_byte is not reported: the tokenizer does not reproduce the text exactly")
        return None
    return counter


def model_config(
    options: TrainOptions, tokenizer: Tokenizer | None, initial: InitialModel | None = None
) -> ModelConfig:
    """Return the config of --init_from, --config or --model_size, with the fields that other flags override.

    Raises InputError if it is invalid, or does not fit the tokenizer or --seq_len.
    """
    entries = num_ids(tokenizer) if tokenizer else None
    overrides = options.config_overrides
    if initial:
        config = initial.config
    else:
        config = ModelConfig.load(options.config) if options.config else ModelConfig.preset(options.model_size)
    if options.model_size == "nano" and not (initial or options.config or options.vocab_size):
        if entries is None:
            raise InputError("nano needs a tokenizer for its vocabulary size: pass --tokenizer or --vocab_size")
        overrides["vocab_size"] = round_up(entries, 128)
    config = replace(config, **overrides)
    if entries and entries > config.vocab_size:
        fix = "pass a different --tokenizer" if initial else "pass a larger --vocab_size or a different --tokenizer"
        raise InputError(
            f"the tokenizer has {entries} entries, more than the model's vocabulary of {config.vocab_size}: {fix}"
        )
    if options.seq_len > config.max_seq_len:
        raise InputError(f"--seq_len {options.seq_len} is above the model's maximum of {config.max_seq_len}")
    return config


def _announce(trainer: Trainer, backend: str):
    options, model, shards = trainer.options, trainer.model, trainer.loader.chunks.shards
    config, device, dtype = model.config, trainer.device, model.compute_dtype
    total, active = model.num_parameters()
    kind = f"MoE, {config.num_experts} routed experts, top-{config.top_k}"
    kind += ", 1 shared expert" if config.d_ff_shared else ""
    kind += f", {config.num_dense_layers} of {config.num_layers} layers dense" if config.num_dense_layers else ""
    name = options.init_from or options.config or options.model_size
    kind = "dense baseline" if config.dense else kind
    logger.info(f"{name}: {kind}; {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active")
    logger.info(f"device {device}, {str(dtype).removeprefix('torch.')}; kernels: {backend}")
    if trainer.plan:
        about = f"{trainer.plan.name} ({trainer.plan.why}): {PLANS[trainer.plan.name]}"
        logger.info(f"{trainer.ranks.size} ranks, {trainer.ranks.per_node} per node; data parallelism: {about}")
        micro_batch = f"{trainer.ranks.size} ranks x {options.batch_size} sequences of {options.seq_len} tokens"
        logger.info(f"global batch: {options.grad_accum} x {micro_batch}")
    logger.info(f"attention: {attention_name(device, dtype, config.head_dim)}")
    if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_has_bf16():
        logger.warning("this CPU has no native bf16: GEMMs are many times slower than with --dtype fp32")
    rows, epoch = int(shards.num_rows.sum()), len(trainer.loader.chunks) * options.seq_len
    logger.info(f"data: {len(shards.paths)} shards, {rows:,} rows of {shards.row_length}")
    logger.info(f"{epoch:,} tokens per epoch, {trainer.tokens_per_step:,} per step")
    if trainer.resumed_from:
        instead = f", not from the weights of {options.init_from}" if options.init_from else ""
        logger.info(f"continuing from {trainer.resumed_from}, step {trainer.step}{instead}")
    elif options.init_from:
        logger.info(f"starting from the weights of {options.init_from}, with a new optimizer")


def open_outputs(trainer: Trainer, tokenizer_path: Path | None) -> tuple[Metrics | None, CheckpointManager]:
    """Open the output files. Only rank 0 has metrics.

    Raises InputError if save_dir is not writable, or RunFailed if the disk is full.
    """
    options, save_dir = trainer.options, Path(trainer.options.save_dir)
    if not trainer.ranks.is_first:
        return None, CheckpointManager(save_dir, options.save_interval, step=trainer.step, ranks=trainer.ranks)
    # The previous process stopped before it logged its last steps. Log them, and save the state again.
    unfinished = trainer.statistics.steps > 0
    try:
        if tokenizer_path:
            _copy_tokenizer(tokenizer_path, save_dir / "tokenizer.json")
        with atomic_write(save_dir / "model.json") as file:
            config = replace(trainer.model.config, debug_force_load_balance=False)  # not for later runs
            file.write(json.dumps(config.to_dict(), indent=2).encode())
        if options.resume is None:
            _move_aside(save_dir / "metrics.jsonl")
        metrics = Metrics(save_dir, trainer.step - 1 if unfinished else trainer.step)
        before_save = partial(metrics.flush, to_disk=True)  # a checkpoint must not be newer than the log
        checkpoints = CheckpointManager(
            save_dir, options.save_interval, options.keep_last, before_save=before_save, step=trainer.step,
            saved=not unfinished, resumed_from=trainer.resumed_from, ranks=trainer.ranks,
        )  # fmt: skip
    except OSError as error:
        raise file_error(f"--save_dir {save_dir}: cannot be written", error) from error
    logger.info(f"writing to {save_dir}: checkpoints, metrics.jsonl, tensorboard/")
    return metrics, checkpoints


def _copy_tokenizer(path: Path, copy: Path):
    content = path.read_bytes()
    if not copy.exists():
        with atomic_write(copy) as file:
            file.write(content)
    elif copy.read_bytes() != content:
        raise InputError(f"{copy} differs from the tokenizer {path}: choose another --save_dir")


def _move_aside(path: Path):
    """Rename the log of a previous run."""
    if path.exists():
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
        free = path.replace(next(name for name in names if not name.exists()))
        logger.info(f"note: {path} is from a different run: renamed to {free.name}")
