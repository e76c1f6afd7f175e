"""Log records on stderr. conftest.py calls log_to_stderr(), as commands do."""

import io
import logging
import subprocess
import sys

from tqdm import tqdm

from acceleron.log import log_to_stderr


def log():
    for name in ("acceleron.data.prepare", "other.library"):
        logger = logging.getLogger(name)
        logger.info(f"100% of {name}")
        logger.warning(f"{name} is slow")


def test_levels_and_prefixes(capsys):
    log_to_stderr()
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


def test_write_errors_are_ignored(monkeypatch):
    monkeypatch.setattr(sys, "stderr", ClosedTerminal())
    log()
    assert "is slow" in sys.stderr.getvalue()
    assert "error" not in sys.stderr.getvalue()


def test_log_lines_are_above_the_progress_bar(monkeypatch):
    """A line first clears the bar, and the bar is drawn again below it."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with tqdm(total=2, file=sys.stderr, ncols=40, mininterval=0) as bar:
        bar.update()
        log()
    drawn = sys.stderr.getvalue().split("\r")
    assert [text for text in drawn if "is slow" in text] == [
        "warning: acceleron.data.prepare is slow\n",
        "warning: other.library is slow\n",
    ]
    assert "50%" in drawn[-1] or "50%" in drawn[-2]


def test_missing_stderr_is_ignored(monkeypatch, capsys):
    """tqdm.write(file=None) would write to stdout, which can be a generated text."""
    monkeypatch.setattr(sys, "stderr", None)
    log()
    assert capsys.readouterr().out == ""


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
