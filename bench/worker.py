"""Worker processes for code that can crash, hang or exhaust memory. A failure costs one answer, not the command."""

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context

import torch

from .rows import describe

CONTEXT = get_context("spawn")
START_SECONDS = 300  # limit for imports


class Failure(Exception):
    """The reason an answer is missing: an exception, the exit status of the process, or its time limit."""

    fatal = False  # True if the process has exited


class Worker:
    """Runs `serve(connection, *args)` in a spawned process. `serve` answers each message, possibly with a Failure.

    If the process has exited, the next `ask` starts a new one. `close` raises EOFError in `serve`.
    """

    def __init__(self, serve: Callable, *args):
        self.serve, self.args, self.process = serve, args, None
        self.start()

    def start(self):
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_run, args=(self.serve, theirs, self.args))
        self.process.start()
        theirs.close()
        self.started = False

    def ask(self, message, seconds: float | None = None):
        """Return the answer to a message. Raises Failure. The time limit excludes imports."""
        if self.process is None:
            self.start()
        try:
            with suppress(OSError):  # a dead process may have sent its reason first
                self.connection.send(message)
            if not self.started:
                self._receive(START_SECONDS)
                self.started = True
            answer = self._receive(seconds)
        except (EOFError, ConnectionError):
            self.process.join()
            status = self.process.exitcode
            self.close()
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
            raise Failure(f"the process was {how}") from None
        if isinstance(answer, Failure):
            if answer.fatal:
                self.close()
            raise answer
        return answer

    def _receive(self, seconds: float | None):
        if not self.connection.poll(seconds):
            self.close(patience=0)
            raise Failure(f"no answer within {seconds:.0f} s")
        return self.connection.recv()

    def close(self, patience: float = 10.0):
        """End the process; kill it after `patience` seconds."""
        if self.process:
            self.connection.close()
            self.process.join(patience)
            self.process.kill()
            self.process.join(10)  # a process stuck in a driver never exits
            self.process = None


def _run(serve: Callable, connection, args: tuple):
    try:
        connection.send("started")
        serve(connection, *args)
    except (EOFError, ConnectionError):  # the parent closed the connection or exited
        return
    except Exception as error:
        traceback.print_exc()
        failure = Failure(describe(error))
        failure.fatal = True
        with suppress(OSError):
            connection.send(failure)


@contextmanager
def pool(processes: int) -> Iterator[Callable[..., Future]]:
    """Yields `call(function, *args, seconds=600)`, which returns a Future of the function's result or of a Failure.

    A call that raises, hangs or ends its process loses only its own result. Pending calls are canceled on exit.
    """
    own, workers = threading.local(), []

    def start():
        own.worker = Worker(serve_calls)
        workers.append(own.worker)

    threads = ThreadPoolExecutor(processes, initializer=start)
    try:
        yield lambda function, *args, seconds=600.0: threads.submit(lambda: own.worker.ask((function, args), seconds))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in [worker.process for worker in workers if worker.process]:
            process.kill()  # unblocks its thread
        threads.shutdown()
        for worker in workers:
            worker.close()


def serve_calls(connection):
    """Answer each (function, arguments) message with the result."""
    while True:
        function, arguments = connection.recv()
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = Failure(describe(error))
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # if the CUDA context is lost, this raises and ends the process
        connection.send(answer)
