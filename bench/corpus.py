"""Benchmark text available on every machine: the source of Python's standard library, or of all installed packages."""

import hashlib
import sysconfig
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from unittest import mock

from acceleron.data import Shards
from acceleron.data.prepare import prepare
from acceleron.data.shards import ROW_LENGTH
from acceleron.errors import InputError

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}  # from the standard library


def source_files(packages: bool) -> list[Path]:
    """List source files, ordered by the hash of their names so training and validation text are similar."""
    root = Path(sysconfig.get_path("purelib" if packages else "stdlib"))
    files = [p for p in root.rglob("*.py") if packages or not EXCLUDED & set(p.relative_to(root).parts)]
    return sorted(files, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())


def write_corpus(directory: str | Path, vocab_size: int, characters: int, packages: bool = False) -> str:
    """Write a tokenizer and shards with about this many characters. Returns a one-line summary.

    Raises InputError if the installed source has fewer than a million characters.
    """
    files, length = [], 0
    for file in source_files(packages):
        if length < characters:
            with suppress(OSError, UnicodeDecodeError):  # a few files are Latin-1
                length += len(file.read_text(encoding="utf-8"))
                files.append(str(file))
    if length < 1_000_000:
        raise InputError(f"only {length:,} characters of Python source are installed; at least 1,000,000 are needed")
    # The loader holds out at least one row per shard. With 25 rows per shard that is 4% of the text, evenly spread.
    with mock.patch.dict(prepare.__globals__, ROWS_PER_SHARD=25), redirect_stdout(StringIO()):
        prepare(files, str(directory), vocab_size=vocab_size)
    tokens, what = Shards(directory).num_rows.sum() * ROW_LENGTH, "packages" if packages else "standard library"
    return f"{tokens:,} tokens of the source of Python's {what} ({len(files)} files), vocabulary {vocab_size}"
