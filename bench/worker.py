"""A process for code that may crash, hang or exhaust memory. Its failure costs one answer, not the command."""

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
START_SECONDS = 300  # most that importing may take


class Failure(Exception):
    """Why there is no answer: an exception's message, the exit status of the process, or the limit it exceeded."""

    fatal = False  # whether the process has ended


class Worker:
    """Runs `serve(connection, *args)` in a spawned process, which sends an answer or a Failure to each message.

    The next `ask` starts another process once this one has ended. `serve` sees `close` as EOFError.
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
        """The answer. Raises Failure if the process sends one, ends, or exceeds the limit, which starts once it has
        imported what it needs."""
        if self.process is None:
            self.start()
        try:
            with suppress(OSError):  # a dead process may have sent its reason before it ended
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
        """End the process, by force after so many seconds."""
        if self.process:
            self.connection.close()
            self.process.join(patience)
            self.process.kill()
            self.process.join(10)  # one that is stuck in a driver does not end
            self.process = None


def _run(serve: Callable, connection, args: tuple):
    try:
        connection.send("started")
        serve(connection, *args)
    except (EOFError, ConnectionError):  # the parent has closed it, or has ended
        return
    except Exception as error:
        traceback.print_exc()
        failure = Failure(describe(error))
        failure.fatal = True
        with suppress(OSError):
            connection.send(failure)


@contextmanager
def pool(processes: int) -> Iterator[Callable[..., Future]]:
    """Yields `call(function, *args, seconds=600)`, whose Future has the function's result, or a Failure.

    A call that raises, hangs or ends its process costs its result alone. Leaving the context drops what is not done.
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
            process.kill()  # which ends the wait of its thread
        threads.shutdown()
        for worker in workers:
            worker.close()


def serve_calls(connection):
    """Answer each (function, arguments) with its result."""
    while True:
        function, arguments = connection.recv()
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = Failure(describe(error))
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # raises, which ends this process, if the CUDA context is lost
        connection.send(answer)
