"""Exit statuses and one-line errors."""

import errno
import os
import signal
import sys
import time

import pytest
from torch._inductor.exc import CppCompileError, InductorError

from acceleron.errors import InputError, RunFailed, RunStopped, file_error, path_error, run_command
from acceleron.flags import Parser, nonempty


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("--lr nan"), 2, "error: --lr nan"),
        (RunFailed("too many bad steps"), 3, "error: too many bad steps"),
        (RunStopped("SIGTERM: stopped at step 7"), 75, "SIGTERM: stopped at step 7"),
        (MemoryError(), 2, "error: out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (OSError(errno.ENOSPC, "No space left"), 3, "error: the output: cannot be read or written (No space left)"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x: cannot be read or written (Permission"),
    ],
)
def test_each_error_kind_has_its_exit_status_and_one_line(error, status, message, capsys):
    def main():
        raise error

    assert run_command(main) == status
    assert message in capsys.readouterr().err
    assert run_command(lambda: None) == 0


def test_sys_exit_keeps_its_status(capsys):
    statuses = [run_command(lambda code=code: sys.exit(code)) for code in (None, 0, True, 2, "why")]
    assert statuses == [0, 0, 1, 2, 1]
    assert capsys.readouterr().err == "why\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_let_a_command_clean_up(number):
    """Holds even after a second signal, and if a library catches every Exception."""
    cleaned = []

    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except Exception:
            pytest.fail("swallowed")
        finally:
            os.kill(os.getpid(), number)
            cleaned.append(True)

    assert run_command(main) == 75
    assert cleaned
    assert signal.getsignal(number) == signal.SIG_DFL


def test_compiler_failure_suggests_cxx_or_no_compile(capsys):
    def main():
        output = "In file included from a.cpp:1:\na.cpp:3:10: fatal error: Python.h: No such file or directory\n"
        raise InductorError(CppCompileError(["g++", "a.cpp"], output), None)

    assert run_command(main) == 2
    reason = "a.cpp:3:10: fatal error: Python.h: No such file or directory"
    assert capsys.readouterr().err == (
        f"error: torch.compile: {reason}: set CXX to a working compiler, or pass --no_compile\n"
    )


def test_blank_environment_variables_count_as_unset(monkeypatch):
    for name in ("CXX", "CC", "ACCELERON_TUNED", "ACCELERON_NO_TMA"):
        monkeypatch.setenv(name, " " * (name == "CC"))
    monkeypatch.setenv("ACCELERON_REFERENCE_OPS", "rope")
    run_command(lambda: None)
    assert not {"CXX", "CC", "ACCELERON_TUNED", "ACCELERON_NO_TMA"} & os.environ.keys()
    assert os.environ["ACCELERON_REFERENCE_OPS"] == "rope"


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("--data_dir x --bathc_size 2", "unknown flag --bathc_size: did you mean --batch_size?"),
        ("--batch-size=2", "did you mean --batch_size?"),
        ("-batch_size 2", "did you mean --batch_size?"),
        ("--qqq", "unknown flag --qqq: see --help"),
        ("--dtype fp23", "--dtype: invalid choice: 'fp23': did you mean fp32? Choose from bf16, fp32"),
        ("--dtype x", "--dtype: invalid choice: 'x': choose from bf16, fp32"),
        ("--batch_size two", "--batch_size: invalid int value: 'two'"),
        ("--data_dir caf\udce9", r"'caf\udce9' is not valid UTF-8"),
        ("--data_dir=", "--data_dir: expected a value, but it is empty"),
        ("--data_dir -x", "unknown flag -x: see --help; if it is the value of --data_dir, write --data_dir=-x"),
        ("--greedy -x", "unknown flag -x: see --help"),
        ("--resume auto", "unknown flag --resume: see --help"),  # --greedy is not similar enough
    ],
)
def test_bad_command_line_is_a_one_line_error(command_line, message):
    parser = Parser()
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--data_dir", type=nonempty)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--dtype", choices=("bf16", "fp32"))
    parser.add_argument("--temperature", type=float)
    with pytest.raises(InputError, match=r"\A.*\Z") as error:
        parser.parse_args(command_line.split())
    assert message in str(error.value)
    assert parser.parse_args(["--temperature", "-1", "--data_dir=--x"]).data_dir == "--x"
    assert parser.parse_args(["--data_dir", "-a=b c"]).data_dir == "-a=b c"


def test_path_error_lists_what_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("shard_00000.npy", "tokenizer.json", ".hidden"):
        (tmp_path / "data" / name).touch()
    os.mkfifo("pipe")
    there = "data contains shard_00000.npy, tokenizer.json"
    for path, wanted, message in (
        ("data/tokeniser.json", "file", f"does not exist: did you mean tokenizer.json? {there}"),
        ("data/x", "file", f"does not exist: {there}"),
        ("dta", "directory", "does not exist: did you mean data? The current directory contains data, pipe"),
        ("data/tokenizer.json", "directory", "is a file, not a directory: pass its directory, data"),
        ("data", "file", "is a directory: pass a file in it; it contains shard_00000.npy, tokenizer.json"),
        ("dxx", "directory", "does not exist: the current directory contains data, pipe"),
        ("pipe", "file", "is neither a file nor a directory"),
        ("no/x", "file", "does not exist, and no cannot be read (no such directory)"),
    ):
        assert str(path_error("--flag", path, wanted)) == f"--flag {path} {message}"


def test_bugs_propagate():
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, RunFailed), (errno.EFBIG, RunFailed), (errno.EACCES, InputError)]
)
def test_full_disk_fails_the_run_and_wrong_path_is_bad_input(number, kind):
    error = file_error("run: cannot be written", OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert str(error) == f"run: cannot be written ({os.strerror(number)})"


def test_file_in_place_of_a_directory_is_reported(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(FileExistsError) as raised:
        (tmp_path / "run").mkdir(exist_ok=True)
    error = file_error("--save_dir run: cannot be written", raised.value)
    assert type(error) is InputError
    assert str(error) == "--save_dir run: cannot be written (it is a file, not a directory)"
