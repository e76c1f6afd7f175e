"""The search for configurations, on the interpreter, with made-up times."""

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from acceleron import kernels
from acceleron.kernels import configs, launch
from acceleron.kernels.configs import Config
from bench import tune
from bench.rows import Results, read
from bench.worker import Failure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [tune.Gemm("nano", op, "fp16", 40) for op in tune.GEMMS]
FAST, SLOW, BROKEN = Config(64, 64, 32, 4, 1), Config(32, 64, 32, 4, 1), Config(16, 32, 32, 4, 1)
SECONDS = {None: [2.0] * 10, FAST: [1.0] * 10, SLOW: [3.0, 1.0] * 5}


class Pool:
    """Runs in this process what is submitted, and fails where BROKEN is checked."""

    def __init__(self, processes):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args, seconds=None):
        def result():
            if args[-1] == BROKEN:
                raise Failure("no answer within 60 s")
            return function(*args)

        return SimpleNamespace(result=result)


@pytest.fixture
def results(tmp_path, monkeypatch):
    def measure(calls, device, rounds):
        for call in calls.values():
            call()
        return {config: SECONDS[config] for config in calls}

    def forget():
        configs.table.cache_clear()
        configs.find_config.cache_clear()
        tune.prepare.cache_clear()

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "Pool", Pool)
    monkeypatch.setattr(tune, "TARGETS", {})  # the interpreter compiles nothing
    kernels.select("triton", DEVICE)
    forget()
    yield Results(str(tmp_path), DEVICE)
    kernels.select("auto", DEVICE)
    forget()


def kept(results: Results) -> dict[tuple, Config]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERON_TUNED", str(results.directory / "tuned.jsonl"))
        return configs.read_table()


@pytest.mark.parametrize("case", CASES, ids=list(tune.GEMMS))
def test_what_beats_the_rule_is_kept_and_used(case, results, monkeypatch):
    tune.tune([(case, [SLOW, BROKEN]), (case, [FAST])], DEVICE, results, 1e9)
    rows = read(results.directory)
    providers = [" ".join(map(str, config)) for config in (SLOW, BROKEN, FAST)]
    assert [row.provider for row in rows] == ["rule", *providers[:2], "rule", providers[2]]
    assert [row.failed for row in rows] == ["", "", "no answer within 60 s", "", ""]
    assert all(row.error <= row.allowed for row in rows if not row.failed)
    ((key, config),) = kept(results).items()
    assert config == FAST
    monkeypatch.setenv("ACCELERON_TUNED", str(results.directory / "tuned.jsonl"))
    configs.table.cache_clear()
    device = launch.device_of(torch.empty(0, device=DEVICE))
    assert key[:4] == (device.arch, device.name, tune.gemm_kernel(case.op), "float16")
    assert configs.find_config(key[2], device, torch.float16, key[4], True) == FAST


def test_a_wrong_result_is_neither_timed_nor_kept(results, monkeypatch):
    made = tune.gemm_case

    def wrong(*args):
        case = made(*args)
        return replace(case, ours=lambda *x: tuple(1.01 * y for y in case.ours(*x)))

    monkeypatch.setattr(tune, "gemm_case", wrong)
    tune.tune([(CASES[0], [FAST])], DEVICE, results, 1e9)
    assert ["plain PyTorch" in row.failed for row in read(results.directory)] == [True, True]
    assert not (results.directory / "tuned.jsonl").exists()


def test_the_rule_wins_ties_and_noise(results, monkeypatch):
    monkeypatch.setitem(SECONDS, FAST, [2.0] * 10)
    tune.tune([(CASES[0], [FAST, SLOW])], DEVICE, results, 1e9)
    assert not (results.directory / "tuned.jsonl").exists()


def test_every_case_has_a_turn_before_any_has_two(results):
    turns = tune.in_turns({CASES[0]: [FAST, SLOW, BROKEN], CASES[1]: [FAST]}, 2)
    assert turns == [(CASES[0], [FAST, SLOW]), (CASES[1], [FAST]), (CASES[0], [BROKEN])]
    tune.tune(turns, DEVICE, results, 0)
    assert read(results.directory) == []


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
