"""Acceleron: pretrains small Mixture-of-Experts language models."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Acceleron", "MoE", "ModelConfig"]

if not Path(__file__).with_name("kernels").is_dir():  # an installed copy of the kernels could be imported instead
    raise ImportError("acceleron/kernels must be a symbolic link to ../kernels: get the code with `git clone`")

if TYPE_CHECKING:
    from .config import ModelConfig
    from .model import Acceleron
    from .moe import MoE
else:

    def __getattr__(name: str):
        """Import on first use, so reading a config imports no kernels and commands start fast."""
        modules = {"Acceleron": ".model", "MoE": ".moe", "ModelConfig": ".config"}
        if name not in modules:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(modules[name], __name__), name)

    def __dir__():
        return [*globals(), *__all__]
