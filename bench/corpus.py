"""Text for benchmarks on any machine: the source of Python's standard library, or of all installed packages."""

import hashlib
import json
import sysconfig
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np

from acceleron.data.prepare import prepare
from acceleron.errors import InputError

from .rows import progress

# Tests, and directories that are not the standard library's.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
# The loader holds out a hundredth of each shard, at least one row: a 25th of shards this short, from all over the text.
ROWS_PER_SHARD = 25


def source_files(packages: bool = False) -> list[Path]:
    """Files of the standard library, or with `packages` of the installed packages, shuffled by the hash of their names.

    The order mixes them, so that the validation text is of the same kind as the training text.
    """
    root = Path(sysconfig.get_path("purelib" if packages else "stdlib"))
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    files = [path for path in files if packages or not LEFT_OUT & set(path.parts)]
    return [root / p for p in sorted(files, key=lambda p: hashlib.sha256(p.as_posix().encode()).digest())]


def write_corpus(directory: str | Path, vocab_size: int, characters: int, packages: bool = False) -> str:
    """Write a tokenizer and shards of about this many characters. Returns one line about them.

    Raises InputError if less than a million characters of source are installed.
    """
    length = num_files = 0
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(StringIO()):
        path = Path(temporary) / "source.jsonl"
        with path.open("w", encoding="utf-8") as lines:
            for file in progress(source_files(packages), desc="source files", leave=False):
                text = file.read_text(encoding="utf-8", errors="ignore")
                lines.write(json.dumps({"text": text}) + "\n")
                length, num_files = length + len(text), num_files + 1
                if length >= characters:
                    break
        if length < 1_000_000:
            raise InputError(f"only {length:,} characters of Python source are installed here: too few to train on")
        prepare([str(path)], str(directory), vocab_size=vocab_size)
    shards = sorted(Path(directory).glob("shard_*.npy"))
    rows = np.concatenate([np.load(shard) for shard in shards])
    for shard in shards:
        shard.unlink()
    for shard, first in enumerate(range(0, len(rows) - 1, ROWS_PER_SHARD)):
        np.save(Path(directory) / f"shard_{shard:05d}.npy", rows[first : first + ROWS_PER_SHARD])
    what = "the installed Python packages" if packages else "Python's standard library"
    return f"{rows.size:,} tokens of the source of {what} ({num_files} files), vocabulary {vocab_size}"
