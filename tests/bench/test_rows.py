"""Rows, rounds and workers: what every benchmark command relies on."""

import json
import math
import os
import threading
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
    monkeypatch.setattr(
        "sys.orig_argv", ["python", "-m", "bench", "ops", "--output", "/a private/path", "--size", "tiny"]
    )
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    row = Row("ops", "triton", {"op": "rope"}, "s", values, "rope", **CHECKED, details={"flops": 3})
    assert Results(str(tmp_path), CPU).write(row)
    (found,) = rows.read(tmp_path)
    assert found == row
    assert found.about["switches"] == {"ACCELERON_NO_TMA": "up"}
    assert found.about["command"] == "python -m bench ops --size tiny"
    assert f"torch {torch.__version__}" in found.about["versions"]
    assert {"date", "commit", "device"} <= found.about.keys()
    written = json.loads((tmp_path / rows.FILE).read_text())
    assert [written[name] for name in ("median", "p20", "p80")] == pytest.approx(np.percentile(values, [50, 20, 80]))


def test_what_did_not_pass_a_check_is_no_result(tmp_path):
    wrong = {"no correctness check": {}, "error 2, where 1 is allowed": dict(check="x", error=2.0, allowed=1.0)}
    wrong |= {
        "wrong: x: error nan": dict(check="x", error=math.nan, allowed=1.0),
        "no memory": dict(failed="no memory"),
    }
    wrong |= {"not finite": dict(check="x", error=0.0, allowed=1.0, values=[math.inf])}
    results = Results(str(tmp_path), CPU)
    assert not any(results.write(Row("ops", "triton", **({"values": [1.0]} | fields))) for fields in wrong.values())
    found = rows.read(tmp_path)
    assert [reason in row.failed for row, reason in zip(found, wrong, strict=True)] == [True] * 5
    assert [row.values for row in found] == [[]] * 5


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "a"}', '{"benchmark": "a", "provider": "b", "case": "x"}'])
def test_a_line_that_is_no_row_is_named(text, tmp_path):
    (tmp_path / rows.FILE).write_text('{"benchmark": "a", "provider": "b"}\n' + text)
    with pytest.raises(InputError, match=r"results\.jsonl: cannot read line 2"):
        rows.read(tmp_path)


def test_results_go_outside_the_checkout_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Results(None, CPU).path.parents[1] == tmp_path / "acceleron" / "bench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert not rows.default_directory().is_relative_to(Path(rows.__file__).parents[1])
    with pytest.raises(InputError, match="--output"):
        Results("/dev/null/below", CPU)


def test_samples_take_turns_after_a_round_that_is_not_counted():
    turns = []
    values = timing.interleave({name: lambda name=name: turns.append(name) or len(turns) for name in "ab"}, 3)
    assert turns == list("ab" * 4)
    assert values == {"a": [3, 5, 7], "b": [4, 6, 8]}


def answers(connection):
    ends = {"raise": lambda: 1 / 0, "die": lambda: os._exit(3), "hang": threading.Event().wait}
    while True:
        message = connection.recv()
        connection.send(Failure("an answer") if message == "fail" else ends.get(message, lambda: 42)())


REASONS = {"raise": "ZeroDivisionError: division", "die": "exit status 3", "hang": "no answer", "fail": "an answer"}


@pytest.mark.parametrize("message", REASONS)
def test_a_worker_that_fails_costs_one_answer(message):
    worker = Worker(answers)
    try:
        assert worker.ask("") == 42
        first = worker.process
        with pytest.raises(Failure, match=REASONS[message]):
            worker.ask(message, 0.1 if message == "hang" else None)
        assert worker.ask("") == 42
        assert (worker.process is first) == (message == "fail")  # which leaves the process as it was
    finally:
        worker.close()
