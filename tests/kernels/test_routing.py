"""The routing and plan kernels. Their error against float64 may be FACTOR times that of the reference in fp32."""

import math

import pytest
import torch
from compare import DEVICE, error, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.kernels import dispatch, formulas, launch, torch_ops, triton_ops
from acceleron.kernels import routing as module
from acceleron.kernels.dispatch import dispatch_plan
from acceleron.kernels.routing import route_top2

FACTOR = 1.5
# A GPU's exp, log and division are approximate: some roundings of the fp32 that every dtype is computed in.
FLOOR = 4 * torch.finfo(torch.float32).eps
LOSSES = ("weights", "z_loss", "balance_loss")

# The interpreter is numpy, which warns of the very infinities that some tests are about.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero|All-NaN slice) encountered:RuntimeWarning"
)


def tensor(values, dtype=torch.float32):
    return torch.tensor(values, device=DEVICE, dtype=dtype)


@pytest.fixture
def three_programs(monkeypatch):
    """At most three programs a launch, so that each goes through several blocks."""
    for part in (module, dispatch):
        monkeypatch.setattr(part, "MAX_PROGRAMS", 3)


# A block has 256 tokens up to 8 experts, 32 at 64 and 8 at 256. T and E: one token; E = K; a T that no block divides,
# in three programs, with an odd E; half a block of many experts; 10 programs, whose sums take two blocks of the second
# kernel, with the most experts; the same with an E that is padded by 51; and exactly one block.
SHAPES = [(1, 8), (300, 2), (600, 5), (16, 64), (75, 256), (75, 205), (256, 8)]
if DEVICE == "cuda":  # more tokens than 256 programs take in one block each, and the shapes of the named sizes
    SHAPES += [(100_003, 8), *{(8192, ModelConfig.preset(size).num_experts) for size in PRESETS}]


def check_routing(logits):
    routing, plain, truth = route_top2(logits), torch_ops.route_top2(logits), formulas.route_top2(logits.double())
    assert (routing.topk_ids_TK.dtype, routing.tokens_per_expert_E.dtype) == (torch.int32, torch.int64)
    assert torch.equal(routing.topk_ids_TK, truth.topk_ids_TK)
    assert torch.equal(routing.tokens_per_expert_E, truth.tokens_per_expert_E)
    for name in ("topk_scores_TK", "z_loss", "balance_loss"):
        ours, theirs, true = (getattr(r, name) for r in (routing, plain, truth))
        assert (ours.dtype, ours.shape) == (torch.float32, true.shape)
        assert error(ours, true) <= FACTOR * error(theirs, true) + FLOOR, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routing(shape):
    check_routing(randn(*shape))


# 100 tokens of 256 experts: two programs of eight blocks, of which the last three are empty; 1500 of 5: three of two.
@pytest.mark.usefixtures("three_programs")
@pytest.mark.parametrize("shape", [(100, 256), (1500, 5)], ids=str)
def test_several_blocks_a_program(shape):
    programs, blocks, _ = module._route_blocks(*shape)
    assert programs > 1
    assert blocks > 1
    check_routing(randn(*shape))


@pytest.mark.parametrize("scale", [1e4, 1e-4], ids=str)
def test_logits_of_other_scales(scale):
    check_routing(randn(37, 8) * scale)


@pytest.mark.parametrize(
    "logits",
    [
        [[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [-1e4, -1e4, -1e4]],  # a naive exponential overflows
        [[0.0] * 7] * 5,  # equal logits
        [[1.0, 3.0, 3.0, 2.0], [2.0, 1.0, 2.0, 2.0], [-1.0, -2.0, -3.0, -1.0]],  # ties for first, for second
        [[0.0, -0.0, -1.0], [-0.0, 0.0, -1.0], [-1.0, -0.0, 0.0]],  # both zeros are equal
        [[-math.inf, 3.0, -math.inf, 1.0], [-math.inf, -math.inf, 2.0, -math.inf]],  # -inf is smaller than padding
        [[-3.0, -1.0, -2.0], [-5e-39, -1e-39, -2e-39]],  # negative: padding of zeros would win
    ],
    ids=["1e4", "equal", "ties", "zeros", "-inf", "negative"],
)
def test_hand_made_logits(logits):
    check_routing(tensor(logits))


def test_uniform_probabilities_have_a_balance_loss_of_one():
    routing = route_top2(torch.zeros(16, 8, device=DEVICE))
    assert (routing.balance_loss.item(), routing.tokens_per_expert_E.tolist()) == (1.0, [16, 16] + [0] * 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_logits_are_routed_in_fp32(dtype):
    logits = randn(40, 8, dtype=dtype)  # bf16 has ties, too
    for narrow, wide in zip(route_top2(logits), route_top2(logits.float()), strict=True):
        assert narrow.dtype == wide.dtype
        assert torch.equal(narrow, wide)


VALUES = st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38])


@settings(max_examples=40)
@given(st.sampled_from([2, 5]).flatmap(lambda E: st.lists(st.lists(VALUES, min_size=E, max_size=E), min_size=1)))
def test_any_value_gives_two_experts_that_exist(rows):
    """NaN counts as the largest; the losses are not finite where the reference's aren't; the plan is a permutation."""
    logits = tensor(rows)
    routing, plain = route_top2(logits), torch_ops.route_top2(logits)
    E = logits.shape[1]
    # Python can't sort by a key of NaN: a row's NaNs first, then the others by value.
    best = [
        [e for e in range(E) if math.isnan(row[e])]
        + sorted((e for e in range(E) if not math.isnan(row[e])), key=lambda e: (-row[e], e))
        for row in rows
    ]
    assert routing.topk_ids_TK.tolist() == [experts[:2] for experts in best]
    for name in ("z_loss", "balance_loss"):
        assert getattr(routing, name).isfinite() == getattr(plain, name).isfinite(), name
    plan = dispatch_plan(routing.topk_ids_TK, E)
    assert sorted(plan.gather_idx.tolist()) == list(range(2 * len(rows)))
    assert plan.offsets.tolist() == [0, *routing.tokens_per_expert_E.cumsum(0).tolist()]
    # A row of finite logits has finite weights, whatever is elsewhere; one with NaN in a chosen expert has none.
    finite = [all(map(math.isfinite, row)) for row in rows]
    assert routing.topk_scores_TK[torch.tensor(finite)].isfinite().all()
    chosen_nan = [math.isnan(row[experts[0]]) for row, experts in zip(rows, best, strict=True)]
    assert routing.topk_scores_TK[torch.tensor(chosen_nan)].isnan().all()


# --- the gradient of the logits ---


def gradient(function, logits, through):
    leaf = logits.detach().requires_grad_()
    routing = function(leaf)
    # Columns first: the weights' gradient arrives with strides that are not a contiguous tensor's.
    dweights = randn(2, logits.shape[0], seed=1).t()
    terms = {"weights": (routing.topk_scores_TK * dweights).sum(), "z_loss": 0.7 * routing.z_loss}
    terms["balance_loss"] = 30 * routing.balance_loss  # its gradient is the smallest: none hides behind another
    return torch.autograd.grad(sum(terms[name] for name in through), leaf)[0]


def check_gradient(logits, through=LOSSES):
    truth = gradient(formulas.route_top2, logits.double(), through)
    plain, ours = (gradient(function, logits, through) for function in (torch_ops.route_top2, route_top2))
    assert (ours.dtype, ours.shape) == (logits.dtype, logits.shape)
    floor = 4 * torch.finfo(logits.dtype).eps if logits.dtype == torch.bfloat16 and DEVICE == "cpu" else FLOOR
    assert error(ours, truth) <= FACTOR * error(plain, truth) + floor


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(shape):
    check_gradient(randn(*shape))


@pytest.mark.parametrize("through", LOSSES)
@pytest.mark.parametrize("shape", [(1, 8), (300, 5), (16, 64)], ids=str)
def test_gradient_through_one_result_alone(shape, through):
    check_gradient(randn(*shape), (through,))


# bf16: the interpreter cuts off where a GPU rounds.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_narrow_logits(dtype):
    check_gradient(randn(40, 8, dtype=dtype))


def test_gradient_of_large_logits():
    """1e4: the choices' softmax is 0 or 1, so what is left is the z-loss's gradient of about 2e4 / T."""
    check_gradient(randn(37, 8) * 1e4)


def test_gradient_past_minus_infinity():
    """An expert that is masked out gets no gradient, and the others theirs."""
    logits = randn(9, 6)
    logits[::2, 3] = -math.inf
    check_gradient(logits)
    assert gradient(route_top2, logits, LOSSES)[::2, 3].abs().max() == 0


def test_a_bad_row_spoils_no_other_rows_weights_or_their_gradient():
    logits = randn(9, 6)
    good = gradient(route_top2, logits, ("weights",))
    logits[4] = math.nan
    bad = gradient(route_top2, logits, ("weights",))
    # The losses are NaN, so their gradients, 0 times NaN here, would be; rows are apart in the kernels.
    others = torch.arange(9, device=DEVICE) != 4
    assert torch.equal(bad[others], good[others])
    assert bad[4].isnan().any()


# --- the plan ---


def check_plan(experts, num_experts):
    plan, plain = dispatch_plan(experts, num_experts), torch_ops.dispatch_plan(experts, num_experts)
    for ours, theirs in zip(plan, plain, strict=True):
        assert (ours.dtype, ours.shape, ours.is_contiguous()) == (torch.int32, theirs.shape, True)
        assert torch.equal(ours, theirs)
    return plan


@st.composite
def assignments(draw):
    """Experts of up to 60 tokens, of which only some are in use; any experts: the plan doesn't need two different."""
    E = draw(st.sampled_from([2, 3, 8, 64, 255, 256]))
    used = draw(st.lists(st.integers(0, E - 1), min_size=1, max_size=8))
    experts = draw(st.lists(st.tuples(*[st.sampled_from(used)] * 2), max_size=60))
    return E, experts, draw(st.sampled_from([torch.int32, torch.int64])), draw(st.sampled_from([1, 3, 256]))


@settings(max_examples=40)
@given(assignments())
def test_plan_is_a_stable_sort(case):
    num_experts, experts, dtype, programs = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MAX_PROGRAMS", programs)
        plan = check_plan(tensor(experts, dtype).view(-1, 2), num_experts)
    flat = [expert for pair in experts for expert in pair]
    gather_idx = sorted(range(len(flat)), key=lambda n: flat[n])  # Python's sort is stable
    assert plan.gather_idx.tolist() == gather_idx
    assert [gather_idx[row] for row in plan.scatter_idx_TK.flatten().tolist()] == list(range(len(flat)))
    counts = torch.bincount(torch.tensor(flat, dtype=torch.int64), minlength=num_experts)
    assert plan.offsets.tolist() == [0, *counts.cumsum(0).tolist()]


def random_experts(T, E, dtype=torch.int32):
    return torch.randint(E, (T, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


# A block has 512 assignments up to 8 experts and 16 at 256. T and E: no token; one; three programs with a short last
# one; exactly one block; 17 programs, whose counts take two blocks; all again on one expert below.
@pytest.mark.parametrize(
    ("T", "E"), [(0, 5), (1, 2), (600, 5), (256, 8), (130, 256), *([(300_000, 8)] if DEVICE == "cuda" else [])]
)
def test_plan(T, E):
    check_plan(random_experts(T, E), E)


@pytest.mark.usefixtures("three_programs")
@pytest.mark.parametrize(("T", "E"), [(1500, 5), (100, 256)])  # three programs of two and of four or more blocks
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_plan_of_several_blocks_a_program(T, E, dtype, monkeypatch):
    sizes, count = [], dispatch._count_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: sizes.append((*grid, kwargs["BLOCKS"])) or count[grid](*args, **kwargs)

    monkeypatch.setattr(dispatch, "_count_kernel", Recorded())
    check_plan(random_experts(T, E, dtype), E)
    assert min(sizes[0]) > 1


@pytest.mark.parametrize("expert", [0, 3, 4])
def test_plan_of_one_hot_expert(expert):
    plan = check_plan(torch.full((300, 2), expert, dtype=torch.int32, device=DEVICE), 5)
    assert torch.equal(plan.gather_idx, torch.arange(600, dtype=torch.int32, device=DEVICE))


# --- both ---


def test_same_bits_every_time():
    logits = randn(300, 5)
    for first, second in zip(route_top2(logits), route_top2(logits), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(*(gradient(route_top2, logits, LOSSES) for _ in range(2)))
    experts = random_experts(300, 5)
    for first, second in zip(dispatch_plan(experts, 5), dispatch_plan(experts, 5), strict=True):
        assert torch.equal(first, second)


def test_no_tokens_have_losses_that_are_means_of_nothing():
    logits = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    routing = route_top2(logits)
    assert routing.topk_scores_TK.shape == routing.topk_ids_TK.shape == (0, 2)
    assert routing.z_loss.isnan()
    assert routing.balance_loss.isnan()
    assert routing.tokens_per_expert_E.tolist() == [0, 0, 0, 0]
    routing.topk_scores_TK.sum().backward()
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(4, 1), "expected 2 to 256 experts, but got 1"),
        (torch.zeros(4, 257), "expected 2 to 256 experts, but got 257"),
        (torch.zeros(4), "expected shape"),
        (torch.zeros(1, 4, 4), "expected shape"),
        (torch.zeros(4, 4, dtype=torch.float64), "expected bfloat16 or float16 or float32, but got float64"),
        (torch.zeros(4, 4, dtype=torch.int64), "expected bfloat16 or float16 or float32 or float64, but got int64"),
        (torch.zeros(4, 5).t(), "call .contiguous()"),
    ],
    ids=["E=1", "E=257", "1d", "3d", "float64", "int", "strides"],
)
def test_routing_refuses_and_names_the_argument(logits, message):
    with pytest.raises(ValueError, match=f"route_top2: logits_TE.*{message}"):
        route_top2(logits.to(DEVICE))


@pytest.mark.parametrize(
    ("experts", "num_experts", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.int32), 4, r"topk_ids_TK: expected shape \(any, 2\)"),
        (torch.zeros(8, dtype=torch.int32), 4, "topk_ids_TK: expected shape"),
        (torch.zeros(4, 2), 4, "topk_ids_TK: expected int32 or int64, but got float32"),
        (torch.zeros(2, 4, dtype=torch.int32).t(), 4, r"topk_ids_TK: .*call .contiguous\(\)"),
        (torch.zeros(4, 2, dtype=torch.int32), 1, "num_experts: expected 2 to 256 experts, but got 1"),
        (torch.zeros(4, 2, dtype=torch.int32), 257, "num_experts: expected 2 to 256 experts, but got 257"),
    ],
    ids=["K=3", "1d", "float", "strides", "E=1", "E=257"],
)
def test_plan_refuses_and_names_the_argument(experts, num_experts, message):
    with pytest.raises(ValueError, match=f"dispatch_plan: {message}"):
        dispatch_plan(experts.to(DEVICE), num_experts)


def test_without_a_gpu_or_the_interpreter_a_cpu_tensor_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "cpu_device", None)
    with pytest.raises(ValueError, match="route_top2: logits_TE: Triton needs a GPU"):
        route_top2(torch.zeros(4, 4))


def test_custom_ops_pass_opcheck():
    torch.use_deterministic_algorithms(False)  # opcheck compares runs on memory it does not own
    ops, logits = torch.ops.acceleron_triton, randn(9, 5)
    routing = route_top2(logits)
    torch.library.opcheck(ops.route_top2.default, (logits,))
    gradients = (randn(9, 2), torch.ones((), device=DEVICE), torch.ones((), device=DEVICE))
    torch.library.opcheck(
        ops.route_top2_backward.default, (logits, routing.topk_ids_TK, routing.tokens_per_expert_E, *gradients)
    )
    torch.library.opcheck(ops.dispatch_plan.default, (routing.topk_ids_TK, 5))
    torch.library.opcheck(ops.dispatch_plan.default, (routing.topk_ids_TK[:0], 5))


def test_compiles_without_a_graph_break():
    def routed(logits):
        routing = route_top2(logits)
        return (*routing, *dispatch_plan(routing.topk_ids_TK, logits.shape[1]))

    logits = randn(9, 5)
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(logits), routed(logits), strict=True):
        assert torch.equal(ours, eager)
    ours = gradient(torch.compile(route_top2, fullgraph=True, backend="aot_eager"), logits, LOSSES)
    assert torch.equal(ours, gradient(route_top2, logits, LOSSES))


def test_checkpointing_keeps_both_ops():
    ops = torch.ops.acceleron_triton
    assert {ops.route_top2.default, ops.dispatch_plan.default} == triton_ops.ROUTING_OPS
