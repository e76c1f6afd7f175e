"""Flags and measurement rounds shared by the commands."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from acceleron import ops
from acceleron.config import PRESETS
from acceleron.device import DTYPES, resolve_device, resolve_dtype
from acceleron.errors import InputError
from acceleron.flags import Parser, nonempty

from .rows import Results, Row, describe, print_rows, progress
from .timing import interleave

CHOICES = {"model_size": tuple(PRESETS), "dtype": ("auto", *DTYPES), "kernels": ("auto", "triton", "reference")}


def parse(doc: str, choices: dict[str, tuple] | None = None, **defaults) -> argparse.Namespace:
    """Parse flags with these defaults, plus --device and --output. `dtype` becomes a torch.dtype.

    A type as the default makes a flag of that type with default None; a list makes a flag that takes several values.
    choices: allowed values by flag, in addition to CHOICES. Raises InputError for a bad value.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = CHOICES | (choices or {})
    for name, default in ({"device": "auto"} | defaults).items():
        given = dict(choices=choices.get(name), default=default, type=type(default), help="default: %(default)s")
        if default is False:
            given = dict(action="store_true")
        elif isinstance(default, list):
            given |= dict(nargs="+", type=str)
        elif isinstance(default, type):
            given |= dict(default=None, type=default)
        if default == [] or isinstance(default, type):
            given["help"] = "default: depends on the device"
        parser.add_argument(f"--{name}", **given)
    output_help = "directory of results.jsonl (default: under ~/.cache)"
    parser.add_argument("--output", type=nonempty, metavar="DIR", help=output_help)
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        if type(value) in (int, float) and not 0 < value < 1 << 31:
            raise InputError(f"--{name} {value}: expected a number above 0")
    arguments.device = resolve_device(arguments.device)
    try:
        ops.set_backend("auto", arguments.device)
    except ValueError as error:  # a bad environment variable
        raise InputError(str(error)) from error
    if "dtype" in arguments:
        fp16 = torch.float16 if arguments.dtype == "fp16" else None  # not a training dtype, so resolve_dtype rejects it
        arguments.dtype = fp16 or resolve_dtype(arguments.dtype, arguments.device)
    return arguments


@contextmanager
def record_failure(row: Row):
    """Record an exception as the row's `failed` or `absent` and continue with the remaining rows."""
    try:
        yield
    except Exception as error:
        setattr(row, "absent" if isinstance(error, ImportError) else "failed", describe(error))


def run_entries(entries: list[Iterator], rounds: int, results: Results, ours: int):
    """Measure entries in interleaved rounds, check them, and write and print their rows.

    An entry is a generator. It yields its row, then a function that returns one value in the row's unit, and finally
    sets the row's check. Exits with status 1 if one of the first `ours` entries fails.
    """
    rows, samples, passed = [next(entry) for entry in entries], {}, []
    print(f"{rows[0].benchmark}: {rows[0].case}", flush=True)

    def guarded(row: Row, sample: Callable[[], float]) -> float:
        with record_failure(row):
            if not row.failed:
                return sample()
        return math.nan

    for index, row in enumerate(progress(rows, "preparing")):
        with record_failure(row):
            samples[index] = partial(guarded, row, next(entries[index]))
    for index, values in interleave(samples, rounds).items():
        rows[index].values = values
    for row, entry in zip(rows, progress(entries, "checking"), strict=True):
        with record_failure(row):
            if not row.failed:
                next(entry, None)  # an absent entry has already finished
        passed.append(results.write(row))
    print_rows(rows, baseline=rows[0].provider)
    print(f"wrote {results.path}")
    if not all(passed[:ours]):
        sys.exit(1)
