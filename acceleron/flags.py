"""Argument parsing with one-line errors."""

import argparse
import os
import re
import sys
from itertools import pairwise

from .errors import InputError, did_you_mean


def nonempty(value: str) -> str:
    """Argument type for a path or a name. Rejects an empty string, which usually comes from an unset variable."""
    if not value:
        raise argparse.ArgumentTypeError("expected a value, but it is empty (an unset variable?)")
    return value


class Parser(argparse.ArgumentParser):
    """Raises InputError for a bad command line and suggests the closest flag instead of printing the usage.

    Rejects arguments that are not valid UTF-8, because the libraries do not accept such paths.
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
        if self._subparsers is None:  # subparsers check their own flags
            known = self._option_string_actions
            for before, argument in pairwise(["", *args[: args.index("--") if "--" in args else None]]):
                flag = "" if " " in argument else argument.partition("=")[0]  # an argument with a space is a value
                if re.fullmatch(r"--?[A-Za-z][\w-]*", flag) and flag not in known:
                    suggestion = did_you_mean(f"--{flag.lstrip('-')}", known, cutoff=0.7)  # "--" alone scores high
                    takes_value = before in known and known[before].nargs is None
                    value = f"; if it is the value of {before}, write {before}={argument}" if takes_value else ""
                    raise InputError(f"unknown flag {flag}: {suggestion}see --help{value}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            names = [str(name) for name in action.choices]
            suggestion = did_you_mean(str(value), names)
            text = f"invalid choice: {value!r}: {suggestion}{'C' if suggestion else 'c'}hoose from {', '.join(names)}"
            raise argparse.ArgumentError(action, text)

    def error(self, message: str):
        raise InputError(message)
