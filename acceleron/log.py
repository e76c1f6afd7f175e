"""Terminal output."""

import sys
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm


def say(line: str, file: TextIO | None = None):
    """Print a line above any progress bar, to stderr by default. Write errors are ignored, so they never end a run."""
    file = file or sys.stderr
    with suppress(OSError, ValueError):
        if file is not None:  # a process can start without stderr
            tqdm.write(line, file=file)
