"""Which checkpoint a run continues from, and what differs from the run that wrote it."""

from dataclasses import asdict, replace
from pathlib import Path

from ..checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, newest_checkpoint
from ..config import brief
from ..data.tokenizer import load_tokenizer
from ..errors import InputError, did_you_mean, path_error
from ..log import say
from .options import TrainOptions


def check_paths(options: TrainOptions) -> TrainOptions:
    """The options with --resume as a path or auto. Raises InputError for a path that does not exist.

    Runs before the lock creates save_dir, which the error would list among the existing files.
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


def checkpoint_of(options: TrainOptions) -> tuple[Path | None, dict | None]:
    """Path and contents of the checkpoint to continue from, if any. Raises InputError where runs would be mixed."""
    save_dir = Path(options.save_dir)
    present = {} if options.memory_test else list_checkpoints(save_dir)
    if options.resume == "auto":
        return newest_checkpoint(save_dir) or (None, None)
    if options.resume is None:
        if present:
            raise InputError(
                f"--save_dir {save_dir} holds the checkpoints of another run: continue it with --resume auto, "
                "or name another directory"
            )
        return None, None
    path = Path(options.resume)
    checkpoint = load_checkpoint(path)
    if present and path.resolve().parent != save_dir.resolve():
        raise InputError(f"--save_dir {save_dir} holds the checkpoints of another run: name another directory")
    if present and max(present) > checkpoint["step"]:
        raise InputError(
            f"--resume {path} is of step {checkpoint['step']}, but {save_dir} has {present[max(present)].name}: "
            "continue with --resume auto, or name another --save_dir, or remove what is newer"
        )
    return path, checkpoint


def warn_of_changes(options: TrainOptions, environment: dict, checkpoint: dict):
    """Warn about settings and versions that differ from the checkpoint's."""
    free = {"resume", "save_dir", "data_dir", "tokenizer", "log_interval", "eval_interval", "save_interval"}
    free |= {"keep_last", "num_workers", "device", "max_bad_steps", "memory_test"}
    saved = checkpoint["options"]
    for name, value in asdict(options).items():
        if name not in free and name in saved and saved[name] != value:
            say(f"warning: --{name} is {value}, but was {brief(saved[name])} before")
    for name, value in environment.items():
        before = checkpoint["environment"].get(name)
        if before != value:
            say(f"warning: {name}: {value}, before {brief(before)}: the run goes on, but not bit for bit the same")
