"""The exit statuses that a scheduler acts on."""

import errno
import os

import pytest

from acceleron.errors import InputError, RunFailed, RunStopped, file_error, run_command


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("--lr nan"), 2, "error: --lr nan"),
        (RunFailed("too many bad steps"), 3, "error: too many bad steps"),
        (RunStopped("SIGTERM: stopped at step 7"), 75, "SIGTERM: stopped at step 7"),
        (MemoryError(), 2, "error: out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_end_has_its_status_and_one_line(error, status, said, capsys):
    def main():
        raise error

    assert run_command(main) == status
    assert said in capsys.readouterr().err
    assert run_command(lambda: None) == 0


def test_a_bug_is_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, RunFailed), (errno.EACCES, InputError)])
def test_a_full_disk_may_pass_and_a_wrong_path_does_not(number, kind):
    error = file_error("run: cannot be written", OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert str(error) == f"run: cannot be written ({os.strerror(number)})"
