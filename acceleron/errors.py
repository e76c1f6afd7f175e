"""What ends a command, told apart from bugs: printed as one line, each kind with its own exit status."""

import errno
import os
import sys
from collections.abc import Callable

import torch

# What a scheduler may act on; 0 is done, 1 a bug (a traceback says which).
BAD_INPUT = 2  # as argparse's: the same command would fail again
FAILED = 3  # the run can't go on as it is; the message says what to change
STOPPED = 75  # EX_TEMPFAIL: a signal stopped the run and nothing is lost; start it again with --resume auto
INTERRUPTED = 130  # Ctrl-C, at once
PIPE_CLOSED = 141


class InputError(ValueError):
    """Bad input. The message names the file, flag or value, and the fix."""


class RunFailed(RuntimeError):
    """A run that can't go on. The message says why, what is saved, and what to do."""


def file_error(what: str, error: OSError) -> InputError | RunFailed:
    """RunFailed for what may pass without a change of the command, a full disk for one; else InputError."""
    passing = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return (RunFailed if passing else InputError)(f"{what} ({error.strerror or error})")


class RunStopped(Exception):
    """A run that a signal stopped. The message says what is saved and how to go on."""


OUT_OF_MEMORY = "out of memory: use a smaller --batch_size, --seq_len or --model_size"


def is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError on CUDA; on a CPU a RuntimeError of a certain wording."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def run_command(main: Callable[[], None]) -> int:
    """Run a command; returns its exit status, one of the above."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except RunStopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:
        # The reader of a pipe left: nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
