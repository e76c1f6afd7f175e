"""Shuffled batches from shards: a pure function of the position in an endless stream, whoever computes it."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from .shards import Shards

# Validation measures at most this many batches, the same ones each time.
VALIDATION_BATCHES = 20


class Chunks:
    """One split of the shards, cut into chunks of seq_len tokens; every chunk of a row is used.

    Raises InputError if seq_len does not divide the row length.
    """

    def __init__(self, shards: Shards, seq_len: int, vocab_size: int, validation: bool = False):
        if shards.row_length % seq_len:
            raise InputError(f"--seq_len {seq_len} must divide the shards' row length {shards.row_length}")
        self.shards, self.seq_len, self.vocab_size = shards, seq_len, vocab_size
        self.per_row = shards.row_length // seq_len
        held_out = shards.num_validation_rows
        self.first_row = shards.num_rows - held_out if validation else np.zeros_like(held_out)
        self.ends = np.cumsum(held_out if validation else shards.num_rows - held_out)

    def __len__(self) -> int:
        return int(self.ends[-1]) * self.per_row

    def locate(self, indices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, row, first column) of each chunk."""
        rows, chunks = np.divmod(np.asarray(indices), self.per_row)
        shards = np.searchsorted(self.ends, rows, side="right")
        starts = self.ends - np.diff(self.ends, prepend=0)
        return shards, rows - starts[shards] + self.first_row[shards], chunks * self.seq_len

    def batch(self, indices) -> torch.Tensor:
        """int64 (len(indices), seq_len). Raises InputError, naming file and row, for an id outside the vocabulary."""
        shards, rows, columns = self.locate(indices)
        ids = np.empty((len(shards), self.seq_len), dtype=np.int64)
        for out, shard, row, column in zip(ids, shards.tolist(), rows.tolist(), columns.tolist(), strict=True):
            out[:] = self.shards.array(shard)[row, column : column + self.seq_len]
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            outside = (ids < 0) | (ids >= self.vocab_size)
            first = int(outside.any(axis=1).argmax())
            raise InputError(
                f"{self.shards.paths[shards[first]]}: row {rows[first]} holds token id {ids[outside][0]}, outside the "
                f"model's vocabulary of {self.vocab_size}; train with the data's tokenizer, or a larger --vocab_size"
            )
        return torch.from_numpy(ids)


class TokenStream(Dataset):
    """Item i is rank's i-th batch from `start` on, in an endless stream that shuffles each epoch anew.

    The stream is a sequence of chunks; batch i of rank r takes the chunks from start + (i * world_size + r) *
    batch_size on, so every chunk comes exactly once an epoch, whatever the numbers of ranks and workers.
    """

    def __init__(self, chunks: Chunks, batch_size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1):
        self.chunks, self.batch_size, self.seed = chunks, batch_size, seed
        self.start, self.rank, self.world_size = start, rank, world_size

    def __getitem__(self, step: int) -> torch.Tensor:
        first = self.start + (step * self.world_size + self.rank) * self.batch_size
        size = len(self.chunks)
        epochs, offsets = np.divmod(np.arange(first, first + self.batch_size), size)
        indices = [
            _permutation(self.seed, epoch, size)[offset] for epoch, offset in zip(epochs.tolist(), offsets, strict=True)
        ]
        return self.chunks.batch(indices)


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


class _Steps:
    """0, 1, 2, …: the endless sampler of a DataLoader."""

    def __iter__(self):
        return count()


class Loader:
    """The batches of a training run: `next(loader)` is int64 (batch_size, seq_len), pinned if asked for.

    `state_dict()` names the next chunk, whatever the workers have read ahead; `load_state_dict` continues there.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        seq_len: int,
        batch_size: int,
        vocab_size: int,
        seed: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.chunks = Chunks(shards, seq_len, vocab_size)
        self.batch_size, self.seed = batch_size, seed
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.rank, self.world_size = rank, world_size
        self._restart(0)

    def _restart(self, position: int):
        self.position = position
        self.stream = TokenStream(self.chunks, self.batch_size, self.seed, position, self.rank, self.world_size)
        self._step = 0
        self._batches: Iterator | None = None

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        if self._batches is None:
            # The workers start with the first batch, so that a loader about to be restored starts none in vain.
            loader = DataLoader(
                self.stream,
                batch_size=None,
                sampler=_Steps(),
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                prefetch_factor=4 if self.num_workers else None,
            )
            self._batches = iter(loader)
        try:
            batch = next(self._batches)
        except InputError:
            # A worker's error arrives wrapped in its traceback: raise it here, in one line.
            batch = self.stream[self._step]
        self._step += 1
        self.position += self.batch_size * self.world_size
        return batch

    @property
    def epoch(self) -> float:
        """Epochs begun and finished so far, as a fraction."""
        return self.position / len(self.chunks)

    def state_dict(self) -> dict:
        return {
            "position": self.position,
            "seed": self.seed,
            "seq_len": self.chunks.seq_len,
            "shards": self.chunks.shards.fingerprint(),
        }

    def load_state_dict(self, state: dict):
        """Raises InputError if the position was saved for other data, as it would not mean the same rows."""
        current = self.state_dict()
        for key in ("seed", "seq_len", "shards"):
            if state.get(key) != current[key]:
                what = "other shards" if key == "shards" else f"{key} {state.get(key)}, not {current[key]}"
                raise InputError(f"cannot resume: the checkpoint's run read {what}; pass the same data and flags")
        if type(state.get("position")) is not int or state["position"] < 0:
            raise InputError("cannot resume: the checkpoint holds no valid position in the data; it is damaged")
        self._restart(state["position"])


def validation_batches(shards: Shards, *, seq_len: int, batch_size: int, vocab_size: int) -> Iterator[torch.Tensor]:
    """The held-out split in a fixed order: at most VALIDATION_BATCHES full batches, or one smaller one."""
    chunks = Chunks(shards, seq_len, vocab_size, validation=True)
    order = _permutation(0, 0, len(chunks))
    full = len(order) // batch_size
    for step in range(max(1, min(full, VALIDATION_BATCHES))):
        yield chunks.batch(order[step * batch_size : (step + 1) * batch_size])
