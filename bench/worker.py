"""A process for code that may crash, hang or exhaust memory. Its failure costs one answer, not the command."""

import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context

from .rows import describe

CONTEXT = get_context("spawn")


class Failure(Exception):
    """Why a worker gave no answer: the message of its exception, its exit status, or the limit that it exceeded."""


class Worker:
    """Runs `serve(connection, *args)` in a spawned process; `serve` receives messages and sends one answer to each.

    `serve` sees the end of its connection as EOFError once the parent closes it.
    """

    def __init__(self, serve: Callable, *args):
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_run, args=(serve, theirs, args))
        self.process.start()
        theirs.close()

    def ask(self, message, seconds: float | None = None):
        """The answer to a message. Raises Failure, with the process dead, if it raises, ends, or exceeds the limit."""
        try:
            with suppress(OSError):  # a dead process may have sent its reason before it ended
                self.connection.send(message)
            if not self.connection.poll(seconds):
                raise Failure(f"no answer within {seconds:.0f} s")
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            answer = Failure(self._ending())
        except Failure as failure:
            answer = failure
        if isinstance(answer, Failure):
            self.close(patience=0)
            raise answer
        return answer

    def _ending(self) -> str:
        self.process.join()
        status = self.process.exitcode
        return f"the process was killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def close(self, patience: float = 10.0):
        """End the process, by force after so many seconds."""
        self.connection.close()
        self.process.join(patience)
        self.process.kill()
        self.process.join()


def _run(serve: Callable, connection, args: tuple):
    try:
        serve(connection, *args)
    except EOFError:  # the parent has ended
        return
    except Exception as error:
        traceback.print_exc()
        with suppress(OSError):
            connection.send(Failure(describe(error)))
