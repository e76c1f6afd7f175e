"""Text for benchmarks that is there wherever Python is: its library's source, or that of all installed packages."""

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

# Tests and what is not Python's own library.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
# Each shard's last hundredth, at least one row, is held out: of short shards that is a 25th, from all over the text.
ROWS_PER_SHARD = 25


def source_files(packages: bool = False) -> list[Path]:
    """Python's own library, or with `packages` the installed packages, in an order that depends on names alone.

    The order mixes them, so that what is held out for validation is of the same kind as the rest.
    """
    root = Path(sysconfig.get_path("purelib" if packages else "stdlib"))
    files = [p.relative_to(root) for p in root.rglob("*.py")]
    if not packages:
        files = [p for p in files if not LEFT_OUT & set(p.parts)]
    return [root / p for p in sorted(files, key=lambda p: hashlib.sha256(p.as_posix().encode()).digest())]


def write_corpus(directory: str | Path, vocab_size: int, characters: int, packages: bool = False) -> str:
    """Shards and a tokenizer trained on them, of up to this many characters; returns a line that says what they hold.

    Raises InputError where Python's source is not installed.
    """
    files, length, num_files = source_files(packages), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "source.jsonl"
        with path.open("w", encoding="utf-8") as lines:
            for file in files:
                try:
                    text = file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):  # a few of the library's are Latin-1
                    continue
                lines.write(json.dumps({"text": text}) + "\n")
                length, num_files = length + len(text), num_files + 1
                if length >= characters:
                    break
        if length < 1_000_000:
            raise InputError(f"only {length:,} characters of Python source are installed here: too few to train on")
        with redirect_stdout(StringIO()):
            prepare([str(path)], str(directory), vocab_size=vocab_size)
    # Their number is not known before: all shards are cut anew into short ones.
    rows = []
    for path in sorted(Path(directory).glob("shard_*.npy")):
        rows.append(np.load(path))
        path.unlink()
    rows = np.concatenate(rows)
    for shard, first in enumerate(range(0, len(rows) - 1, ROWS_PER_SHARD)):
        np.save(Path(directory) / f"shard_{shard:05d}.npy", rows[first : first + ROWS_PER_SHARD])
    what = "the installed Python packages" if packages else "Python's own library"
    return f"{rows.size:,} tokens of the source of {what} ({num_files} files), vocabulary {vocab_size}"
