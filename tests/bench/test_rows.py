"""Rows, rounds and workers: what every benchmark command relies on."""

import json
import math
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from acceleron.errors import InputError
from bench import rows, timing
from bench.rows import Results, Row
from bench.worker import Failure, Worker

CPU = torch.device("cpu")
CHECKED = dict(check="equality", error=0.0, allowed=0.0)


def test_a_row_comes_back_with_its_spread_and_its_origin(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERON_NO_TMA", "up")
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    row = Row("ops", "triton", {"op": "rope"}, "s", values, "rope", **CHECKED, details={"flops": 3})
    assert Results(str(tmp_path), CPU).write(row)
    (found,) = rows.read(tmp_path)
    assert found == row
    assert found.about["switches"] == {"ACCELERON_NO_TMA": "up"}
    assert {"command", "date", "commit", "device", "versions"} <= found.about.keys()
    written = json.loads((tmp_path / rows.FILE).read_text())
    assert [written[name] for name in ("median", "p20", "p80")] == pytest.approx(np.percentile(values, [50, 20, 80]))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "no correctness check"),
        (dict(check="x", error=2.0, allowed=1.0), "wrong: x: error 2, where 1 is allowed"),
        (dict(check="x", error=math.nan, allowed=1.0), "wrong"),
        (dict(check="x", error=0.0, allowed=1.0, values=[math.inf]), "not finite"),
        (dict(failed="out of memory"), "out of memory"),
    ],
)
def test_what_did_not_pass_a_check_is_no_result(fields, reason, tmp_path):
    assert not Results(str(tmp_path), CPU).write(Row("ops", "triton", **({"values": [1.0]} | fields)))
    (found,) = rows.read(tmp_path)
    assert reason in found.failed
    assert found.values == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"benchmark": "ops"}',
        '{"benchmark": "a", "provider": "b", "colour": 1}',
        '{"benchmark": "a", "provider": "b", "case": "x"}',
    ],
)
def test_a_line_that_is_no_row_is_named(text, tmp_path):
    Results(str(tmp_path), CPU).write(Row("ops", "triton", **CHECKED))
    with (tmp_path / rows.FILE).open("a") as file:
        file.write(text)
    with pytest.raises(InputError, match=r"results\.jsonl, line 2"):
        rows.read(tmp_path)


def test_results_go_outside_the_checkout_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Results(None, CPU).directory.parent == tmp_path / "acceleron" / "bench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert not rows.default_directory().is_relative_to(Path(rows.__file__).parents[1])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output"):
        Results(str(tmp_path / "file" / "below"), CPU)


def test_ratios_are_taken_round_by_round():
    slowed = Row("a", "x", values=[2.0, 20.0, 2.0]), Row("a", "y", values=[1.0, 10.0, 1.0])
    assert rows.ratio(*slowed) == (2.0, 2.0, 2.0)


def test_samples_take_turns_after_a_round_that_is_not_counted():
    turns = []
    values = timing.interleave({name: lambda name=name: turns.append(name) or len(turns) for name in "ab"}, 3)
    assert turns == list("ab" * 4)
    assert values == {"a": [3, 5, 7], "b": [4, 6, 8]}


def test_a_sleep_is_timed_as_at_least_its_length():
    assert timing.seconds_of(lambda: time.sleep(2e-3), CPU) >= 2e-3


def test_ceilings_are_no_more_than_the_work_over_the_least_time(monkeypatch):
    """The FLOPs and bytes of the calls, by the time that a fake clock gives each."""
    monkeypatch.setattr(
        timing, "measure", lambda calls, device, rounds: {n: (c(), [2.0, 1.0])[1] for n, c in calls.items()}
    )
    flops, moved = timing.ceilings(CPU, torch.float32)
    assert flops == 2 * timing.GEMM_SIDE["cpu"] ** 3 / 1.0
    assert moved == 2 * timing.COPY_BYTES["cpu"] / 1.0


def answers(connection):
    while True:
        message = connection.recv()
        if message == "raise":
            raise RuntimeError("of some kind")
        if message == "die":
            os._exit(3)
        if message == "hang":
            threading.Event().wait()
        connection.send(Failure("an answer") if message == "fail" else message * 2)


@pytest.mark.parametrize(
    ("message", "seconds", "reason"),
    [
        ("raise", None, "RuntimeError: of some kind"),
        ("die", None, "exit status 3"),
        ("hang", 0.1, "no answer within 0 s"),
        ("fail", None, "an answer"),
    ],
)
def test_a_worker_that_fails_costs_one_answer(message, seconds, reason):
    worker = Worker(answers)
    try:
        assert worker.ask(21) == 42
        first = worker.process
        with pytest.raises(Failure, match=reason):
            worker.ask(message, seconds)
        assert worker.ask(21) == 42
        assert (worker.process is first) == (message == "fail")  # which leaves the process as it was
    finally:
        worker.close()
