"""The shard format: shard_00000.npy, …, each an integer array (sequences, row length) of token ids."""

from pathlib import Path

import numpy as np

from ..errors import InputError

ROW_LENGTH = 2048
ROWS_PER_SHARD = 10_000
# Of each shard the last rows are held out for validation: contiguous, so that few documents stand in both splits.
VALIDATION_SHARE = 0.01


class Shards:
    """The rows of a data directory, memory-mapped, split into training and validation.

    Raises InputError for a missing or empty directory, and for a shard that is truncated, not an integer array of
    two dimensions, or of another row length than the first.
    """

    def __init__(self, data_dir: str | Path):
        directory = Path(data_dir)
        if not directory.is_dir():
            raise InputError(
                f"data directory {directory} does not exist: make it with `python -m acceleron.data prepare`"
            )
        self.paths = sorted(directory.glob("shard_*.npy"))
        if not self.paths:
            raise InputError(
                f"data directory {directory} has no shard_*.npy: fill it with `python -m acceleron.data prepare`"
            )
        self._arrays: dict[int, np.ndarray] = {}
        shapes = [self.array(index).shape for index in range(len(self.paths))]
        self.row_length = shapes[0][1]
        for path, shape in zip(self.paths, shapes, strict=True):
            if shape[1] != self.row_length:
                raise InputError(
                    f"{path}: rows of {shape[1]} tokens, but {self.paths[0].name} has rows of {self.row_length}; "
                    "prepare all shards alike"
                )
        self.num_rows = np.array([shape[0] for shape in shapes])
        if self.num_rows.sum() < 2:
            raise InputError(f"{self.paths[0]}: one row is not enough, as one is held out; add more text")
        self.num_validation_rows = np.ceil(self.num_rows * VALIDATION_SHARE).astype(int)
        # A shard of one row trains: another one has the row to hold out.
        self.num_validation_rows[self.num_rows == 1] = 0
        if not self.num_validation_rows.any():
            self.num_validation_rows[-1] = 1

    def __getstate__(self):
        # A worker process maps the files itself, rather than receiving their contents.
        return self.__dict__ | {"_arrays": {}}

    def array(self, index: int) -> np.ndarray:
        """The memory-mapped shard of this index."""
        if index not in self._arrays:
            path = self.paths[index]
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # a damaged header fails in many ways: ValueError, BadZipFile, TokenError, …
                reason = " ".join(str(error).split())
                raise InputError(f"{path}: damaged or not a .npy file ({reason}); fetch or prepare it again") from error
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
                kind = getattr(array, "dtype", type(array).__name__)
                raise InputError(f"{path}: token ids must be integers, but this holds {kind}")
            if array.ndim != 2 or 0 in array.shape:
                raise InputError(f"{path}: expected shape (sequences, row length), but found {array.shape}")
            self._arrays[index] = array
        return self._arrays[index]

    def fingerprint(self) -> list[list]:
        """[[name, rows, row length], …]: tells whether a saved position still means the same chunks."""
        return [[path.name, int(rows), self.row_length] for path, rows in zip(self.paths, self.num_rows, strict=True)]
