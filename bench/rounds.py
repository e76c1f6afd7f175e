"""Providers raced in rounds: the fields of their rows, and the table of rates and of ratios taken round by round."""

import statistics

from .results import complaint
from .timing import spread


def rates(seconds: list[float], tokens: int) -> dict:
    """tokens/s of each round, and their median, 20th and 80th percentile."""
    rounds = [tokens / elapsed for elapsed in seconds]
    median, p20, p80 = spread(rounds)
    fields = {"rounds": rounds, "tokens_per_second": median}
    return fields | {"tokens_per_second_p20": p20, "tokens_per_second_p80": p80}


def print_race(rows: list[dict], ratios: list[tuple[str, str]] = ()):
    """Each provider's median and range, and of each pair the ratio: round by round drops what slowed a whole round.

    A row that failed its check has its complaint instead, and no ratio.
    """
    valid = {row["provider"]: row["rounds"] for row in rows if not complaint(row) and "rounds" in row}
    width = max(len(row["provider"]) for row in rows)
    for row in rows:
        values = valid.get(row["provider"])
        reason = complaint(row) or row.get("failed") or row.get("absent")
        figures = f"{_range(values, '{:.5g}')} tokens/s" if values else reason
        print(f"{row['provider']:{width}}  {figures}")
    for one, other in ratios:
        if one in valid and other in valid:
            values = [a / b for a, b in zip(valid[one], valid[other], strict=True)]
            print(f"{one} / {other}: {_range(values, '{:.2f}')}")


def _range(values: list[float], form: str) -> str:
    low, middle, high = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} .. {high})"
