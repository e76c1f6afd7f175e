"""A step traced without a GPU, and the roofline's figures, against counts made by hand."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from acceleron import Acceleron, ModelConfig
from acceleron.errors import InputError
from bench import roofline
from bench.memory import saved_per_token
from bench.trace import Launch, Step

ROOT = Path(__file__).parents[2]
CONFIG, BASELINE = (ModelConfig.preset("nano", vocab_size=2048, dense=dense) for dense in (False, True))
B, S = 4, 2048  # with fewer sequences the peak is in the optimizer
T, L, D, V = B * S, CONFIG.num_layers, CONFIG.d_model, CONFIG.vocab_size
N, E, F, KV = 2 * T, CONFIG.num_experts, CONFIG.d_ff, CONFIG.num_kv_heads * CONFIG.head_dim
# Launches of nano's MoE in one micro-batch: each costs the host some microseconds, whatever the size.
MOST_LAUNCHES = 327

# A process of its own: kernels that were decorated under the interpreter are not those that a GPU runs.
SCRIPT = """
import json
from unittest import mock
from acceleron.training.guard import StepGuard
from bench.trace import trace_step

steps = {"MoE": trace_step("nano", batch_size=4), "twice the tokens": trace_step("nano", batch_size=8)}
steps["checkpointed"] = trace_step("nano", batch_size=4, checkpointing=True)
steps["dense"] = trace_step("nano", batch_size=4, dense=True)
try:
    with mock.patch.object(StepGuard, "judge", lambda guard, step, position, loss, norm: loss.item()):
        trace_step("nano", dense=True)
    waits = ""
except Exception as error:
    waits = type(error).__name__
print(json.dumps([steps, waits]))
"""


@pytest.fixture(scope="module")
def traced() -> tuple[dict[str, Step], str]:
    """Steps of nano of T tokens, or as their name says; and what a step that waits for the device raises."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    found, waits = json.loads(process.stdout.splitlines()[-1])
    return {name: Step([Launch(*x) for x in launches], *rest) for name, (launches, *rest) in found.items()}, waits


@pytest.fixture(scope="module")
def steps(traced) -> dict[str, Step]:
    return traced[0]


@pytest.mark.parametrize(("name", "config"), [("MoE", CONFIG), ("dense", BASELINE)])
def test_flops_are_those_of_the_shapes(steps, name, config):
    mlp = 3 * config.d_ff_dense if config.dense else 2 * 3 * F + 3 * config.d_ff_shared + E
    weights = L * (D * (D + 2 * KV) + D * D + D * mlp) + V * D  # that a token meets, of qkv, out, MLP and head
    # Of attention, whose causal half is S D FLOPs per layer, GEMM and token, MFU counts the forward pass's two GEMMs
    # and twice as many backward; there are five, as the scores are computed again.
    assert sum(launch.flops for launch in steps[name].launches) == T * (6 * weights + 7 * L * S * D)
    assert steps[name].model_flops == T * (6 * weights + 6 * L * S * D)


def test_launches(steps):
    launches = steps["MoE"].launches
    counts = Counter(launch.name for launch in launches)
    once = ("_route_kernel", "_up_kernel", "_hidden_grad_kernel", "attention", "attention backward")
    expected = dict.fromkeys(once, L) | dict.fromkeys(("_rows_kernel", "_weight_grad_kernel"), 2 * L)
    expected["_cross_entropy_kernel"] = 2  # chunks, at the least
    assert {name: counts[name] for name in expected} == expected
    assert counts.total() <= MOST_LAUNCHES
    assert not {*once[:3], "_rows_kernel"} & {launch.name for launch in steps["dense"].launches}
    # Tiles of 128 x 128, and half a row tile more per expert.
    tiles = {launch.tiles for launch in launches if launch.name in ("_up_kernel", "_hidden_grad_kernel")}
    assert tiles == {(N / 128 + E / 2) * -(-F // 128)}


def test_bytes_are_those_of_what_is_read_and_written(steps):
    by_hand = {
        # Weight, both moments and the gradient, which it clips, are read and written: fp32.
        "_fused_adamw_": 32 * Acceleron(CONFIG).num_parameters()[0],
        # Rows of x as often as they are gathered, w13, h and act; the plan's order and offsets.
        "_up_kernel": L * (2 * (N * D + 2 * E * F * D + 3 * N * F) + 4 * (N + E + 1)),
        # Logits read, and overwritten by their gradient; labels and losses.
        "_cross_entropy_kernel": T * (2 * 2 * V + 8 + 4),
        # q, k and v in, the result and a logsumexp per head out; backward that and its gradients.
        "attention": L * T * (2 * (2 * D + 2 * KV) + 4 * CONFIG.num_heads),
        "attention backward": L * T * (2 * (4 * D + 4 * KV) + 4 * CONFIG.num_heads),
    }
    kinds = Counter()
    for launch in steps["MoE"].launches:
        kinds[launch.name] += launch.moved
    assert {name: kinds[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-3)


def test_memory_is_what_the_layers_and_the_head_save(steps):
    grown = (steps["twice the tokens"].peak_bytes - steps["MoE"].peak_bytes) / T
    # The peak is in the cross-entropy: half of the logits, the final norm's input, its output and that one's gradient;
    # a label, a loss and the norm's fp32 value per row.
    saved, head = saved_per_token(CONFIG, "block", 2), 2 * V / 2 + 3 * 2 * D + 8 + 4 + 4
    assert grown == pytest.approx(L * saved + head, rel=0.03)
    # With checkpointing one layer's activations are there at the peak, and attention and up run twice.
    less = steps["MoE"].peak_bytes - steps["checkpointed"].peak_bytes
    assert less > 0.9 * T * (L - 1) * (saved - saved_per_token(CONFIG, "block", 2, checkpointing=True))
    counts = Counter(launch.name for launch in steps["checkpointed"].launches)
    assert [counts[name] for name in ("_route_kernel", "attention", "_up_kernel")] == [L, 2 * L, 2 * L]


def test_a_step_that_waits_for_the_device_is_refused(traced):
    assert traced[1] == "DataDependentOutputException"


def test_bounds_and_predictions_of_made_up_launches():
    gemm, copy = Launch("mm", 798e9, 1e6), Launch("copy", 0, 2.7e9)
    assert (roofline.bound(gemm), roofline.bound(copy)) == (1e-3, 0.9e-3)
    assert roofline.predicted(gemm) == pytest.approx(798 / 584 * 1e-3)
    assert roofline.predicted(copy) == pytest.approx(1e-3)
    assert roofline.predicted(Launch("tiny", 0, 8)) == 3e-6
    # A wave and a half take as long as two: a quarter is idle.
    grouped = Launch("_rows_kernel", 450e9, 0, tiles=150, programs=100)
    assert roofline.predicted(grouped) == pytest.approx(1e-3 / 0.75)
    # A head of 96 fills three quarters of a tile of 128.
    assert roofline.predicted(Launch("attention", 450e9, 0, head_dim=96)) == pytest.approx(4 / 3 * 1e-3)
    assert roofline.predicted(Launch("attention backward", 250e9, 0, head_dim=32)) == pytest.approx(2e-3)
    kinds = roofline.by_kind([*(Launch(name, 0, 9e3) for name in "abc"), copy, gemm, gemm, grouped])
    assert list(kinds.index) == ["mm", "_rows_kernel", "copy", "3 other kinds", "all"]
    assert list(kinds.launches) == [2, 1, 1, 3, 7]
    assert kinds.idle["_rows_kernel"] == pytest.approx(0.25)
    assert kinds.moved["3 other kinds"] == 27e3
    assert (kinds.gap["mm"], kinds.gap["copy"]) == (0, kinds.bound["copy"])
    assert kinds.bound["all"] == pytest.approx(kinds.bound.iloc[:-1].sum())


def test_the_command_prints_both_models_and_the_targets(steps, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "INTERPRETED", False)
    monkeypatch.setattr(roofline, "trace_step", lambda size, dense, *_: steps["dense" if dense else "MoE"])
    monkeypatch.setattr("sys.argv", ["roofline", "--size", "tiny"])
    roofline.main()
    out = capsys.readouterr().out
    assert "_weight_grad_kernel" in out
    moe, dense = (roofline.by_kind(steps[name].launches).predicted["all"] for name in ("MoE", "dense"))
    (line,) = (line for line in out.splitlines() if line.startswith("predicted, tokens/s MoE / dense"))
    assert [float(word) for word in line.split()[-2:]] == pytest.approx([dense / moe, 0.95], abs=0.006)
    assert "700,000" in out


def test_mistakes_have_one_line_errors(monkeypatch):
    monkeypatch.setattr("sys.argv", ["roofline", "--batch_size", "0"])
    with pytest.raises(InputError, match="--batch_size 0"):
        roofline.main()
    monkeypatch.setattr(roofline, "INTERPRETED", True)
    monkeypatch.setattr("sys.argv", ["roofline"])
    with pytest.raises(SystemExit, match="unset it"):
        roofline.main()
