"""Routing kernels: top-k ids and scores, the statistics, and the gradient of the logits."""

import math
from functools import partial

import numpy as np
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
from acceleron.kernels.routing import route_topk

FACTOR = 1.5
DIFFERENTIABLE = ("topk_scores_TK", "z_loss", "mean_probabilities_E")

# Under the interpreter, NumPy warns about the infinities in some tests.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero|All-NaN slice) encountered:RuntimeWarning"
)


# T, E, K and normalize. A block has 256 tokens for up to 8 experts, 32 for 64 and 8 for 256; half for K > 2.
CASES = [
    (1, 8, 2, True),  # one token
    (300, 2, 2, True),  # K = E
    (600, 5, 2, False),  # three programs with a partial block, and an odd E
    (10, 64, 8, True),  # less than a block of many experts
    (75, 256, 4, False),  # the most experts, and 19 programs: the second kernel needs five blocks for their sums
    (75, 205, 2, True),  # 51 padded experts, and two blocks of sums
    (128, 8, 4, True),  # exactly one block
    (40, 16, 16, True),  # the largest K
    (40, 8, 8, False),  # every expert: equal to the softmax
    (300, 5, 1, True),  # every score is 1, without a gradient
    (33, 8, 1, False),
    (9, 1, 1, True),  # a single expert
]
if DEVICE == "cuda":  # more tokens than 256 programs of one block, and the shapes of the named sizes
    CASES += [(100_003, 8, 2, True), (8192, 256, 16, True), (8192, 64, 8, False)]
    CASES += {(8192, ModelConfig.preset(size).num_experts, 2, True) for size in PRESETS}


def check_routing(logits, K=2, normalize=True, force_load_balance=False):
    routing, plain, truth = (
        op(x, K, normalize=normalize, force_load_balance=force_load_balance)
        for op, x in ((route_topk, logits), (torch_ops.route_topk, logits), (formulas.route_topk, logits.double()))
    )
    assert_equal(routing.topk_ids_TK, truth.topk_ids_TK)
    assert_equal(routing.tokens_per_expert_E, truth.tokens_per_expert_E)
    assert (routing.topk_ids_TK.dtype, routing.z_loss.dtype) == (torch.int32, torch.float32)
    values = ([getattr(r, name) for name in DIFFERENTIABLE] for r in (routing, plain, truth))
    assert_accurate(DIFFERENTIABLE, *values, FACTOR)


@pytest.mark.parametrize(("T", "E", "K", "normalize"), CASES, ids=str)
def test_routing_matches_the_formula(T, E, K, normalize):
    check_routing(randn(T, E), K, normalize)


# Two programs with 16 blocks each, where the last seven are empty; three programs with two blocks each.
@pytest.mark.parametrize(("shape", "K"), [((100, 256), 4), ((1500, 5), 2)], ids=str)
def test_programs_loop_over_several_blocks(shape, K, monkeypatch):
    monkeypatch.setattr(module, "MAX_PROGRAMS", 3)
    programs, blocks, _ = module._route_blocks(*shape, K)
    assert programs > 1
    assert blocks > 1
    check_routing(randn(*shape), K)


@pytest.mark.parametrize(("K", "normalize"), [(2, True), (4, False)], ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e-4], ids=str)
def test_large_and_small_logits(scale, K, normalize):
    check_routing(randn(37, 8) * scale, K, normalize)


@pytest.mark.skipif(DEVICE == "cuda", reason="GPUs approximate exp and division")
def test_two_normalized_scores_are_bitwise_equal_to_the_two_way_softmax():
    """1 / (1 + exp(gap)) and exp(gap) / (1 + exp(gap)) in fp32, and the gradient in the same form."""
    logits, dscores = randn(300, 5), randn(300, 2, seed=1)
    top, ids = logits.sort(dim=1, descending=True)
    exp_gap = torch.from_numpy(np.exp((top[:, 1] - top[:, 0]).numpy()))  # the interpreter's exp
    dgap = (dscores[:, 0] - dscores[:, 1]) * (exp_gap / ((1 + exp_gap) * (1 + exp_gap)))
    scores = route_topk(logits.requires_grad_()).topk_scores_TK
    assert_equal(scores.detach(), torch.stack([1 / (1 + exp_gap), exp_gap / (1 + exp_gap)], dim=1))
    (dlogits,) = torch.autograd.grad((scores * dscores).sum(), logits)
    assert_equal(dlogits, torch.zeros(300, 5).scatter(1, ids[:, :2], torch.stack([dgap, -dgap], dim=1)))


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
    for K, normalize in ((2, True), (3, False)):
        check_routing(torch.tensor(logits, device=DEVICE), K, normalize)


@pytest.mark.parametrize(("E", "K"), [(5, 3), (4, 4)])
def test_forced_load_balance(E, K):
    logits = randn(17, E)
    check_routing(logits, K, True, True)
    ids_TK = route_topk(logits, K, force_load_balance=True).topk_ids_TK
    assert [sorted(ids) for ids in ids_TK.tolist()] == [sorted((t + k) % E for k in range(K)) for t in range(17)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_logits_are_routed_in_fp32(dtype):
    logits = randn(40, 8, dtype=dtype)  # bf16 also has ties
    assert_equal(route_topk(logits), route_topk(logits.float()))


VALUES = st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38])


@settings(max_examples=40)
@given(
    st.sampled_from([2, 5]).flatmap(lambda E: st.lists(st.lists(VALUES, min_size=E, max_size=E), min_size=1)),
    st.sampled_from([1, 2, 4]),
)
def test_nonfinite_logits_still_give_valid_ids_and_a_valid_plan(rows, K):
    """NaN counts as the largest value. A statistic is finite if the reference's is finite."""
    logits = torch.tensor(rows, device=DEVICE)
    E = logits.shape[1]
    K = min(K, E)
    routing, plain = route_topk(logits, K), torch_ops.route_topk(logits, K)
    # Python cannot sort NaN keys, so put a row's NaNs first, then the other experts by value.
    best = [
        [e for e in range(E) if math.isnan(row[e])]
        + sorted((e for e in range(E) if not math.isnan(row[e])), key=lambda e: (-row[e], e))
        for row in rows
    ]
    assert routing.topk_ids_TK.tolist() == [ids[:K] for ids in best]
    for name in ("z_loss", "mean_probabilities_E"):
        assert torch.equal(getattr(routing, name).isfinite(), getattr(plain, name).isfinite()), name
    plan = dispatch_plan(routing.topk_ids_TK, E)
    assert sorted(plan.gather_idx.tolist()) == list(range(K * len(rows)))
    assert plan.offsets.tolist() == [0, *routing.tokens_per_expert_E.cumsum(0).tolist()]
    # A row of finite logits has finite scores regardless of the other rows. A selected NaN makes all scores NaN.
    finite = [all(map(math.isfinite, row)) for row in rows]
    assert routing.topk_scores_TK[torch.tensor(finite)].isfinite().all()
    selected_nan = [math.isnan(row[ids[0]]) for row, ids in zip(rows, best, strict=True)]
    assert routing.topk_scores_TK[torch.tensor(selected_nan)].isnan().all()


# --- the gradient of the logits ---


def gradient(function, logits, through=DIFFERENTIABLE):
    leaf = logits.detach().requires_grad_()
    routing = function(leaf)
    # Neither gradient is contiguous.
    dscores = randn(*routing.topk_scores_TK.shape[::-1], seed=1).t()
    dprobabilities = randn(logits.shape[1], 2, seed=2) * len(logits)  # scaled up: the mean has small gradients
    twice = torch.stack([routing.mean_probabilities_E] * 2, dim=1)
    terms = {"topk_scores_TK": (routing.topk_scores_TK * dscores).sum(), "z_loss": 0.7 * routing.z_loss}
    terms["mean_probabilities_E"] = (twice * dprobabilities).sum()
    return torch.autograd.grad(sum(terms[name] for name in through), leaf)[0]


def check_gradient(logits, through=DIFFERENTIABLE, K=2, normalize=True):
    ours, plain, truth = (
        gradient(lambda x, op=op: op(x, K, normalize=normalize), x, through)
        for op, x in ((route_topk, logits), (torch_ops.route_topk, logits), (formulas.route_topk, logits.double()))
    )
    # The interpreter truncates to bf16 where a GPU rounds.
    floor = 4 * torch.finfo(logits.dtype).eps if logits.dtype == torch.bfloat16 and DEVICE == "cpu" else FLOOR
    assert_accurate(("logits",), [ours], [plain], [truth], FACTOR, floor)


@pytest.mark.parametrize(("T", "E", "K", "normalize"), CASES, ids=str)
def test_gradient(T, E, K, normalize):
    check_gradient(randn(T, E), K=K, normalize=normalize)


@pytest.mark.parametrize("through", DIFFERENTIABLE)
@pytest.mark.parametrize(
    ("T", "E", "K", "normalize"), [(1, 8, 2, True), (300, 5, 2, False), (16, 64, 8, True), (33, 8, 1, True)], ids=str
)
def test_gradient_through_one_result(T, E, K, normalize, through):
    check_gradient(randn(T, E), (through,), K, normalize)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_16_bit_logits(dtype):
    check_gradient(randn(40, 8, dtype=dtype))


def test_gradient_of_large_logits():
    """At 1e4, every score is 0 or 1, so only the z-loss has a gradient, which is about 2e4 / T."""
    check_gradient(randn(37, 8) * 1e4)
    check_gradient(randn(37, 16) * 1e4, K=4)


def test_masked_expert_has_zero_gradient():
    logits = randn(9, 6)
    logits[::2, 3] = -math.inf
    check_gradient(logits)
    assert gradient(route_topk, logits)[::2, 3].abs().max() == 0


def test_nan_row_does_not_affect_the_gradient_of_other_rows():
    logits = randn(9, 6)
    good = gradient(route_topk, logits, ("topk_scores_TK",))
    logits[4] = math.nan
    bad = gradient(route_topk, logits, ("topk_scores_TK",))
    # The NaN losses have a gradient of 0 here, and 0 * NaN would spread if the kernels mixed rows.
    others = torch.arange(9, device=DEVICE) != 4
    assert torch.equal(bad[others], good[others])
    assert bad[4].isnan().any()


# --- the op ---


@pytest.mark.parametrize("K", [2, 4])
def test_results_are_deterministic(K):
    logits, route = randn(300, 5), partial(route_topk, top_k=K)
    assert_equal(route(logits), route(logits))
    assert torch.equal(gradient(route, logits), gradient(route, logits))


def test_means_over_zero_tokens_are_nan():
    logits = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    routing = route_topk(logits, 3)
    assert routing.topk_scores_TK.shape == routing.topk_ids_TK.shape == (0, 3)
    assert routing.z_loss.isnan()
    assert routing.mean_probabilities_E.isnan().all()
    assert routing.tokens_per_expert_E.tolist() == [0, 0, 0, 0]
    routing.topk_scores_TK.sum().backward()
    assert logits.grad.shape == (0, 4)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "cpu_device", None)
    with pytest.raises(ValueError, match="route_topk: logits_TE: Triton needs a GPU"):
        route_topk(torch.zeros(4, 4))


def test_custom_ops_pass_opcheck():
    ops, logits = torch.ops.acceleron_triton, randn(9, 5)
    gradients = (randn(9, 3), torch.ones((), device=DEVICE), randn(5))
    for normalize in (True, False):
        opcheck(ops.route_topk.default, (logits, 3, normalize))
        ids = route_topk(logits, 3, normalize=normalize).topk_ids_TK
        opcheck(ops.route_topk_backward.default, (logits, ids, *gradients, normalize))


def test_compiles_without_graph_breaks():
    logits = randn(9, 5)
    compiled = torch.compile(route_topk, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(logits), route_topk(logits))
    assert torch.equal(gradient(compiled, logits), gradient(route_topk, logits))


def test_checkpointing_saves_the_routing_and_the_plan():
    ops = torch.ops.acceleron_triton
    assert {ops.route_topk.default, ops.dispatch_plan.default} == triton_ops.ROUTING_OPS
