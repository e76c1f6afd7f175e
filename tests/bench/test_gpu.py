"""bench/gpu.sh: parts fail independently, and every stage completes on a CPU."""

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
LONG = 300.0  # planned seconds, longer than any test part takes
WRITES = """
import json, os, sys
row = {"benchmark": "fallbacks", "provider": "triton", "details": {"ACCELERON_REFERENCE_OPS": "rope"}}
open(sys.argv[1] + "/results.jsonl", "a").write(json.dumps(row) + "\\n" + '{"cut')
"""
SHOWS = "import os; print('fallback', os.environ['ACCELERON_REFERENCE_OPS'])"
# The child process keeps the part's output open.
HANGS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import threading; threading.Event().wait()'])"


def run(planned: list[Part], seconds: float, output: Path) -> tuple[list[str], str]:
    log = gpu.Log(output / "log.txt")
    return gpu.run(planned, seconds, output, log), (output / "log.txt").read_text()


def test_a_failing_part_does_not_stop_the_others(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERON_REFERENCE_OPS", "")
    planned = [
        Part("hangs", 0, ["-c", HANGS]),
        Part("raises", LONG, ["-c", "raise SystemExit('no such luck')"]),
        Part("dies", LONG, ["-c", "import os; os.kill(os.getpid(), 9)"]),
        Part("writes", LONG, ["-c", WRITES, str(tmp_path)]),
        Part("shows", LONG, ["-c", SHOWS]),
    ]
    failed, log = run(planned, 4 * LONG + 1, tmp_path)
    assert failed == ["hangs: timed out after 1 s", "raises: exit status 1", "dies: exit status -9"]
    assert "no such luck" in log
    assert "fallback rope" in log  # parts skip kernels that failed in an earlier part
    rows = gpu.read_rows(tmp_path)
    assert [row["provider"] for row in rows if row.get("failed")] == ["hangs", "raises", "dies"]
    lines = gpu.summary(failed, rows)
    assert lines[:3] == [f"FAILED {reason}" for reason in failed]


def test_parts_without_time_are_skipped_except_the_report(tmp_path):
    planned = [Part(name, LONG, ["-c", f"print('ran {name}')"]) for name in ("one", "two", "three", "report")]
    failed, log = run(planned, 2 * LONG + 1, tmp_path)
    assert failed == ["three: skipped, no time left", "two: skipped, no time left"]
    ran = [line.strip() for line in log.splitlines() if "ran" in line and "print" not in line]
    assert ran == ["ran one", "ran report"]


@pytest.mark.parametrize("stage", gpu.SECONDS)
def test_planned_seconds_fit_in_the_time_of_the_stage(stage, tmp_path):
    assert sum(part.seconds for part in gpu.parts(stage, False, tmp_path)) <= gpu.SECONDS[stage]


def test_summary_ends_with_the_headline_of_one_command(tmp_path):
    def row(provider: str, median: float, date: str) -> dict:
        case, details = {"size": "tiny", "mode": "compiled"}, {"mfu": 0.4, "peak_memory_bytes": 2**30}
        fields = dict(case=case, group="tiny", median=median, details=details, about={"date": date})
        return dict(benchmark="throughput", provider=provider, **fields)

    rows = [row("MoE, triton", 95.0, "a"), row("dense, triton", 100.0, "a"), row("dense, triton", 10.0, "b")]
    last = gpu.summary([], rows)[-1].split()
    assert last == ["tiny", "compiled", "95", "100", "0.950", "40.0%", "1.0"]


def test_bad_flags_get_a_one_line_error_that_names_them(tmp_path):
    for flags, named in (
        (["--stage", "third"], "--stage: invalid choice: 'third'"),
        (["--output", str(tmp_path)], "--stage and --output are required"),
        (["--stge", "first", "--output", str(tmp_path)], "unrecognized arguments: --stge first"),
        (["--stage", "first", "--output", str(tmp_path), "--seconds", "0", "--smoke"], "--seconds 0"),
    ):
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
        done = subprocess.run([ROOT / "bench/gpu.sh", *flags], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert named in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("stage", gpu.SECONDS)
def test_commands_accept_the_flags_of_every_part(monkeypatch, tmp_path, stage, smoke):
    class Parsed(BaseException):
        pass

    def stop(parser, args=None, namespace=None):
        parse_args(parser)
        raise Parsed

    parse_args = Parser.parse_args
    monkeypatch.setattr(Parser, "parse_args", stop)
    commands = [part.command[2:] for part in gpu.parts(stage, smoke, tmp_path) if part.command[1] == "bench"]
    assert len(commands) > 1
    for words in commands:
        monkeypatch.setattr("sys.argv", ["bench", *words])
        with pytest.raises(Parsed):
            main()


@pytest.mark.slow
@pytest.mark.parametrize("stage", gpu.SECONDS)
def test_smoke_stage_completes(stage, tmp_path):
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
    expected = {"first": {"ceilings", "kernels", "ops"}, "rest": {"ops", "memory"}, "tune": {"tune"}}.get(stage, set())
    assert expected | {"throughput"} <= {row["benchmark"] for row in rows}
