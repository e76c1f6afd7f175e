"""Two results against each other: a real change is marked, and noise is not."""

import math
import random
import sys

import made_rows
import pytest

from acceleron.errors import run_command
from bench import comparison, report, sections
from bench import rows as fields
from bench.comparison import Measured, changed, compare

OTHER_DAY = {"date": "2026-11-21T10:00:00+00:00", "commit": "0000000"}


def rows_of(directory, **files):
    return fields.read(made_rows.write(directory, **files))


def noisy(generator: random.Random, rate: float, noise: float, rounds: int = 5) -> list[float]:
    """Rates whose times vary as lognormal, one round in ten slowed by a neighbour by 3 to 30 % on top."""
    slowed = [1 - generator.uniform(0.03, 0.3) * (generator.random() < 0.1) for _ in range(rounds)]
    return [rate * slow * math.exp(generator.gauss(0, noise)) for slow in slowed]


def steady(generator: random.Random, rate: float, noise: float, rounds: int = 5) -> list[float]:
    return [rate * math.exp(generator.gauss(0, noise)) for _ in range(rounds)]


def percentiles(values: list[float]) -> Measured:
    values = sorted(values)
    low, middle, high = (values[round(q * (len(values) - 1))] for q in (0.2, 0.5, 0.8))
    return Measured(middle, (), low, high, len(values))


def rounds_of(values: list[float]) -> Measured:
    return Measured(sorted(values)[len(values) // 2], values)


@pytest.mark.parametrize("draw", [steady, noisy])
@pytest.mark.parametrize(("noise", "count"), [(0.01, 5), (0.03, 3), (0.03, 5), (0.1, 5), (0.1, 10)])
def test_noise_is_marked_in_less_than_three_of_a_thousand_rows(draw, noise, count):
    generator = random.Random(0)
    marked = 0
    for _ in range(1500):
        # Two runs also differ as a whole, by a hundredth.
        before, after = (rounds_of(draw(generator, generator.gauss(1, 0.01), noise, count)) for _ in range(2))
        marked += changed(before, after)
    assert marked <= 3 * 1.5


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_planted_change_of_a_fifth_is_marked(factor):
    generator = random.Random(1)
    for count, noise in ((5, 0.03), (10, 0.05), (3, 0.01)):
        found = sum(
            changed(
                rounds_of(steady(generator, 6e5, noise, count)),
                rounds_of(steady(generator, factor * 6e5, noise, count)),
            )
            for _ in range(200)
        )
        assert found >= 194, (count, noise)


def test_of_p20_and_p80_noise_is_not_marked_and_a_fifth_is():
    generator = random.Random(2)
    for noise in (0.01, 0.03, 0.1):
        for count in (20, 50):
            pairs = [
                (steady(generator, 1e-3, noise, count), steady(generator, 1e-3, noise, count)) for _ in range(1000)
            ]
            assert sum(changed(percentiles(a), percentiles(b)) for a, b in pairs) <= 3
            if noise < 0.1:
                slower = sum(changed(percentiles(a), percentiles([1.2 * x for x in b])) for a, b in pairs)
                assert slower >= 990
    few = percentiles([1.0, 1.0, 1.0])
    assert not changed(few, percentiles([2.0, 2.0, 2.0]))


def test_without_a_spread_only_the_floor_counts():
    assert not changed(Measured(100.0), Measured(104.9))
    assert changed(Measured(100.0), Measured(105.1))
    assert changed(Measured(105.1), Measured(100.0))
    # One round says nothing of its noise.
    assert not changed(Measured(100.0, [100.0]), Measured(50.0, [50.0, 50.0]))


@pytest.mark.parametrize(
    ("t", "freedom", "p"), [(2.776, 4, 0.05), (4.501, 8, 0.002), (12.706, 1, 0.05), (1.0, 2, 0.4226)]
)
def test_the_p_value_is_that_of_students_tables(t, freedom, p):
    # Equal sizes and variances: freedom = 2 n - 2. Odd freedom 1: the second sample without variance, of two values.
    if freedom == 1:
        a, b = [-1.0, 1.0], [t, t]  # the mean's variance is 2 / 2
    else:
        count = freedom // 2 + 1
        a = [float(i) for i in range(count)]
        variance = sum((x - sum(a) / count) ** 2 for x in a) / (count - 1)
        b = [x + t * math.sqrt(2 * variance / count) for x in a]
    assert comparison.welch_p_value(a, b) == pytest.approx(p, rel=2e-3)


def test_changes_are_marked_by_what_is_better_for_each_figure(tmp_path):
    def files(slow: float) -> dict:
        return {
            "throughput": [made_rows.throughput([x / slow for x in (600e3, 610e3, 605e3, 598e3, 607e3)])],
            "quality": [made_rows.quality("moe", seed, slow**0.1 * (3 + 0.001 * seed)) for seed in range(5)],
            "ops": [made_rows.op("triton", 1e-3 * slow)],
            "kernels": [made_rows.kernel()],
            "memory": [made_rows.memory(int(3e8 * slow)), made_rows.memory(int(9e9 * slow), what="peak")],
            "peers": [made_rows.race("ours", [x / slow for x in (200.0, 203.0, 201.0)])],
            "checkpoints": [made_rows.checkpoints([x * slow for x in (1.02, 1.03, 1.01)])],
        }

    fast, slow = rows_of(tmp_path / "fast", **files(1.0)), rows_of(tmp_path / "slow", **files(1.25))
    names = ["throughput", "quality", "ops", "memory", "memory", "peers", "checkpoints"]
    assert [(change.name, change.mark) for change in compare(slow, fast).changes] == [(n, "regression") for n in names]
    assert [(change.name, change.mark) for change in compare(fast, slow).changes] == [(n, "improvement") for n in names]
    assert {change.mark for change in compare(slow, slow).changes} == {""}
    change = compare(slow, fast).changes[0]
    assert (change.before, change.after) == (605e3, 484e3)


def test_small_peaks_of_memory_are_noise_and_saved_bytes_are_not(tmp_path):
    before = rows_of(tmp_path / "a", memory=[made_rows.memory(10**8), made_rows.memory(10**8, what="peak")])
    after = rows_of(tmp_path / "b", memory=[made_rows.memory(15 * 10**7), made_rows.memory(15 * 10**7, what="peak")])
    marks = {change.row["what"]: change.mark for change in compare(after, before).changes}
    assert marks == {"saved": "regression", "peak": ""}


def test_only_rows_of_the_same_thing_are_compared(tmp_path):
    rounds = [100.0, 101.0, 99.0, 100.0, 100.0]
    there = [
        made_rows.throughput(rounds),
        made_rows.throughput(rounds, "dense"),
        made_rows.throughput(rounds, size="small"),
    ]
    here = [made_rows.throughput(rounds, batch_size=64), made_rows.throughput(rounds, "dense")]
    ops = (
        {"ops": [made_rows.op("triton", 1e-3)]},
        {"ops": [made_rows.op("triton", 2e-3, sizes={"T": 131072, "D": 512})]},
    )
    found = compare(
        rows_of(tmp_path / "here", throughput=here, **ops[0]), rows_of(tmp_path / "there", throughput=there, **ops[1])
    )
    assert [(change.name, change.row["model"]) for change in found.changes] == [("throughput", "dense")]
    assert [(name, row.get("batch_size")) for name, row in found.only_here] == [("throughput", 64), ("ops", None)]
    assert [(name, row.get("size")) for name, row in found.only_there] == [
        ("throughput", "tiny"), ("throughput", "small"), ("ops", None),
    ]  # fmt: skip


def test_the_latest_of_several_measurements_is_compared(tmp_path):
    old, new = made_rows.throughput([50.0, 51.0, 49.0], **OTHER_DAY), made_rows.throughput([100.0, 101.0, 99.0])
    here, there = rows_of(tmp_path / "a", throughput=[new, old]), rows_of(tmp_path / "b", throughput=[new])
    assert [(change.after, change.mark) for change in compare(here, there).changes] == [(100.0, "")]


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    try:
        status = run_command(report.main)
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_a_regression_is_reported_and_the_status_is_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "_plots", lambda: None)
    rounds = [600e3, 610e3, 605e3, 598e3, 607e3]
    there = made_rows.write(tmp_path / "there", throughput=[made_rows.throughput(rounds, **OTHER_DAY)])
    here = made_rows.write(tmp_path / "here", throughput=[made_rows.throughput([0.8 * x for x in rounds])])
    status, printed = run(monkeypatch, capsys, here, "--compare", there)
    assert status == 1
    assert "1 rows compared: 1 regressions, 0 improvements" in printed
    text = (here / "report.md").read_text()
    assert "| regression | throughput | size tiny, model moe" in text
    assert "| tokens/s | 605,000 | 484,000 | 0.800 |" in text
    assert OTHER_DAY["commit"] in text
    assert run(monkeypatch, capsys, there, "--compare", here, "--output", tmp_path / "out")[0] == 0
    assert run(monkeypatch, capsys, here, "--compare", here)[0] == 0
    assert "regression |" not in (here / "report.md").read_text()


def test_what_fails_now_and_was_measured_is_a_regression(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "_plots", lambda: None)
    there = made_rows.write(tmp_path / "there", kernels=[made_rows.kernel(), made_rows.kernel(shape="large")])
    row = made_rows.kernel(shape="large")
    del row["sizes"], row["check_error"], row["check_allowed"]
    here = made_rows.write(tmp_path / "here", kernels=[made_rows.kernel(), row | {"failed": "wrong: error 0.5"}])
    status, _ = run(monkeypatch, capsys, here, "--compare", there)
    assert status == 1
    assert (
        "shape large, pass forward, provider triton, dtype fp16 | wrong: error 0.5 |"
        in (here / "report.md").read_text()
    )


def test_results_of_different_devices_are_not_compared_and_the_report_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "_plots", lambda: None)
    rounds = [600e3, 610e3, 605e3, 598e3, 607e3]
    slower = made_rows.throughput([0.5 * x for x in rounds], device="A small GPU")
    there = made_rows.write(tmp_path / "there", throughput=[made_rows.throughput(rounds)])
    here = made_rows.write(tmp_path / "here", throughput=[slower])
    status, printed = run(monkeypatch, capsys, here, "--compare", there)
    assert status == 2
    assert "nothing to compare, as the devices differ: A small GPU here, Some GPU 80GB there" in printed
    assert "The devices differ: A small GPU here, Some GPU 80GB in the baseline" in (here / "report.md").read_text()


def test_the_rule_in_the_report_has_the_numbers_of_the_code(tmp_path):
    rows = rows_of(tmp_path, kernels=[made_rows.kernel()])
    shown = " ".join(block for block in sections.compared(compare(rows, rows), rows).blocks if isinstance(block, str))
    assert f"{comparison.FLOOR:.0%}" in shown
    assert "0.2%" in shown
