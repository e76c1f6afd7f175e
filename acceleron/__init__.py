"""Acceleron: small Mixture-of-Experts language models, pretrained fast."""

from pathlib import Path

_package = Path(__file__).resolve().parent
if not (_package / "kernels").is_dir():
    # A bare checkout, where kernels/ stands beside this package: the root joins the path on which `acceleron.kernels`
    # is looked up. A wheel carries acceleron/kernels.
    __path__.append(str(_package.parent))

from .config import ModelConfig  # noqa: E402
from .model import Acceleron  # noqa: E402
from .moe import MoE  # noqa: E402

__version__ = "0.1.0"
__all__ = ["Acceleron", "MoE", "ModelConfig"]
