"""Tokenize text files into shards."""

import codecs
import fcntl
import filecmp
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from ..errors import InputError, file_error, path_error
from .shards import METADATA, ROW_LENGTH, ROWS_PER_SHARD, STAGING, metadata
from .tokenizer import END_OF_TEXT, encode, load_tokenizer, num_ids, split_document, train_tokenizer, unique_keys

logger = logging.getLogger(__name__)

DEFAULT_VOCAB_SIZE = 8192
TRAINING_CHARACTERS = 200_000_000  # sample size for tokenizer training; more text changes few merges
PIECE_CHARACTERS = 1 << 20  # longer documents are split
BATCH_CHARACTERS = 1 << 23  # tokenized in one parallel call
JSON_LINES = (".jsonl", ".jsonlines", ".jl", ".ndjson", ".json")
BYTE_ORDER_MARKS = {  # UTF-32 is first because its little-endian mark starts with UTF-16's
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
JSON_TYPE_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}
CONVERT = "decompress it or convert it to UTF-8 text"
MAX_LINE_BYTES = 1 << 30  # in a JSON Lines file
MAX_SKIPPED_LOGGED = 20  # further skipped files are only counted


def read_documents(path: Path) -> Iterator[str]:
    """Yield a file's documents: the "text" of each JSON Lines line, or else the text between <|endoftext|> tokens.

    Raises InputError for a file that is not UTF-8, or for an invalid JSON line.
    """
    try:
        if path.suffix.lower() in JSON_LINES:
            with path.open("rb") as file:
                for number in count(1):
                    line = file.readline(MAX_LINE_BYTES + 1)
                    if not line:
                        break
                    if line.removeprefix(codecs.BOM_UTF8).strip():
                        yield from _split(_parse_line(line, f"{path}, line {number}"))
        else:
            yield from _split(_decode(path.read_bytes(), str(path)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _decode(content: bytes, where: str) -> str:
    for encoding, marks in BYTE_ORDER_MARKS.items():
        if content.startswith(marks):
            raise InputError(f"{where}: {encoding} text; convert it with `iconv -f {encoding} -t UTF-8`")
    if b"\0" in content:
        raise InputError(f"{where}: contains NUL characters: {CONVERT}")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}): {CONVERT}") from error


def _parse_line(line: bytes, where: str) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise InputError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB; split its text into several lines")
    decoded = _decode(line, where)
    try:
        value = json.loads(decoded, object_pairs_hook=unique_keys)
        text = value["text"] if isinstance(value, dict) and "text" in value else None
        if isinstance(text, str):
            text.encode()  # fails for half of a surrogate pair, which truncation can leave behind
            return text
        found = _describe_json(value)
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the text is not valid Unicode ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        found = f"not JSON ({getattr(error, 'msg', error)})"
    raise InputError(
        f'{where}: {found}; each line must be a JSON object with a "text" string; to read the file as plain text, '
        "rename it to .txt"
    )


def _describe_json(value: object) -> str:
    """Describe why a JSON value is not an object with a "text" string."""
    if not isinstance(value, dict):
        return f"the line is {JSON_TYPE_NAMES[type(value)]}"
    if "text" in value:
        return f'"text" is {JSON_TYPE_NAMES[type(value["text"])]}'
    return f'no "text" key; the keys are {repr(", ".join(value)[:80])[1:-1] or "none"}'


def _split(text: str) -> list[str]:
    return [document for document in text.split(END_OF_TEXT) if document.strip()]


class _Corpus:
    """The documents of all inputs: the given files and all files below the given directories, in a fixed order.

    Skips and logs hidden, duplicate and unreadable files, and __pycache__.
    """

    def __init__(self, inputs: list[str], output: Path):
        self.named = {Path(name) for name in inputs}
        self.files: dict[Path, int] = {}  # path to size
        self.skipped: set[Path] = set()
        self.hidden: list[Path] = []
        self._find([Path(name) for name in reversed(inputs)], Path(os.path.realpath(output)))
        if self.hidden:
            logger.info(f"skipped: {len(self.hidden)} hidden files and directories, such as {self.hidden[0]}")
        if not self.files:
            raise InputError(f"--input {' '.join(inputs)}: no files found")

    def _find(self, todo: list[Path], output: Path):
        seen: dict[tuple[int, int], Path] = {}
        while todo:
            path = todo.pop()
            if path not in self.named and path.name.startswith((".", "__pycache__")):
                self.hidden.append(path)
                continue
            try:
                status = path.stat()
                first = seen.setdefault((status.st_dev, status.st_ino), path)
                if first is not path:
                    self._skip(path, "given twice" if first == path else f"the same file as {first}")
                elif stat.S_ISDIR(status.st_mode):
                    if output.is_relative_to(path.resolve()):
                        raise InputError(f"--input {path} is or contains the output directory: choose another --output")
                    todo += sorted(path.iterdir(), reverse=True)
                elif path.name in (METADATA, "tokenizer.json") and path not in self.named:
                    raise InputError(
                        f"--input {path.parent} is already prepared: it contains {path.name}; pass the text files"
                    )
                elif stat.S_ISREG(status.st_mode):
                    self.files[path] = status.st_size
                else:
                    self._raise_or_skip(path, InputError(f"{path}: neither a file nor a directory; save it to a file"))
            except OSError as error:
                if path in self.named and not path.exists():
                    raise path_error("--input", path, "file") from error
                self._raise_or_skip(path, InputError(f"{path}: cannot be read ({error.strerror})"))

    def _raise_or_skip(self, path: Path, error: InputError):
        """Raise for JSON Lines and files given by name. Skip other files: directories can contain images."""
        if path in self.named or path.suffix.lower() in JSON_LINES:
            raise error
        self._skip(path, str(error).removeprefix(f"{path}: "))

    def _skip(self, path: Path, reason: str):
        if path not in self.skipped and len(self.skipped) < MAX_SKIPPED_LOGGED:
            logger.info(f"skipped: {path} ({reason})")
        self.skipped.add(path)

    def documents(self, label: str) -> Iterator[str]:
        """Yield all documents. Show a progress bar over the files' bytes."""
        total = sum(self.files.values())
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
            for path, size in self.files.items():
                try:
                    yield from read_documents(path)
                except InputError as error:
                    self._raise_or_skip(path, error)
                bar.update(size)


def _sample(documents: Iterator[str]) -> Iterator[str]:
    """Yield up to TRAINING_CHARACTERS of the documents, in short pieces, so the trainer can use all cores."""
    seen = 0
    for document in documents:
        for piece in split_document(document, 1 << 16):
            yield piece
            seen += len(piece)
        if seen > TRAINING_CHARACTERS:
            break
    documents.close()  # close the progress bar


def _tokens(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the ids of all documents in order. Each document ends with the end-of-text token."""
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.int32)

    def marked_pieces():
        for document in documents:
            *parts, last = split_document(document, PIECE_CHARACTERS, tokenizer)
            yield from ((part, False) for part in parts)
            yield last, True

    for batch in _batches(marked_pieces()):
        for ids, (_, ends_document) in zip(encode(tokenizer, [text for text, _ in batch]), batch, strict=True):
            yield np.array(ids, dtype=np.int32)
            if ends_document:
                yield end


def _batches(stream: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Group pieces into batches of BATCH_CHARACTERS or more. The tokenizer needs about 80 bytes per character."""
    batch, size = [], 0
    for piece in stream:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _write_shards(tokens: Iterator[np.ndarray], directory: Path) -> tuple[dict[str, int], int]:
    """Write the shards. Return the row count by shard name, and the number of leftover tokens, too few for a row."""
    shards = {}
    pending, size = [], 0

    def write(ids: np.ndarray):
        name = f"shard_{len(shards):05d}.npy"
        with (directory / name).open("wb") as file:
            # numpy writes to real files in C, and its errors omit the cause. So hide that this is a file.
            np.save(SimpleNamespace(write=file.write), ids.reshape(-1, ROW_LENGTH))
        shards[name] = len(ids) // ROW_LENGTH

    capacity = ROW_LENGTH * ROWS_PER_SHARD
    for ids in tokens:
        pending.append(ids)
        size += len(ids)
        while size >= capacity:
            joined = np.concatenate(pending)
            write(joined[:capacity])
            pending, size = [joined[capacity:]], size - capacity
    remainder = size % ROW_LENGTH
    if size >= ROW_LENGTH:
        write(np.concatenate(pending)[: size - remainder])
    return shards, remainder


def prepare(inputs: list[str], output: str, tokenizer_path: str | None = None, vocab_size: int | None = None):
    """Write shards, tokenizer.json (a copy of a given tokenizer) and shards.json to `output`, all at the end.

    Raises InputError for unreadable input, text that fills fewer than two rows, or an output that is not writable or
    contains shards or a different tokenizer.json. Raises RunFailed for a full disk.
    """
    if tokenizer_path and vocab_size:
        raise InputError("--tokenizer and --vocab_size are mutually exclusive: a given tokenizer has a fixed size")
    target = Path(output)
    for present in (*target.glob("shard_*.npy"), *target.glob(METADATA)):
        raise InputError(
            f"--output {target} already contains prepared data ({present.name}): remove it or choose another directory"
        )
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
    present = target / "tokenizer.json"
    if present.exists() and not (tokenizer and filecmp.cmp(present, tokenizer_path, shallow=False)):
        raise InputError(
            f"--output {target} already contains a different tokenizer.json: use it with --tokenizer {present} or "
            "choose another directory"
        )
    corpus = _Corpus(inputs, target)
    with _staged(target) as staging:
        if tokenizer:
            content = Path(tokenizer_path).read_bytes()
        else:
            tokenizer = train_tokenizer(_sample(corpus.documents("reading")), vocab_size or DEFAULT_VOCAB_SIZE)
            content = tokenizer.to_str(pretty=True).encode()
        shards, remainder = _write_shards(_tokens(corpus.documents("tokenizing"), tokenizer), staging)
        rows = sum(shards.values())
        if rows < 2:
            raise InputError(f"--input: the text fills {rows} rows of {ROW_LENGTH} tokens; at least 2 are needed")
        (staging / "tokenizer.json").write_bytes(content)
        (staging / METADATA).write_bytes(metadata(content, num_ids(tokenizer), shards))
    if len(corpus.skipped) > MAX_SKIPPED_LOGGED:
        logger.info(f"skipped: {len(corpus.skipped)} files in total")
    print(
        f"{target}: {rows * ROW_LENGTH:,} tokens in {rows:,} rows and {len(shards)} shards, vocabulary of "
        f"{tokenizer.get_vocab_size():,}; dropped the last {remainder} tokens, which do not fill a row"
    )


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Yield a directory inside `target`. On success, all its files move to `target`. On an error, none do.

    Existing files in `target` stay. A killed process leaves the directory behind. Shards rejects `target` while it
    exists. The next `prepare` empties it.
    """
    staging, moved = target / STAGING, []
    created = [directory for directory in (target, *target.parents) if not directory.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = _lock_staging(staging)
        try:
            for path in staging.iterdir():
                path.unlink()
            yield staging
            for path in sorted(staging.iterdir()):
                final = target / path.name
                if not final.exists():
                    path.replace(final)
                    moved.append(final)
        except BaseException:
            for path in moved:
                path.unlink()
            raise
        finally:
            shutil.rmtree(staging)
            os.close(lock)
            with suppress(OSError):  # rmdir fails for directories that are not empty
                for directory in created:
                    directory.rmdir()
    except BrokenPipeError:  # from the progress bar
        raise
    except OSError as error:
        raise file_error(f"--output {target}: cannot be written", error) from error


def _lock_staging(staging: Path) -> int:
    """Create the directory or reuse a stale one. Return a descriptor that holds a lock on it until closed."""
    stale = staging.exists()
    staging.mkdir(exist_ok=True)
    lock = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # without file locks, an existing directory could be in use
        if stale or isinstance(error, BlockingIOError):
            os.close(lock)
            raise InputError(
                f"{staging} is in use by another `prepare`: wait for it; if none is running, remove {staging}"
            ) from error
    return lock
