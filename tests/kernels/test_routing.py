"""Routing kernels: top-2 ids and scores, both losses, and the gradient of the logits."""

import math

import pytest
import torch
from compare import DEVICE, FLOOR, assert_accurate, assert_equal, opcheck, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.kernels import formulas, launch, torch_ops, triton_ops
from acceleron.kernels import routing as module
from acceleron.kernels.dispatch import dispatch_plan
from acceleron.kernels.routing import route_top2

FACTOR = 1.5
DIFFERENTIABLE = ("topk_scores_TK", "z_loss", "balance_loss")

# Under the interpreter, NumPy warns about the infinities in some tests.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero|All-NaN slice) encountered:RuntimeWarning"
)


# T and E. A block has 256 tokens for up to 8 experts, 32 for 64 and 8 for 256. One token; E = K; three programs with a
# partial block and an odd E; half a block of many experts; the most experts and 10 programs, so the second kernel needs
# two blocks for their sums; the same with 51 padded experts; exactly one block.
SHAPES = [(1, 8), (300, 2), (600, 5), (16, 64), (75, 256), (75, 205), (256, 8)]
if DEVICE == "cuda":  # more tokens than 256 programs of one block, and the shapes of the named sizes
    SHAPES += [(100_003, 8), *{(8192, ModelConfig.preset(size).num_experts) for size in PRESETS}]


def check_routing(logits):
    routing, plain, truth = route_top2(logits), torch_ops.route_top2(logits), formulas.route_top2(logits.double())
    assert_equal(routing.topk_ids_TK, truth.topk_ids_TK)
    assert_equal(routing.tokens_per_expert_E, truth.tokens_per_expert_E)
    assert (routing.topk_ids_TK.dtype, routing.z_loss.dtype) == (torch.int32, torch.float32)
    values = ([getattr(r, name) for name in DIFFERENTIABLE] for r in (routing, plain, truth))
    assert_accurate(DIFFERENTIABLE, *values, FACTOR)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routing_matches_the_formula(shape):
    check_routing(randn(*shape))


# Two programs with eight blocks each, where the last three are empty; three programs with two blocks each.
@pytest.mark.parametrize("shape", [(100, 256), (1500, 5)], ids=str)
def test_programs_loop_over_several_blocks(shape, monkeypatch):
    monkeypatch.setattr(module, "MAX_PROGRAMS", 3)
    programs, blocks, _ = module._route_blocks(*shape)
    assert programs > 1
    assert blocks > 1
    check_routing(randn(*shape))


@pytest.mark.parametrize("scale", [1e4, 1e-4], ids=str)
def test_large_and_small_logits(scale):
    check_routing(randn(37, 8) * scale)


@pytest.mark.parametrize(
    "logits",
    [
        [[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [-1e4, -1e4, -1e4]],  # a naive exponential overflows
        [[0.0] * 7] * 5,
        [[1.0, 3.0, 3.0, 2.0], [2.0, 1.0, 2.0, 2.0], [-1.0, -2.0, -3.0, -1.0]],  # ties for first and for second
        [[0.0, -0.0, -1.0], [-0.0, 0.0, -1.0], [-1.0, -0.0, 0.0]],  # both zeros are equal
        [[-math.inf, 3.0, -math.inf, 1.0], [-math.inf, -math.inf, 2.0, -math.inf]],  # -inf still wins over padding
        [[-3.0, -1.0, -2.0], [-5e-39, -1e-39, -2e-39]],  # all negative: zero padding would win
    ],
    ids=["1e4", "equal", "ties", "zeros", "-inf", "negative"],
)
def test_edge_case_logits(logits):
    check_routing(torch.tensor(logits, device=DEVICE))


def test_uniform_probabilities_have_a_balance_loss_of_one():
    routing = route_top2(torch.zeros(16, 8, device=DEVICE))
    assert (routing.balance_loss.item(), routing.tokens_per_expert_E.tolist()) == (1.0, [16, 16] + [0] * 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_logits_are_routed_in_fp32(dtype):
    logits = randn(40, 8, dtype=dtype)  # bf16 also has ties
    assert_equal(route_top2(logits), route_top2(logits.float()))


VALUES = st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38])


@settings(max_examples=40)
@given(st.sampled_from([2, 5]).flatmap(lambda E: st.lists(st.lists(VALUES, min_size=E, max_size=E), min_size=1)))
def test_nonfinite_logits_still_give_valid_ids_and_a_valid_plan(rows):
    """NaN counts as the largest value. A loss is finite if the reference's loss is finite."""
    logits = torch.tensor(rows, device=DEVICE)
    routing, plain = route_top2(logits), torch_ops.route_top2(logits)
    E = logits.shape[1]
    # Python cannot sort NaN keys, so put a row's NaNs first, then the other experts by value.
    best = [
        [e for e in range(E) if math.isnan(row[e])]
        + sorted((e for e in range(E) if not math.isnan(row[e])), key=lambda e: (-row[e], e))
        for row in rows
    ]
    assert routing.topk_ids_TK.tolist() == [ids[:2] for ids in best]
    for name in ("z_loss", "balance_loss"):
        assert getattr(routing, name).isfinite() == getattr(plain, name).isfinite(), name
    plan = dispatch_plan(routing.topk_ids_TK, E)
    assert sorted(plan.gather_idx.tolist()) == list(range(2 * len(rows)))
    assert plan.offsets.tolist() == [0, *routing.tokens_per_expert_E.cumsum(0).tolist()]
    # A row of finite logits has finite scores regardless of the other rows. A selected NaN makes both scores NaN.
    finite = [all(map(math.isfinite, row)) for row in rows]
    assert routing.topk_scores_TK[torch.tensor(finite)].isfinite().all()
    selected_nan = [math.isnan(row[ids[0]]) for row, ids in zip(rows, best, strict=True)]
    assert routing.topk_scores_TK[torch.tensor(selected_nan)].isnan().all()


# --- the gradient of the logits ---


def gradient(function, logits, through=DIFFERENTIABLE):
    leaf = logits.detach().requires_grad_()
    routing = function(leaf)
    # dscores is column-major, so the gradient of the scores is not contiguous.
    dscores = randn(2, logits.shape[0], seed=1).t()
    terms = {"topk_scores_TK": (routing.topk_scores_TK * dscores).sum(), "z_loss": 0.7 * routing.z_loss}
    terms["balance_loss"] = 30 * routing.balance_loss  # scaled up, because its gradient is the smallest
    return torch.autograd.grad(sum(terms[name] for name in through), leaf)[0]


def check_gradient(logits, through=DIFFERENTIABLE):
    truth = gradient(formulas.route_top2, logits.double(), through)
    plain, ours = (gradient(function, logits, through) for function in (torch_ops.route_top2, route_top2))
    # The interpreter truncates to bf16 where a GPU rounds.
    floor = 4 * torch.finfo(logits.dtype).eps if logits.dtype == torch.bfloat16 and DEVICE == "cpu" else FLOOR
    assert_accurate(("logits",), [ours], [plain], [truth], FACTOR, floor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(shape):
    check_gradient(randn(*shape))


@pytest.mark.parametrize("through", DIFFERENTIABLE)
@pytest.mark.parametrize("shape", [(1, 8), (300, 5), (16, 64)], ids=str)
def test_gradient_through_one_result(shape, through):
    check_gradient(randn(*shape), (through,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_16_bit_logits(dtype):
    check_gradient(randn(40, 8, dtype=dtype))


def test_gradient_of_large_logits():
    """At 1e4, every score is 0 or 1, so only the z-loss has a gradient, which is about 2e4 / T."""
    check_gradient(randn(37, 8) * 1e4)


def test_masked_expert_has_zero_gradient():
    logits = randn(9, 6)
    logits[::2, 3] = -math.inf
    check_gradient(logits)
    assert gradient(route_top2, logits)[::2, 3].abs().max() == 0


def test_nan_row_does_not_affect_the_gradient_of_other_rows():
    logits = randn(9, 6)
    good = gradient(route_top2, logits, ("topk_scores_TK",))
    logits[4] = math.nan
    bad = gradient(route_top2, logits, ("topk_scores_TK",))
    # The NaN losses have a gradient of 0 here, and 0 * NaN would spread if the kernels mixed rows.
    others = torch.arange(9, device=DEVICE) != 4
    assert torch.equal(bad[others], good[others])
    assert bad[4].isnan().any()


# --- the op ---


def test_results_are_deterministic():
    logits = randn(300, 5)
    assert_equal(route_top2(logits), route_top2(logits))
    assert torch.equal(gradient(route_top2, logits), gradient(route_top2, logits))


def test_losses_of_zero_tokens_are_nan():
    logits = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    routing = route_top2(logits)
    assert routing.topk_scores_TK.shape == routing.topk_ids_TK.shape == (0, 2)
    assert routing.z_loss.isnan()
    assert routing.balance_loss.isnan()
    assert routing.tokens_per_expert_E.tolist() == [0, 0, 0, 0]
    routing.topk_scores_TK.sum().backward()
    assert logits.grad.shape == (0, 4)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "cpu_device", None)
    with pytest.raises(ValueError, match="route_top2: logits_TE: Triton needs a GPU"):
        route_top2(torch.zeros(4, 4))


def test_custom_ops_pass_opcheck():
    ops, logits = torch.ops.acceleron_triton, randn(9, 5)
    routing = route_top2(logits)
    opcheck(ops.route_top2.default, (logits,))
    gradients = (randn(9, 2), torch.ones((), device=DEVICE), torch.ones((), device=DEVICE))
    opcheck(ops.route_top2_backward.default, (logits, routing.topk_ids_TK, routing.tokens_per_expert_E, *gradients))


def test_compiles_without_graph_breaks():
    logits = randn(9, 5)
    compiled = torch.compile(route_top2, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(logits), route_top2(logits))
    assert torch.equal(gradient(compiled, logits), gradient(route_top2, logits))


def test_checkpointing_saves_the_routing_and_the_plan():
    ops = torch.ops.acceleron_triton
    assert {ops.route_top2.default, ops.dispatch_plan.default} == triton_ops.ROUTING_OPS
