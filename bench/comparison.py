"""Two results directories against each other: what became slower, larger or worse, beyond the noise of both."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from . import rows as fields
from .rows import Rows

# A comparison has hundreds of rows, and one false alarm spoils it: of the unchanged rows with rounds at most two in a
# thousand are marked, one of them as a regression.
FALSE_ALARMS = 0.002
# Two runs on one machine differ by more than their rounds tell (clocks, temperature, neighbours): smaller changes of a
# rate, a time or a memory are never marked. A loss is steadier than that.
FLOOR = 0.05
LOSS_FLOOR = 0.005
PEAK_NOISE = 64 * 2**20  # bytes: on a CPU a peak is of the process's resident size, known to tens of MB
FEWEST_SAMPLES = 5  # below this many, p20 and p80 say little

RULE = (
    "A change is marked if it is beyond the noise of both measurements. Rows with rounds, and losses, whose rounds are "
    "the seeds: Welch's t-test of their logarithms finds a difference such as fewer than "
    f"{FALSE_ALARMS:.1%} of unchanged rows show. Rows with p20 and p80 alone: the two ranges do not overlap, and each "
    f"is of {FEWEST_SAMPLES} samples or more. In both cases, and for bytes, which are counted: the medians differ by "
    f"more than {FLOOR:.0%} ({LOSS_FLOOR:.1%} for a loss), and peaks of memory by more than {PEAK_NOISE >> 20} MiB. "
    "What was measured in the baseline and failed here is a regression."
)


class Measured(NamedTuple):
    """A median with what is known of its noise: rounds, or p20 and p80, or neither where it was counted."""

    value: float
    rounds: Sequence[float] = ()
    p20: float = math.nan
    p80: float = math.nan
    samples: int = 0


class Change(NamedTuple):
    name: str  # of the file
    row: dict
    before: float
    after: float
    mark: str  # "regression", "improvement" or ""


class Comparison(NamedTuple):
    changes: list[Change]  # marked ones first
    failed: list[tuple[str, dict]]  # rows that failed now, and were measured there
    only_here: list[tuple[str, dict]]
    only_there: list[tuple[str, dict]]
    devices: tuple[list[str], list[str]]  # here and there

    def summary(self) -> str:
        marks = [change.mark for change in self.changes]
        return (
            f"{len(marks)} rows compared: {marks.count('regression')} regressions, {marks.count('improvement')} "
            f"improvements. {len(self.failed)} rows failed here that were measured in the baseline."
        )

    def regressed(self) -> bool:
        return bool(self.failed) or any(change.mark == "regression" for change in self.changes)


def welch_p_value(a: list[float], b: list[float]) -> float:
    """The two-sided p-value of Welch's t-test that two samples, each of two values or more, have the same mean."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    difference = statistics.fmean(a) - statistics.fmean(b)
    if va + vb == 0:
        return float(difference == 0)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    # With t = sqrt(freedom) tan(angle), Student's density is cos(angle) ** (freedom - 1), but for a constant.
    angle = math.atan(abs(difference) / math.sqrt(freedom * (va + vb)))
    return _integral(angle, freedom - 1) / _integral(0, freedom - 1)


def _integral(start: float, power: float, steps: int = 2000) -> float:
    """Of cos(x) ** power from start to pi / 2, by Simpson's rule."""
    step = (math.pi / 2 - start) / steps
    values = [max(math.cos(start + i * step), 0) ** max(power, 0) for i in range(steps + 1)]
    return (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])) * step / 3


def changed(before: Measured, after: Measured, floor: float = FLOOR) -> bool:
    """Whether two measurements of one thing differ beyond the noise of both; RULE in the report says the same.

    With rounds it is Welch's test of logarithms, since what slows a round multiplies its time; it holds for few rounds
    (a test of ranks can't reach p < 0.01 with four) and for unequal noise. An outlier widens the noise, so that it
    hides a change rather than feigns one. With p20 and p80 alone, ranges that don't overlap put the medians some 1.7
    standard deviations of a sample apart, which is 2.1 times the error of their difference for FEWEST_SAMPLES and 6.8
    times for fifty. The floor stands for what neither sees: the difference between two runs of the same thing.
    """
    if abs(math.log(after.value) - math.log(before.value)) <= math.log1p(floor):
        return False
    if before.rounds or after.rounds:
        if min(len(before.rounds), len(after.rounds)) < 2:
            return False
        return welch_p_value([*map(math.log, before.rounds)], [*map(math.log, after.rounds)]) < FALSE_ALARMS
    if before.samples or after.samples:
        apart = before.p80 < after.p20 or after.p80 < before.p20
        return apart and min(before.samples, after.samples) >= FEWEST_SAMPLES
    return True


def _measured(name: str, row: dict) -> Measured:
    if name == "ops":
        return Measured(row["seconds"], (), row["seconds_p20"], row["seconds_p80"], row["samples"])
    if name == "memory":
        return Measured(row["bytes"])
    if name == "quality":
        return Measured(statistics.median(row["losses"]), row["losses"])
    return Measured(row["ratio" if name == "checkpoints" else "tokens_per_second"], row["rounds"])


def _comparable(name: str, rows: list[dict]) -> dict[tuple, dict]:
    """The latest row of each key. The final runs of a model and budget become one row, with `losses`, one a seed."""
    if name == "memory":
        rows = [row for row in rows if row["bytes"] > 0]  # a ratio needs two figures above 0
    if name != "quality":
        return {fields.key(name, row): row for row in fields.latest(name, rows)}
    runs: dict[tuple, dict] = {}
    for row in fields.latest(name, [row for row in rows if row["purpose"] == "final" and row["val_loss"] > 0]):
        key = tuple(row[field] for field in ("device", "size", "model", "tokens", "dtype"))
        merged = runs.setdefault(key, row | {"losses": []})
        merged["losses"].append(row["val_loss"])
    return runs


def compare(here: Rows, there: Rows) -> Comparison:
    """The rows of `here` against those of the baseline `there` that measured the same thing on the same device."""
    changes, failed, only_here, only_there = [], [], [], []
    for name in fields.FIELDS:
        ours, theirs = _comparable(name, here.used[name]), _comparable(name, there.used[name])
        now_failing = {fields.identity(name, row): row for row in here.missing[name] if "failed" in row}
        only_here += [(name, row) for key, row in ours.items() if key not in theirs]
        for key, row in theirs.items():
            if key in ours:
                if name != "kernels":  # which have no figures
                    changes.append(_change(name, row, ours[key]))
            elif fields.identity(name, row) in now_failing:
                failed.append((name, now_failing[fields.identity(name, row)]))
            else:
                only_there.append((name, row))
    changes.sort(key=lambda change: ("regression", "improvement", "").index(change.mark))
    devices = tuple(sorted({row["device"] for row in rows.everything()}) for rows in (here, there))
    return Comparison(changes, failed, only_here, only_there, devices)


def _change(name: str, before: dict, after: dict) -> Change:
    old, new = _measured(name, before), _measured(name, after)
    mark = ""
    is_peak = name == "memory" and before["what"] == "peak"
    if changed(old, new, LOSS_FLOOR if name == "quality" else FLOOR) and not (
        is_peak and abs(new.value - old.value) <= PEAK_NOISE
    ):
        less_is_better = name in ("ops", "memory", "quality", "checkpoints")
        mark = "improvement" if (new.value < old.value) == less_is_better else "regression"
    return Change(name, after, old.value, new.value, mark)
