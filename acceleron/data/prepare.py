"""Text files to shards."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from ..errors import InputError, file_error, path_error
from .shards import ROW_LENGTH, ROWS_PER_SHARD
from .tokenizer import END_OF_TEXT, encode, load_tokenizer, pieces, train_tokenizer

DEFAULT_VOCAB_SIZE = 8192
TRAINING_CHARACTERS = 200_000_000  # the tokenizer learns from this much text; more changes few merges
PIECES_PER_BATCH = 64


def find_files(inputs: list[str]) -> list[Path]:
    """The named files, and every file below the named directories but hidden ones and __pycache__, in a fixed order."""
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.is_file())
            files += [
                p for p in below if not any(part.startswith((".", "__pycache__")) for part in p.relative_to(path).parts)
            ]
        elif path.is_file():
            files.append(path)
        else:
            raise path_error("--input", path, "file")
    if not files:
        raise InputError(f"--input {' '.join(inputs)}: no files there")
    return files


def read_documents(path: Path) -> Iterator[str]:
    """A file's documents: the "text" of each line of a .jsonl; else the text between <|endoftext|> marks.

    Raises InputError for a file that is not UTF-8, or not JSON lines with a text.
    """
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield from _split(_text_of(line, f"{path}, line {number}"))
        else:
            yield from _split(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # half of a surrogate pair, as left by cutting an emoji in two, has no UTF-8
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the text is not valid Unicode ({error.reason})") from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{where}: must be a JSON object with a "text" string ({error!r})') from error
    return text


def _split(text: str) -> list[str]:
    return [document for document in text.split(END_OF_TEXT) if document.strip()]


class _Corpus:
    """The documents of all inputs, with a progress bar over their bytes."""

    def __init__(self, inputs: list[str]):
        named = {Path(name) for name in inputs}
        self.files = find_files(inputs)
        self.named = [path in named for path in self.files]
        self.num_bytes = sum(path.stat().st_size for path in self.files)
        self.skipped: set[Path] = set()

    def documents(self, what: str) -> Iterator[str]:
        with tqdm(total=self.num_bytes, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
            for path, named in zip(self.files, self.named, strict=True):
                try:
                    yield from read_documents(path)
                except InputError:
                    # A directory may hold pictures and the like; a file the user named must be readable.
                    if named or path.suffix == ".jsonl":
                        raise
                    self.skipped.add(path)
                bar.update(path.stat().st_size)


def _sample(documents: Iterator[str]) -> Iterator[str]:
    """Pieces of the documents up to TRAINING_CHARACTERS; short pieces let the trainer use all cores."""
    seen = 0
    for document in documents:
        for piece in pieces(document, 1 << 16):
            yield piece
            seen += len(piece)
        if seen > TRAINING_CHARACTERS:
            break
    # Run the progress bar's context to its end.
    documents.close()


def _tokens(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of all documents in order, each document followed by the end-of-text token."""
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.int32)

    def marked_pieces():
        for document in documents:
            parts = list(pieces(document))
            yield from ((part, False) for part in parts[:-1])
            yield parts[-1], True

    stream = marked_pieces()
    while batch := list(islice(stream, PIECES_PER_BATCH)):
        for ids, (_, ends_document) in zip(encode(tokenizer, [text for text, _ in batch]), batch, strict=True):
            yield np.array(ids, dtype=np.int32)
            if ends_document:
                yield end


def _write_shards(tokens: Iterator[np.ndarray], directory: Path) -> tuple[int, int, int]:
    """Returns the numbers of shards, rows, and tokens left over, too few for a row."""
    shards = rows = 0
    pending, size = [], 0

    def write(ids: np.ndarray):
        nonlocal shards, rows
        np.save(directory / f"shard_{shards:05d}.npy", ids.reshape(-1, ROW_LENGTH))
        shards, rows = shards + 1, rows + len(ids) // ROW_LENGTH

    capacity = ROW_LENGTH * ROWS_PER_SHARD
    for ids in tokens:
        pending.append(ids)
        size += len(ids)
        while size >= capacity:
            joined = np.concatenate(pending)
            write(joined[:capacity])
            pending, size = [joined[capacity:]], size - capacity
    left_over = size % ROW_LENGTH
    if size >= ROW_LENGTH:
        write(np.concatenate(pending)[: size - left_over])
    return shards, rows, left_over


def prepare(inputs: list[str], output: str, tokenizer_path: str | None = None, vocab_size: int | None = None):
    """Write shards and tokenizer.json to `output`; nothing appears there before all is done.

    Raises InputError for unreadable input, text that fills fewer than two rows, or an output that holds shards.
    """
    if tokenizer_path and vocab_size:
        raise InputError("--tokenizer and --vocab_size exclude each other: a given tokenizer has its own size")
    target = Path(output)
    if any(target.glob("shard_*.npy")):
        raise InputError(f"--output {target} already holds shards: remove them or name another directory")
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
    corpus = _Corpus(inputs)
    try:
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".prepare-", dir=target))
    except OSError as error:
        raise file_error(f"--output {target}: cannot be written", error) from error
    try:
        if tokenizer is None:
            documents = corpus.documents("reading")
            tokenizer = train_tokenizer(_sample(documents), vocab_size or DEFAULT_VOCAB_SIZE)
        shards, rows, left_over = _write_shards(_tokens(corpus.documents("tokenizing"), tokenizer), staging)
        if rows < 2:
            raise InputError(f"--input: the text fills {rows} rows of {ROW_LENGTH} tokens; at least 2 are needed")
        (staging / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        for path in sorted(staging.iterdir()):
            path.replace(target / path.name)
    except OSError as error:
        raise file_error(f"--output {target}: cannot be written", error) from error
    finally:
        shutil.rmtree(staging)
        with suppress(OSError):  # keeps a directory that holds anything
            target.rmdir()
    if corpus.skipped:
        print(f"skipped {len(corpus.skipped)} files that are not UTF-8 text")
    print(
        f"{target}: {rows * ROW_LENGTH:,} tokens in {rows:,} rows and {shards} shards, tokenizer of "
        f"{tokenizer.get_vocab_size():,} entries; the last {left_over} tokens filled no row and are left out"
    )
