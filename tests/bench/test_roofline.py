"""Compares a step traced without a GPU, and the roofline's numbers, with counts done by hand."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from acceleron import Acceleron, ModelConfig
from bench import roofline
from bench.memory import saved_per_token
from bench.trace import Launch, Step

CONFIG, BASELINE = (ModelConfig.preset("nano", dense=dense) for dense in (False, True))
# The routed experts have the active FLOPs of nano's.
OTHER_SHAPE = dict(num_experts=64, top_k=8, d_ff=32, d_ff_shared=0, num_dense_layers=1)
S, T = 2048, 4 * 2048  # with fewer sequences, memory peaks in the optimizer
L, D, V = CONFIG.num_layers, CONFIG.d_model, CONFIG.vocab_size
N, E, F, KV = 2 * T, CONFIG.num_experts, CONFIG.d_ff, CONFIG.num_kv_heads * CONFIG.head_dim
# A separate process, because other tests may have imported the kernels under the interpreter.
SCRIPT = f"""
import json
from acceleron import ModelConfig
from bench.trace import trace_step
cases = ({{}}, 4), (dict(dense=True), 4), ({OTHER_SHAPE}, 4), ({{}}, 8)
print(json.dumps([trace_step(ModelConfig.preset("nano", **shape), batch) for shape, batch in cases]))
"""


@pytest.fixture(scope="module")
def steps() -> dict[str, Step]:
    """Return traced steps of nano with T tokens, or twice as many."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    output = subprocess.check_output(command, cwd=Path(__file__).parents[2], env=environment, text=True)
    steps = (Step([Launch(*x) for x in launches], *rest) for launches, *rest in json.loads(output.splitlines()[-1]))
    return dict(zip(("MoE", "dense", "other shape", "twice the tokens"), steps, strict=True))


@pytest.mark.parametrize(
    ("name", "config"), [("MoE", CONFIG), ("dense", BASELINE), ("other shape", replace(CONFIG, **OTHER_SHAPE))]
)
def test_flops_match_the_shapes(steps, name, config):
    moe_layers = 0 if config.dense else L - config.num_dense_layers
    mlp = 3 * (config.top_k * config.d_ff + config.d_ff_shared)
    # Active, in qkv, out, MLP, router and head.
    weights = L * (D * (D + 2 * KV) + D * D + D * mlp) + moe_layers * D * config.num_experts + V * D
    # Causal attention has S D FLOPs per layer, GEMM and token. MFU counts two GEMMs forward and four backward. The step
    # has five backward, because it recomputes the scores.
    assert sum(launch.flops for launch in steps[name].launches) == T * (6 * weights + 7 * L * S * D)
    assert steps[name].model_flops == T * (6 * weights + 6 * L * S * D)


def test_launch_counts_and_bytes_match_manual_counts(steps):
    launches = steps["MoE"].launches
    counts = Counter(launch.name for launch in launches)
    assert [counts[name] for name in ("_route_kernel", "_up_kernel", "attention", "attention backward")] == [L] * 4
    assert [counts[name] for name in ("_rows_kernel", "_weight_grad_kernel", "_scatter_kernel")] == [2 * L] * 3
    assert counts.total() <= 349  # per micro-batch; each costs the host microseconds
    by_hand = {
        # AdamW reads and writes, in fp32, the weight, both moments and the gradient (which it clips).
        "_fused_adamw_": 32 * Acceleron(CONFIG).num_parameters()[0],
        # x, w13, h and act; the gather index and expert offsets.
        "_up_kernel": L * (2 * (T * D + 2 * E * F * D + 3 * N * F) + 4 * (N + E + 1)),
        # x and dy: each token's row is read once and written twice; the scatter index.
        "_scatter_kernel": 2 * L * (2 * 3 * T * D + 4 * N),
        # Sorted rows of dy, w2, h, act and dh; the gather index, the top-k scores, partial sums and expert offsets.
        "_hidden_grad_kernel": L * (2 * (N * D + E * D * F + 5 * N * F) + 4 * N * (2 + -(-F // 128)) + 4 * (E + 1)),
        # Logits, overwritten by their gradient; labels and losses.
        "_cross_entropy_kernel": T * (2 * 2 * V + 8 + 4),
        # q, k, v, output and logsumexp per head; the gradients of all but the logsumexp.
        "attention backward": L * T * (2 * (4 * D + 4 * KV) + 4 * CONFIG.num_heads),
    }
    found = {name: sum(launch.bytes_moved for launch in launches if launch.name == name) for name in by_hand}
    assert found == pytest.approx(by_hand, rel=1e-3)


def test_peak_memory_grows_by_the_tensors_that_layers_and_head_save(steps):
    grown = (steps["twice the tokens"].peak_bytes - steps["MoE"].peak_bytes) / T
    # The head: half of the logits; the final norm's input, output and output gradient; a label and two fp32 values.
    head = 2 * V / 2 + 3 * 2 * D + 8 + 4 + 4
    assert grown == pytest.approx(L * saved_per_token(CONFIG, 2, checkpointing=False) + head, rel=0.03)


def test_bounds_and_predictions_of_synthetic_launches():
    def predicted(launch: Launch, size: str = "tiny") -> float:
        return roofline.predicted(launch, size, "h100")

    gemm, copy = Launch("mm", 798e9, 1e6), Launch("copy", 0, 2.7e9)
    assert (roofline.bound(gemm, "h100"), roofline.bound(copy, "h100")) == (1e-3, 0.9e-3)
    assert roofline.bound(copy, "h200") == pytest.approx(2.7 / 4.23 * 1e-3)
    assert predicted(gemm) == pytest.approx(798 / 690 * 1e-3)
    assert predicted(copy) == pytest.approx(0.9e-3 / 0.95)
    assert predicted(Launch("tiny", 0, 8)) == 3e-6
    up = Launch("_up_kernel", 462e9, 0)
    assert predicted(up) == pytest.approx(1e-3)
    assert predicted(up, "large") == pytest.approx(462 / 536 * 1e-3)
    three_quarters = Launch("attention", 470e9, 0, head_dim=96)  # out of a tile of 128
    assert predicted(three_quarters) == pytest.approx(4 / 3 * 1e-3)
    assert predicted(Launch("attention backward", 335e9, 0, head_dim=32)) == pytest.approx(2e-3)
    kinds = roofline.by_kind([*(Launch(name, 0, 9e3) for name in "abc"), copy, gemm, gemm, up], "tiny", "h100")
    assert dict(kinds.launches) == {"mm": 2, "_up_kernel": 1, "copy": 1, "3 other kinds": 3, "all": 7}
    assert (kinds["gap ms"]["mm"], kinds["gap ms"]["copy"]) == (0, kinds["bound ms"]["copy"])
    assert kinds["bound ms"]["all"] == pytest.approx(kinds["bound ms"].iloc[:-1].sum())


def test_limiting_kernel_is_not_in_the_dense_baseline():
    slow = Launch("mm", 798e12, 0)  # 1 s, predicted 1.19 s, in both models
    rows, up = Launch("_rows_kernel", 712e9, 0), Launch("_up_kernel", 462e9, 0)
    step = Step([slow, rows, up, up], 0, 1, 1)
    name, seconds = roofline.limiting_kernel(step, Step([slow], 0, 1, 1), "tiny", "h100")
    assert (name, seconds) == ("_up_kernel", pytest.approx(2e-3 * (1 - 462 / 798)))


def test_totals_give_tokens_per_second_and_their_ratio(steps):
    table = roofline.totals("tiny", "h200", steps["MoE"], steps["dense"])
    moe, dense = (
        sum(roofline.predicted(launch, "tiny", "h200") for launch in steps[name].launches) for name in ("MoE", "dense")
    )
    assert table.loc["predicted, tokens/s"].tolist() == pytest.approx([T / moe, T / dense])
    assert table.MoE["predicted, MoE / dense tokens/s"] == pytest.approx(dense / moe)
