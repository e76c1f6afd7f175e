"""The memory benchmark: byte counts against hand-computed sums, the gradient check, and the rows."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from acceleron.config import PRESETS
from bench import memory, peers, rows

CPU = torch.device("cpu")
BLOCK = peers.Contender("reference", "nano", torch.float32, 1, 32, block=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, x, table):
        return nn.functional.linear(x, self.weight.half()).square() * table


def test_saved_bytes_exclude_parameters_tables_and_weight_copies():
    x, table, block = torch.randn(6, 4).half().requires_grad_(), torch.randn(6, 8).half(), Block()
    found = memory.saved_bytes(block, lambda: block(x, table).sum().square())
    # x and the input of square().
    assert found == {"bytes": 2 * (6 * 4 + 6 * 8), "weight_copies": 2 * 8 * 4}


def test_peak_bytes_of_known_allocations():
    def allocate():
        a, b = torch.ones(1000, 1000), torch.ones(1000, 1000)
        a + b
        del a, b
        torch.ones(500, 1000)

    assert memory.peak_bytes(allocate, CPU) == 3 * 4 * 1000 * 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels on a CPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, marks=pytest.mark.slow, id="nano"),
        pytest.param(dict(top_k=4, d_ff=40, d_ff_shared=0), id="K=4"),
    ],
)
def test_kernels_save_as_many_bytes_as_the_formula(monkeypatch, checkpointing, shape):
    monkeypatch.setitem(PRESETS, "nano", replace(PRESETS["nano"], **shape))
    monkeypatch.setattr(peers, "_gradients", peers._gradients.__wrapped__)  # uncached, because the shape changes
    row = memory.measure_row(replace(BLOCK, source="triton", checkpointing=checkpointing), CPU)
    assert not row.problem()
    assert row.median == pytest.approx(row.details["formula_bytes"], rel=0.02)


def test_a_wrong_gradient_fails_the_check():
    _, gradients = memory.measure(replace(BLOCK, checkpointing=True), CPU)
    row = rows.Row("memory", "ours", {})
    BLOCK.check(row, gradients, CPU)
    assert not row.problem()
    for name in gradients:
        for wrong in (0 * gradients[name], 1.001 * gradients[name], gradients[name] + float("nan")):
            BLOCK.check(row, gradients | {name: wrong}, CPU)
            assert name in row.problem()


def test_a_failure_gives_exit_status_1_and_keeps_the_other_rows(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setattr(memory, "VARIANTS", ({},))
    monkeypatch.setattr(memory, "build_optimizer", lambda *_: torch.empty(1 << 60))  # out of memory
    flags = ["--model_size", "nano", "--tokens", "32", "--dtype", "fp32", "--device", "cpu", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench memory", *flags])
    with pytest.raises(SystemExit, match="1"):
        memory.main()
    *saved, ours, granite, llama = rows.read(tmp_path)
    assert all("memory" in row.failed for row in (ours, granite, llama))
    assert [row.details["bytes_per_token"] == row.median / 32 > 0 for row in saved] == [True] * 3
