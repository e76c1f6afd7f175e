"""The signals that end a run."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from ..errors import INTERRUPTED, STOPPED

POLL_SECONDS = 0.2  # how often a waiting run checks for a stop request
# SIGHUP: the terminal was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """Context manager that turns STOP_SIGNALS into stop requests. Signals ignored by nohup stay ignored.

    `requested` is the name of the first signal, or None. Until `has_progress` is set, a signal calls `before_exit` and
    ends the process immediately with status STOPPED. A second SIGINT always ends the process immediately.

    A separate thread handles the signals, because the main thread can spend minutes in C++ (compiling, for example),
    where Python's own handlers do not run. The context manager does nothing outside the main thread, because
    Python can install handlers only there.
    """

    def __init__(self):
        self.requested: str | None = None
        self.has_progress = False
        self.before_exit: Callable[[], None] = lambda: None
        self._interrupts = 0

    def __enter__(self) -> "StopSignals":
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            # Python writes a signal to the pipe only if it has a Python handler for it.
            handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, lambda *_: None) for number in handled}
            threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *_):
        if self._active:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writing)  # ends the thread

    def is_requested(self) -> bool:
        return self.requested is not None

    def _watch(self):
        while received := os.read(self._reading, 1):
            if received[0] in STOP_SIGNALS:
                self._handle(signal.Signals(received[0]))
        os.close(self._reading)

    def _handle(self, number: signal.Signals):
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._exit("stopped immediately: unsaved progress is lost; existing checkpoints are valid", INTERRUPTED)
        if not self.has_progress:
            self._exit(f"{number.name} before the end of the first step: nothing new to save", STOPPED)
        if self.requested is None:
            self.requested = number.name
            self._print(f"{number.name}: saving and stopping after this step")

    def _print(self, line: str):
        with suppress(OSError):
            os.write(sys.__stderr__.fileno(), f"\n{line}\n".encode())

    def _exit(self, line: str, status: int):
        self._print(line)
        with suppress(Exception):
            self.before_exit()
            sys.stdout.flush()
        os._exit(status)
