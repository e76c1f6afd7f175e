"""Tests wait for events, never for a fixed time."""

import time
from collections.abc import Callable

HANG = 1200.0  # seconds until a hanging wait fails its test


def wait_until(condition: Callable[[], bool]):
    """Poll until the condition is true. Raises TimeoutError after HANG seconds."""
    deadline = time.monotonic() + HANG
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition is still false after {HANG:.0f} s")
        time.sleep(0.005)
