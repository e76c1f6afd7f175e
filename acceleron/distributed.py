"""The ranks of a run: one process per GPU, started by torchrun, on torch.distributed.

A process that torchrun did not start, or started alone, is rank 0 of 1. Then nothing here communicates.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from .errors import BAD_INPUT, InputError, RunFailed, RunStopped, is_out_of_memory

# A rank that has not reported an error this many seconds after the others is listed as not responding.
GRACE = 3.0
# How long the other ranks wait for rank 0 to save: longer than it repeats its last attempt.
DISK_TIMEOUT = timedelta(hours=1)

logger = logging.getLogger(__name__)


class LostRank(RunFailed):
    """Another rank ended or does not respond. No collective can succeed, so nothing is saved."""


class Vote:
    """The `with` block of `Ranks.agreed` sets `value`. After the block, it is the largest value of all ranks."""

    value = 0


class Ranks:
    """This process among the ranks of a run, and decisions that all ranks make together.

    The decisions use gloo on the host, so they never wait for a GPU. All ranks call the methods in the same order,
    except `announce_stop`, `stop_announced` and `report`, which any thread can call at any time.

    store: a connection that nothing else uses, because operations on one connection wait for each other.
    timeout: applies to decisions. device_timeout: applies to the model's collectives.
    on_loss: called when a collective fails, before the missing ranks are identified, which takes up to GRACE seconds.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, per_node: int = 1, store: dist.Store | None = None,
        timeout: timedelta | None = None, device_timeout: timedelta | None = None,
    ):  # fmt: skip
        self.rank, self.size, self.per_node = rank, size, per_node
        self.on_loss: Callable[[], None] = lambda: None
        self._store = store
        self._device_timeout = device_timeout
        if size > 1:
            self._control = dist.new_group(backend="gloo", timeout=timeout, group_desc="control")
            self._disk = dist.new_group(backend="gloo", timeout=DISK_TIMEOUT, group_desc="disk")
            self._groups = [dist.group.WORLD, self._control, self._disk]

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the only one that logs, locks and writes."""
        return self.rank == 0

    def add_groups(self, groups: list[dist.ProcessGroup]):
        """Add the model's groups, which do not inherit the default group's timeout."""
        for group in groups:
            _set_pg_timeout(self._device_timeout, group)
        self._groups += groups

    def max(self, value: int) -> int:
        """Return the largest value of all ranks."""
        if self.size == 1:
            return value
        values = torch.tensor(int(value))
        dist.all_reduce(values, dist.ReduceOp.MAX, self._control)
        return int(values)

    def gather(self, value) -> list:
        """Return the values of all ranks, which are pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, self._control)
        return values

    @contextmanager
    def agreed(self) -> Iterator[Vote]:
        """Context manager that raises an InputError or RunFailed of one rank on all ranks, and counts their votes.

        The block must not contain collectives.
        """
        vote, error = Vote(), None
        if self.size == 1:
            yield vote
            return
        try:
            yield vote
        except LostRank:
            raise
        except (InputError, RunFailed) as failure:
            error = failure
        vote.value = self.max(1 << 30 if error else int(vote.value))
        if vote.value < 1 << 30:
            return
        errors = self.gather(error)
        rank, first = next((rank, found) for rank, found in enumerate(errors) if found)
        where = "" if all(str(other) == str(first) for other in errors) else f"rank {rank}: "
        raise (InputError if isinstance(first, InputError) else RunFailed)(f"{where}{first}") from error

    def from_first(self, work: Callable[[], str | bool | None]) -> str | bool | None:
        """Call `work` on rank 0 and return its result on all ranks. An InputError or RunFailed is raised on all.

        The other ranks wait up to DISK_TIMEOUT, because rank 0 can wait for a disk.
        """
        if self.size == 1:
            return work()
        outcome = [None]
        if self.is_first:
            try:
                outcome = [work()]
            except (InputError, RunFailed) as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self._disk)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def announce_stop(self):
        """Tell ranks that wait for data or for the disk that this rank received a signal."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set("stop", "")

    def stop_announced(self) -> bool:
        """Return whether a rank announced a stop. Asks the store over the network."""
        return self._store is not None and self._store.check(["stop"])

    def report(self) -> bool:
        """Return whether this rank prints why the run ends: true for one rank."""
        if self._store is None:
            return True
        with suppress(RuntimeError):
            return self._store.add("reports", 1) == 1
        return is_first_of_node()  # the node with the store is gone

    def missing(self) -> list[int]:
        """Return the ranks that do not call this method within GRACE seconds. Raises RuntimeError without a store.

        A collective must have failed. Ends the collectives in which other ranks wait, so that they call this too.
        """
        self._close_connections()
        self._store.set(f"responds {self.rank}", "")
        others = [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + GRACE
        while others and time.monotonic() < deadline:
            others = [rank for rank in others if not self._store.check([f"responds {rank}"])]
            time.sleep(0.05)
        return others

    def _close_connections(self):
        # A lost rank's neighbors notice it, but the others wait for the neighbors. gloo closes a group's connections
        # when an operation times out, and has no other call for this.
        for group in self._groups:
            for rank in dist.get_process_group_ranks(group):
                if rank != self.rank:
                    with suppress(RuntimeError):
                        dist.irecv(torch.zeros(1), src=rank, group=group).wait(timedelta(milliseconds=1))


@contextmanager
def join_ranks(device: str, timeout: float) -> Iterator[Ranks]:
    """Context manager that joins the other ranks of a torchrun job, on its rank's GPU. Only rank 0 logs.

    device: as --device. timeout: seconds after which a collective fails. Raises InputError if torchrun started more
    processes than the node has GPUs, and LostRank, with the ranks that do not respond, if a collective fails.
    """
    size = _integer("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1
    if size == 1:
        yield Ranks()
        return
    rank, per_node = _integer("RANK"), _integer("LOCAL_WORLD_SIZE")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    try:
        _check_device(device, per_node, torch.cuda.device_count() if on_gpu else per_node)
        if on_gpu:
            torch.cuda.set_device(_integer("LOCAL_RANK"))
        # The host notices a stalled rank first, and says so, before NCCL's watchdog aborts the process.
        limit, device_limit = timedelta(seconds=timeout), timedelta(seconds=timeout + 60 * on_gpu)
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        # A restarted rank must not find the addresses of the previous attempt.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=device_limit)
        ranks = Ranks(rank, size, per_node, dist.PrefixStore("ranks", store.clone()), limit, device_limit)
    except (InputError, RuntimeError) as error:
        if not isinstance(error, InputError):
            if not is_collective_error(error):
                raise
            error = LostRank(f"not all {size} ranks started within --timeout {timeout} s; continue with --resume auto")
        if is_first_of_node():
            raise error from None
        raise SystemExit(error.status) from None
    package = logging.getLogger(__package__)
    level = package.level
    if rank:
        package.setLevel(logging.ERROR)
    try:
        with _reported_once(ranks):
            yield ranks
        dist.destroy_process_group()
    finally:
        package.setLevel(level)


def is_first_of_node() -> bool:
    """Return whether this process reports an error before the ranks have joined: one per node."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def _integer(name: str) -> int:
    value = os.environ.get(name)
    try:
        return int(value)
    except (TypeError, ValueError):
        found = "is not set" if value is None else f"is {value!r}, not a number"
        raise InputError(f"{name} {found}: start several ranks with torchrun, or unset WORLD_SIZE") from None


def _check_device(device: str, per_node: int, gpus: int):
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}: torchrun assigns a GPU to each rank: use auto, cuda or cpu")
    if per_node > gpus:
        raise InputError(f"{per_node} processes on a node with {gpus} GPUs: pass --nproc_per_node={gpus}")


@contextmanager
def _reported_once(ranks: Ranks) -> Iterator[None]:
    """Context manager that turns the error of a collective into LostRank.

    Only one rank raises an error that all have. The others exit with its status.
    """
    try:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and not ranks.report():
                raise SystemExit(BAD_INPUT) from error
            if not is_collective_error(error):
                raise
            ranks.on_loss()
            raise LostRank(describe_loss(ranks)) from error
    except (InputError, RunFailed, RunStopped) as error:
        if not isinstance(error, LostRank):
            dist.destroy_process_group()
        if ranks.report():
            raise
        raise SystemExit(error.status) from error


def is_collective_error(error: Exception) -> bool:
    """Return whether the error means that another rank ended or timed out. gloo's errors have no type."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def describe_loss(ranks: Ranks) -> str:
    """Name the ranks that do not respond after a collective has failed."""
    who = "another rank"
    with suppress(RuntimeError):  # if the node with the store is gone
        missing = ranks.missing()
        if missing:
            who = f"rank {missing[0]}" if len(missing) == 1 else f"one of the ranks {', '.join(map(str, missing))}"
    return f"{who} ended or does not respond: stopped without saving; continue with --resume auto"


def full_tensor(value: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, on all ranks. A collective."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def sharded_like(value: Tensor, example: Tensor) -> Tensor:
    """Return this rank's part of a full tensor, on the example's device, if the example is a DTensor."""
    if not hasattr(example, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor  # takes a second to import

    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements, src_data_rank=None)
