"""The report shows every valid row and no unchecked values."""

import json
import re
import sys
from dataclasses import asdict
from io import StringIO

import pandas as pd
import pytest

from acceleron.errors import run_command
from bench import report
from bench.rows import Row, read

ABOUT = {"command": "python -m bench throughput", "date": "2026-11-22", "commit": "abc1234", "device": "Some GPU"}
MOE, DENSE = [610.0, 600.0, 640.0, 590.0, 620.0], [650.0, 660.0, 655.0, 640.0, 645.0]


def row(provider, values=(), mode="compiled", benchmark="throughput", unit="tokens/s", about=(), **fields) -> Row:
    fields = {"group": "all", "check": "gradients", "error": 0.001, "allowed": 0.002} | fields
    case = {"size": "tiny", "mode": mode, "dtype": "bf16"} | fields.pop("case", {})
    return Row(benchmark, provider, case, unit, list(values), about=ABOUT | dict(about), **fields)


def report_of(directory, *rows: Row) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "results.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return report.report(read(directory), directory)


def tables(text: str) -> list[list[dict[str, str]]]:
    """Parse the tables of a report. As on GitHub, an unescaped pipe ends a cell."""
    options = dict(sep=r" *(?<!\\)\| *", engine="python", quoting=3, dtype=str, keep_default_na=False, skiprows=[1])
    return [pd.read_csv(StringIO(t), **options).to_dict("records") for t in re.findall(r"(?:^\|.*\n)+", text, re.M)]


def test_headline_compares_with_the_fastest_dense_row_by_round(tmp_path):
    rows = [row("MoE, triton", MOE), row("dense, reference", [1.0] * 5), row("dense, triton", DENSE)]
    rows += [row("MoE, triton", [120.0], "eager"), row("dense, triton", [100.0], "eager")]
    rows += [row("MoE, triton", [990.0], "balanced"), row("dense, triton", [990.0], "balanced")]
    rows += [row("MoE", [900.0], case={"size": "small"}), row("dense", [9e9], "eager", about={"date": "earlier"})]
    [headline], lines, _ = tables(report_of(tmp_path, *rows))
    expected = sorted(a / b for a, b in zip(MOE, DENSE, strict=True))[2]
    assert float(headline["MoE / dense"].split()[0]) == pytest.approx(expected, abs=1e-4)
    assert [line["relative"] == "1" for line in lines[:3]] == [False, False, True]
    assert (lines[0]["relative"], lines[0]["tokens/s"]) == (headline["MoE / dense"], "610 (598 .. 624)")


def test_failures_come_first_with_a_reason_and_no_values(tmp_path):
    rows = [row("good", DENSE), row("wrong", [987654.0], error=0.1), row("unchecked", [987654.0], check="")]
    text = report_of(tmp_path, *rows, row("liger", absent="not installed"), row("large", failed="out of memory"))
    failed, _, absent, _ = tables(text)
    assert [line["provider"] for line in failed + absent] == ["unchecked", "large", "wrong", "liger"]
    assert failed[1]["why"] == "FAILED: out of memory"
    assert "987,654" not in text


def test_latest_row_wins_and_text_is_escaped(tmp_path):
    copies = [row("copy", [day * 1e9], "", "new", "bytes/s", {"date": f"2026-11-{day}"}) for day in (22, 23, 21)]
    gemm = row("<b> | [a](b)\n# `x`", [8e14, 9e14, 7e14], "", "new", "FLOP/s", details={"peak_bytes": 2**21}, group="")
    lines, _ = tables(report_of(tmp_path, *copies, gemm))
    assert [line["GB/s"] for line in lines] == ["23", ""]
    assert (lines[1]["TFLOP/s"], lines[1]["peak MiB"]) == ("800 (740 .. 860)", "2")
    assert lines[1]["provider"] == r"&lt;b&gt; \| \[a\](b) \# \`x\`"


def test_plots_are_reproducible_and_bars_match_the_rates(tmp_path):
    curve, case = [[1000, 10.0, 4.0], [2000, 20.0, 3.0]], {"tokens": 2000, "seed": 1, "purpose": "final"}
    final = row("MoE", [3.0], "", "quality", "nats", case=case, details={"seconds": 20.0, "curve": curve})
    rows = [row("MoE, triton", MOE), row("dense, triton", DENSE), final]
    assert report_of(tmp_path / "a", *rows) == report_of(tmp_path / "b", *rows)
    svg, again = ([(tmp_path / d / f"{name}.svg").read_text() for name in ("throughput", "loss")] for d in "ab")
    assert svg == again
    paths = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: #', svg[0])
    moe, dense = (max(float(x) for x in re.findall(r"L (\S+)", path)) - float(path.split()[1]) for path in paths)
    assert moe / dense == pytest.approx(610 / 650, rel=1e-3)


def test_loss_curves_average_the_seeds_of_the_full_budget():
    runs = [("MoE", 2000, 4.0, 3.0), ("MoE", 2000, 5.0, 3.5), ("MoE", 1000, 9.0, 9.0), ("dense", 2000, 6.0, 5.0)]
    curves = [[[tokens // 2, 10.0, first], [tokens, 20.0, last]] for _, tokens, first, last in runs]
    frame = pd.DataFrame([run[:2] for run in runs], columns=["model", "tokens"])
    [axis] = report.losses([frame.assign(curve=curves, size="nano", dtype="fp32")]).axes
    lines = [(line.get_label(), [*line.get_xdata()], [*line.get_ydata()]) for line in axis.lines]
    assert [line[1:] for line in lines if line[0] == "MoE, mean of 2 seeds"] == [([1000, 2000], [4.5, 3.25])]
    assert [line[2] for line in lines] == [[6.0, 5.0], [6.0, 5.0], [4.0, 3.0], [5.0, 3.5], [4.5, 3.25]]


def test_changes_beyond_both_spreads_are_marked():
    worse, better = [("tokens/s", 0.8), ("s", 1.2), ("nats", 1.01)], [("tokens/s", 1.2), ("bytes", 0.8)]
    for unit, factor in [*worse, *better, ("s", 1.04)]:
        old = [row("steady", [100.0, 100.1, 100.2], unit=unit), row("noisy", [100.0, 150.0, 200.0], unit=unit)]
        new = [row(r.provider, [factor * value for value in r.values], unit=unit) for r in old]
        marks = ["regression"] * ((unit, factor) in worse) + ["improvement"] * ((unit, factor) in better)
        assert [(c["mark"], c["provider"]) for c in report.changes(new, old)] == [(mark, "steady") for mark in marks]


def test_exit_status_is_1_for_a_regression_and_2_for_bad_input(tmp_path, monkeypatch, capsys):
    old, new, other = (tmp_path / name for name in ("old", "new", "other"))
    report_of(old, row("MoE", MOE))
    report_of(new, row("MoE", failed="illegal address"))
    report_of(other, row("MoE", MOE, about={"device": "Different GPU"}))
    monkeypatch.chdir(tmp_path)
    for words, status, message in (
        (["x"], 2, "DIR x does not exist: the current directory contains new, old, other"),
        (["."], 2, "DIR . has no results.jsonl: choose the --output directory of a benchmark"),
        (["old", "--compare="], 2, "--compare: expected a value"),
        (["old", "--compare", "odl"], 2, "--compare odl does not exist: did you mean old?"),
        (["old", "--compare", "other"], 2, "--compare: no row"),
        (["new", "--compare", "old"], 1, ""),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *words])
        with pytest.raises(SystemExit) as ended:
            sys.exit(run_command(report.main))
        assert ended.value.code == status
        assert message in capsys.readouterr().err
    assert "| regression |  | FAILED: illegal address |" in (new / "report.md").read_text()
