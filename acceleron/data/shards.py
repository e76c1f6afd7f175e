"""The shard format: shard_00000.npy, …, each an integer array (sequences, row length) of token ids.

Beside them, shards.json records the shards and the tokenizer that made them: see `metadata`.
"""

import hashlib
import io
import json
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

from ..config import brief
from ..errors import InputError, path_error
from ..log import say

ROW_LENGTH = 2048
ROWS_PER_SHARD = 10_000
# Of each shard the last rows are held out for validation: contiguous, so that few documents stand in both splits.
VALIDATION_SHARE = 0.01
METADATA, METADATA_FORMAT, MAX_METADATA_BYTES = "shards.json", 1, 1 << 24
STAGING = ".prepare"  # the directory, beside the shards, of a `prepare` that has not ended
MAX_OPEN_FILES = 128
MAX_TOKENS = 2**36  # of a shard, by a checkpoint's word: 256 GiB as int32
MAX_LOST_ROWS = 2**24  # of a shard that is not there, for whose rows memory is taken all the same
_HEADER_BYTES = 2**14  # numpy itself refuses longer headers


class ShardError(InputError):
    """A row that can't be read, or holds what it must not. The message names the file, the row and the cause."""


# As np.save writes it; other spellings are numpy's to read.
_HEADER = re.compile(rb"\{'descr': '([<>|][biufc]\d+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n")


def _read_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, fortran_order, dtype) of a .npy file, and the file's position after it. Raises one of many exceptions.

    numpy asks Python's compiler to read it, which in Python 3.11 fails at random while another thread compiles too
    (SystemError, "AST constructor recursion depth mismatch"), as a reader or torch.compile does.
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


class _File:
    """An open shard, read at offsets: a map would kill the process when the file is truncated under it.

    It closes when the last thread lets go of it, so never under a reader.
    """

    def __init__(self, fd: int):
        """Raises InputError, without the path, for what is no shard; OSError if it can't be read."""
        self.fd = fd
        self.state = self._state()
        status = os.fstat(fd)
        # The same at the next opening, unless the file was replaced or written to.
        self.identity = status.st_ino, status.st_mtime_ns, status.st_size
        try:
            header = io.BytesIO(os.pread(fd, _HEADER_BYTES, 0))
            self.shape, fortran_order, self.dtype = _read_header(header)
            self.offset = header.tell()
            if self.dtype.kind not in "iu":
                raise InputError(f"token ids must be integers, but this holds {self.dtype!s:.100}")
            if len(self.shape) != 2 or min(self.shape) < 1:
                raise InputError(f"expected shape (sequences, row length), but found {self.shape!s:.100}")
            if fortran_order:
                raise InputError("stored in Fortran order; save it from np.ascontiguousarray")
            size = self.offset + math.prod(self.shape) * self.dtype.itemsize
            if os.fstat(fd).st_size < size:
                raise InputError(
                    f"truncated to {os.fstat(fd).st_size:,} of the {size:,} bytes that its header promises; "
                    "fetch or prepare it again"
                )
        except (OSError, InputError):
            raise
        except Exception as error:  # a damaged header fails in many ways: ValueError, TokenError, RecursionError, …
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"damaged or not a .npy file ({reason}); fetch or prepare it again") from error

    def __del__(self):
        os.close(self.fd)

    def _state(self) -> tuple[int, int, int]:
        """Differs once the file is replaced, removed or written to; the time alone may be too coarse to tell."""
        status = os.fstat(self.fd)
        return status.st_ctime_ns, status.st_size, status.st_nlink

    def read(self, row: int, column: int, count: int) -> np.ndarray:
        """`count` tokens in the file's dtype. Raises OSError, and InputError if the file is not as it was opened."""
        tokens = np.empty(count, dtype=self.dtype)
        position = self.offset + (row * self.shape[1] + column) * self.dtype.itemsize
        received = os.preadv(self.fd, [tokens], position)
        # A file written to since its header was read may hold anything at this position.
        if self._state() != self.state:
            raise InputError("the file changed while it was read")
        if received < tokens.nbytes:
            raise InputError("the file ended early")
        return tokens

    def checksum(self) -> int:
        """CRC-32 of the first, the middle and the last row: tells data from other data of the same shape."""
        rows, row_length = self.shape
        checksum = 0
        for row in (0, rows // 2, rows - 1):
            checksum = zlib.crc32(self.read(row, 0, row_length), checksum)
        return checksum


class Shards:
    """The rows of a data directory, split into training and validation. Threads may share it.

    `known` is the fingerprint of an earlier run. A shard of it that is now missing, unreadable or of another shape
    keeps its place, so that every other row keeps its own; a warning names it, and each read from it fails.

    Raises InputError for a missing or empty directory; for a shard that is truncated, not an integer array of two
    dimensions, of another row length than the first, or not as shards.json records it, unless it keeps its place; if
    all would; and for a damaged `known` or shards.json.
    """

    def __init__(self, data_dir: str | Path, known: list | None = None):
        directory = Path(data_dir)
        if not directory.is_dir():
            raise path_error("--data_dir", directory, "directory")
        names = {path.name for path in directory.glob("shard_*.npy")}
        if not names:
            raise InputError(
                f"data directory {directory} has no shard_*.npy: fill it with `python -m acceleron.data prepare`"
            )
        if (directory / STAGING).exists():
            raise InputError(
                f"data directory {directory} holds {STAGING}: `prepare` is still running, or was killed, and not all "
                "shards are there; wait for it, or remove the directory's content and prepare it again"
            )
        places = {name: place for name, *place in check_fingerprint([] if known is None else known)}
        self.paths = [directory / name for name in sorted(names | places.keys())]
        self._lost: dict[int, str] = {}  # the shards that only keep their place, and why
        self._headers: dict[int, tuple] = {}
        self._identities: dict[int, tuple] = {}  # of the files whose content is known to be the fingerprint's
        self._files: OrderedDict[int, _File] = OrderedDict()  # the last one used last
        self._lock = threading.Lock()
        self._fingerprint = [self._inspect(index, places.get(path.name)) for index, path in enumerate(self.paths)]
        if len(self._lost) == len(self.paths):
            raise InputError(
                f"cannot resume: the checkpoint's run read other shards than {directory} holds "
                f"({self.paths[0].name}: {self._lost[0]}); pass the same data"
            )
        for index, reason in self._lost.items():
            say(f"warning: {self.paths[index]}: {reason}; none of its rows can be read")
        self.row_length = self._fingerprint[0][2]
        for path, (_, _, row_length, _) in zip(self.paths, self._fingerprint, strict=True):
            if row_length != self.row_length:
                raise InputError(
                    f"{path}: rows of {row_length} tokens, but {self.paths[0].name} has rows of {self.row_length}; "
                    "prepare all shards alike"
                )
        self._metadata = _read_metadata(directory / METADATA)
        self._check_metadata()
        self.num_rows = np.array([rows for _, rows, _, _ in self._fingerprint])
        if self.num_rows.sum() < 2:
            raise InputError(f"{self.paths[0]}: one row is not enough, as one is held out; add more text")
        self.num_validation_rows = np.ceil(self.num_rows * VALIDATION_SHARE).astype(int)
        # A shard of one row trains: another one has the row to hold out.
        self.num_validation_rows[self.num_rows == 1] = 0
        if not self.num_validation_rows.any():
            self.num_validation_rows[-1] = 1

    def _check_metadata(self):
        """Raises InputError for a shard that is not the one of shards.json. Some may be absent: downloads are parts."""
        if self._metadata is None:
            return
        for index, (name, rows, *_) in enumerate(self._fingerprint):
            expected, path = self._metadata[2].get(name), self.paths[index]
            if expected != rows and index not in self._lost:
                found = f"has {rows:,} rows, {expected:,}" if expected else "is not"
                raise InputError(f"{path} {found} in {path.with_name(METADATA)}: prepare all shards together")

    def check_tokenizer(self, path: Path) -> bool:
        """False if there is no shards.json. Raises InputError if another tokenizer made the shards."""
        if self._metadata is None:
            return False
        digest, vocab_size, _ = self._metadata
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise InputError(
                f"{path} did not make these shards; {self.paths[0].with_name(METADATA)} records one of {vocab_size:,} "
                "ids: pass the tokenizer.json that `prepare` wrote beside them"
            )
        return True

    def _inspect(self, index: int, place: list | None) -> list:
        """The shard's entry of the fingerprint, from the file; or, for one that is lost, from its place."""
        path = self.paths[index]
        try:
            file = self._open(index)
            self._headers[index], self._identities[index] = (file.shape, file.dtype), file.identity
            entry = [path.name, *map(int, file.shape), file.checksum()]
            if place and place[:2] != entry[1:3]:
                raise InputError(f"its shape is {file.shape}, and was {tuple(place[:2])}")
        except (OSError, InputError) as error:
            if place is None or place[0] > MAX_LOST_ROWS:
                raise InputError(f"{path}: {_reason(error)}") from error
            self._lost[index] = _reason(error)
            return [path.name, *place]
        return entry

    def _file(self, index: int) -> _File:
        """The open shard. Raises OSError or, also if it is not what it was at first, InputError."""
        if index in self._lost:
            raise InputError(self._lost[index])
        with self._lock:
            file = self._files.get(index)
            if file:
                self._files.move_to_end(index)
                return file
        file = self._open(index)  # outside the lock, so that a slow disk holds up nobody else
        header, noted = (file.shape, file.dtype), self._headers[index]
        if header != noted:
            raise InputError("its header tells of {} {}, and told of {} {}".format(*header, *noted))
        if file.identity != self._identities[index]:
            if file.checksum() != self._fingerprint[index][3]:
                raise InputError("the file has other content than at the start")
            self._identities[index] = file.identity  # a copy, or only touched
        with self._lock:
            self._files[index] = file
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def _open(self, index: int) -> _File:
        # O_NONBLOCK: a pipe fails instead of waiting.
        return _File(os.open(self.paths[index], os.O_RDONLY | os.O_NONBLOCK))

    def read(self, shard: int, row: int, column: int, out: np.ndarray):
        """Fill `out` (int64, 1-D) with the row's tokens from this column on. Raises ShardError."""
        try:
            out[:] = self._file(shard).read(row, column, len(out))
        except (OSError, InputError):
            # What was open may be stale: once more, from a file opened and inspected anew.
            with self._lock:
                self._files.pop(shard, None)
            try:
                out[:] = self._file(shard).read(row, column, len(out))
            except (OSError, InputError) as error:
                raise ShardError(f"{self.paths[shard]}: row {row} cannot be read: {_reason(error)}") from error

    def fingerprint(self) -> list[list]:
        """[[name, rows, row length, checksum], …]: tells whether a saved position still means the same chunks.

        Always the same list, not to be changed.
        """
        return self._fingerprint


def metadata(tokenizer: bytes, vocab_size: int, shards: dict[str, int]) -> bytes:
    """The content of shards.json, from tokenizer.json's content, the number of ids, and the rows of each shard."""
    digest = hashlib.sha256(tokenizer).hexdigest()
    fields = {"format": METADATA_FORMAT, "tokenizer_sha256": digest, "vocab_size": vocab_size, "shards": shards}
    return json.dumps(fields, indent=2).encode() + b"\n"


def _read_metadata(path: Path) -> tuple[str, int, dict[str, int]] | None:
    """The tokenizer's digest, the number of ids, the rows of each shard; None if there is no such file."""
    if not path.exists():
        return None
    if not path.is_file():  # opening a pipe would wait for a writer
        raise InputError(f"{path}: not a regular file; remove it, or prepare the data again")
    try:
        with path.open("rb") as file:
            fields = json.loads(file.read(MAX_METADATA_BYTES))
        if fields["format"] != METADATA_FORMAT:
            raise ValueError(f"its format is {brief(fields['format'])}, not {METADATA_FORMAT}")
        for number in (fields["vocab_size"], *fields["shards"].values()):
            if type(number) is not int or not 0 < number <= MAX_TOKENS:
                raise ValueError(f"{brief(number)} is not a number of ids or rows")
        return str(fields["tokenizer_sha256"]), fields["vocab_size"], fields["shards"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged, or of another version ({error!s:.200}); prepare the data again") from error


def _reason(error: OSError | InputError) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file has vanished"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def check_fingerprint(entries: object) -> list[list]:
    """A fingerprint out of a checkpoint, which may hold anything. Raises InputError if it can't be one."""

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
