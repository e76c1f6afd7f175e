"""The quality comparison: statistics against published and exact values, and a small run."""

import math
import signal
import subprocess
import sys
import threading
from argparse import Namespace

import pandas as pd
import pytest

from acceleron.data import Shards
from bench import quality
from bench.corpus import write_corpus
from bench.rows import read

# Student's sleep data (1908; `sleep` in R): extra hours of sleep of ten patients with two drugs. t.test(..., paired =
# TRUE) gives a mean difference of 1.58 and the interval 0.7001142 .. 2.4598858.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def summary(*runs: tuple) -> list[str]:
    """Return the loss difference and wall-clock ratio for runs of (model, seed, tokens, loss, seconds)."""
    frame = pd.DataFrame(runs, columns=["model", "seed", "tokens", "loss", "seconds"])
    return list(quality.summary(frame.assign(device="", size="", dtype="", date="")).values())[-2:]


def test_loss_difference_matches_a_published_t_interval():
    losses = [("MoE", *x) for x in enumerate(FIRST)] + [("dense", *x) for x in enumerate(SECOND)]
    runs = [(model, seed, 1000, loss, 1.0) for model, seed, loss in [*losses, ("dense", 10, 9.0)]]  # unpaired
    assert summary(("MoE", 1, 800, 9.0, 1.0), *runs)[0] == "1.58 (0.7001 .. 2.46)"


def test_wall_clock_uses_the_moes_own_speed():
    # The MoE reaches the dense baseline's loss after about 700 of 1000 tokens, and takes 1.2 times as long per token.
    runs, spread = [], math.exp(4.302653 * math.log(1.1) / math.sqrt(3))  # Student's t, two degrees of freedom
    for seed, needed in ((1, 700 / 1.1), (2, 700), (3, 770)):
        runs.append(("dense", seed, 1000, 8.0 - 0.6 * math.log(needed), 10.0))
        runs += [("MoE", seed, n, 8.0 - 0.6 * math.log(n), 0.012 * n) for n in (600, 800, 1000)]
    assert summary(*runs)[1] == f"0.84 ({0.84 / spread:.4g} .. {0.84 * spread:.4g})"
    assert summary(("dense", 1, 1000, 1.0, 10.0), *runs[1:])[1] == "nan"  # far beyond the budgets


def test_corpus_is_python_source_with_a_validation_row_per_shard(tmp_path):
    assert "tokens of the source of Python's standard library" in write_corpus(tmp_path, 512, 1_000_000)
    assert Shards(tmp_path).num_validation_rows.tolist() == [1] * len(list(tmp_path.glob("shard_*"))) > [1, 1, 1]


def test_an_interrupt_kills_the_runs_in_progress(monkeypatch):
    running, processes = threading.Event(), []

    def train(row, plan, data, save_dir, started):
        if row.provider == "dense":
            running.wait()
            raise KeyboardInterrupt
        started.append(subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"]))
        processes.append(started[-1])
        running.set()

    monkeypatch.setattr(quality, "train", train)
    plan = Namespace(at_once=2, steps=1, flags=dict(model_size="nano", dtype="fp32", batch_size=1, seq_len=64))
    with pytest.raises(KeyboardInterrupt):
        quality.run_all(
            plan, "", Namespace(write=lambda row: False), "tuning", [(m, 1, 1.0, 1) for m in ("dense", "MoE")]
        )
    assert processes[0].wait() == -signal.SIGKILL


@pytest.mark.slow  # twelve runs of train.py
def test_a_small_comparison_completes(tmp_path, monkeypatch, capsys):
    small = dict(characters=1_100_000, steps=20, seeds=2, lr=(1e-3, 4e-3, -1.0))
    small["flags"] = quality.PRESETS["cpu"]["flags"] | dict(vocab_size=512, batch_size=1, seq_len=64)
    monkeypatch.setitem(quality.PRESETS, "cpu", quality.PRESETS["cpu"] | small)
    monkeypatch.setattr("sys.argv", ["quality", "--device", "cpu", "--output", str(tmp_path)])
    quality.main()
    assert "wall clock to the dense baseline's loss" in capsys.readouterr().out
    assert ["lr" in row.failed for row in read(tmp_path) if not row.values] == [True, True]
    rows = [row for row in read(tmp_path) if row.values]
    runs = sorted((row.case["purpose"], row.provider, row.case["tokens"]) for row in rows)
    final = [("final", "MoE", 1024), ("final", "MoE", 1280), ("final", "dense", 1280)]
    assert runs == sorted(2 * [*final, ("tuning", "MoE", 640), ("tuning", "dense", 640)])
    # An untrained model has a loss of ln 512. After so few steps, the loss is still far above the text's entropy.
    assert all(4 < row.median < math.log(512) + 0.1 and row.allowed < 1e-3 for row in rows)
    assert [row.details["curve"][-1][0] for row in rows] == [row.case["tokens"] for row in rows]
