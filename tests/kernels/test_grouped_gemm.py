"""Grouped GEMM kernels."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from compare import DEVICE, DTYPES, FACTOR, assert_accurate, assert_equal, error, opcheck, randn, sum_floor

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.kernels import configs, formulas, torch_ops
from acceleron.kernels import grouped_gemm as module
from acceleron.kernels.configs import Config
from acceleron.kernels.torch_ops import dispatch_plan

grouped_gemm = module.grouped_gemm


def make_plan(T, E, used=None, top_k=2):
    """Return a plan for random expert ids, drawn from `used` if given. A token can have the same id twice."""
    pool = torch.tensor(used or range(E))
    indices = torch.randint(len(pool), (T, top_k), generator=torch.Generator().manual_seed(1))
    return dispatch_plan(pool[indices].to(DEVICE, torch.int32), E)


def inputs(T, D, width, E, used, dtype):
    # Weights with scale 1 / sqrt(fan-in) keep every tensor at unit scale.
    x, w = randn(2 * T, D, dtype=dtype), (randn(E, width, D, seed=2) / D**0.5).to(dtype)
    return x, w, make_plan(T, E, used), randn(2 * T, width, seed=3, dtype=dtype)


def run(function, x, w, plan, grad):
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    y = function(*leaves, plan)
    return y, *torch.autograd.grad(y, leaves, grad)


def check_errors(x, w, plan, grad):
    truths = run(formulas.grouped_gemm, x.double(), w.double(), plan, grad.double())
    plains, results = (run(function, x, w, plan, grad) for function in (torch_ops.grouped_gemm, grouped_gemm))
    assert results[0].dtype == x.dtype
    floor = sum_floor(max(*x.shape, *w.shape))
    assert_accurate(("y", "x", "w"), results, plains, truths, FACTOR[x.dtype], floor)
    return results


# T, D, F, E and the experts that get rows. The interpreter runs three programs with 32 x 32 x 32 blocks.
CASES = {
    "several tiles": (50, 64, 96, 3, None),  # full tiles on both the column and inner axes
    "partial tiles": (37, 40, 72, 3, None),  # TMA for the weight gradient only: the last inner block is partial
    "odd widths": (50, 33, 17, 5, None),
    "one token": (1, 64, 32, 4, None),  # more experts than rows
    "empty experts": (40, 32, 64, 9, (1, 4, 5, 7)),  # the first, the last and some in between are empty
    "hot expert": (48, 32, 32, 4, (2,)),  # exactly three blocks of rows
    "last expert": (20, 32, 32, 4, (3,)),
    "two experts": (33, 32, 40, 2, None),
    "many experts": (20, 8, 16, 33, None),
    "narrow": (20, 1, 2, 3, None),
}
if DEVICE == "cuda":
    for size in PRESETS:
        config = ModelConfig.preset(size)
        CASES[size] = (8192, config.d_model, 2 * config.d_ff, config.num_experts, None)

    RUNS = [(case, dtype) for case in CASES for dtype in DTYPES]
else:  # the interpreter is slow: run all in fp16, which has the same path as bf16, and some in fp32
    RUNS = [(case, torch.float16) for case in CASES]
    RUNS += [(case, torch.float32) for case in ("several tiles", "partial tiles", "odd widths", "empty experts")]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_output_and_gradients(case, dtype):
    _, _, _, E, used = CASES[case]
    _, _, grad_w = check_errors(*inputs(*CASES[case], dtype))
    for expert in set(range(E)) - set(used or range(E)):
        assert not grad_w[expert].any()  # exactly 0, although uninitialized memory holds NaN


def test_bfloat16_is_accurate():
    check_errors(*inputs(*CASES["two experts"], torch.bfloat16))


def test_tma_is_used_for_aligned_16_bit_operands(monkeypatch):
    """TMA needs full inner blocks and rows that are a multiple of 16 bytes. Otherwise, the kernels use pointers."""
    used = []
    monkeypatch.setattr(module, "choose", lambda *args: used.append(configs.choose(*args)) or used[-1])

    def paths(D, width, dtype):
        used.clear()
        run(grouped_gemm, *inputs(3, D, width, 2, None, dtype))
        return [tma for _, tma in used]

    descriptors = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    assert paths(64, 96, torch.float16) == [descriptors] * 3
    assert paths(64, 96, torch.float32) == [False] * 3
    assert paths(33, 17, torch.float16) == [False] * 3
    # The weight gradient sums over rows, and TMA reads zeros past their end.
    assert paths(40, 72, torch.float16) == [False, False, descriptors]


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float16, Config(16, 64, 32, 4, 1, flatten=True, split=1)),  # one loop over tiles and inner width
        (torch.float32, Config(64, 32, 16, 4, 1, flatten=True, split=1)),
        (torch.float16, Config(64, 16, 16, 4, 1, split=3)),  # some shares have no rows
        (torch.float16, Config(32, 64, 64, 4, 2, programs=2, flatten=True, split=2)),
        (torch.float32, Config(32, 32, 32, 4, 1, programs=100, split=4)),  # more programs than tiles of rows
    ],
    ids=str,
)
def test_different_tile_configs_are_accurate(config, dtype, monkeypatch):
    monkeypatch.setattr(configs, "find_config", lambda *args: config)
    check_errors(*inputs(40, 64, 96, 5, (0, 2, 4), dtype))


def test_expert_rows_that_the_split_does_not_divide(monkeypatch):
    """Each share has full blocks, except the last one, which is partial or empty."""
    counts = [1, 31, 32, 33, 64, 65, 96]
    ids = torch.arange(7).repeat_interleave(torch.tensor(counts)).to(DEVICE, torch.int32).view(-1, 2)
    plan = dispatch_plan(ids, 7)
    x, w, grad = randn(sum(counts), 16), randn(7, 24, 16, seed=2) / 4, randn(sum(counts), 24, seed=3)
    for split in (1, 2, 3):
        monkeypatch.setattr(configs, "find_config", lambda *args, split=split: Config(32, 32, 32, 4, 1, split=split))
        truths = run(formulas.grouped_gemm, x.double(), w.double(), plan, grad.double())
        for ours, truth in zip(run(grouped_gemm, x, w, plan, grad), truths, strict=True):
            for expert in range(7):  # per expert, because large experts would hide the error of a small one
                rows = slice(*plan.offsets[expert : expert + 2].tolist())
                part = expert if ours.dim() == 3 else rows
                assert error(ours[part], truth[part]) <= sum_floor(96), (split, expert)


@triton.jit
def _load_weight_tile(w_ptr, out_ptr, o, i, O: tl.constexpr, I: tl.constexpr, LAYOUT: tl.constexpr):
    tile = module._weight_tile(w_ptr, tl.program_id(0), o, i, O, I, LAYOUT, False, 16, 16)
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], tile)


@pytest.mark.parametrize("layout", ["E2OI", "EOI", "EIO"])
def test_weight_offsets_within_an_expert_exceed_32_bits(layout):
    """The last tile of a weight with more than 2**31 values. "E2OI" has 8 gate and 8 up columns in a tile."""
    outputs, I = 1 << 16, (1 << 15) + 64
    O, columns = (outputs // 2, 8) if layout == "E2OI" else (outputs, 16)
    # On a CPU, only the pages that are accessed take memory.
    w = torch.from_numpy(np.zeros(outputs * I, np.int8)).to(DEVICE)
    w_OI = w.view(I, O).t() if layout == "EIO" else w.view(outputs, I)
    w_OI[-columns:, -16:] = torch.arange(columns * 16, device=DEVICE).view(columns, 16) - 100
    tile_KN = torch.zeros(16, 16, dtype=torch.int8, device=DEVICE)
    _load_weight_tile[(1,)](w, tile_KN, O - columns, I - 16, O=O, I=I, LAYOUT=layout)
    assert torch.equal(tile_KN.t()[-columns:], w_OI[-columns:, -16:])


@pytest.mark.parametrize(("width", "top_k"), [(1, 2), (40, 1), (257, 8), (1024, 2)])
def test_scatter_rows_returns_the_token_of_each_assignment(width, top_k):
    plan = make_plan(50, 5, (0, 2, 4), top_k)
    x = randn(50, width, dtype=torch.float16)
    rows = module.scatter_rows(x, plan.scatter_idx_TK)
    assert torch.equal(rows[plan.scatter_idx_TK.long()], x[:, None].expand(-1, top_k, -1))


def test_weight_gradient_shares_are_summed_in_fp32(monkeypatch):
    """If shares were rounded to 16 bits, the error would be 1.4 times that of the rounded ground truth."""
    monkeypatch.setattr(configs, "find_config", lambda *args: Config(32, 32, 16, 4, 1, split=4))
    _, _, plan, grad = inputs(64, 1, 40, 2, None, torch.float16)
    x = randn(128, 40, dtype=torch.float16)
    truth = torch_ops._grouped_weight_grad(grad.double(), x.double(), plan.offsets)
    ours = module.grouped_weight_grad(grad, x, plan.offsets, None, x.dtype)
    assert error(ours, truth) <= 1.1 * error(truth.half(), truth)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("case", ["odd widths", "empty experts"])
def test_add_weight_grad_adds_to_the_sum(monkeypatch, split, case):
    monkeypatch.setattr(configs, "find_config", lambda *args: Config(32, 32, 16, 4, 1, split=split))
    x, w, plan, grad = inputs(*CASES[case], torch.float16)
    total = randn(*w.shape, seed=4)
    truth = total.double() + torch_ops._grouped_weight_grad(grad.double(), x.double(), plan.offsets)
    expected = total + module.grouped_weight_grad(grad, x, plan.offsets, None, torch.float32)
    module.add_weight_grad(grad, x, plan.offsets, None, total)
    assert torch.equal(total, expected)
    assert error(total, truth) <= sum_floor(len(x))
    module.add_weight_grad(grad[:0], x[:0], torch.zeros_like(plan.offsets), None, total)
    assert torch.equal(total, expected)


# Loads stop at the end of an expert: TMA's ragged descriptors ensure that in the first case, masks in the second. At an
# odd width, a load past the end of a row would read the NaN of the next row.
@pytest.mark.parametrize(("case", "dtype"), [("several tiles", torch.float16), ("odd widths", torch.float32)], ids=str)
def test_nan_does_not_reach_other_experts(case, dtype):
    x, w, plan, grad = inputs(*CASES[case], dtype)
    good = run(grouped_gemm, x, w, plan, grad)
    begin, end = plan.offsets[1:3].tolist()
    bad_x, bad_grad, bad_w = x.clone(), grad.clone(), w.clone()
    bad_x[begin], bad_x[end - 1], bad_grad[begin], bad_w[1] = (torch.nan,) * 4
    y, grad_x, grad_w = run(grouped_gemm, bad_x, bad_w, plan, bad_grad)
    others = torch.ones(len(x), dtype=torch.bool, device=DEVICE)
    others[begin:end] = False
    assert torch.equal(y[others], good[0][others])
    assert torch.equal(grad_x[others], good[1][others])
    others = torch.arange(len(w), device=DEVICE) != 1
    assert torch.equal(grad_w[others], good[2][others])
    assert all(bad.isnan().all() for bad in (y[begin:end], grad_x[begin:end], grad_w[1]))


def test_backward_accepts_an_expanded_gradient():
    x, w, plan, _ = inputs(*CASES["odd widths"], torch.float32)
    leaf = x.clone().requires_grad_()
    grouped_gemm(leaf, w, plan).sum().backward()  # the gradient of a sum has strides of 0
    y_like = torch.ones(len(x), w.shape[1], device=DEVICE)
    assert torch.equal(leaf.grad, run(grouped_gemm, x, w, plan, y_like)[1])


def test_zero_rows_are_accepted():
    y, grad_x, grad_w = run(grouped_gemm, *inputs(0, 16, 24, 3, None, torch.float32))
    assert (y.shape, grad_x.shape, grad_w.shape) == ((0, 24), (0, 16), (3, 24, 16))
    assert not grad_w.any()


def test_results_are_deterministic():
    # On a GPU, the shape is large enough that programs can finish in different orders.
    arguments = inputs(*(CASES["tiny"] if DEVICE == "cuda" else (20, 32, 40, 2, None)), torch.float16)
    assert_equal(run(grouped_gemm, *arguments), run(grouped_gemm, *arguments))


def test_custom_ops_pass_opcheck():
    ops = torch.ops.acceleron_triton
    x, w, plan, grad = inputs(3, 8, 12, 2, None, torch.float32)
    opcheck(ops.grouped_rows.default, (x, w, plan.offsets, True))
    opcheck(ops.grouped_rows.default, (grad, w, plan.offsets, False))
    for b, scatter_idx_TK in ((x, None), (x[:3], plan.scatter_idx_TK)):
        opcheck(ops.grouped_weight_grad.default, (grad, b, plan.offsets, scatter_idx_TK, x.dtype))
        opcheck(ops.add_weight_grad.default, (grad, b, plan.offsets, scatter_idx_TK, torch.zeros_like(w)))
    opcheck(ops.scatter_rows.default, (x[:3], plan.scatter_idx_TK))


def test_compiles_without_graph_breaks():
    arguments = inputs(*CASES["odd widths"], torch.float32)
    compiled = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, *arguments), run(grouped_gemm, *arguments))
