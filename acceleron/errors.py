"""What ends a command, told apart from bugs: printed as one line, each kind with its own exit status."""

import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

# What a scheduler may act on; 0 is done, 1 a bug (a traceback says which).
BAD_INPUT = 2  # as argparse's: the same command would fail again
FAILED = 3  # the run can't go on as it is, or its output can't be written; the message says what to change
STOPPED = 75  # EX_TEMPFAIL: a signal stopped the command and nothing is lost; start it again (train.py: --resume auto)
INTERRUPTED = 130  # Ctrl-C, at once
PIPE_CLOSED = 141  # the program that reads its output has exited

# A full or failing disk, a limit on the size of files, or a terminal that has gone.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class InputError(ValueError):
    """Bad input. The message names the file, flag or value, and the fix."""


class RunFailed(RuntimeError):
    """A run that can't go on. The message says why, what is saved, and what to do."""


def file_error(what: str, error: OSError) -> InputError | RunFailed:
    """RunFailed for what may pass without a change of the command, a full disk for one; else InputError."""
    is_file = isinstance(error, FileExistsError) and os.path.isfile(error.filename or "")
    reason = "it is a file, not a directory" if is_file else error.strerror or error
    return (RunFailed if error.errno in PASSING else InputError)(f"{what} ({reason})")


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The question, with the nearest of the names and a space after it; an empty string if none is near."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"did you mean {near[0]}? " if near else ""


def path_error(what: str, path: str | Path, wanted: str) -> InputError:
    """Says why `path` can't be used, what is there instead, and which name is nearest.

    what: the flag, or another name for it. wanted: "file" or "directory".
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        return InputError(f"{what} {path} is neither a file nor a directory")
    place = path if path.is_dir() else path.parent
    try:
        names = sorted(entry.name for entry in place.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        reason = "there is no such directory" if isinstance(error, FileNotFoundError) else error.strerror
        return InputError(f"{what} {path} does not exist, and {place} cannot be read ({reason})")
    listed = repr(", ".join(names[:5]) + ", …" * (len(names) > 5))[1:-1] or "nothing"  # escaped for the terminal
    if path.is_dir():
        return InputError(f"{what} {path} is a directory: name a {wanted} in it; it holds {listed}")
    if path.exists():
        return InputError(f"{what} {path} is a file, not a directory: name the {wanted} that it is in, {place}")
    question = did_you_mean(path.name, names)
    where = f"{'T' if question else 't'}he current directory" if place == Path() else place
    return InputError(f"{what} {path} does not exist: {question}{where} holds {listed}")


class RunStopped(Exception):
    """A run that a signal stopped. The message says what is saved and how to go on."""


OUT_OF_MEMORY = "out of memory: use a smaller model, a smaller batch or shorter sequences"


def is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError on CUDA; on a CPU a RuntimeError of a certain wording."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def run_command(main: Callable[[], None]) -> int:
    """Run a command; returns its exit status, one of the above.

    The standard streams can be used whatever the command was started with. SIGTERM and SIGHUP raise SystemExit in it,
    unless it handles them itself, so that it cleans up. Blank environment variables that it would read count as unset.
    """
    _prepare_streams()
    os.environ.pop("MPLBACKEND", None)  # pictures are written to files, and importing matplotlib fails for a bad one
    for name, value in list(os.environ.items()):
        if not value.strip() and (name in ("CC", "CXX") or name.startswith("ACCELERON_")):
            del os.environ[name]
    with _stop_signals():
        try:
            status, line = _outcome(main)
        except SystemExit as end:
            status, line = (1, end.code) if isinstance(end.code, str) else (int(end.code or 0), "")
        if not status:
            status, line = _outcome(sys.stdout.flush)
    with suppress(OSError):
        print(line, end="\n" * bool(line), file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again as it ends, and change the exit status
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _outcome(main: Callable[[], None]) -> tuple[int, str]:
    """Exit status and last line of a command."""
    try:
        main()
    except InputError as error:
        return BAD_INPUT, f"error: {error}"
    except RunFailed as error:
        return FAILED, f"error: {error}"
    except RunStopped as stopped:
        return STOPPED, str(stopped)
    except BrokenPipeError:
        return PIPE_CLOSED, ""
    except OSError as error:
        if error.filename is None and error.errno not in (*PASSING, errno.EBADF):
            raise
        what = "the output" if error.filename is None else error.filename
        failure = file_error(f"{what}: cannot be read or written", error)
        return (FAILED if isinstance(failure, RunFailed) else BAD_INPUT), f"error: {failure}"
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return BAD_INPUT, f"error: {OUT_OF_MEMORY}"
        cause = getattr(error, "inner_exception", None)  # of torch.compile's errors
        if type(cause).__name__ not in ("InvalidCxxCompiler", "CppCompileError"):
            raise
        lines = str(cause).splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0])
        return BAD_INPUT, f"error: torch.compile: {reason}: set CXX to a compiler that works, or pass --no_compile"
    except KeyboardInterrupt:
        return INTERRUPTED, "\ninterrupted"
    return 0, ""


def _prepare_streams():
    """Open those that are closed on /dev/null, and let them escape what the terminal can't show."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # not so under pytest or in a notebook
            stream.reconfigure(errors=errors)


@contextmanager
def _stop_signals() -> Iterator[None]:
    def stop(number: int, _):
        signal.signal(number, signal.SIG_IGN)  # a second one must not end the cleaning up
        with suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: stopped\n".encode())
        raise SystemExit(STOPPED)

    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    changed = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
