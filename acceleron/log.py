"""Logging to the terminal."""

import logging
import sys
from contextlib import suppress


class _Handler(logging.Handler):
    """Writes to the current sys.stderr, above any progress bar. A closed or full terminal does not end a run."""

    def emit(self, record: logging.LogRecord):
        from tqdm import tqdm  # not needed to import acceleron

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                tqdm.write(prefix + self.format(record), file=sys.stderr)


_handler = _Handler()


def log_to_stderr():
    """Show acceleron's log records from INFO on stderr. Warnings start with "warning: "."""
    logging.root.addHandler(_handler)  # no effect the second time
    logging.getLogger("acceleron").setLevel(logging.INFO)
