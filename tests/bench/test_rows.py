"""Rows, results files and interleaved rounds."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from acceleron.errors import InputError
from bench import rows, timing
from bench.rows import Results, Row

CPU = torch.device("cpu")


def test_written_row_is_read_back_with_spread_and_origin(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERON_NO_TMA", "up")
    monkeypatch.setattr("sys.orig_argv", ["python", "bench", "--output", "/a private/path", "--model_size", "tiny"])
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    row = Row("ops", "triton", {"op": "rope"}, "s", values, "rope", "equality", 0.0, 0.0, details={"flops": 3})
    assert Results(str(tmp_path), CPU).write(row)
    assert rows.read(tmp_path) == [row]
    assert {"date", "commit", "device", "versions"} < row.about.keys()
    assert row.about["switches"] == {"ACCELERON_NO_TMA": "up"}
    assert row.about["command"] == "python bench --model_size tiny"
    written = json.loads((tmp_path / rows.FILE).read_text())
    assert [written[name] for name in ("median", "p20", "p80")] == pytest.approx(np.percentile(values, [50, 20, 80]))


def test_rows_without_a_passed_check_have_no_values(tmp_path):
    wrong = {"no correctness check": {}, "no memory": dict(failed="no memory"), "wrong: x: error 2": dict(error=2.0)}
    wrong |= {"wrong: x: error nan": dict(error=math.nan), "not finite": dict(error=0.0, values=[math.inf])}
    for reason, fields in wrong.items():
        row = Row("ops", "triton", **({"values": [1.0], "check": "x", "allowed": 1.0} | fields))
        passed, [*_, found] = Results(str(tmp_path), CPU).write(row), rows.read(tmp_path)
        assert (passed, reason in found.failed, found.values) == (False, True, [])


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "a"}', '{"benchmark": "a", "provider": "b", "case": "x"}'])
def test_error_names_the_line_that_is_not_a_row(text, tmp_path):
    (tmp_path / rows.FILE).write_text('{"benchmark": "a", "provider": "b"}\n' + text + "\n")
    with pytest.raises(InputError, match=r"results\.jsonl: cannot read line 2"):
        rows.read(tmp_path)


def test_a_partial_last_line_is_dropped(tmp_path):
    results = Results(str(tmp_path), CPU)
    with results.path.open("a") as file:
        file.write('{"benchmark": "a", "provider": "b"}\n{"bench')
    assert len(rows.read(tmp_path)) == 1
    Results(str(tmp_path), CPU).write(Row("c", "d", absent="not here"))
    assert [row.benchmark for row in rows.read(tmp_path)] == ["a", "c"]


def test_default_results_are_outside_the_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert not rows.default_directory().is_relative_to(Path(rows.__file__).parents[1])
    with pytest.raises(InputError, match="--output"):
        Results("/dev/null/below", CPU)


def test_rounds_are_interleaved_after_an_uncounted_warmup():
    turns = []
    values = timing.interleave({name: lambda name=name: turns.append(name) or len(turns) for name in "ab"}, 3)
    assert turns == list("ab" * 4)
    assert values == {"a": [3, 5, 7], "b": [4, 6, 8]}
