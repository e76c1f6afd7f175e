"""The memory benchmark: its counts against sums made by hand, its check, and its rows."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from acceleron import ModelConfig, kernels
from bench import memory, rows
from bench.peers import Contender

CPU = torch.device("cpu")
BLOCK = Contender("reference", "block", "nano", torch.float32, 1, 32)


@pytest.fixture(autouse=True)
def selection_restored(monkeypatch):
    monkeypatch.setattr(kernels, "_choice", kernels._choice)


def test_saved_bytes_are_counted_once_without_parameters_and_tables_and_apart_from_copies():
    x, table = torch.randn(6, 4).half().requires_grad_(), torch.randn(3, 8).half()
    weight, found = torch.randn(8, 4, requires_grad=True), {}
    with memory.saved_bytes(found, [weight], (table,)):
        y = F.linear(x, weight.half()).square()
        (y[:3] * table).sum()
    # x, and the square's input. The product saves only the table, as that has no gradient.
    assert found == {"bytes": 2 * (6 * 4 + 6 * 8), "weight_copies": 2 * 8 * 4}


def test_the_peak_of_known_allocations():
    found = {}
    with memory.peak_bytes(found, CPU):
        a, b = torch.ones(1000, 1000), torch.ones(1000, 1000)
        c = a + b
        del a, b
        torch.ones(500, 1000)
    assert found == {"bytes": 3 * c.nbytes}


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU, the kernels are interpreted")
@pytest.mark.parametrize("case", [{"part": "moe layer"}, {}, {"checkpointing": True}, {"dense": True}])
def test_the_kernels_save_what_the_formula_says(case):
    contender = replace(BLOCK, source="triton", **case)
    config = ModelConfig.preset("nano", contender.dense)
    formula = 32 * memory.saved_per_token(config, contender.part, 4, contender.checkpointing)
    found, _ = memory.measure(contender, CPU)
    assert found["bytes"] == pytest.approx(formula, rel=0.02)


def test_the_formula_by_hand():
    """Tiny's routed experts keep 2 D + 8 F bytes per token in bf16."""
    routed, shared, routing = 2 * 512 + 8 * 1408, 2 * 3 * 704, 4 * 4 + 32
    assert memory.saved_per_token(ModelConfig.preset("tiny"), "moe layer", 2) == routed + shared + routing


def test_a_wrong_gradient_fails_the_check():
    contender = replace(BLOCK, checkpointing=True)
    _, grads = memory.measure(contender, CPU)
    row = rows.Row("memory", "ours", {})
    contender.check(row, grads, CPU)
    assert not row.complaint()
    for name in grads:
        for wrong in (0 * grads[name], 1.001 * grads[name], grads[name] + float("nan")):
            contender.check(row, grads | {name: wrong}, CPU)
            assert name in row.complaint()


def test_the_command_goes_on_after_a_failure_and_exits_with_1(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "planned", lambda *_: [replace(BLOCK, part="model step"), BLOCK])
    monkeypatch.setattr(memory, "build_optimizer", lambda *_: torch.empty(1 << 60))  # out of memory
    flags = ["--size", "nano", "--device", "cpu", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench memory", *flags])
    with pytest.raises(SystemExit, match="1"):
        memory.main()
    failed, block = rows.read(tmp_path)
    assert "memory" in failed.failed
    assert not block.complaint()
    assert block.details["bytes_per_token_per_layer"] == block.median / 32 > 0
