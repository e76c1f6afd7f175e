"""Ranks as child processes of a test, in the environment that torchrun gives them."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from runs import CONTEXT, Child
from waiting import TIMEOUT

from acceleron.distributed import join_ranks
from acceleron.training import TrainOptions


def environments(store: dist.TCPStore, size: int, per_node: int | None = None) -> list[dict[str, str]]:
    """Return each rank's environment. Like torchrun's agent, this process holds the store."""
    per_node = per_node or size
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE=True)
    shared |= dict(WORLD_SIZE=size, LOCAL_WORLD_SIZE=per_node)
    own = [shared | dict(RANK=rank, LOCAL_RANK=rank % per_node) for rank in range(size)]
    return [{name: str(value) for name, value in values.items()} for values in own]


def new_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _call(connection, environment: dict[str, str], work: Callable, arguments: tuple):
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        with join_ranks("cpu", TIMEOUT) as ranks:
            connection.send((work(ranks, *arguments), None))
    except BaseException:
        connection.send((None, traceback.format_exc()))


def on_ranks(size: int, work: Callable[..., object], *arguments, per_node: int | None = None) -> list:
    """Call `work(ranks, *arguments)` on each rank of a CPU job and return the results in rank order.

    work: a function of a module, because it is pickled. Results are pickled too.
    """
    store = new_store()
    results = []
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    for (_, sending), environment in zip(pipes, environments(store, size, per_node), strict=True):
        CONTEXT.Process(target=_call, args=(sending, environment, work, arguments), daemon=True).start()
        sending.close()
    for receiving, _ in pipes:
        assert receiving.poll(TIMEOUT), "a rank does not end"
        result, error = receiving.recv()
        assert error is None, error
        results.append(result)
    return results


class Job:
    """The ranks of a training run: child processes with the output files <directory>/rank0, rank1, …

    If a rank fails, nothing ends the others: that is the agent's task, and a test's.
    """

    def __init__(
        self, settings: TrainOptions, size: int, directory: Path, hook: Callable[[], None] | None = None,
        per_node: int | None = None,
    ):  # fmt: skip
        directory.mkdir(parents=True, exist_ok=True)
        self.store = new_store()
        self.children = [
            Child(settings, directory / f"rank{rank}", hook, environment)
            for rank, environment in enumerate(environments(self.store, size, per_node))
        ]

    def statuses(self) -> list[int]:
        return [child.status() for child in self.children]

    def output(self) -> str:
        return "".join(child.output.read_text() for child in self.children)
