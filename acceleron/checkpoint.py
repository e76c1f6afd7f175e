"""checkpoint_<step>.pt: tensors and plain values only, so that loading runs no code; every record has a checksum."""

import errno
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from .config import ModelConfig, brief
from .errors import InputError, path_error
from .log import say

FORMAT = 2
KINDS = dict(step=int, tokens=int, config=dict, model=dict, optimizer=dict, data=dict, options=dict)
KINDS |= dict(statistics=dict, rng=dict, environment=dict)
# All that a pickle of tensors and plain values calls. torch's weights_only allows more, that takes memory at will.
CALLS = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2"}
CALLS |= {f"torch.{name}Storage" for name in ("Float", "Double", "Long", "Int", "Byte")}
MAX_PICKLE_BYTES = 16 << 20  # of objects that take up to 64 times as much; that of a large run is below 5 MB


class DamagedCheckpoint(InputError):
    """A file that is not, or no longer, a checkpoint of this version."""


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"checkpoint_{step}.pt"


def list_checkpoints(directory: Path) -> dict[int, Path]:
    """The directory's checkpoints by step, in ascending order."""
    found = (
        (re.fullmatch(r"checkpoint_(\d{1,18})\.pt", path.name), path) for path in directory.glob("checkpoint_*.pt")
    )
    return dict(sorted((int(match[1]), path) for match, path in found if match and path.is_file()))


def find_checkpoint(name: str, directory: Path) -> Path:
    """The path of this name; if it is a bare name of nothing here, the path in `directory`."""
    path, there = Path(name), directory / name
    if path.exists() or path.name != name or not directory.is_dir():
        return path
    if there.is_file():
        say(f"note: {path} does not exist: using {there}")
    return there


def verify_archive(path: Path):
    """Read all of a checkpoint against its checksums, and see what unpickling it would call.

    Raises DamagedCheckpoint, naming the damaged record (torch.load alone takes a flipped bit for a weight) or the calls
    that tensors and plain values don't need, and InputError for a file that can't be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = {record.filename.lower() for record in records}  # torch finds records whatever their case
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
            # torch.save compresses nothing and writes each record once: what would unfold to more is not its work.
            if not stored or len(names) < len(records) or sum(r.file_size for r in records) > path.stat().st_size:
                raise DamagedCheckpoint(f"{path}: not written by torch.save; use another one")
            if any(r.filename.endswith(".pkl") and r.file_size > MAX_PICKLE_BYTES for r in records):
                raise DamagedCheckpoint(
                    f"{path}: its pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB; use another one"
                )
            damaged = archive.testzip()
    except (DamagedCheckpoint, MemoryError):
        raise
    except Exception as error:  # a damaged archive fails in many ways: BadZipFile, EOFError, NotImplementedError, …
        # EINVAL is what a seek to where a damaged directory points ends in; else the file may be whole.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        raise DamagedCheckpoint(f"{path}: truncated, damaged or not a checkpoint; use another one") from error
    if damaged:
        name = repr(damaged)[1:-1]  # without what a terminal would act on
        raise DamagedCheckpoint(f"{path}: damaged: its record {name} does not match its checksum; use another one")
    try:
        # As torch.load finds it: of a hostile archive zipfile might show another one.
        calls = pickled_calls(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
    except Exception as error:
        raise DamagedCheckpoint(f"{path}: not a checkpoint; use another one") from error
    if calls - CALLS:
        what = repr(", ".join(sorted(calls - CALLS))[:200])[1:-1]
        raise DamagedCheckpoint(f"{path}: refused: it holds more than tensors and plain values, and would run {what}")


def pickled_calls(pickled: bytes) -> set[str]:
    """The functions and classes, as module.name, that unpickling would look up, by any opcode. Runs nothing.

    Raises one of many exceptions for what is no pickle.
    """
    calls, strings = set(), [""]
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            calls.add(argument.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":  # of what is on the stack: as a rule the last two strings
            calls.add(".".join(strings[-2:]) + " (by STACK_GLOBAL)")
        elif opcode.name.startswith("EXT"):
            calls.add(f"extension {argument}")
        elif isinstance(argument, str):
            strings.append(argument)
    return calls


def tensor_bytes(contents) -> int:
    """Of all tensors in nested dicts, lists and tuples, one that stands in several places as often."""
    total, seen, stack = 0, set(), [contents]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, dict) else value)
    return total


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint's contents, tensors on the CPU, `config` as a ModelConfig.

    Raises InputError if the file is absent or can't be read, DamagedCheckpoint if it is truncated or damaged anywhere,
    would run code, or is not a checkpoint of this project and version.
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
        raise DamagedCheckpoint(f"{path}: truncated, damaged or not a checkpoint; use another one") from error
    if tensor_bytes(contents) > path.stat().st_size:  # by strides of 0, or many tensors that share one memory
        raise DamagedCheckpoint(f"{path}: its tensors are larger than the file; it is damaged; use another one")
    version = contents.get("format") if isinstance(contents, dict) else None
    if type(version) is not int or version != FORMAT:
        raise DamagedCheckpoint(f"{path}: not a checkpoint of this version (format {FORMAT})")
    wrong = [name for name, kind in KINDS.items() if type(contents.get(name)) not in (kind, OrderedDict)]
    if wrong:
        raise DamagedCheckpoint(f"{path}: damaged: {', '.join(wrong)} of the wrong type; use another one")
    plain = [*contents["options"].items(), *contents["environment"].items()]
    if not all(type(value) in (str, int, float, bool, type(None)) for pair in plain for value in pair):
        raise DamagedCheckpoint(f"{path}: damaged: its options or environment are no plain values; use another one")
    if not (0 <= contents["step"] < 2**62 and 0 <= contents["tokens"] < 2**62):
        raise DamagedCheckpoint(f"{path}: damaged: step {brief(contents['step'])}, tokens {brief(contents['tokens'])}")
    try:
        contents["config"] = ModelConfig.from_dict(contents["config"])
    except InputError as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error
    return contents


def newest_checkpoint(directory: Path) -> tuple[Path, dict] | None:
    """Path and contents of the directory's newest checkpoint that is whole; None if there is none at all.

    Warns of every one that it passes over. Raises InputError if all are damaged, as to begin anew would replace them,
    and if one can't be read, which may pass.
    """
    paths = list_checkpoints(directory)
    for path in reversed(paths.values()):
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpoint as error:
            say(f"warning: passed over: {error}")
    if paths:
        raise InputError(f"--resume auto: no checkpoint in {directory} is whole; move them away to begin anew")
    return None


def restore_optimizer(optimizer: torch.optim.Optimizer, contents: dict, path: str | Path):
    """Load the optimizer's state, but keep this run's settings. Raises InputError if it doesn't fit."""
    damaged = InputError(f"{path}: its optimizer state does not fit the model; it is damaged")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = contents["optimizer"].get("state")
    # load_state_dict checks no shapes. Before the first step there is no state.
    if type(state) is not dict or (state and state.keys() != set(range(len(parameters)))):
        raise damaged
    copied = {}
    for index, entry in state.items():
        shape = parameters[index].shape
        shapes = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
        if type(entry) is not dict or entry.keys() != shapes.keys():
            raise damaged
        if not all(is_tensor_of(entry[name], shapes[name], torch.float32) for name in shapes):
            raise damaged
        # In memory of its own: the loaded tensors are the file, mapped.
        copied[index] = {name: value.clone() for name, value in entry.items()}
    optimizer.load_state_dict({"state": copied, "param_groups": optimizer.state_dict()["param_groups"]})


def is_tensor_of(value, shape, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype and value.device.type == "cpu"


def load_weights(model: torch.nn.Module, contents: dict, path: str | Path):
    """Copy the weights in. Raises InputError, naming what differs, if they are of another model."""
    theirs, ours = contents["config"].to_dict(), model.config.to_dict()
    changed = [f"{name} {theirs[name]} (here {ours[name]})" for name in ours if theirs[name] != ours[name]]
    if changed:
        raise InputError(f"{path}: of another model: {', '.join(changed)}; pass the flags it was trained with")
    assign_weights(model, contents, path, assign=False)


def assign_weights(model: torch.nn.Module, contents: dict, path: str | Path, assign: bool = True):
    """Make the checkpoint's tensors the model's (or copy them). Raises InputError if they don't fit its config."""
    damaged = InputError(f"{path}: its weights do not fit its config; it is damaged")
    expected = {name: weight.shape for name, weight in model.named_parameters()}
    weights = contents["model"]
    if weights.keys() != expected.keys():
        raise damaged
    if not all(is_tensor_of(weights[name], shape, torch.float32) for name, shape in expected.items()):
        raise damaged
    model.load_state_dict(weights, assign=assign)
