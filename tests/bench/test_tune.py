"""The search for configurations, on the interpreter: what it times is right, and what is wrong is never kept."""

import json

import pytest
import torch

from acceleron import ModelConfig, kernels
from acceleron.kernels import configs
from acceleron.kernels.configs import Config
from bench import tune

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ModelConfig(
    d_model=64, num_layers=1, num_heads=4, num_kv_heads=4, num_experts=4, d_ff=96, d_ff_shared=32, vocab_size=128
)
OPS = ["up", "rows", "hidden_grad", "rows", "weight_grad", "weight_grad"]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of its own, and the Triton kernels."""
    monkeypatch.setattr(configs, "TABLE", tmp_path / "tuned.jsonl")
    configs.TABLE.touch()
    configs.table.cache_clear()
    configs.find_config.cache_clear()
    kernels.select("triton", DEVICE)
    yield configs.TABLE
    kernels.select("auto", DEVICE)
    configs.table.cache_clear()
    configs.find_config.cache_clear()


@pytest.mark.parametrize("index", range(6), ids=OPS)
def test_the_fastest_right_candidate_is_kept_and_served(index, table):
    case = tune.cases(CONFIG, 50, torch.float16, DEVICE)[index]
    assert case.op == OPS[index]
    device = (
        configs.Device("ours", "interpreter", 3) if DEVICE.type == "cpu" else tune.launch.device_of(case.tensors[0])
    )
    key = tune.key_of(case.op, case.sizes, "fp16", device.arch, tune.launch.device_of(case.tensors[0]).name)
    fit = [Config(32, 32, 32, 4, 1), Config(64, 64, 32, 4, 1)]
    best, median = tune.fastest(case, key, fit, 2, torch.empty(8, device=DEVICE))
    assert best in fit
    assert median > 0
    assert configs.find_config(case.op, tune.launch.device_of(case.tensors[0]), torch.float16, case.sizes) == best


def test_a_wrong_result_is_never_kept(table, capsys):
    case = tune.cases(CONFIG, 50, torch.float16, DEVICE)[1]
    wrong = case._replace(ours=lambda x, w: (case.ours(x, w)[0] * 1.01,))
    key = tune.key_of(case.op, case.sizes, "fp16", "interpreter", "interpreter")
    assert tune.fastest(wrong, key, [Config(32, 32, 32, 4, 1)], 1, torch.empty(8)) is None
    assert "where the reference has" in capsys.readouterr().err


def test_the_table_keeps_other_entries_and_is_read_back(table):
    other = ("sm_90", "another GPU", "up", "bfloat16", (4, 64, 96))
    ours = ("sm_90", "any", "rows", "bfloat16", (4, 96, 64, 1))
    tune.write_table({other: (Config(128, 128, 64, 8, 3), 1e-3)})
    tune.write_table({ours: (Config(64, 64, 64, 4, 3), 2e-3)})
    tune.write_table({ours: (Config(128, 64, 64, 4, 3, split=2), 1.5e-3)})
    configs.table.cache_clear()
    assert configs.table() == {other: Config(128, 128, 64, 8, 3), ours: Config(128, 64, 64, 4, 3, split=2)}
    assert [json.loads(line)["microseconds"] for line in table.read_text().splitlines()] == [1000.0, 1500.0]


def test_candidates_are_distinct_and_of_powers_of_two():
    for arch in tune.TARGETS:
        for op in configs.OPS:
            found = tune.candidates(op, arch)
            assert len(found) == len(set(found)) > 10
            assert all(n & (n - 1) == 0 for c in found for n in (c.block_m, c.block_n, c.block_k, c.warps))


def test_without_a_gpu_tuning_says_so(monkeypatch):
    monkeypatch.setattr(tune.launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit, match="--dry_run"):
        tune.main()
