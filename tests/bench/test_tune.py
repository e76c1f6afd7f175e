"""The tuner, on the interpreter with synthetic times."""

import json
import os
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.kernels import configs, launch
from acceleron.kernels.configs import Config
from bench import op_cases, ops, tune
from bench.rows import Results, read
from bench.worker import Failure, pool

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GEMMS = {op: ops.Settings(("nano",), (op,), 40, torch.float16, DEVICE) for op in tune.GEMMS}
SMALL = replace(ModelConfig.preset("nano"), d_model=64, d_ff=64, num_experts=4)
FAST, SLOW, BROKEN = Config(64, 64, 32, 4, 1), Config(32, 64, 32, 4, 1), Config(16, 32, 32, 4, 1)
SECONDS = {FAST: [1.0] * 10, SLOW: [3.0, 1.0] * 5}


@pytest.fixture
def results(tmp_path, monkeypatch):
    def measure(calls, device, rounds):
        return {"candidate": SECONDS[calls["candidate"].args[0]()], "rule": [2.0] * 10}

    def ask(message, seconds):
        if BROKEN in message[1]:
            raise Failure("no answer within 60 s")
        return message[0](*message[1])

    monkeypatch.setattr(ModelConfig, "preset", lambda size: SMALL)
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "Worker", lambda serve: SimpleNamespace(ask=ask, close=lambda: None))
    monkeypatch.setenv("ACCELERON_TUNED", str(tmp_path / "tuned.jsonl"))
    monkeypatch.setattr(configs, "table", cache(configs.read_table))
    monkeypatch.setattr(configs, "find_config", configs.find_config.__wrapped__)
    return Results(str(tmp_path), DEVICE)


@pytest.mark.parametrize("gemm", GEMMS.values(), ids=list(GEMMS))
def test_a_candidate_that_beats_the_rule_is_stored_and_used(gemm, results):
    tune.tune({gemm: [SLOW, BROKEN, FAST]}, results, 1e9, 60)
    rows = read(results.directory)
    assert [row.failed for row in rows] == ["", "Failure: no answer within 60 s", ""]
    assert all(row.error <= row.allowed and row.values for row in rows if not row.failed)
    ((key, config),) = configs.table().items()
    device = launch.device_of(torch.empty(0, device=DEVICE))
    assert (key[:4], config) == ((device.arch, device.name, op_cases.gemm_kernel(gemm.ops[0]), "float16"), FAST)
    assert configs.find_config(key[2], device, torch.float16, key[4], True) == FAST


def test_ties_noisy_wins_and_wrong_results_are_not_stored(results, monkeypatch):
    monkeypatch.setitem(SECONDS, FAST, [2.0] * 10)
    tune.tune({GEMMS["up"]: [FAST, SLOW]}, results, 1e9, 60)
    monkeypatch.setattr(ops, "check", lambda *args: ("h", 0.02, 0.01))
    tune.tune({GEMMS["up"]: [FAST]}, results, 1e9, 60)
    assert [row.failed[:8] for row in read(results.directory)] == ["", "", "wrong: h"]
    assert not (results.directory / "tuned.jsonl").exists()


def test_committed_candidates_are_unique_and_exclude_the_rule():
    h100 = launch.Device("any", "sm_90", 132)
    found = {(line["size"], line["op"]): line["configs"] for line in map(json.loads, tune.CANDIDATES.open())}
    assert found.keys() >= {(size, op) for size in tune.SIZES for op in tune.GEMMS}
    for (size, op), listed in found.items():
        candidates = [Config(*values) for values in listed]
        E, D, F = PRESETS[size].num_experts, PRESETS[size].d_model, PRESETS[size].d_ff
        sizes = {
            "up": (E, D, F), "rows-down": (E, F, D, 1), "hidden_grad": (E, D, F), "rows-dx": (E, 2 * F, D, 0),
            "weight_grad-w13": (E, 2 * F, D), "weight_grad-w2": (E, D, F),
        }[op]  # fmt: skip
        rule = configs.rule(op_cases.gemm_kernel(op), h100, torch.bfloat16, sizes, True)
        assert len({rule, *candidates}) == len(candidates) + 1 <= 13, (size, op)


def test_a_dead_worker_loses_only_its_own_result():
    with pool(1) as call:
        ended, raised, right = call(os._exit, 3), call(int, "x"), call(int, "7")
        assert "exit status 3" in str(ended.exception())
        assert "ValueError" in str(raised.exception())
        assert right.result() == 7
