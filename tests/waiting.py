"""Tests wait for events, never for a fixed time."""

import time
from collections.abc import Callable

TIMEOUT = 1200.0  # seconds before a wait that never ends fails its test


def wait_until(condition: Callable[[], bool]):
    """Poll until the condition is true. Raises TimeoutError after TIMEOUT seconds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition is still false after {TIMEOUT:.0f} s")
        time.sleep(0.005)
