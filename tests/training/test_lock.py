"""Only one run at a time can use a save_dir."""

import errno
import fcntl
import json
import os
import socket
from functools import partial

import pytest
from runs import Child, options, pause_at_step, shrink_nano

from acceleron.errors import InputError
from acceleron.lock import DirectoryLock
from acceleron.training import train


def test_second_run_is_rejected_with_the_pid_and_host_of_the_first(data_dir, tmp_path):
    run = options(data_dir, tmp_path / "run", resume="auto")
    first = Child(run, tmp_path / "output", partial(pause_at_step, 2, str(tmp_path / "no gate")))
    first.wait_for("paused")
    with pytest.raises(InputError, match=f"in use by process {first.process.pid} on {socket.gethostname()}"):
        train(run)
    second = Child(run, tmp_path / "second")
    assert second.status() == 2
    assert f"in use by process {first.process.pid} on {socket.gethostname()}" in (tmp_path / "second").read_text()
    assert first.process.is_alive()
    first.process.kill()
    assert first.status() == -9


def test_lock_of_a_killed_run_is_stale(data_dir, tmp_path):
    """Holds even if a different process has the same pid."""
    run = options(data_dir, tmp_path / "run", max_steps=1, resume="auto")
    killed = Child(run, tmp_path / "output", partial(pause_at_step, 1, str(tmp_path / "no gate")))
    killed.wait_for("paused")
    killed.process.kill()
    assert killed.status() == -9
    lock = tmp_path / "run" / "run.lock"
    assert json.loads(lock.read_text()) == {"pid": killed.process.pid, "host": socket.gethostname()}
    lock.write_text(json.dumps({"pid": os.getppid(), "host": "elsewhere"}))
    again = Child(run, tmp_path / "again", shrink_nano)
    assert again.status() == 0
    output = (tmp_path / "again").read_text()
    assert f"left by process {os.getppid()} on elsewhere, which is no longer running" in output
    assert not lock.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\x00\xff"])
def test_damaged_lock_file_is_ignored(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with DirectoryLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_locks_causes_only_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with DirectoryLock(tmp_path):
        assert "does not support locks (No locks available)" in capsys.readouterr().err


def test_rejected_run_leaves_no_directory(data_dir, tmp_path):
    with pytest.raises(InputError, match="--seq_len"):
        train(options(data_dir, tmp_path / "a" / "b" / "run", seq_len=48))
    assert list(tmp_path.iterdir()) == []
