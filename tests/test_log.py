"""Log records on stderr. conftest.py calls log_to_stderr(), as commands do."""

import io
import logging
import subprocess
import sys
from contextlib import nullcontext

import pytest
from tqdm.contrib.logging import logging_redirect_tqdm

from acceleron.log import log_to_stderr


def log():
    for name in ("acceleron.data.prepare", "other.library"):
        logger = logging.getLogger(name)
        logger.info(f"100% of {name}")
        logger.warning(f"{name} is slow")


@pytest.mark.parametrize("context", [nullcontext, logging_redirect_tqdm])  # the latter above a progress bar
def test_levels_and_prefixes(context, capsys):
    log_to_stderr()
    with context():
        log()
    assert capsys.readouterr().err.splitlines() == [
        "100% of acceleron.data.prepare",
        "warning: acceleron.data.prepare is slow",
        "warning: other.library is slow",
    ]


class ClosedTerminal(io.StringIO):
    def write(self, text: str):
        super().write(text)
        raise BrokenPipeError


@pytest.mark.parametrize("context", [nullcontext, logging_redirect_tqdm])
def test_write_errors_are_ignored(context, monkeypatch):
    monkeypatch.setattr(sys, "stderr", ClosedTerminal())
    with context():
        log()
    assert "is slow" in sys.stderr.getvalue()
    assert "error" not in sys.stderr.getvalue()


def test_missing_stderr_is_ignored(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    log()


def test_only_commands_configure_logging():
    code = """
import logging
from acceleron.errors import run_command
logger = logging.getLogger("acceleron.data.prepare")
logger.info("from a library")
run_command(lambda: logger.info("from a command"))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == "from a command\n"
