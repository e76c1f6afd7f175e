"""Command lines, whose errors are one line."""

import argparse
import os
import re
import sys

from .errors import InputError, did_you_mean


class Parser(argparse.ArgumentParser):
    """Raises InputError for a bad command line, and suggests the nearest flag instead of printing the usage.

    An argument that is not valid UTF-8 is refused: no library takes such a path.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for argument in args:
            try:
                os.fsencode(argument).decode()
            except UnicodeError as error:
                raise InputError(f"{argument!a} is not valid UTF-8") from error
        if self._subparsers is None:  # else it is theirs to say
            known = self._option_string_actions
            for argument in args[: args.index("--") if "--" in args else None]:
                flag = "" if " " in argument else argument.partition("=")[0]  # with a space it is a value
                if re.fullmatch(r"--?[A-Za-z][\w-]*", flag) and flag not in known:
                    meant = did_you_mean(f"--{flag.lstrip('-')}", known)
                    raise InputError(f"unknown flag {flag}: {meant}--help lists all")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            names = [str(name) for name in action.choices]
            meant = did_you_mean(str(value), names)
            text = f"invalid choice: {value!r}: {meant}{'C' if meant else 'c'}hoose from {', '.join(names)}"
            raise argparse.ArgumentError(action, text)

    def error(self, message: str):
        raise InputError(message)
