"""The rows of a results directory: which fields each file's rows need, and which rows a report may use.

A row is one of three: used (it passed its correctness check and has its fields), missing (it says `failed` or
`absent`, and why), or refused (anything else), which no table or plot shows.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from acceleron.errors import InputError

from . import results

ABOUT = {"command": "text", "date": "text", "commit": "text", "device": "text", "versions": "text"}
RATES = {
    "rounds": "rates", "tokens_per_second": "positive",
    "tokens_per_second_p20": "positive", "tokens_per_second_p80": "positive",
}  # fmt: skip
OP = {
    "op": "text", "shape": "text", "pass": "text", "provider": "text", "dtype": "text", "sizes": "object?",
    "flops": "number?", "bytes": "number?",
}  # fmt: skip
RACE = {
    "provider": "text", "size": "text?", "dtype": "text?", "batch_size": "whole?", "seq_len": "whole?",
    "tokens": "whole?", "group": "text", **RATES,
}  # fmt: skip

# The fields of each file's rows, by kind; those with a question mark may be null or absent.
FIELDS = {
    "throughput": {
        "size": "text", "model": "model", "kernels": "text", "compiled": "flag", "checkpointing": "flag",
        "deterministic": "flag?", "batch_size": "whole", "grad_accum": "whole", "seq_len": "whole", "dtype": "text",
        "routing": "text?", "group": "text", **RATES, "mfu": "number?", "flops_per_token": "number?",
        "peak_flops": "number?", "start_seconds": "number?", "peak_memory_bytes": "number?",
        "expert_least_share": "number?", "expert_most_share": "number?", "op_shares": "shares?",
    },
    "quality": {
        "size": "text", "model": "model", "seed": "whole", "lr": "positive", "purpose": "purpose", "tokens": "count",
        "dtype": "text", "val_loss": "positive", "seconds": "positive", "tokens_per_second": "positive",
        "curve": "curve", "tuning": "text?",
    },
    "ops": {
        **OP, "seconds": "positive", "seconds_p20": "positive", "seconds_p80": "positive", "samples": "whole",
        "rate": "number?", "bound": "bound?", "share_of_ceiling": "number?", "ceiling_flops": "number?",
        "ceiling_bytes": "number?",
    },
    "kernels": OP,
    "memory": {
        "what": "text", "size": "text", "part": "text", "provider": "text", "model": "model?", "kernels": "text?",
        "tokens": "whole?", "dtype": "text", "checkpointing": "flag?", "compiled": "flag?", "bytes": "whole",
        "bytes_per_token_per_layer": "number?", "formula_bytes": "positive?",
    },
    "peers": RACE, "decoding": RACE, "loader": RACE,
    "checkpoints": {
        "size": "text", "dtype": "text", "compiled": "flag", "batch_size": "whole", "seq_len": "whole",
        "interval": "count", "rounds": "rates", "ratio": "positive", "ratio_p20": "positive", "ratio_p80": "positive",
        "interval_seconds": "positive", "blocked_seconds": "positive", "write_seconds": "positive", "bytes": "count",
    },
}  # fmt: skip

# What makes two rows measurements of the same thing; `device` and an op's `sizes` come on top.
IDENTITY = {
    "throughput": (
        "size", "model", "kernels", "routing", "compiled", "checkpointing", "batch_size", "grad_accum", "seq_len",
        "dtype", "group",
    ),
    "quality": ("size", "model", "seed", "lr", "purpose", "tokens", "dtype"),
    "ops": ("op", "shape", "pass", "provider", "dtype"),
    "kernels": ("op", "shape", "pass", "provider", "dtype"),
    "memory": (
        "what", "size", "part", "provider", "model", "kernels", "tokens", "dtype", "checkpointing", "compiled",
    ),
    **dict.fromkeys(("peers", "decoding", "loader"), ("provider", "size", "dtype", "batch_size", "seq_len", "tokens")),
    "checkpoints": ("size", "dtype", "compiled", "batch_size", "seq_len", "interval"),
}  # fmt: skip


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _positive(value) -> bool:
    return _number(value) and value > 0


KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "text": ("a text", lambda value: isinstance(value, str)),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "whole": ("a whole number", lambda value: _number(value) and isinstance(value, int) and value >= 0),
    "count": ("a whole number above 0", lambda value: _positive(value) and isinstance(value, int)),
    "number": ("a finite number", _number),
    "positive": ("a number above 0", _positive),
    "object": ("an object", lambda value: isinstance(value, dict)),
    "model": ("moe or dense", lambda value: value in ("moe", "dense")),
    "purpose": ("tuning or final", lambda value: value in ("tuning", "final")),
    "bound": ("compute or memory", lambda value: value in ("compute", "memory")),
    "rates": (
        "a list of numbers above 0",
        lambda value: isinstance(value, list) and value != [] and all(map(_positive, value)),
    ),
    "shares": ("an object of numbers", lambda value: isinstance(value, dict) and all(map(_number, value.values()))),
    "curve": (
        "a list of [tokens, seconds, loss]",
        lambda value: (
            isinstance(value, list)
            and all(isinstance(point, list) and len(point) == 3 and all(map(_number, point)) for point in value)
        ),
    ),
}


class Refused(NamedTuple):
    file: str
    line: int
    reason: str


class Rows(NamedTuple):
    """By the name of the file without .jsonl, in the files' order; `used` and `missing` have all names."""

    used: dict[str, list[dict]]
    missing: dict[str, list[dict]]
    refused: list[Refused]

    def everything(self) -> list[dict]:
        return [row for rows in self.used.values() for row in rows]


def refusal(name: str, row: dict) -> str | None:
    """Why a row that claims a result is none: no passed check, or a field without a value of its kind."""
    if not isinstance(row.get("check"), str) or not all(_number(row.get(f"check_{x}")) for x in ("error", "allowed")):
        return "no correctness check"
    if results.complaint(row):
        return results.complaint(row)
    for field, kind in (ABOUT | FIELDS[name]).items():
        value, (expected, fits) = row.get(field), KINDS[kind.rstrip("?")]
        if not fits(value) and not (kind.endswith("?") and value is None):
            found = f"{json.dumps(value):.60}" if field in row else "nothing"
            return f"{field}: expected {expected}, but found {found}"
    return None


def read(directory: Path) -> Rows:
    """All rows of a directory. Raises InputError if it has no results, or a file that is not JSON lines."""
    if not any((directory / f"{name}.jsonl").exists() for name in FIELDS):
        names = ", ".join(f"{name}.jsonl" for name in FIELDS)
        raise InputError(f"{directory}: no results there; expected a directory with at least one of {names}")
    rows = Rows({name: [] for name in FIELDS}, {name: [] for name in FIELDS}, [])
    for name in FIELDS:
        path = directory / f"{name}.jsonl"
        try:
            found = results.read_results(path)
        except InputError:
            raise
        except (OSError, ValueError, RecursionError) as error:  # not text, a number of 5000 digits, too deeply nested
            raise InputError(f"{path}: cannot be read as JSON lines ({error})") from error
        for line, row in enumerate(found, 1):
            if "failed" in row or "absent" in row:
                rows.missing[name].append(row)
            elif reason := refusal(name, row):
                rows.refused.append(Refused(path.name, line, reason))
            else:
                rows.used[name].append(row)
    return rows


def identity(name: str, row: dict) -> tuple:
    """What a row measures and on which device, less an op's sizes, which a failed row does not keep. Hashable."""
    values = (row.get(field) for field in ("device", *IDENTITY[name]))
    return tuple(value if isinstance(value, (str, int, float, type(None))) else json.dumps(value) for value in values)


def key(name: str, row: dict) -> tuple:
    """`identity`, and the sizes of an op: equal for two measurements of the same thing."""
    return (*identity(name, row), json.dumps(row.get("sizes"), sort_keys=True))


def latest(name: str, rows: Iterable[dict]) -> list[dict]:
    """One row of each key, the one with the latest date, and of equal dates the last."""
    return list({key(name, row): row for row in sorted(rows, key=lambda row: row["date"])}.values())


def final_runs(rows: Iterable[dict]) -> list[dict]:
    """The final runs of quality: of each device, size and dtype the latest command's, whose rows have one date."""
    final = [row for row in rows if row["purpose"] == "final"]
    latest: dict[tuple, str] = {}
    for row in final:
        of = row["device"], row["size"], row["dtype"]
        latest[of] = max(latest.get(of, ""), row["date"])
    return [row for row in final if row["date"] == latest[row["device"], row["size"], row["dtype"]]]


def same_run(row: dict, other: dict) -> bool:
    """Whether two rows were measured interleaved, so that their rounds can be compared one by one."""
    return all(row[field] == other[field] for field in ("group", "device", "command", "date", "commit"))
