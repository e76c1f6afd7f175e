"""What the offline tools share: launches on tensors without data, and a pool of processes that may crash.

Ops run as far as the launches of their kernels, and take no memory.

The tensors pass for a CPU's, as torch's CPU build has no others. They have no values to wait for: an op that asks the
host to read one (`.item()`, a mask as index) raises.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from unittest import mock

from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from acceleron import kernels
from acceleron.kernels import launch
from acceleron.kernels.launch import Device

from .worker import Worker


class Launching(TorchDispatchMode):
    """In this context our custom ops do what they do on real tensors, which fake tensors alone would not have done."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "acceleron_triton":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def offline(device: Device, run: Callable, offset: int = 0) -> Iterator[None]:
    """In this context tensors have no data, and the Triton kernels are those for `device`.

    run: takes the place of JITFunction.run, with its arguments. offset: of each tensor's memory, in bytes from an
    aligned address, which CUDA's allocator returns. Raises RuntimeError under TRITON_INTERPRET=1, where kernels are not
    those that a GPU runs.
    """
    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set, under which kernels are not those that a GPU runs: unset it")
    address = lambda x: offset + x.storage_offset() * x.element_size()  # noqa: E731
    with ExitStack() as stack:
        patch = lambda *args, **kwargs: stack.enter_context(mock.patch.object(*args, **kwargs))  # noqa: E731
        patch(launch, "cpu_device", device)
        patch(kernels, "_choice", "triton")
        patch(JITFunction, "run", lambda *args, **kwargs: run(*args, **kwargs))
        patch(FakeTensor, "data_ptr", address, create=True)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


class Pool:
    """Processes that call functions side by side. One that raises, hangs or ends its process costs its result alone.

    Use it as a context manager: leaving the context drops what is not done yet.
    """

    def __init__(self, processes: int):
        self.threads, self.free = ThreadPoolExecutor(processes), SimpleQueue()
        self.workers = [Worker(serve_calls) for _ in range(processes)]
        for worker in self.workers:
            self.free.put(worker)

    def submit(self, function: Callable, *args, seconds: float = 600) -> Future:
        """The function's result, or worker.Failure if it takes longer than `seconds` or fails."""
        return self.threads.submit(self._ask, (function, args), seconds)

    def _ask(self, call: tuple, seconds: float):
        worker = self.free.get()
        try:
            return worker.ask(call, seconds)
        finally:
            self.free.put(worker)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error):
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in [worker.process for worker in self.workers if worker.process]:
            process.kill()  # which ends the wait of its thread
        self.threads.shutdown()
        for worker in self.workers:
            worker.close()


def serve_calls(connection):
    """Answer each (function, arguments) with its result."""
    while True:
        function, arguments = connection.recv()
        connection.send(function(*arguments))
