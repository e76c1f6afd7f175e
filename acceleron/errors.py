"""Mistakes of the user, told apart from bugs: the commands print them as one line and exit with status 2."""

import os
import sys
from collections.abc import Callable

import torch


class InputError(ValueError):
    """Bad input. The message names the file, flag or value, and the fix."""


def run_command(main: Callable[[], None]) -> int:
    """Run a command; returns its exit status: 0, 2 after an `InputError` or for want of memory, 130 after Ctrl-C."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError on CUDA; on a CPU a RuntimeError of this wording.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        print("error: out of memory: use a smaller --batch_size, --seq_len or --model_size", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe left: nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0
