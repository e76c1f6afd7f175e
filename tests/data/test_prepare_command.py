"""The `prepare` command: signals, full disks and closed streams."""

import errno
import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import TIMEOUT

from acceleron.data import Shards
from acceleron.data import __main__ as data_command
from acceleron.data.prepare import prepare
from acceleron.errors import InputError, RunFailed

ROOT = Path(__file__).resolve().parents[2]
TEXT = "\n".join(f"Line {number} of a text that fills some rows." for number in range(3000))
STALL_WHILE_WRITING = """
import sys, threading
from acceleron.data import __main__ as command, prepare

def stall(tokens, directory):
    (directory / "shard_00000.npy").write_text("partial")
    print("stalled", flush=True)
    threading.Event().wait()

prepare._write_shards = stall
command.main()
"""
STALL_WHILE_TRAINING = """
import hashlib
from acceleron.data import __main__ as command, prepare

def documents(*_):
    print("stalled", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C code, like the end of tokenizer training
    yield "a text"

prepare.read_documents = documents
command.main()
"""


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "in.txt").write_text(TEXT)
    return ["prepare", "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out"), "--vocab_size", "300"]


@contextmanager
def stalled_prepare(program, arguments):
    """Run the command and yield its process while it is paused with partial output."""
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "stalled\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("program", [STALL_WHILE_TRAINING, STALL_WHILE_WRITING], ids=["training", "writing"])
def test_sigterm_removes_the_partial_output(program, arguments, tmp_path):
    with stalled_prepare(program, arguments) as process:
        assert any((tmp_path / "out").iterdir())
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, errors) == (75, "SIGTERM: stopped\n")
    assert not (tmp_path / "out").exists()


def test_prepare_restarts_after_a_kill_but_not_while_another_runs(arguments, tmp_path):
    inputs, output = [str(tmp_path / "in.txt")], tmp_path / "out"
    with stalled_prepare(STALL_WHILE_WRITING, arguments):
        before = sorted(output.rglob("*"))
        with pytest.raises(InputError, match=r"out/\.prepare is in use by another `prepare`: wait for it"):
            prepare(inputs, str(output), vocab_size=300)
        assert sorted(output.rglob("*")) == before
    assert [path.name for path in (output / ".prepare").iterdir()] == ["shard_00000.npy"]
    prepare(inputs, str(output), vocab_size=300)
    assert sorted(os.listdir(output)) == ["shard_00000.npy", "shards.json", "tokenizer.json"]
    assert Shards(output).num_rows.sum() > 1


def test_existing_staging_directory_is_rejected_without_file_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "in.txt").write_text(TEXT)
    (tmp_path / "used" / ".prepare").mkdir(parents=True)
    with pytest.raises(InputError, match=r"if none is running, remove .*used/\.prepare$"):
        prepare([str(tmp_path / "in.txt")], str(tmp_path / "used"), vocab_size=300)
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=300)
    assert Shards(tmp_path / "out").num_rows.sum() > 1


@pytest.mark.parametrize(
    ("redirected", "status", "message"),
    [
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 3, "error: the output: cannot be read or written (No space left on device)\n"),
        (">/dev/full 2>/dev/full", 3, ""),
    ],
)
def test_closed_and_full_standard_streams(arguments, tmp_path, redirected, status, message):
    """The data is still prepared. Only the final message cannot be printed."""
    command = f'{sys.executable} -m acceleron.data "$@" {redirected}'
    run = subprocess.run(
        ["bash", "-c", command, "bash", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT
    )
    assert (run.returncode, run.stderr) == (status, message)
    assert sorted(os.listdir(tmp_path / "out"))[0] == "shard_00000.npy"


def test_file_size_limit_is_reported(tmp_path):
    """numpy's own error for a short write omits the cause."""
    (tmp_path / "in.txt").write_text(TEXT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(RunFailed, match=r"--output .*out: cannot be written \(File too large\)"):
            prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("prep", "'prep': did you mean prepare? Choose from prepare, download"),
        ("prepare --input= --output y", "--input: expected a value"),
        ("prepare --input x --output=", "--output: expected a value"),
        ("prepare --input x --output y --tokenizer=", "--tokenizer: expected a value"),
        ("download --output=", "--output: expected a value"),
        ("prepare --input x --output y --vocab_size x", "--vocab_size: expected a positive integer"),
        ("download --output y --shards 0", "--shards: expected a positive integer"),
    ],
)
def test_bad_command_lines_are_rejected(command_line, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data", *command_line.split()])
    with pytest.raises(InputError, match=re.escape(message)):
        data_command.run()
