"""Text for benchmarks on any machine: the source of Python's standard library, or of all installed packages."""

import hashlib
import sysconfig
from contextlib import redirect_stdout, suppress
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
    """The standard library's files, or with `packages` those of all installed packages.

    The order, by a hash of their names, mixes them, so that validation and training text are of the same kind.
    """
    root = Path(sysconfig.get_path("purelib" if packages else "stdlib"))
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    files = [path for path in files if packages or not LEFT_OUT & set(path.parts)]
    return [root / p for p in sorted(files, key=lambda p: hashlib.sha256(p.as_posix().encode()).digest())]


def write_corpus(directory: str | Path, vocab_size: int, characters: int, packages: bool = False) -> str:
    """Write a tokenizer and shards of about this many characters. Returns one line about them.

    Raises InputError if less than a million characters of source are installed.
    """
    files, length = [], 0
    for file in progress(source_files(packages), desc="source files", leave=False):
        with suppress(OSError, UnicodeDecodeError):  # a few are Latin-1
            length += len(file.read_text(encoding="utf-8"))
            files.append(str(file))
        if length >= characters:
            break
    if length < 1_000_000:
        raise InputError(f"only {length:,} characters of Python source are installed here: too few to train on")
    with redirect_stdout(StringIO()):
        prepare(files, str(directory), vocab_size=vocab_size)
    shards = sorted(Path(directory).glob("shard_*.npy"))
    rows = np.concatenate([np.load(shard) for shard in shards])
    for shard in shards:
        shard.unlink()
    for number, part in enumerate(np.array_split(rows, max(1, len(rows) // ROWS_PER_SHARD))):
        np.save(Path(directory) / f"shard_{number:05d}.npy", part)
    what = "the installed Python packages" if packages else "Python's standard library"
    return f"{rows.size:,} tokens of the source of {what} ({len(files)} files), vocabulary {vocab_size}"
