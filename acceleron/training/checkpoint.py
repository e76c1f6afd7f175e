"""checkpoint_<step>.pt: tensors and plain values only, so that loading one runs no code."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import torch

from ..config import ModelConfig
from ..errors import InputError

FORMAT = 1
KEYS = {"format", "step", "tokens", "config", "model", "optimizer", "data", "options"}


def save_checkpoint(directory: Path, *, step: int, **contents) -> Path:
    """Write checkpoint_<step>.pt: complete, or not there at all under that name."""
    path = directory / f"checkpoint_{step}.pt"
    partial = path.with_suffix(".pt.partial")
    torch.save({"format": FORMAT, "step": step} | contents, partial)
    os.replace(partial, path)
    return path


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint's contents, tensors on the CPU, `config` as a ModelConfig.

    Raises InputError if the file is absent, truncated, would run code, or is not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, as it holds more than tensors and plain values, and loading it could run code"
        ) from error
    except Exception as error:  # damage inside the pickle fails in many ways: IndexError, AssertionError, …
        raise InputError(f"{path}: truncated, damaged or not a checkpoint; use another one") from error
    if not isinstance(contents, dict) or not contents.keys() >= KEYS or contents["format"] != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this version (format {FORMAT})")
    kinds = dict(step=int, tokens=int, config=dict, model=dict, optimizer=dict, data=dict, options=dict)
    wrong = [name for name, kind in kinds.items() if type(contents[name]) not in (kind, OrderedDict)]
    if wrong:
        raise InputError(f"{path}: damaged: {', '.join(wrong)} of the wrong type; use another one")
    contents["config"] = ModelConfig.from_dict(contents["config"])
    return contents


def restore_optimizer(optimizer: torch.optim.Optimizer, contents: dict, path: str | Path):
    """Load the optimizer's state, but keep this run's weight decay. Raises InputError if it doesn't fit."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(contents["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its optimizer state does not fit the model; it is damaged") from error
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


def load_weights(model: torch.nn.Module, contents: dict, path: str | Path):
    """Copy the weights in. Raises InputError, naming what differs, if they are of another model."""
    theirs, ours = contents["config"].to_dict(), model.config.to_dict()
    changed = [f"{name} {theirs[name]} (here {ours[name]})" for name in ours if theirs[name] != ours[name]]
    if changed:
        raise InputError(f"{path}: of another model: {', '.join(changed)}; pass the flags it was trained with")
    assign_weights(model, contents, path, assign=False)


def assign_weights(model: torch.nn.Module, contents: dict, path: str | Path, assign: bool = True):
    """Make the checkpoint's tensors the model's (or copy them). Raises InputError if they don't fit its config."""
    try:
        model.load_state_dict(contents["model"], assign=assign)
    except RuntimeError as error:
        raise InputError(f"{path}: its weights do not fit its config; it is damaged") from error
