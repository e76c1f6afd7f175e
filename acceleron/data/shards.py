"""The shard format: shard_00000.npy, …, each an integer array (sequences, row length) of token ids.

shards.json in the same directory records the shards and their tokenizer: see `metadata`.
"""

import hashlib
import io
import json
import logging
import math
import os
import re
import struct
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ..config import short_repr
from ..errors import InputError, path_error

logger = logging.getLogger(__name__)

ROW_LENGTH = 2048
ROWS_PER_SHARD = 10_000
# The last rows of each shard are held out for validation. They are contiguous, so few documents cross the split.
VALIDATION_SHARE = 0.01
METADATA, METADATA_FORMAT, MAX_METADATA_BYTES = "shards.json", 1, 1 << 24
STAGING = ".prepare"  # directory of an unfinished `prepare`, next to the shards
MAX_OPEN_FILES = 128
MAX_TOKENS = 2**36  # per shard listed in a checkpoint or shards.json: 256 GiB as int32
MAX_UNUSABLE_ROWS = 2**24  # per unusable shard listed in a checkpoint, because permutations still include its rows
_HEADER_BYTES = 2**14  # numpy rejects longer headers


class ShardError(InputError):
    """An unreadable row or an invalid token id. The message names the file, the row and the cause."""


# The header that np.save writes. numpy parses any other header.
_HEADER = re.compile(rb"\{'descr': '([<>|][biufc]\d+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n")


def _read_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return (shape, fortran_order, dtype) of a .npy file and advance past its header. Raises many exception types.

    numpy parses headers with Python's compiler. In Python 3.11, this fails at random while another thread compiles
    (SystemError: "AST constructor recursion depth mismatch"), for example a reader thread or torch.compile.
    """
    version = npy.read_magic(file)
    start = file.tell()
    size, length = (2, "<H") if version == (1, 0) else (4, "<I")
    (length,) = struct.unpack(length, file.read(size))
    found = _HEADER.fullmatch(file.read(length))
    if found:
        shape = tuple(int(size) for size in found[3].split(b",") if size.strip())
        return shape, found[2] == b"True", np.dtype(found[1].decode())
    file.seek(start)
    return (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)


class _ShardFile:
    """An open shard. Reads at offsets, because a memory-mapped file would crash the process if truncated.

    The file closes when its last reference is dropped, so it never closes while a thread reads it.
    """

    def __init__(self, fd: int):
        """Raises InputError, without the path, if the file is not a valid shard; OSError if it is unreadable."""
        self.fd = fd
        self.state = self._state()
        status = os.fstat(fd)
        # Does not change when the file is reopened, unless it was replaced or written to.
        self.identity = status.st_ino, status.st_mtime_ns, status.st_size
        try:
            header = io.BytesIO(os.pread(fd, _HEADER_BYTES, 0))
            self.shape, fortran_order, self.dtype = _read_header(header)
            self.offset = header.tell()
            if self.dtype.kind not in "iu":
                raise InputError(f"token ids must be integers, but the dtype is {self.dtype!s:.100}")
            if len(self.shape) != 2 or min(self.shape) < 1:
                raise InputError(f"expected shape (sequences, row length), but found {self.shape!s:.100}")
            if fortran_order:
                raise InputError("stored in Fortran order; convert it with np.ascontiguousarray")
            size = self.offset + math.prod(self.shape) * self.dtype.itemsize
            if os.fstat(fd).st_size < size:
                raise InputError(
                    f"truncated to {os.fstat(fd).st_size:,} of {size:,} bytes; download or prepare it again"
                )
        except (OSError, InputError):
            raise
        except Exception as error:  # a damaged header fails in many ways: ValueError, TokenError, RecursionError, …
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"damaged or not a .npy file ({reason}); download or prepare it again") from error

    def __del__(self):
        os.close(self.fd)

    def _state(self) -> tuple[int, int, int]:
        """Changes when the file is replaced, removed or written to. A timestamp alone can be too coarse to show it."""
        status = os.fstat(self.fd)
        return status.st_ctime_ns, status.st_size, status.st_nlink

    def read(self, row: int, column: int, count: int) -> np.ndarray:
        """Read `count` tokens in the file's dtype. Raises OSError, or InputError if the file has since changed."""
        tokens = np.empty(count, dtype=self.dtype)
        position = self.offset + (row * self.shape[1] + column) * self.dtype.itemsize
        received = os.preadv(self.fd, [tokens], position)
        # If the file was written to since its header was read, this position can contain anything.
        if self._state() != self.state:
            raise InputError("the file changed during the read")
        if received < tokens.nbytes:
            raise InputError("unexpected end of file")
        return tokens

    def checksum(self) -> int:
        """CRC-32 of the first, middle and last row. It distinguishes data with the same shape."""
        rows, row_length = self.shape
        checksum = 0
        for row in (0, rows // 2, rows - 1):
            checksum = zlib.crc32(self.read(row, 0, row_length), checksum)
        return checksum


class Shards:
    """The rows of a data directory, split into training and validation. Thread-safe.

    `known` is the fingerprint of an earlier run. If one of its shards is now missing, unreadable or has a different
    shape, the constructor logs a warning and keeps its rows, so all other rows keep their index. Reading them fails.

    Raises InputError for a missing or empty directory, a damaged `known` or shards.json, or if no shard of `known` is
    usable. Also raises it for an invalid shard that is not in `known`: truncated, not a 2-D integer array, or with a
    row length that differs from the first shard's or a row count that differs from shards.json.
    """

    def __init__(self, data_dir: str | Path, known: list | None = None):
        directory = Path(data_dir)
        if not directory.is_dir():
            raise path_error("--data_dir", directory, "directory")
        names = {path.name for path in directory.glob("shard_*.npy")}
        if not names:
            raise InputError(
                f"data directory {directory} has no shard_*.npy: create them with `python -m acceleron.data prepare`"
            )
        if (directory / STAGING).exists():
            raise InputError(
                f"data directory {directory} contains {STAGING}: `prepare` is still running or was killed, so shards "
                "are missing; wait for it, or empty the directory and prepare the data again"
            )
        known_shapes = {name: shape for name, *shape in check_fingerprint([] if known is None else known)}
        self.paths = [directory / name for name in sorted(names | known_shapes.keys())]
        self._unusable: dict[int, str] = {}  # unreadable shards of `known`, with the reason
        self._headers: dict[int, tuple] = {}
        self._identities: dict[int, tuple] = {}  # files with content that matches the fingerprint
        self._files: OrderedDict[int, _ShardFile] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._fingerprint = [self._inspect(index, known_shapes.get(path.name)) for index, path in enumerate(self.paths)]
        if len(self._unusable) == len(self.paths):
            raise InputError(
                f"cannot resume: the checkpoint's run used different shards than those in {directory} "
                f"({self.paths[0].name}: {self._unusable[0]}); pass the same data"
            )
        for index, reason in self._unusable.items():
            logger.warning(f"{self.paths[index]}: {reason}; none of its rows can be read")
        self.row_length = self._fingerprint[0][2]
        for path, (_, _, row_length, _) in zip(self.paths, self._fingerprint, strict=True):
            if row_length != self.row_length:
                raise InputError(
                    f"{path}: rows of {row_length} tokens, but {self.paths[0].name} has rows of {self.row_length}; "
                    "prepare all shards with the same row length"
                )
        self._metadata = _read_metadata(directory / METADATA)
        self._check_metadata()
        self.num_rows = np.array([rows for _, rows, _, _ in self._fingerprint])
        if self.num_rows.sum() < 2:
            raise InputError(f"{self.paths[0]}: one row is not enough, because one is held out; add more text")
        self.num_validation_rows = np.ceil(self.num_rows * VALIDATION_SHARE).astype(int)
        # A single-row shard is used for training. A different shard provides a validation row.
        self.num_validation_rows[self.num_rows == 1] = 0
        if not self.num_validation_rows.any():
            self.num_validation_rows[-1] = 1

    def _check_metadata(self):
        """Raise InputError for a shard that differs from shards.json. A partial download can have missing shards."""
        if self._metadata is None:
            return
        for index, (name, rows, *_) in enumerate(self._fingerprint):
            expected, path = self._metadata[2].get(name), self.paths[index]
            if expected != rows and index not in self._unusable:
                found = f"has {rows:,} rows, but {expected:,}" if expected else "is not"
                raise InputError(f"{path} {found} in {path.with_name(METADATA)}: prepare all shards together")

    def check_tokenizer(self, path: Path) -> bool:
        """Return False if there is no shards.json. Raises InputError if the shards used a different tokenizer."""
        if self._metadata is None:
            return False
        digest, vocab_size, _ = self._metadata
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise InputError(
                f"{path} is not the tokenizer of these shards; {self.paths[0].with_name(METADATA)} records one with "
                f"{vocab_size:,} ids: pass the tokenizer.json that `prepare` wrote next to them"
            )
        return True

    def _inspect(self, index: int, known: list | None) -> list:
        """Return the shard's fingerprint entry: from the file, or from the known entry if the file is unusable."""
        path = self.paths[index]
        try:
            file = self._open(index)
            self._headers[index], self._identities[index] = (file.shape, file.dtype), file.identity
            entry = [path.name, *map(int, file.shape), file.checksum()]
            if known and known[:2] != entry[1:3]:
                raise InputError(f"its shape is {file.shape}, previously {tuple(known[:2])}")
        except (OSError, InputError) as error:
            if known is None or known[0] > MAX_UNUSABLE_ROWS:
                raise InputError(f"{path}: {_reason(error)}") from error
            self._unusable[index] = _reason(error)
            return [path.name, *known]
        return entry

    def _file(self, index: int) -> _ShardFile:
        """Return the open shard. Raises OSError, or InputError if it is unusable or its content has changed."""
        if index in self._unusable:
            raise InputError(self._unusable[index])
        with self._lock:
            file = self._files.get(index)
            if file:
                self._files.move_to_end(index)
                return file
        file = self._open(index)  # outside the lock, so a slow disk does not block other threads
        header, original = (file.shape, file.dtype), self._headers[index]
        if header != original:
            raise InputError("its header changed from {} {} to {} {}".format(*original, *header))
        if file.identity != self._identities[index]:
            if file.checksum() != self._fingerprint[index][3]:
                raise InputError("its content changed since the start of the run")
            self._identities[index] = file.identity  # a copy, or a new timestamp
        with self._lock:
            self._files[index] = file
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def _open(self, index: int) -> _ShardFile:
        # With O_NONBLOCK, a named pipe fails instead of waiting for a writer.
        return _ShardFile(os.open(self.paths[index], os.O_RDONLY | os.O_NONBLOCK))

    def read(self, shard: int, row: int, column: int, out: np.ndarray):
        """Fill `out` (int64, 1-D) with the row's tokens, starting at `column`. Raises ShardError on failure."""
        try:
            out[:] = self._file(shard).read(row, column, len(out))
        except (OSError, InputError):
            # The open file may be stale: reopen it and retry once.
            with self._lock:
                self._files.pop(shard, None)
            try:
                out[:] = self._file(shard).read(row, column, len(out))
            except (OSError, InputError) as error:
                raise ShardError(f"{self.paths[shard]}: row {row} cannot be read: {_reason(error)}") from error

    def fingerprint(self) -> list[list]:
        """[[name, rows, row length, checksum], …]. A saved position is valid only for the same fingerprint.

        Every call returns the same list: do not modify it.
        """
        return self._fingerprint


def metadata(tokenizer: bytes, vocab_size: int, shards: dict[str, int]) -> bytes:
    """Return the content of shards.json from the content of tokenizer.json and a map of shard names to row counts."""
    digest = hashlib.sha256(tokenizer).hexdigest()
    fields = {"format": METADATA_FORMAT, "tokenizer_sha256": digest, "vocab_size": vocab_size, "shards": shards}
    return json.dumps(fields, indent=2).encode() + b"\n"


def _read_metadata(path: Path) -> tuple[str, int, dict[str, int]] | None:
    """Return (tokenizer digest, number of ids, rows per shard), or None if the file does not exist."""
    if not path.exists():
        return None
    if not path.is_file():  # opening a named pipe would block
        raise InputError(f"{path}: not a regular file; remove it or prepare the data again")
    try:
        with path.open("rb") as file:
            fields = json.loads(file.read(MAX_METADATA_BYTES))
        if fields["format"] != METADATA_FORMAT:
            raise ValueError(f"its format is {short_repr(fields['format'])}, not {METADATA_FORMAT}")
        for number in (fields["vocab_size"], *fields["shards"].values()):
            if type(number) is not int or not 0 < number <= MAX_TOKENS:
                raise ValueError(f"{short_repr(number)} is not a valid number of ids or rows")
        return str(fields["tokenizer_sha256"]), fields["vocab_size"], fields["shards"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged or from a different version ({error!s:.200}); rerun `prepare`") from error


def _reason(error: OSError | InputError) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def check_fingerprint(entries: object) -> list[list]:
    """Validate a fingerprint from an untrusted checkpoint. Raises InputError if it is invalid."""

    def valid(entry) -> bool:
        if not isinstance(entry, list) or [type(value) for value in entry] != [str, int, int, int]:
            return False
        name, rows, row_length, checksum = entry
        return (
            re.fullmatch(r"shard_[^/\\]*\.npy", name) is not None
            and name.isprintable()
            and min(rows, row_length) > 0
            and rows * row_length <= MAX_TOKENS
            and 0 <= checksum < 2**32
        )

    if isinstance(entries, list) and all(map(valid, entries)):
        names = [entry[0] for entry in entries]
        if names == sorted(set(names)) and len({entry[2] for entry in entries}) <= 1:
            return entries
    raise InputError("cannot resume: the checkpoint's list of shards is damaged; resume from another checkpoint")
