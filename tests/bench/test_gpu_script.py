"""bench/gpu.sh on the CPU: every part runs to its end, so that none fails for a silly reason where a GPU is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES, MOST_BYTES = 8, 16 << 20


@pytest.mark.slow
def test_smoke_writes_all_results_and_the_report(tmp_path):
    done = subprocess.run(
        ["bench/gpu.sh", "--output", str(tmp_path / "out"), "--smoke"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    wanted = ["kernels.jsonl", "throughput.jsonl", "ops.jsonl", "memory.jsonl", "report.html", "report.md", "log.txt"]
    assert sorted(files) == sorted(wanted)
    assert len(files) <= MOST_FILES
    assert max(files.values()) <= MOST_BYTES
    for name in wanted[:4]:
        rows = [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        assert not [row for row in rows if "failed" in row]
        served = [row.get("kernels", row.get("provider")) for row in rows if "absent" not in row]
        # What is timed is not interpreted.
        assert "reference" in served if name == "ops.jsonl" else "triton" in served, name


def test_a_wrong_flag_is_refused_with_the_usage(tmp_path):
    for flags in (["--smoke"], ["--output"], ["--output", str(tmp_path), "--fast"]):
        done = subprocess.run([ROOT / "bench/gpu.sh", *flags], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert "usage" in done.stderr
