"""Mistakes of the user, told apart from bugs: the commands print them as one line and exit with status 2."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input. The message names the file, flag or value, and the fix."""


def run_command(main: Callable[[], None]) -> int:
    """Run a command; returns its exit status: 0, 2 after an `InputError`, 130 after Ctrl-C."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0
