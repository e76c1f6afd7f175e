"""The signals that end a run."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

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

    With several ranks, `on_request` is called in that thread after the first signal, `quiet` suppresses its message,
    which would be wrong if the ranks cannot save, and `may_report` decides which rank prints why the process ends.
    """

    def __init__(self):
        self.requested: str | None = None
        self.has_progress = self.quiet = False
        self.before_exit: Callable[[], None] = lambda: None
        self.on_request: Callable[[], None] = lambda: None
        self.may_report: Callable[[], bool] = lambda: True
        self._interrupts = 0
        self._cleanup = ExitStack()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            thread = threading.Thread(target=self._watch, args=(reading,), name="stop signals", daemon=True)
            # The thread must not free the callbacks while the interpreter shuts down: they hold process groups.
            self._cleanup.callback(thread.join)
            self._cleanup.callback(os.close, writing)  # ends the thread
            self._cleanup.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writing, warn_on_full_buffer=False))
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    # Python writes a signal to the pipe only if it has a Python handler for it.
                    self._cleanup.callback(signal.signal, number, signal.signal(number, lambda *_: None))
            thread.start()
        return self

    def __exit__(self, _, error: BaseException | None, __):
        self._cleanup.close()
        if self.quiet and error and threading.current_thread() is threading.main_thread():
            # Once a rank has exited, torchrun sends SIGTERM to the others. Let them print why they exit.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def ignore(self):
        """Ignore signals, except a second SIGINT, because the run is about to end."""
        self.has_progress = self.quiet = True

    def is_requested(self) -> bool:
        return self.requested is not None

    def _watch(self, reading: int):
        while received := os.read(reading, 1):
            if received[0] in STOP_SIGNALS:
                self._handle(signal.Signals(received[0]))
        os.close(reading)

    def _handle(self, number: signal.Signals):
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._exit("stopped immediately: unsaved progress is lost; existing checkpoints are valid", INTERRUPTED)
        if not self.has_progress:
            self._exit(f"{number.name} before the end of the first step: nothing new to save", STOPPED)
        if self.requested is None:
            self.requested = number.name
            if not self.quiet:
                self._print(f"{number.name}: saving and stopping after this step")
            self.on_request()

    def _print(self, line: str):
        with suppress(OSError):
            os.write(sys.__stderr__.fileno(), f"\n{line}\n".encode())

    def _exit(self, line: str, status: int):
        if self.may_report():
            self._print(line)
        with suppress(Exception):
            self.before_exit()
            sys.stdout.flush()
        os._exit(status)
