"""The signals that end a run."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from ..errors import INTERRUPTED, STOPPED

# SIGHUP: the terminal was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """Within this context STOP_SIGNALS ask the run to stop, unless they were ignored before (as nohup does).

    `requested` is then the first one's name.

    A thread of its own hears them, as the main thread may wait in C++ for minutes (while it compiles, say), where
    Python's own handlers would wait with it. Until `learned` is set there is nothing to save, and the process ends at
    once with status STOPPED, after `before_exit`. A second SIGINT ends it at once at any time. Outside the main thread,
    where signals can't be handled, the context does nothing.
    """

    def __init__(self):
        self.requested: str | None = None
        self.learned = False
        self.before_exit: Callable[[], None] = lambda: None
        self._interrupts = 0

    def __enter__(self) -> "StopSignals":
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            # A handler of Python's must be there for the signal to be written to the pipe.
            heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, lambda *_: None) for number in heard}
            threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *_):
        if self._active:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writing)  # which ends the thread

    def _watch(self):
        while heard := os.read(self._reading, 1):
            if heard[0] in STOP_SIGNALS:
                self._hear(signal.Signals(heard[0]))
        os.close(self._reading)

    def _hear(self, number: signal.Signals):
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._end("stopped at once: what was not saved yet is lost, the checkpoints are whole", INTERRUPTED)
        if not self.learned:
            self._end(f"{number.name} before the first step was done: nothing new to save", STOPPED)
        if self.requested is None:
            self.requested = number.name
            self._say(f"{number.name}: saving and stopping after this step")

    def _say(self, line: str):
        with suppress(OSError):
            os.write(sys.__stderr__.fileno(), f"\n{line}\n".encode())

    def _end(self, line: str, status: int):
        self._say(line)
        with suppress(Exception):
            self.before_exit()
            sys.stdout.flush()
        os._exit(status)
