"""Models on the Hugging Face Hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download


def is_model_id(name: str) -> bool:
    """Return whether `name` has the form user/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def download_model(repo: str, weights: bool = True) -> Path:
    """Download the config, the tokenizer and, with `weights`, the safetensors files. Returns their directory."""
    patterns = ["*.json", "*.safetensors"] if weights else ["*.json"]
    return Path(snapshot_download(repo, allow_patterns=patterns))
