"""Lines for the terminal."""

import sys
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm


def say(line: str, file: TextIO | None = None):
    """Write a line, by default to stderr, above the progress bar if there is one.

    A terminal that can't be written to, as its pipe was closed or its disk is full, is no reason to end a run.
    """
    file = file or sys.stderr
    with suppress(OSError, ValueError):
        if file is not None:  # as in a process that was started without one
            tqdm.write(line, file=file)
