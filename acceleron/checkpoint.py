"""checkpoint_<step>.pt: tensors and plain values only, so loading it runs no code. Every record has a checksum."""

import errno
import logging
import os
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from .config import ModelConfig, short_repr
from .distributed import sharded_like
from .errors import InputError, path_error
from .files import atomic_write

logger = logging.getLogger(__name__)

FORMAT = 4
FIELD_TYPES = dict(step=int, tokens=int, config=dict, model=dict, optimizer=dict, data=dict, options=dict)
FIELD_TYPES |= dict(statistics=dict, environment=dict)
# The only globals that tensors and plain values need. torch's weights_only allows more; some can exhaust memory.
ALLOWED_GLOBALS = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2"}
ALLOWED_GLOBALS |= {f"torch.{name}Storage" for name in ("Float", "Double", "Long", "Int")}
MAX_PICKLE_BYTES = 16 << 20  # unpickled, it takes up to 64 times as much memory; a large run's is under 5 MB


class DamagedCheckpoint(InputError):
    """The file is not a valid checkpoint of this version."""


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"checkpoint_{step}.pt"


def list_checkpoints(directory: Path) -> dict[int, Path]:
    """The directory's checkpoints, keyed by step in ascending order."""
    matches = {path: re.fullmatch(r"checkpoint_(\d{1,18})\.pt", path.name) for path in directory.glob("*.pt")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match and path.is_file()))


def find_checkpoint(name: str, directory: Path) -> Path:
    """Return `name` as a path. A bare file name that does not exist here is looked up in `directory`."""
    path, alternative = Path(name), directory / name
    # Unlike Path.exists, os.path.exists accepts a name that is too long for a file.
    if os.path.exists(path) or path.name != name or not directory.is_dir():
        return path
    if os.path.isfile(alternative):
        logger.info(f"note: {path} does not exist: using {alternative}")
    return alternative


def save_checkpoint(contents: dict, path: Path) -> int:
    """Write a checkpoint, read it back from the disk and verify it. Returns its size in bytes.

    Raises an error of torch.save (the OSError is its context), OSError, or DamagedCheckpoint. `path` is then unchanged.
    """
    with atomic_write(path) as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # drop the page cache, so the file is read back from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        verify_archive(Path(file.name))
        return file.tell()


def verify_archive(path: Path):
    """Verify a checkpoint's checksums, and check that unpickling it would build only tensors and plain values.

    torch.load alone does not detect flipped bits. Raises DamagedCheckpoint, which names the damaged record or the
    forbidden globals, and InputError for an unreadable file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = {record.filename.lower() for record in records}  # torch ignores case
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
            # torch.save never compresses and writes each record once. Reject archives that would expand when read.
            if not stored or len(names) < len(records) or sum(r.file_size for r in records) > path.stat().st_size:
                raise DamagedCheckpoint(f"{path}: not written by torch.save; use another checkpoint")
            if any(r.filename.endswith(".pkl") and r.file_size > MAX_PICKLE_BYTES for r in records):
                raise DamagedCheckpoint(f"{path}: its pickle is too large; use another checkpoint")
            damaged = archive.testzip()
    except (DamagedCheckpoint, MemoryError):
        raise
    except Exception as error:  # a damaged archive fails in many ways: BadZipFile, EOFError, NotImplementedError, …
        # A seek to an offset from a damaged directory gives EINVAL. After any other I/O error the file may be valid.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        raise DamagedCheckpoint(f"{path}: truncated, damaged or not a checkpoint; use another checkpoint") from error
    if damaged:
        name = repr(damaged)[1:-1]  # control characters escaped
        raise DamagedCheckpoint(f"{path}: damaged: {name} does not match its checksum; use another checkpoint")
    try:
        # Use torch's reader: in a hostile archive, zipfile could find a different record.
        found = pickle_globals(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
    except Exception as error:
        raise DamagedCheckpoint(f"{path}: not a checkpoint; use another checkpoint") from error
    if found - ALLOWED_GLOBALS:
        names = repr(", ".join(sorted(found - ALLOWED_GLOBALS))[:200])[1:-1]
        raise DamagedCheckpoint(f"{path}: unsafe: unpickling it would run {names}; use a checkpoint you trust")


def pickle_globals(pickled: bytes) -> set[str]:
    """Return the functions and classes, as module.name, that unpickling would look up. Executes nothing.

    Raises many exception types for an invalid pickle.
    """
    found, strings = set(), [""]
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(argument.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":  # takes its names from the stack, usually the last two strings
            found.add(".".join(strings[-2:]) + " (by STACK_GLOBAL)")
        elif opcode.name.startswith("EXT"):
            found.add(f"extension {argument}")
        elif isinstance(argument, str):
            strings.append(argument)
    return found


def tensor_bytes(contents) -> int:
    """Total bytes of all tensors in nested dicts, lists and tuples. Counts a tensor once per occurrence."""
    total = 0
    seen = set()
    stack = [contents]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, dict) else value)
    return total


def load_checkpoint(path: str | Path) -> dict:
    """Load a checkpoint, with tensors on the CPU and `config` as a ModelConfig.

    Raises InputError if the file is missing or unreadable, DamagedCheckpoint if it is truncated, damaged, would run
    code, or is not a checkpoint of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise path_error("checkpoint", path, "file")
    verify_archive(path)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # damage inside the pickle fails in many ways: IndexError, AssertionError, …
        raise DamagedCheckpoint(f"{path}: truncated, damaged or not a checkpoint; use another checkpoint") from error
    if tensor_bytes(contents) > path.stat().st_size:  # strides of 0, or tensors that share storage
        raise DamagedCheckpoint(f"{path}: damaged: its tensors are larger than the file; use another checkpoint")
    version = contents.get("format") if isinstance(contents, dict) else None
    if type(version) is not int or version != FORMAT:
        found = f"has format {version}" if type(version) is int else "not a checkpoint"
        raise DamagedCheckpoint(f"{path}: {found}; this version of acceleron reads format {FORMAT}")
    wrong = [name for name, kind in FIELD_TYPES.items() if type(contents.get(name)) not in (kind, OrderedDict)]
    if wrong:
        raise DamagedCheckpoint(f"{path}: damaged: wrong type of {', '.join(wrong)}; use another checkpoint")
    plain = [*contents["options"].items(), *contents["environment"].items()]
    if not all(type(value) in (str, int, float, bool, type(None)) for pair in plain for value in pair):
        raise DamagedCheckpoint(f"{path}: damaged: invalid type in options or environment; use another checkpoint")
    for name in ("step", "tokens"):
        if not 0 <= contents[name] < 2**62:
            raise DamagedCheckpoint(f"{path}: damaged: {name} is {short_repr(contents[name])}; use another checkpoint")
    try:
        contents["config"] = ModelConfig.from_dict(contents["config"])
    except InputError as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error
    return contents


def newest_checkpoint(directory: Path) -> tuple[Path, dict] | None:
    """Return the path and contents of the newest valid checkpoint, or None if there are no checkpoints.

    Logs a warning for each damaged checkpoint. Raises InputError if all are damaged, because a new run would overwrite
    them. Also raises it if one is unreadable, because the cause can be temporary.
    """
    paths = list_checkpoints(directory)
    for path in reversed(paths.values()):
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpoint as error:
            logger.warning(f"skipped: {error}")
    if paths:
        raise InputError(f"--resume auto: {directory} has no valid checkpoint; move its files to start a new run")
    return None


def restore_optimizer(optimizer: torch.optim.Optimizer, contents: dict, path: str | Path):
    """Load the optimizer's state but keep this run's hyperparameters. Raises InputError if it does not fit."""
    damaged = InputError(f"{path}: damaged: its optimizer state does not fit the model")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = contents["optimizer"].get("state")
    # load_state_dict does not check shapes. Before the first step the state is empty.
    if type(state) is not dict or (state and state.keys() != set(range(len(parameters)))):
        raise damaged
    copied = {}
    for index, entry in state.items():
        shape = parameters[index].shape
        shapes = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
        if type(entry) is not dict or entry.keys() != shapes.keys():
            raise damaged
        if not all(is_cpu_tensor(entry[name], shapes[name], torch.float32) for name in shapes):
            raise damaged
        # Copy the tensors, because they are memory-mapped from the file.
        parts = {name: sharded_like(value, parameters[index]) for name, value in entry.items() if name != "step"}
        copied[index] = {name: parts.get(name, value).clone() for name, value in entry.items()}
    optimizer.load_state_dict({"state": copied, "param_groups": optimizer.state_dict()["param_groups"]})


def is_cpu_tensor(value, shape, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype and value.device.type == "cpu"


def load_weights(model: torch.nn.Module, contents: dict, path: str | Path):
    """Copy the weights into the model. Raises InputError with the differences if the configs differ."""
    theirs, ours = contents["config"].to_dict(), model.config.to_dict()
    changed = [f"{name} {theirs[name]} (here {ours[name]})" for name in ours if theirs[name] != ours[name]]
    if changed:
        raise InputError(f"{path}: from a different model: {', '.join(changed)}; pass the flags it was trained with")
    assign_weights(model, contents, path, assign=False)


def assign_weights(model: torch.nn.Module, contents: dict, path: str | Path, assign: bool = True):
    """Assign or copy the checkpoint's tensors to the model. Raises InputError if they do not fit its config."""
    damaged = InputError(f"{path}: damaged: its weights do not fit its config")
    parameters = dict(model.named_parameters())
    expected = {name: weight.shape for name, weight in parameters.items()}
    weights = contents["model"]
    if weights.keys() != expected.keys():
        raise damaged
    if not all(is_cpu_tensor(weights[name], shape, torch.float32) for name, shape in expected.items()):
        raise damaged
    parts = {name: sharded_like(weight, parameters[name]) for name, weight in weights.items()}
    model.load_state_dict(parts, assign=assign)
