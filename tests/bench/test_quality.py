"""The statistics of the quality comparison, against published and exact figures; the runs, at a small size."""

import json
import math

import pytest

from bench import quality

# Student's sleep data (1908), R's `sleep`: extra hours under two drugs, ten patients. t.test(..., paired = TRUE) gives
# a mean difference of 1.58 and the interval 0.7001142 .. 2.4598858.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def row(model: str, seed: int, tokens: int, val_loss: float, seconds: float, **changes) -> dict:
    about = {"purpose": "final", "model": model, "seed": seed, "tokens": tokens}
    return about | {"val_loss": val_loss, "seconds": seconds} | changes


def test_paired_difference_is_the_t_interval_of_a_textbook():
    rows = [row("moe", i, 1000, a, 1.0) for i, a in enumerate(FIRST)]
    rows += [row("dense", i, 1000, b, 1.0) for i, b in enumerate(SECOND)]
    found = quality.paired_difference(rows)
    assert (found["pairs"], found["tokens"]) == (10, 1000)
    assert found["mean"] == pytest.approx(1.58)
    assert (found["low"], found["high"]) == pytest.approx((0.7001142, 2.4598858), abs=1e-3)


def test_only_final_runs_of_equal_tokens_are_paired():
    rows = [row("dense", seed, 1000, 3.0 + seed / 10, 10.0) for seed in (1, 2, 3)]
    rows += [row("moe", seed, 1000, 2.9, 12.0) for seed in (1, 2, 3)]
    others = [
        row("moe", 1, 800, 1.0, 10.0),  # a shorter one
        row("moe", 1, 1000, 1.0, 10.0, purpose="tuning"),
        row("dense", 4, 1000, 9.0, 10.0),  # without its pair
        {"purpose": "final", "model": "moe", "seed": 4, "tokens": 1000, "failed": "out of memory"},
    ]
    assert quality.paired_difference(rows + others) == quality.paired_difference(rows)
    assert quality.paired_difference(rows)["mean"] == pytest.approx(0.3)
    assert quality.paired_difference(rows[:1] + rows[3:4]) is None


@pytest.mark.parametrize("needed", [500, 700, 900, 1000, 1100])
def test_tokens_to_reach_a_loss_invert_a_loss_that_is_linear_in_the_logarithm(needed):
    def loss(tokens):
        return 8.0 - 0.6 * math.log(tokens)

    runs = [row("moe", 1, tokens, loss(tokens), 1.0) for tokens in (600, 800, 1000)]
    assert quality.tokens_to_reach(loss(needed), runs) == pytest.approx(needed)


def test_time_to_the_dense_loss_counts_the_moe_at_its_own_speed():
    # The dense twin takes 10 s for 1000 tokens. The MoE needs 700 tokens for the same loss, and 1.2 times as long each.
    rows = []
    for seed in (1, 2, 3):
        start = 8.0 + seed / 7
        rows.append(row("dense", seed, 1000, start - 0.6 * math.log(700), 10.0))
        rows += [row("moe", seed, n, start - 0.6 * math.log(n), 12.0 * n / 1000) for n in (600, 800, 1000)]
    found = quality.time_to_dense_loss(rows)
    assert (found["seeds"], found["extrapolated"]) == (3, 0)
    assert [found["ratio"], found["low"], found["high"]] == pytest.approx([0.84] * 3)


def test_a_loss_beyond_the_budgets_is_said_to_be_extrapolated_and_one_far_beyond_is_unknown():
    def rows(needed):
        dense = [row("dense", s, 1000, 8.0 - 0.6 * math.log(needed), 10.0) for s in (1, 2)]
        return dense + [row("moe", s, n, 8.0 - 0.6 * math.log(n), 0.01 * n) for s in (1, 2) for n in (800, 1000)]

    found = quality.time_to_dense_loss(rows(600))
    assert (round(found["ratio"], 6), found["extrapolated"]) == (0.6, 2)
    assert quality.time_to_dense_loss(rows(300)) is None
    assert quality.time_to_dense_loss(rows(3000)) is None


def test_only_the_latest_command_counts():
    def rows(date, gain):
        return [row(m, s, 1000, 3.0 - gain * (m == "moe"), 1.0, date=date) for s in (1, 2) for m in ("moe", "dense")]

    found = quality.paired_difference(rows("2026-11-21T10:00:00", 0.5) + rows("2026-11-22T10:00:00", 0.1))
    assert found["mean"] == pytest.approx(0.1)


def test_time_to_the_dense_loss_is_unknown_where_more_tokens_did_not_help():
    rows = [row("dense", s, 1000, 3.0, 10.0) for s in (1, 2)]
    rows += [row("moe", s, n, 3.1, 12.0) for s in (1, 2) for n in (800, 1000)]
    assert quality.time_to_dense_loss(rows) is None


@pytest.mark.slow  # ten runs of train.py
def test_a_small_comparison_runs_to_its_end(tmp_path, monkeypatch, capsys):
    small = quality.PRESETS["cpu"]._replace(characters=1_100_000, vocab_size=512, steps=20, seeds=2, rates=(1e-3, 4e-3))
    monkeypatch.setitem(quality.PRESETS, "cpu", small._replace(batch_size=1, seq_len=64))
    monkeypatch.setattr("sys.argv", ["quality", "--preset", "cpu", "--output", str(tmp_path)])
    quality.main()
    rows = [json.loads(line) for line in (tmp_path / "quality.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    runs = sorted((row["purpose"], row["model"], row["tokens"]) for row in rows)
    tuning = [("tuning", model, 10 * 64) for model in ("dense", "moe") for _ in range(2)]
    assert (
        runs
        == 2 * [("final", "dense", 20 * 64)]
        + 2 * [("final", "moe", 16 * 64)]
        + 2 * [("final", "moe", 20 * 64)]
        + tuning
    )
    for row in rows:
        assert row["check_error"] <= row["check_allowed"] < 1e-3
        # Untrained it is ln 512; the entropy of the text is far below what so few steps reach.
        assert 4 < row["val_loss"] < math.log(512) + 0.1
        assert row["curve"][-1][0] == row["tokens"]
    assert "both models: the best of the learning rates" in rows[-1]["tuning"]
    assert "seeds" in capsys.readouterr().out


def test_a_failed_run_is_a_row_with_its_reason(tmp_path):
    run = quality.Training("moe", 1, 4e-3, 20, "final")
    row = quality.train(run, quality.PRESETS["cpu"], str(tmp_path))
    assert "does not exist" in row["failed"]
