"""Terminal output."""

import logging
import sys
from typing import TextIO


class _Handler(logging.StreamHandler):
    @property
    def stream(self) -> TextIO | None:  # tests and redirect_stderr replace sys.stderr
        return sys.stderr

    @stream.setter
    def stream(self, _):
        pass


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return prefix + super().format(record)


_handler = _Handler()
_handler.setFormatter(_Formatter())


def log_to_stderr():
    """Show acceleron's log records from INFO on stderr. A warning starts with "warning: "."""
    logging.raiseExceptions = False  # a closed terminal or a full disk neither ends a run nor prints a traceback
    logging.root.addHandler(_handler)  # no effect the second time
    logging.getLogger("acceleron").setLevel(logging.INFO)
