"""The search for configurations, on the interpreter and with made-up times."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from acceleron import ModelConfig, kernels
from acceleron.kernels import configs, launch
from acceleron.kernels.configs import Config
from bench import tune
from bench.offline import Pool
from bench.rows import Results, read
from bench.worker import Failure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {op: tune.Gemm("nano", op, "fp16", 40) for op in tune.GEMMS}
UP = CASES["up"]
SMALL = ModelConfig(
    d_model=64, num_layers=1, num_heads=4, num_kv_heads=4, num_experts=4, d_ff=96, d_ff_shared=32, vocab_size=128
)
FAST, SLOW, BROKEN = Config(64, 64, 32, 4, 1), Config(32, 64, 32, 4, 1), Config(16, 32, 32, 4, 1)
SECONDS = {None: [2.0] * 10, FAST: [1.0] * 10, SLOW: [3.0, 1.0] * 5}


@pytest.fixture
def results(tmp_path, monkeypatch):
    def measure(calls, device, rounds):
        return {config: call() and SECONDS[config] for config, call in calls.items()}

    def submit(function, *args, seconds):
        return SimpleNamespace(result=lambda: fail() if BROKEN in args else function(*args))

    def fail():
        raise Failure("no answer within 60 s")

    def forget():
        for cached in (configs.table, configs.find_config, tune.prepare):
            cached.cache_clear()

    monkeypatch.setattr(tune.ModelConfig, "preset", lambda size: SMALL)
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "Pool", lambda processes: nullcontext(SimpleNamespace(submit=submit)))
    monkeypatch.setattr(tune, "TARGETS", {})  # the interpreter compiles nothing
    monkeypatch.setenv("ACCELERON_TUNED", str(tmp_path / "tuned.jsonl"))
    kernels.select("triton", DEVICE)
    forget()
    yield Results(str(tmp_path), DEVICE)
    kernels.select("auto", DEVICE)
    forget()


@pytest.mark.parametrize("gemm", CASES.values(), ids=list(CASES))
def test_what_beats_the_rule_is_kept_and_used(gemm, results):
    tune.tune([(gemm, [SLOW, BROKEN]), (gemm, [FAST])], DEVICE, results, 1e9)
    rows = read(results.directory)
    assert [row.failed for row in rows] == ["", "", "no answer within 60 s", "", ""]
    assert all(row.error <= row.allowed and row.values for row in rows if not row.failed)
    ((key, config),) = configs.table().items()
    device = launch.device_of(torch.empty(0, device=DEVICE))
    assert (key[:4], config) == ((device.arch, device.name, tune.gemm_kernel(gemm.op), "float16"), FAST)
    assert configs.find_config(key[2], device, torch.float16, key[4], True) == FAST


def test_a_wrong_result_is_neither_timed_nor_kept(results, monkeypatch):
    made = UP.case()
    wrong = replace(made, ours=lambda *x: tuple(1.01 * y for y in made.ours(*x)))
    monkeypatch.setattr(tune, "gemm_case", lambda *args: wrong)
    tune.tune([(UP, [FAST])], DEVICE, results, 1e9)
    assert ["plain PyTorch" in row.failed for row in read(results.directory)] == [True, True]
    assert not (results.directory / "tuned.jsonl").exists()


def test_the_rule_wins_ties_and_noise(results, monkeypatch):
    monkeypatch.setitem(SECONDS, FAST, SECONDS[None])
    tune.tune([(UP, [FAST, SLOW])], DEVICE, results, 1e9)
    assert [len(row.values) for row in read(results.directory)] == [10, 10, 10]
    assert not (results.directory / "tuned.jsonl").exists()


def test_every_gemm_has_a_turn_before_any_has_two(results):
    turns = tune.in_turns({UP: [FAST, SLOW, BROKEN], CASES["rows-dx"]: [FAST]}, 2)
    assert turns == [(UP, [FAST, SLOW]), (CASES["rows-dx"], [FAST]), (UP, [BROKEN])]
    tune.tune(turns, DEVICE, results, 0)
    assert results.path.read_text() == ""


def test_a_process_that_ends_costs_its_result_alone():
    with Pool(1) as pool:
        ended, raised, right = pool.submit(os._exit, 3), pool.submit(int, "x"), pool.submit(int, "7")
        for future, reason in ((ended, "exit status 3"), (raised, "ValueError")):
            with pytest.raises(Failure, match=reason):
                future.result()
        assert right.result() == 7


def test_committed_candidates_are_those_of_the_search():
    lines = [json.loads(line) for line in tune.CANDIDATES.read_text().splitlines()]
    assert {(line["size"], line["op"]) for line in lines} == set(product(tune.SIZES, tune.GEMMS))
    for line in lines:
        found = [Config(*config) for config in line["configs"]]
        assert found
        assert set(found) <= set(tune.space(line["op"]))


def test_without_a_gpu_tuning_says_so(monkeypatch):
    monkeypatch.setattr(launch, "cpu_device", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit, match="--dry_run"):
        tune.main()
