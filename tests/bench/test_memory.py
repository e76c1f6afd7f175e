"""The memory benchmark: its counts against torch's allocator and against sums made by hand, and its check."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from acceleron import ModelConfig, kernels
from acceleron.device import missing_compiler
from bench import memory, passes
from bench.results import complaint

CPU = torch.device("cpu")
RUN = passes.Run("saved", "block", "nano", "moe", "ours", "reference", 48, "fp32")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted where there is no GPU")


@pytest.fixture(autouse=True)
def selection_restored(monkeypatch):
    monkeypatch.setattr(kernels, "_choice", kernels._choice)


def saved_by(run):
    saved = memory.Saved(routing=run.checkpointing and not run.compiled)
    passes.layer_gradients(run, CPU, saved)
    return saved


def test_saved_bytes_of_a_linear_layer_and_a_square():
    """x (6, 4) and the square's input (6, 8) in fp16; the weight's copy apart, and the fp32 weight not at all."""
    x, weight = torch.randn(6, 4).half().requires_grad_(), torch.randn(8, 4, requires_grad=True)
    with memory.Saved() as saved:
        y = F.linear(x, weight.half()).square()
        y = y + x.new_zeros(1)  # saves nothing
    saved.count([weight], [])
    assert saved.bytes == 2 * (6 * 4 + 6 * 8)
    assert saved.copies == 2 * 8 * 4
    y.sum().backward()
    assert weight.grad.any()


def test_tables_and_views_count_once_or_not_at_all():
    x, table = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    with memory.Saved() as saved:
        (x[:3] * x[3:] * table[:3]).sum()
    saved.count([], [table])
    # x, whose halves are views; and the product, which the table's gradient would want, but it has none.
    assert saved.bytes == x.nbytes


@pytest.mark.parametrize("model", ["moe", "dense"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_blocks_saved_bytes_are_what_the_allocator_still_holds(model, checkpointing):
    """Of all that the forward pass allocated; the input came before it, and the output is not saved."""
    run = replace(RUN, model=model, checkpointing=checkpointing)
    kernels.select("reference", CPU)
    saved = saved_by(run)
    built, block, _, tables = passes.layer(run, CPU)
    x = torch.randn(*run.shape(), built.config.d_model).requires_grad_()
    with memory.Peak(CPU) as peak:
        y, stats = block(x, *tables, checkpointing)  # the router's losses too keep what they need
    held = peak.left + x.nbytes - y.nbytes
    assert saved.copies == 0
    assert saved.bytes == pytest.approx(held, rel=1e-3, abs=200)
    assert saved.bytes >= x.nbytes
    assert (stats is None) == (model == "dense")


@on_cpu
@pytest.mark.parametrize(
    ("model", "part", "checkpointing"),
    [
        ("moe", "moe layer", False),
        ("moe", "block", False),
        ("moe", "block", True),
        ("dense", "block", False),
        ("dense", "block", True),
    ],
)
def test_the_kernels_save_what_the_formula_says(model, part, checkpointing):
    run = replace(RUN, model=model, part=part, checkpointing=checkpointing, kernels="triton", tokens=32)
    config = ModelConfig.preset("nano", model == "dense")
    formula = 32 * memory.saved_per_token(config, part, 4, checkpointing)
    assert saved_by(run).bytes == pytest.approx(formula, rel=0.02)


def test_the_formula_by_hand():
    """Tiny's routed experts alone keep 2 D + 8 F bytes a token in bf16, the README's sentence."""
    config = ModelConfig.preset("tiny")
    routed = 2 * 512 + 8 * 1408
    shared, routing = 2 * 3 * 704, 4 * 4 + 32
    assert memory.saved_per_token(config, "moe layer", 2) == routed + shared + routing
    assert memory.saved_per_token(config, "block", 2, checkpointing=True) == 2 * 512 + 32


def test_the_peak_of_known_allocations():
    with memory.Peak(CPU) as peak:
        a, b = torch.ones(1000, 1000), torch.ones(1000, 1000)
        c = a + b
        del a, b
        torch.ones(500, 1000)
    assert (peak.bytes, peak.left) == (12_000_000, c.nbytes)


def test_the_peak_of_a_step_has_its_state_and_what_its_blocks_save():
    """With checkpointing it is lower, by what the blocks save less at most. Of fewer tokens AdamW is the peak."""
    plain = replace(RUN, what="peak", part="model step", tokens=512)
    figures = [memory.measure(replace(plain, checkpointing=flag), CPU)[0] for flag in (False, True)]
    config = ModelConfig.preset("nano")
    parameters = passes.build(plain, CPU).num_parameters()[0]
    assert figures[0]["state_bytes"] == pytest.approx(16 * parameters, rel=1e-3)
    full, small = (saved_by(replace(RUN, checkpointing=flag, tokens=512)).bytes for flag in (False, True))
    assert figures[0]["bytes"] > figures[0]["state_bytes"] - 4 * parameters + config.num_layers * full
    drop = figures[0]["bytes"] - figures[1]["bytes"]
    assert 0 < drop <= config.num_layers * (full - small)


@pytest.fixture(scope="module")
def truth():
    return passes.Truths(CPU)


def test_right_gradients_pass_and_wrong_ones_do_not(truth):
    run = replace(RUN, checkpointing=True)
    found = passes.sample(memory.measure(run, CPU)[1])
    grads = truth.of(run)
    assert complaint(passes.check(run, found, grads)) is None
    for name in found:
        for wrong in (0 * found[name], 1.001 * found[name], found[name] + float("nan")):
            verdict = passes.check(run, found | {name: wrong}, grads)
            assert name in complaint(verdict)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("source", ["eager", "grouped_mm"])
def test_a_peers_gradients_are_ours_and_zeros_are_not(source, dtype):
    pytest.importorskip("transformers")
    run = replace(RUN, source=source, kernels=None, dtype=dtype)
    found, grads = passes.sample(memory.measure(run, CPU)[1]), passes.Truths(CPU).of(run)
    assert complaint(passes.check(run, found, grads)) is None
    zeros = found | {"x": 0 * found["x"]}
    assert "wrong" in complaint(passes.check(run, zeros, grads))


@pytest.mark.skipif(missing_compiler(CPU) is not None, reason="torch.compile needs a compiler")
def test_the_saved_tensors_of_a_compiled_block_are_seen():
    eager, compiled = (saved_by(replace(RUN, model="dense", compiled=flag)).bytes for flag in (False, True))
    assert 0.5 * eager < compiled < 1.1 * eager


def test_the_command_writes_a_checked_row_for_each_run(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(memory, "missing_compiler", lambda device: "none here")
    monkeypatch.setattr(memory, "kernels_run", lambda choice, device: "not here")
    flags = ["--size", "nano", "--tokens", "16", "--dtype", "fp32", "--device", "cpu", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench memory", *flags])
    memory.main()
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert not [row["failed"] for row in rows if "failed" in row]
    measured = [row for row in rows if "absent" not in row]
    assert {(row["what"], row["part"]) for row in measured} == {
        ("saved", "moe layer"), ("saved", "block"), ("peak", "model step"), ("peak", "cross-entropy"),
    }  # fmt: skip
    assert all(row["bytes"] > 0 and complaint(row) is None for row in measured)
    assert len({(row["what"], row["part"], row["provider"], row["checkpointing"]) for row in rows}) == len(rows)
    shown = capsys.readouterr().out
    assert all(row["provider"] in shown for row in rows)


def test_a_provider_that_runs_out_of_memory_leaves_a_row_and_the_others(monkeypatch):
    def run_out(run, device):
        sizes.append(run.tokens)
        raise torch.OutOfMemoryError("no room")

    sizes = []
    monkeypatch.setattr(passes, "train_steps", lambda run, device, steps: run_out(run, device))
    run = replace(RUN, what="peak", part="model step", tokens=8192)
    row = memory.attempt(run, CPU, None)
    assert "no room" in row["failed"]
    assert "bytes" not in row
    memory.attempt(replace(run, source="llama", model="dense", kernels=None), CPU, None)
    assert sizes == [8192, 8192, 4096, 2048]  # a peer gets half the tokens until they fit
