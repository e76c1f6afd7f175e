"""Tests wait for events, never for a time."""

import time
from collections.abc import Callable

HANG = 1200.0  # seconds after which a wait that hangs is ended, and its test fails


def wait_until(happened: Callable[[], bool]):
    """Raises TimeoutError if it never happens."""
    deadline = time.monotonic() + HANG
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"did not happen in {HANG:.0f} s")
        time.sleep(0.005)
