"""User-facing errors: one line on stderr and an exit status per kind. Bugs keep their traceback."""

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

from .log import log_to_stderr

# Exit statuses for schedulers. 0 is success; 1 is a bug, with a traceback.
BAD_INPUT = 2  # same as argparse: running the same command again would fail
FAILED = 3  # the run cannot continue or its output cannot be written; the message says how to fix it
STOPPED = 75  # EX_TEMPFAIL: a signal stopped the command and nothing is lost; restart it (train.py: --resume auto)
INTERRUPTED = 130  # Ctrl-C
PIPE_CLOSED = 141  # the reader of the output has exited

# A full or failing disk, a file size limit, or a closed terminal.
TRANSIENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class InputError(ValueError):
    """Bad input. The message names the file, flag or value, and the fix."""

    status = BAD_INPUT


class RunFailed(RuntimeError):
    """The run cannot continue. The message says why, what is saved, and what to do."""

    status = FAILED


class RunStopped(Exception):
    """A signal stopped the run. The message says what is saved and how to continue."""

    status = STOPPED


def file_error(what: str, error: OSError) -> InputError | RunFailed:
    """RunFailed if the same command can succeed later (for example, once the disk has space), else InputError."""
    is_file = isinstance(error, FileExistsError) and os.path.isfile(error.filename or "")
    reason = "it is a file, not a directory" if is_file else error.strerror or error
    return (RunFailed if error.errno in TRANSIENT_ERRNOS else InputError)(f"{what} ({reason})")


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "did you mean <closest name>? ", or an empty string if no name is close."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"did you mean {close[0]}? " if close else ""


def path_error(what: str, path: str | Path, wanted: str) -> InputError:
    """Return an error that says why `path` is unusable, what exists instead, and which name is closest.

    `what` is the flag or another name for the path; `wanted` is "file" or "directory".
    """
    path = Path(path)
    # Unlike Path.exists, these functions accept a name that is too long for a file.
    exists, is_directory = os.path.exists(path), os.path.isdir(path)
    if exists and not (is_directory or path.is_file()):
        return InputError(f"{what} {path} is neither a file nor a directory")
    directory = path if is_directory else path.parent
    try:
        names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        reason = "no such directory" if isinstance(error, FileNotFoundError) else error.strerror
        return InputError(f"{what} {path} does not exist, and {directory} cannot be read ({reason})")
    listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    listed = repr(listed)[1:-1] or "nothing"  # escaped for the terminal
    if is_directory:
        return InputError(f"{what} {path} is a directory: pass a {wanted} in it; it contains {listed}")
    if exists:
        return InputError(f"{what} {path} is a file, not a directory: pass its directory, {directory}")
    suggestion = did_you_mean(path.name, names)
    where = f"{'T' if suggestion else 't'}he current directory" if directory == Path() else directory
    return InputError(f"{what} {path} does not exist: {suggestion}{where} contains {listed}")


OUT_OF_MEMORY = "out of memory: use a smaller model, a smaller batch or shorter sequences"


def is_out_of_memory(error: Exception) -> bool:
    """Detect both forms: CUDA's torch.OutOfMemoryError and the CPU allocator's RuntimeError, identified by its text."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def run_command(main: Callable[[], None]) -> int:
    """Run a command and return one of the exit statuses above.

    Closed standard streams are reopened on /dev/null. SIGTERM and SIGHUP raise SystemExit in the command, so it can
    clean up, unless it installs its own handlers. Blank CC, CXX and ACCELERON_* variables count as unset.
    """
    _prepare_streams()
    log_to_stderr()
    os.environ.pop("MPLBACKEND", None)  # plots go to files, and importing matplotlib with an unknown backend fails
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
        print(line, end="\n" if line else "", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would flush again at exit and change the exit status
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _outcome(main: Callable[[], None]) -> tuple[int, str]:
    """Run the command. Return its exit status and the final line for stderr."""
    try:
        main()
    except (InputError, RunFailed) as error:
        return error.status, f"error: {error}"
    except RunStopped as stopped:
        return stopped.status, str(stopped)
    except BrokenPipeError:
        return PIPE_CLOSED, ""
    except OSError as error:
        if error.filename is None and error.errno not in (*TRANSIENT_ERRNOS, errno.EBADF):
            raise
        what = "the output" if error.filename is None else error.filename
        failure = file_error(f"{what}: cannot be read or written", error)
        return failure.status, f"error: {failure}"
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return BAD_INPUT, f"error: {OUT_OF_MEMORY}"
        cause = getattr(error, "inner_exception", None)  # set on torch.compile errors
        if type(cause).__name__ not in ("InvalidCxxCompiler", "CppCompileError"):
            raise
        lines = str(cause).splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0])
        return BAD_INPUT, f"error: torch.compile: {reason}: set CXX to a working compiler, or pass --no_compile"
    except KeyboardInterrupt:
        return INTERRUPTED, "\ninterrupted"
    return 0, ""


def _prepare_streams():
    """Reopen closed standard streams on /dev/null, and escape characters that the terminal cannot show."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # missing under pytest and in notebooks
            stream.reconfigure(errors=errors)


@contextmanager
def _stop_signals() -> Iterator[None]:
    def stop(number: int, _):
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
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
