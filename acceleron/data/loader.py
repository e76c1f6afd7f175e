"""Shuffled batches from shards: a pure function of the position in an endless stream, whoever computes it."""

import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from queue import Empty, Full, Queue

import numpy as np
import torch

from ..errors import InputError
from .shards import ShardError, Shards, check_fingerprint

# Validation measures at most this many batches, the same ones each time.
VALIDATION_BATCHES = 20
BATCHES_AHEAD = 4  # of each reader thread
MAX_DRAWS = 100  # of a substitute for a bad chunk
ROWS_NAMED = 8  # by origin()
CLOSE_SECONDS = 1.0  # that close() waits for the readers


class Chunks:
    """One split of the shards, cut into chunks of seq_len tokens; every chunk of a row is used.

    A chunk that can't be read, or holds an id outside the vocabulary, is an error if `bad_data` is "fail"; if it is
    "skip", another chunk of the split takes its place: which one depends on the seed, the chunk and the files alone.

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

    def stream(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: the chunks from position `first` of an endless stream, which shuffles each epoch anew."""
        epochs, offsets = np.divmod(np.arange(first, first + count), len(self))
        indices = np.empty_like(offsets)
        for epoch in range(epochs[0], epochs[-1] + 1):
            indices[epochs == epoch] = _permutation(self.seed, epoch, len(self))[offsets[epochs == epoch]]
        return indices

    def batch(self, indices, complaints: list[str] | None = None) -> torch.Tensor:
        """int64 (len(indices), seq_len). For each chunk replaced, a line that says why is added to `complaints`.

        Raises ShardError for a bad chunk, or if no good one is found in its place.
        """
        ids = np.empty((len(indices), self.seq_len), dtype=np.int64)
        for index, out, *place in zip(indices, ids, *self._places(indices), strict=True):
            try:
                self._read(*place, out)
            except ShardError as error:
                if self.bad_data == "fail":
                    raise
                if complaints is not None:
                    complaints.append(str(error))
                self._substitute(int(index), out)
        return torch.from_numpy(ids)

    def _places(self, indices) -> list[list[int]]:
        return [values.tolist() for values in self.locate(indices)]

    def _read(self, shard: int, row: int, column: int, out: np.ndarray):
        self.shards.read(shard, row, column, out)
        if out.view(np.uint64).max() >= self.vocab_size:  # as unsigned numbers the negative ones are large, too
            outside = out[(out < 0) | (out >= self.vocab_size)][0]
            raise ShardError(
                f"{self.shards.paths[shard]}: row {row} holds token id {outside}, outside the model's vocabulary of "
                f"{self.vocab_size}; train with the data's tokenizer, or a larger --vocab_size"
            )

    def _substitute(self, index: int, out: np.ndarray):
        drawn = np.random.default_rng([self.seed, index]).integers(len(self), size=MAX_DRAWS)
        for place in zip(*self._places(drawn), strict=True):
            try:
                return self._read(*place, out)
            except ShardError as error:
                last = error
        raise ShardError(f"no readable data: {MAX_DRAWS} rows drawn at random are all bad, the last of them {last}")


@lru_cache(maxsize=3)  # a batch may straddle two epochs; and validation has its own
def _cached_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


_permuting = threading.Lock()


def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    with _permuting:  # the readers enter an epoch together: one computes it for all
        return _cached_permutation(seed, epoch, size)


def _read_ahead(
    chunks: Chunks, positions: Iterable[int], batch_size: int, pin_memory: bool, queue: Queue, stop: threading.Event
):
    """A reader thread: puts (batch, complaints), or at last the exception that ended it, until `stop` is set.

    It knows nothing of its Loader, which can thus be garbage collected.
    """
    for position in positions:
        try:
            complaints = []
            batch = chunks.batch(chunks.stream(position, batch_size), complaints)
            item = (batch.pin_memory() if pin_memory else batch, complaints)
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
    """Batches of the training split, without end: `next(loader)` is int64 (batch_size, seq_len), pinned if asked for.

    The stream is a sequence of chunks, of which a step takes the next batch_size * world_size, the ranks in turn: every
    chunk comes exactly once an epoch, whatever the numbers of ranks and of the `num_workers` threads that read ahead.
    These start with the first batch that is asked for. `state_dict()` names the next chunk, whatever they have read;
    `load_state_dict` continues there.

    `position`: chunks consumed by all ranks. `skipped_rows`: how often this rank's batches so far hold another row in
    place of a bad one (`bad_data="skip"`). `complaints`: a line for each, for the caller to show and clear.

    With `validation` it reads the held-out split, and ends: see validation_loader.
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
            raise InputError(f"--num_workers {num_workers}: at least one thread must read")
        self.chunks = Chunks(shards, seq_len, vocab_size, validation=validation, bad_data=bad_data, seed=seed)
        self.batch_size, self.end = batch_size, sys.maxsize
        if validation:
            self.batch_size = min(batch_size, len(self.chunks))
            self.end = min(len(self.chunks) // self.batch_size, VALIDATION_BATCHES) * self.batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.rank, self.world_size = rank, world_size
        self.skipped_rows = 0
        self.complaints: list[str] = []
        self._readers: list[tuple[threading.Thread, Queue]] = []
        self._restart(0)

    def _restart(self, position: int):
        """Continue at this position, with new readers."""
        if self._readers:
            self._stop()
        self.position = position
        self._readers = []
        self._step = 0

    def _start(self):
        stop = threading.Event()
        self._stop = weakref.finalize(self, stop.set)  # to be called; or it is, when the Loader is no more
        step = self.batch_size * self.world_size
        for index in range(self.num_workers):
            first = self.position + index * step + self.rank * self.batch_size
            queue = Queue(BATCHES_AHEAD)
            positions = range(first, self.end, self.num_workers * step)
            thread = threading.Thread(
                target=_read_ahead,
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
        """The next batch, or None if there is none after `timeout` seconds. After an error, the next call tries again.

        Raises ShardError for a bad chunk, and RuntimeError, with its cause, if a reader failed in another way; and
        StopIteration after the last batch of a validation.
        """
        if self.position >= self.end:
            raise StopIteration
        if not self._readers:
            self._start()
        thread, queue = self._readers[self._step % self.num_workers]
        alive = thread.is_alive()  # asked first: what a thread leaves when it ends is in the queue by then
        try:
            item = queue.get(timeout=timeout if alive else 0)
        except Empty:
            if alive:
                return None
            self._restart(self.position)
            raise RuntimeError("a reader thread ended without an error") from None
        if isinstance(item, Exception):
            self._restart(self.position)
            if isinstance(item, InputError):
                raise item
            raise RuntimeError(f"a reader thread failed: {type(item).__name__}: {item}") from item
        batch, complaints = item
        self._step += 1
        self.position += self.batch_size * self.world_size
        self.skipped_rows += len(complaints)
        self.complaints += complaints
        return batch

    def close(self):
        """End the readers, waiting for them up to CLOSE_SECONDS: one that a stalled disk holds ends when it wakes."""
        readers = self._readers
        self._restart(self.position)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread, _ in readers:
            thread.join(max(0, deadline - time.monotonic()))

    @property
    def epoch(self) -> float:
        """Epochs begun and finished so far, as a fraction."""
        return self.position / len(self.chunks)

    def origin(self, position: int) -> str:
        """Files and rows of this rank's batch of the step that begins at `position`, as the stream has them.

        Rows that had to be skipped are named, and not those that came in their place.
        """
        indices = self.chunks.stream(position + self.rank * self.batch_size, self.batch_size)
        shards, rows, _ = self.chunks.locate(indices)
        places = sorted(set(zip(shards.tolist(), rows.tolist(), strict=True)))
        parts = []
        for shard, group in groupby(places[:ROWS_NAMED], key=itemgetter(0)):
            numbers = [str(row) for _, row in group]
            parts.append(f"{self.chunks.shards.paths[shard]} row{'s' * (len(numbers) > 1)} {', '.join(numbers)}")
        more = len(places) - ROWS_NAMED
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
        """Raises InputError if the position was saved for other data, as it would not mean the same rows."""
        current = self.state_dict()
        if not isinstance(state, dict):
            raise InputError("cannot resume: the checkpoint holds no state of the data; it is damaged")
        for key, limit in {"position": 2**62, "skipped_rows": 2**62, "seed": 2**64, "seq_len": 2**62}.items():
            if type(state.get(key)) is not int or not 0 <= state[key] < limit:
                raise InputError(f"cannot resume: the checkpoint holds no valid {key} of the data; it is damaged")
        for key in ("seed", "seq_len"):
            if state[key] != current[key]:
                raise InputError(
                    f"cannot resume: the checkpoint's run read {key} {state[key]}, not {current[key]}; "
                    "pass the same data and flags"
                )
        before, now = check_fingerprint(state.get("shards")), current["shards"]
        changes = _changes(before, now)
        if changes:
            named = "; ".join(changes[:2]) + (f"; and {len(changes) - 2} more" if len(changes) > 2 else "")
            missing = {entry[0] for entry in before} - {entry[0] for entry in now}
            raise InputError(
                f"cannot resume: the checkpoint's run read other shards: {named}; pass the same data"
                + (" (--bad_data skip continues without a missing shard)" if missing else "")
            )
        self._restart(state["position"])
        self.skipped_rows = state["skipped_rows"]


def _changes(before: list[list], now: list[list]) -> list[str]:
    """How the second fingerprint differs from the first: a clause for each shard that does."""
    old, new = ({name: values for name, *values in fingerprint} for fingerprint in (before, now))
    changes = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            changes.append(f"{name} is missing")
        elif name not in old:
            changes.append(f"{name} is new")
        elif old[name][:2] != new[name][:2]:
            changes.append("{} has {} rows of {}, and had {} of {}".format(name, *new[name][:2], *old[name][:2]))
        elif old[name] != new[name]:
            changes.append(f"{name} has other content")
    return changes


def validation_loader(
    shards: Shards, *, seq_len: int, batch_size: int, vocab_size: int, bad_data: str = "fail"
) -> tuple[Loader, int]:
    """A Loader over the held-out split in a fixed order, and the number of its batches, after which its reader ends.

    These are at most VALIDATION_BATCHES full ones; or a smaller one, if the split has no more.
    """
    loader = Loader(
        shards,
        seq_len=seq_len,
        batch_size=batch_size,
        vocab_size=vocab_size,
        seed=0,
        bad_data=bad_data,
        validation=True,
    )
    return loader, loader.end // loader.batch_size


def validation_batches(
    shards: Shards, *, seq_len: int, batch_size: int, vocab_size: int, bad_data: str = "fail"
) -> Iterator[torch.Tensor]:
    """The batches of a validation_loader, which is closed at the end, also where the caller leaves early."""
    loader, _ = validation_loader(
        shards, seq_len=seq_len, batch_size=batch_size, vocab_size=vocab_size, bad_data=bad_data
    )
    try:
        yield from loader
    finally:
        loader.close()
