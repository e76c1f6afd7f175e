"""Selection of the checkpoint to resume from, and warnings about changed settings."""

from dataclasses import asdict, replace
from pathlib import Path

from ..checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, newest_checkpoint
from ..config import short_repr
from ..data.tokenizer import load_tokenizer
from ..errors import InputError, did_you_mean, path_error
from ..log import say
from .options import TrainOptions


def check_paths(options: TrainOptions) -> TrainOptions:
    """Return the options with --resume as a path or "auto". Raises InputError for a path that does not exist.

    Must run before the lock creates save_dir. Otherwise the error would list save_dir among the existing files.
    """
    if not Path(options.data_dir).is_dir():
        raise path_error("--data_dir", options.data_dir, "directory")
    if options.tokenizer and not Path(options.tokenizer).is_file():
        load_tokenizer(options.tokenizer)  # raises
    if options.resume in (None, "auto"):
        return options
    path = find_checkpoint(options.resume, Path(options.save_dir))
    if path.is_file():
        return replace(options, resume=str(path))
    if question := did_you_mean(options.resume, ["auto"]).strip():
        raise InputError(f"--resume {path} does not exist: {question}")
    raise path_error("--resume", path, "file")


def select_checkpoint(options: TrainOptions) -> tuple[Path | None, dict | None]:
    """Return the checkpoint to resume from, (path, contents), if any. Raises InputError for conflicting checkpoints."""
    save_dir = Path(options.save_dir)
    existing = {} if options.memory_test else list_checkpoints(save_dir)
    if options.resume == "auto":
        return newest_checkpoint(save_dir) or (None, None)
    if options.resume is None:
        if existing:
            raise InputError(
                f"--save_dir {save_dir} has checkpoints of a different run: continue it with --resume auto, "
                "or choose another directory"
            )
        return None, None
    path = Path(options.resume)
    checkpoint = load_checkpoint(path)
    if existing and path.resolve().parent != save_dir.resolve():
        raise InputError(f"--save_dir {save_dir} has checkpoints of a different run: choose another directory")
    if existing and max(existing) > checkpoint["step"]:
        raise InputError(
            f"--resume {path} is at step {checkpoint['step']}, but {save_dir} has {existing[max(existing)].name}: "
            "continue with --resume auto, choose another --save_dir, or remove the newer checkpoints"
        )
    return path, checkpoint


def warn_about_changes(options: TrainOptions, environment: dict, checkpoint: dict):
    """Warn about settings and versions that differ from the checkpoint's."""
    ignored = {"resume", "save_dir", "data_dir", "tokenizer", "log_interval", "eval_interval", "save_interval"}
    ignored |= {"keep_last", "num_workers", "device", "max_bad_steps", "memory_test"}
    saved = checkpoint["options"]
    for name, value in asdict(options).items():
        if name not in ignored and name in saved and saved[name] != value:
            say(f"warning: --{name} is {value}, but was {short_repr(saved[name])} before")
    for name, value in environment.items():
        before = checkpoint["environment"].get(name)
        if before != value:
            say(f"warning: {name} is {value}, but was {short_repr(before)} before: results will not be bitwise equal")
