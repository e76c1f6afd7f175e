"""Shuffled batches from shards. Each batch is a pure function of its position in an endless stream."""

import sys
import threading
import time
import weakref
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from queue import Empty, Full, Queue

import numpy as np
import torch

from ..errors import InputError
from .shards import ShardError, Shards, check_fingerprint

VALIDATION_BATCHES = 20  # maximum per evaluation; every evaluation uses the same batches
PREFETCH_BATCHES = 4  # per reader thread
MAX_SUBSTITUTES = 100  # number of random chunks to try in place of a bad one
MAX_ROWS_LISTED = 8  # in the output of describe_rows()
CLOSE_SECONDS = 1.0  # maximum time that close() waits for the readers


class Chunks:
    """One split of the shards, cut into chunks of seq_len tokens. Every chunk of a row is used.

    A bad chunk is unreadable or contains an id outside the vocabulary. `bad_data="fail"` raises an error; "skip"
    substitutes a different chunk of the split, chosen only by the seed, the chunk and the files.

    Raises InputError if seq_len does not divide the row length.
    """

    def __init__(
        self,
        shards: Shards,
        seq_len: int,
        vocab_size: int,
        validation: bool = False,
        bad_data: str = "fail",
        seed: int = 0,
    ):
        if shards.row_length % seq_len:
            raise InputError(f"--seq_len {seq_len} must divide the shards' row length {shards.row_length}")
        self.shards, self.seq_len, self.vocab_size = shards, seq_len, vocab_size
        self.bad_data, self.seed = bad_data, seed
        self.chunks_per_row = shards.row_length // seq_len
        held_out = shards.num_validation_rows
        self.first_row = shards.num_rows - held_out if validation else np.zeros_like(held_out)
        self.ends = np.cumsum(held_out if validation else shards.num_rows - held_out)

    def __len__(self) -> int:
        return int(self.ends[-1]) * self.chunks_per_row

    def locate(self, indices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (shard, row, first column) of each chunk."""
        rows, chunks = np.divmod(np.asarray(indices), self.chunks_per_row)
        shards = np.searchsorted(self.ends, rows, side="right")
        starts = self.ends - np.diff(self.ends, prepend=0)
        return shards, rows - starts[shards] + self.first_row[shards], chunks * self.seq_len

    def stream(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: the chunks starting at position `first` of an endless stream, reshuffled every epoch."""
        epochs, offsets = np.divmod(np.arange(first, first + count), len(self))
        indices = np.empty_like(offsets)
        for epoch in range(epochs[0], epochs[-1] + 1):
            indices[epochs == epoch] = _permutation(self.seed, epoch, len(self))[offsets[epochs == epoch]]
        return indices

    def batch(self, indices, warnings: list[str] | None = None) -> torch.Tensor:
        """Return int64 (len(indices), seq_len). Appends a line to `warnings` for each replaced chunk.

        Raises ShardError for a bad chunk, or if no substitute is readable.
        """
        ids = np.empty((len(indices), self.seq_len), dtype=np.int64)
        for index, out, *location in zip(indices, ids, *self._locations(indices), strict=True):
            try:
                self._read(*location, out)
            except ShardError as error:
                if self.bad_data == "fail":
                    raise
                if warnings is not None:
                    warnings.append(str(error))
                self._substitute(int(index), out)
        return torch.from_numpy(ids)

    def _locations(self, indices) -> list[list[int]]:
        return [values.tolist() for values in self.locate(indices)]

    def _read(self, shard: int, row: int, column: int, out: np.ndarray):
        self.shards.read(shard, row, column, out)
        if out.view(np.uint64).max() >= self.vocab_size:  # viewed as unsigned, negative ids are large
            outside = out[(out < 0) | (out >= self.vocab_size)][0]
            raise ShardError(
                f"{self.shards.paths[shard]}: row {row} contains token id {outside}, outside the model's vocabulary of "
                f"{self.vocab_size}; train with the data's tokenizer or a larger --vocab_size (with --init_from: "
                "prepare the data with the model's tokenizer)"
            )

    def _substitute(self, index: int, out: np.ndarray):
        drawn = np.random.default_rng([self.seed, index]).integers(len(self), size=MAX_SUBSTITUTES)
        for location in zip(*self._locations(drawn), strict=True):
            try:
                return self._read(*location, out)
            except ShardError as error:
                last = error
        raise ShardError(f"no readable data: {MAX_SUBSTITUTES} random rows are all bad; last error: {last}")


@lru_cache(maxsize=3)  # two epochs if a batch spans both, and validation
def _cached_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


_permutation_lock = threading.Lock()


def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    with _permutation_lock:  # all readers enter an epoch together, but only one computes its permutation
        return _cached_permutation(seed, epoch, size)


def _prefetch(
    chunks: Chunks, positions: Iterable[int], batch_size: int, pin_memory: bool, queue: Queue, stop: threading.Event
):
    """Reader thread: queue (batch, warnings) pairs until `stop` is set. On an error, queue the exception and exit.

    It holds no reference to its Loader, so the Loader can be garbage-collected.
    """
    for position in positions:
        try:
            warnings = []
            batch = chunks.batch(chunks.stream(position, batch_size), warnings)
            item = (batch.pin_memory() if pin_memory else batch, warnings)
        except Exception as error:
            item = error
        while True:
            if stop.is_set():
                return
            try:
                queue.put(item, timeout=0.1)
                break
            except Full:
                pass
        if isinstance(item, Exception):
            return


class Loader:
    """Endless batches of the training split: `next(loader)` is int64 (batch_size, seq_len), pinned if `pin_memory`.

    Each step consumes the next batch_size * world_size chunks of the stream, in rank order. Every chunk appears exactly
    once per epoch, for any number of ranks and reader threads (`num_workers`). The readers start when the first
    batch is requested. `state_dict()` saves the consumed position, not the prefetched one.

    Attributes:
        position: chunks consumed by all ranks.
        skipped_rows: rows that this rank has replaced so far (`bad_data="skip"`).
        warnings: one line per replaced row. The caller logs and clears them.

    With `validation`, iterate once over the held-out split: see `held_out`.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        seq_len: int,
        batch_size: int,
        vocab_size: int,
        seed: int,
        bad_data: str = "fail",
        num_workers: int = 1,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
        validation: bool = False,
    ):
        if num_workers < 1:
            raise InputError(f"--num_workers {num_workers}: must be at least 1")
        self.chunks = Chunks(shards, seq_len, vocab_size, validation=validation, bad_data=bad_data, seed=seed)
        self.batch_size, self.end = batch_size, sys.maxsize
        if validation:
            if len(self.chunks) < world_size:
                raise InputError(
                    f"the validation split has {len(self.chunks)} sequences of {seq_len} tokens, fewer than "
                    f"{world_size} ranks: use fewer ranks, a smaller --seq_len or more data"
                )
            self.batch_size = min(batch_size, len(self.chunks) // world_size)
            step = self.batch_size * world_size
            self.end = min(len(self.chunks) // step, VALIDATION_BATCHES) * step
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.rank, self.world_size = rank, world_size
        self.skipped_rows = 0
        self.warnings: list[str] = []
        self._readers: list[tuple[threading.Thread, Queue]] = []
        self._restart(0)

    def _restart(self, position: int):
        """Stop the readers. The next batch starts new ones at this position."""
        if self._readers:
            self._stop()
        self.position = position
        self._readers = []
        self._step = 0

    def _start(self):
        stop = threading.Event()
        self._stop = weakref.finalize(self, stop.set)  # also runs when the Loader is garbage collected
        step = self.batch_size * self.world_size
        for index in range(self.num_workers):
            first = self.position + index * step + self.rank * self.batch_size
            queue = Queue(PREFETCH_BATCHES)
            positions = range(first, self.end, self.num_workers * step)
            thread = threading.Thread(
                target=_prefetch,
                args=(self.chunks, positions, self.batch_size, self.pin_memory, queue, stop),
                name=f"reader-{index}",
                daemon=True,
            )
            self._readers.append((thread, queue))
            thread.start()

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        while (batch := self.poll(1.0)) is None:
            pass
        return batch

    def poll(self, timeout: float) -> torch.Tensor | None:
        """Return the next batch, or None if none arrives in `timeout` seconds. After an error, the next call retries.

        Raises ShardError for a bad chunk, RuntimeError if a reader fails for any other reason, and StopIteration after
        the last validation batch.
        """
        if self.position >= self.end:
            raise StopIteration
        if not self._readers:
            self._start()
        thread, queue = self._readers[self._step % self.num_workers]
        alive = thread.is_alive()  # check before reading the queue: a dead thread has queued its last item
        try:
            item = queue.get(timeout=timeout if alive else 0)
        except Empty:
            if alive:
                return None
            self._restart(self.position)
            raise RuntimeError("a reader thread exited without an error") from None
        if isinstance(item, Exception):
            self._restart(self.position)
            if isinstance(item, InputError):
                raise item
            raise RuntimeError(f"a reader thread failed: {type(item).__name__}: {item}") from item
        batch, warnings = item
        self._step += 1
        self.position += self.batch_size * self.world_size
        self.skipped_rows += len(warnings)
        self.warnings += warnings
        return batch

    def close(self):
        """Stop the readers and wait up to CLOSE_SECONDS. A reader blocked on a stalled disk exits when it unblocks."""
        readers = self._readers
        self._restart(self.position)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread, _ in readers:
            thread.join(max(0, deadline - time.monotonic()))

    def held_out(self) -> "Loader":
        """Return a Loader over this rank's part of the held-out split in a fixed order, with one reader.

        It yields at most VALIDATION_BATCHES full batches, or one smaller batch if the split is smaller than a batch of
        all ranks. Raises InputError if a rank would get no sequence.
        """
        chunks = self.chunks
        return Loader(
            chunks.shards, seq_len=chunks.seq_len, batch_size=self.batch_size, vocab_size=chunks.vocab_size, seed=0,
            bad_data=chunks.bad_data, rank=self.rank, world_size=self.world_size, validation=True,
        )  # fmt: skip

    @property
    def epoch(self) -> float:
        """Number of epochs consumed so far, including fractions."""
        return self.position / len(self.chunks)

    def describe_rows(self, position: int, all_ranks: bool = False) -> str:
        """Describe the files and rows of this rank's batch at `position`, or of all ranks'.

        Lists skipped rows, not substitutes.
        """
        first, count = position + self.rank * self.batch_size, self.batch_size
        if all_ranks:
            first, count = position, self.batch_size * self.world_size
        indices = self.chunks.stream(first, count)
        shards, rows, _ = self.chunks.locate(indices)
        locations = sorted(set(zip(shards.tolist(), rows.tolist(), strict=True)))
        parts = []
        for shard, group in groupby(locations[:MAX_ROWS_LISTED], key=itemgetter(0)):
            numbers = [str(row) for _, row in group]
            noun = "rows" if len(numbers) > 1 else "row"
            parts.append(f"{self.chunks.shards.paths[shard]} {noun} {', '.join(numbers)}")
        more = len(locations) - MAX_ROWS_LISTED
        return "; ".join(parts) + (f" and {more} more" if more > 0 else "")

    def state_dict(self) -> dict:
        return {
            "position": self.position,
            "skipped_rows": self.skipped_rows,
            "seed": self.chunks.seed,
            "seq_len": self.chunks.seq_len,
            "shards": self.chunks.shards.fingerprint(),
        }

    def load_state_dict(self, state: dict):
        """Raises InputError if the state is damaged or from different data, where the position means different rows."""
        current = self.state_dict()
        if not isinstance(state, dict):
            raise InputError("cannot resume: the checkpoint has no data loader state; it is damaged")
        for key, limit in {"position": 2**62, "skipped_rows": 2**62, "seed": 2**64, "seq_len": 2**62}.items():
            if type(state.get(key)) is not int or not 0 <= state[key] < limit:
                raise InputError(f"cannot resume: the checkpoint has an invalid data loader {key}; it is damaged")
        for key in ("seed", "seq_len"):
            if state[key] != current[key]:
                raise InputError(
                    f"cannot resume: the checkpoint's run used {key} {state[key]}, not {current[key]}; "
                    "pass the same data and flags"
                )
        before, now = check_fingerprint(state.get("shards")), current["shards"]
        changes = _changes(before, now)
        if changes:
            listed = "; ".join(changes[:2]) + (f"; and {len(changes) - 2} more" if len(changes) > 2 else "")
            missing = {entry[0] for entry in before} - {entry[0] for entry in now}
            raise InputError(
                f"cannot resume: the checkpoint's run used different shards: {listed}; pass the same data"
                + (" (--bad_data skip continues without a missing shard)" if missing else "")
            )
        self._restart(state["position"])
        self.skipped_rows = state["skipped_rows"]


def _changes(before: list[list], now: list[list]) -> list[str]:
    """Describe the changes from the first fingerprint to the second, with one clause per changed shard."""
    old, new = ({name: values for name, *values in fingerprint} for fingerprint in (before, now))
    changes = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            changes.append(f"{name} is missing")
        elif name not in old:
            changes.append(f"{name} is new")
        elif old[name][:2] != new[name][:2]:
            changes.append("{} has {} rows of {}, previously {} of {}".format(name, *new[name][:2], *old[name][:2]))
        elif old[name] != new[name]:
            changes.append(f"{name} has different content")
    return changes
