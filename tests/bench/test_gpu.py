"""bench/gpu.sh: a part that fails, hangs or dies costs itself alone; and all stages run to their end on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from acceleron.flags import Parser
from bench import gpu
from bench.__main__ import main
from bench.gpu import Part

ROOT = Path(__file__).resolve().parents[2]
PLENTY = 300.0  # of planned seconds: no part that ends by itself exceeds it
WRITES = """
import json, os, sys
row = {"benchmark": "fallbacks", "provider": "triton", "details": {"ACCELERON_REFERENCE_OPS": "rope"}}
open(sys.argv[1] + "/results.jsonl", "a").write(json.dumps(row) + "\\n" + '{"cut')
"""
SHOWS = "import os; print('avoids', os.environ['ACCELERON_REFERENCE_OPS'])"
# A process that a hanging part has started holds the part's output open.
HANGS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import threading; threading.Event().wait()'])"


def run(planned: list[Part], seconds: float, output: Path) -> tuple[list[str], str]:
    log = gpu.Log(output / "log.txt")
    return gpu.run(planned, seconds, output, log), (output / "log.txt").read_text()


def test_a_part_that_fails_hangs_or_dies_costs_itself_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERON_REFERENCE_OPS", "")
    planned = [
        Part("hangs", 0, ["-c", HANGS]),
        Part("raises", PLENTY, ["-c", "raise SystemExit('no such luck')"]),
        Part("dies", PLENTY, ["-c", "import os; os.kill(os.getpid(), 9)"]),
        Part("writes", PLENTY, ["-c", WRITES, str(tmp_path)]),
        Part("shows", PLENTY, ["-c", SHOWS]),
    ]
    failed, log = run(planned, 4 * PLENTY + 1, tmp_path)
    assert failed == ["hangs: exceeded its 1 s", "raises: exit status 1", "dies: exit status -9"]
    assert "no such luck" in log
    assert "avoids rope" in log  # what a part found broken is avoided in those after it
    rows = gpu.rows_of(tmp_path)
    assert [row["provider"] for row in rows if row.get("failed")] == ["hangs", "raises", "dies"]
    lines = gpu.summary(failed, rows)
    assert lines[:3] == [f"FAILED {reason}" for reason in failed]


def test_parts_for_which_no_time_is_left_are_skipped_but_not_the_report(tmp_path):
    planned = [Part(name, PLENTY, ["-c", f"print('ran {name}')"]) for name in ("one", "two", "three", "report")]
    failed, log = run(planned, 2 * PLENTY + 1, tmp_path)
    assert failed == ["three: skipped, no time is left", "two: skipped, no time is left"]
    assert [line.strip() for line in log.splitlines() if "ran" in line and "print" not in line] == [
        "ran one",
        "ran report",
    ]


@pytest.mark.parametrize("stage", gpu.SECONDS)
def test_the_planned_seconds_of_a_stage_fit_in_its_time(stage, tmp_path):
    assert sum(part.seconds for part in gpu.parts(stage, False, tmp_path)) <= gpu.SECONDS[stage]


def test_the_headline_is_last_and_takes_the_rows_of_one_command(tmp_path):
    def row(provider: str, median: float, date: str) -> dict:
        case, details = {"size": "tiny", "mode": "compiled"}, {"mfu": 0.4, "peak_memory_bytes": 2**30}
        return dict(
            benchmark="throughput",
            provider=provider,
            case=case,
            group="tiny",
            median=median,
            details=details,
            about={"date": date},
        )

    rows = [row("MoE, triton", 95.0, "a"), row("dense, triton", 100.0, "a"), row("dense, triton", 10.0, "b")]
    last = gpu.summary([], rows)[-1].split()
    assert last == ["tiny", "compiled", "95", "100", "0.950", "40.0%", "1.0"]


def test_bad_flags_are_refused_in_one_line_that_names_them(tmp_path):
    for flags, named in (
        (["--stage", "third"], "--stage: invalid choice: 'third'"),
        (["--output", str(tmp_path)], "--stage and --output are required"),
        (["--stge", "first", "--output", str(tmp_path)], "unrecognized arguments: --stge first"),
        (["--stage", "first", "--output", str(tmp_path), "--seconds", "0", "--smoke"], "--seconds 0"),
    ):
        done = subprocess.run(
            [ROOT / "bench/gpu.sh", *flags],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert named in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("stage", gpu.SECONDS)
def test_every_part_has_flags_that_its_command_takes(monkeypatch, tmp_path, stage, smoke):
    class Parsed(BaseException):
        pass

    def stop(parser, args=None, namespace=None):
        parse_args(parser)
        raise Parsed

    parse_args = Parser.parse_args
    monkeypatch.setattr(Parser, "parse_args", stop)
    commands = [part.command[2:] for part in gpu.parts(stage, smoke, tmp_path) if part.command[1] == "bench"]
    assert len(commands) > 2
    for words in commands:
        monkeypatch.setattr("sys.argv", ["bench", *words])
        with pytest.raises(Parsed):
            main()


@pytest.mark.slow
@pytest.mark.parametrize("stage", gpu.SECONDS)
def test_smoke_runs_every_part(stage, tmp_path):
    output = tmp_path / "out"
    done = subprocess.run(
        ["bench/gpu.sh", "--stage", stage, "--output", str(output), "--smoke"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    files = {path.name: path.stat().st_size for path in output.iterdir()}
    assert {"results.jsonl", "log.txt", "summary.txt", "report.md"} <= files.keys()
    assert len(files) <= 8
    assert max(files.values()) <= 16 << 20
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row.get("failed")]
    wanted = {"first": {"ceilings", "kernels", "ops"}, "rest": {"ops", "memory"}, "tune": {"tune"}}.get(stage, set())
    assert wanted | {"throughput"} <= {row["benchmark"] for row in rows}
