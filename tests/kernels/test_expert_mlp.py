"""Expert MLP kernels."""

import gc

import pytest
import torch
from compare import DEVICE, DTYPES, FACTOR, assert_accurate, assert_equal, opcheck, randn, saved_tensors, sum_floor

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.kernels import configs, formulas, torch_ops
from acceleron.kernels import expert_mlp as module
from acceleron.kernels import grouped_gemm as gemms
from acceleron.kernels.configs import Config
from acceleron.kernels.dispatch import dispatch_plan
from acceleron.kernels.routing import route_topk

expert_mlp = module.expert_mlp
NAMES = ("x", "topk_scores", "w13", "w2")


def inputs(T, D, width, E, used=None, top_k=2, dtype=torch.float32):
    """Return [x, topk_scores, w13, w2] and a plan from random logits. used: experts that get tokens (default: all)."""
    logits = randn(T, E, seed=1)
    if used:
        logits[:, [e for e in range(E) if e not in used]] -= 100
    routing = route_topk(logits, top_k)
    # Weights with scale 1 / sqrt(fan-in) keep every tensor at unit scale.
    w13, w2 = randn(E, 2 * width, D, seed=2) / D**0.5, randn(E, D, width, seed=3) / width**0.5
    tensors = [randn(T, D, dtype=dtype), routing.topk_scores_TK, w13.to(dtype), w2.to(dtype)]
    return tensors, dispatch_plan(routing.topk_ids_TK, E)


def run(function, tensors, plan, grad):
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves[:2], plan, *leaves[2:])
    return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def check_errors(tensors, plan, functions=(formulas.expert_mlp, torch_ops.expert_mlp, expert_mlp)):
    x = tensors[0]
    grad = randn(*x.shape, seed=5, dtype=x.dtype)
    formula, *backends = functions
    truths = run(formula, [t.double() for t in tensors], plan, grad)
    plains, results = (run(function, tensors, plan, grad) for function in backends)
    assert results[0].dtype == x.dtype
    floor, luck = sum_floor(max(*x.shape, *tensors[2].shape)), torch.finfo(x.dtype).eps / 2
    assert_accurate(("y", *NAMES), results, plains, truths, FACTOR[x.dtype], floor, luck)
    return results


# T, D, F, E, the experts that get tokens, and K (default: 2). The interpreter runs three programs with 32 x 32 x 32
# blocks. The first cases have the expert counts and roughly the D / F ratios of the named sizes. Only tiny has two row
# tiles per expert.
SIZES = {
    "nano": (20, 64, 64, 8, None),
    "tiny": (60, 16, 44, 4, None),
    "small": (20, 24, 28, 8, None),
    "medium": (20, 32, 52, 8, None),
    "large": (20, 24, 30, 8, None),
}
CASES = SIZES | {
    "one token": (1, 32, 64, 4, None),
    "empty experts": (37, 32, 40, 6, (1, 3, 4)),  # the first and the last are empty
    "hot experts": (40, 64, 32, 5, (4, 2)),  # two tiles of rows each
    "two experts": (33, 32, 32, 2, None),
    "many experts": (16, 8, 8, 33, None),
    "odd widths": (33, 33, 17, 5, None),  # loads through pointers instead of TMA, and partial tiles on every axis
    "wide rows": (9, 264, 8, 3, None),  # two programs per token in the kernels that sum its K rows
    "K = 1, two experts": (33, 32, 40, 2, None, 1),
    "K = 1, one expert": (33, 32, 40, 1, None, 1),
    "K = 4, empty and hot experts": (40, 32, 32, 7, (1, 3, 4, 5), 4),
    "K = 8, one token": (1, 32, 64, 8, None, 8),
    "K = 8, many experts": (20, 16, 16, 64, None, 8),
    "K = 8, odd widths": (11, 33, 17, 9, None, 8),
    "K = 16, 256 experts": (3, 16, 8, 256, None, 16),
}
if DEVICE == "cuda":
    for size in PRESETS:
        config = ModelConfig.preset(size)
        CASES[f"{size}, full size"] = (8192, config.d_model, config.d_ff, config.num_experts, None)
    RUNS = [(case, dtype) for case in CASES for dtype in DTYPES]
else:  # the interpreter is slow: run fp16, which has the same path as bf16, and some fp32; test_moe_layer.py has more
    SLOW = ("K = 8, many experts", "K = 16, 256 experts")
    RUNS = [(case, torch.float16) for case in CASES if case not in ("nano", "small", "medium", *SLOW)]
    RUNS += [pytest.param(case, torch.float16, marks=pytest.mark.slow) for case in SLOW]
    RUNS += [(case, torch.float32) for case in ("one token", "empty experts", "hot experts", "odd widths")]
    RUNS += [("K = 8, odd widths", torch.float32)]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_output_and_every_gradient(case, dtype):
    E, used, *_ = CASES[case][3:]
    _, _, _, grad_w13, grad_w2 = check_errors(*inputs(*CASES[case], dtype=dtype))
    for expert in set(range(E)) - set(used or range(E)):
        assert not grad_w13[expert].any()  # exactly 0, although uninitialized memory holds NaN
        assert not grad_w2[expert].any()


def test_fp32_weights_get_fp32_gradients():
    """The weights are cast for the GEMMs, but their gradients are never rounded to 16 bits."""
    (x, scores, w13, w2), plan = inputs(*CASES["odd widths"], dtype=torch.float16)
    grad = randn(*x.shape, seed=5, dtype=x.dtype)
    narrow = run(expert_mlp, (x, scores, w13, w2), plan, grad)
    wide = run(expert_mlp, (x, scores, w13.float(), w2.float()), plan, grad)
    assert_equal(narrow[:3], wide[:3])
    for a, b in zip(narrow[3:], wide[3:], strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(b.half(), a)
        assert not torch.equal(b.half().float(), b)


def test_bfloat16_is_accurate():
    """Add x to dilute the error, because the interpreter truncates four times in a row, always toward zero.

    The weights are fp32, because it would truncate their gradients as well.
    """
    tensors, plan = inputs(*CASES["two experts"], dtype=torch.bfloat16)
    tensors[2:] = [w.float() for w in tensors[2:]]
    functions = (formulas.expert_mlp, torch_ops.expert_mlp, expert_mlp)
    check_errors(tensors, plan, [lambda x, *rest, f=f: f(x, *rest) + x for f in functions])


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float16, Config(16, 64, 32, 4, 1, flatten=True)),
        (torch.float32, Config(64, 16, 16, 4, 2, programs=2, split=3)),
        (torch.float16, Config(32, 128, 64, 4, 1, split=2)),
    ],
    ids=str,
)
def test_different_tile_configs_are_accurate(config, dtype, monkeypatch):
    monkeypatch.setattr(configs, "find_config", lambda *args: config)
    check_errors(*inputs(30, 48, 72, 2, dtype=dtype))


def test_tma_is_used_for_aligned_16_bit_operands(monkeypatch):
    """TMA needs full inner blocks and rows that are a multiple of 16 bytes. Otherwise, the kernels use pointers."""
    used = []
    for caller in (module, gemms):
        monkeypatch.setattr(caller, "choose", lambda *args: used.append(configs.choose(*args)) or used[-1])

    def paths(D, width, dtype):
        used.clear()
        tensors, plan = inputs(3, D, width, 2, dtype=dtype)
        run(expert_mlp, tensors, plan, tensors[0])
        return [tma for _, tma in used]

    descriptors = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    # The order is: up, down; w2.T dy, dW2, dW13 and the rows of dX.
    assert paths(64, 32, torch.float16) == [descriptors] * 6
    assert paths(64, 32, torch.float32) == [False] * 6
    assert paths(33, 17, torch.float16) == [False] * 6


@pytest.mark.parametrize("names", ["rows, up", "hidden_grad", "weight_grad", "all"])
def test_disabling_tma_does_not_change_the_results(names, monkeypatch):
    tensors, plan = inputs(50, 64, 96, 3, dtype=torch.float16)
    expected, used = run(expert_mlp, tensors, plan, tensors[0]), {}

    def recorded(op, *args):
        config, used[op] = configs.choose(op, *args)
        return config, used[op]

    for caller in (module, gemms):
        monkeypatch.setattr(caller, "choose", recorded)
    monkeypatch.setenv("ACCELERON_NO_TMA", names)
    for without, with_tma in zip(run(expert_mlp, tensors, plan, tensors[0]), expected, strict=True):
        assert with_tma.any()
        assert torch.equal(without, with_tma)
    if DEVICE == "cpu":
        assert used == {op: names != "all" and op not in names for op in configs.OPS}


def test_config_lookup_uses_the_documented_sizes(monkeypatch):
    calls = []

    def recorded(op, device, dtype, sizes, tma):
        calls.append((op, sizes))
        return Config(32, 32, 32, 4, 1)

    monkeypatch.setattr(configs, "find_config", recorded)
    tensors, plan = inputs(3, 8, 12, 2)
    run(expert_mlp, tensors, plan, tensors[0])
    forward = [("up", (2, 8, 12)), ("rows", (2, 12, 8, 1))]
    assert calls[:2] == forward
    backward = [("hidden_grad", (2, 8, 12)), ("rows", (2, 24, 8, 0))]
    backward += [("weight_grad", (2, 8, 12)), ("weight_grad", (2, 24, 8))]
    assert sorted(calls[2:]) == sorted(backward)


def test_gradients_computed_alone_match_joint_gradients():
    tensors, plan = inputs(9, 17, 5, 3)
    grad = randn(*tensors[0].shape, seed=5)
    _, *together = run(expert_mlp, tensors, plan, grad)
    for index, (name, expected) in enumerate(zip(NAMES, together, strict=True)):
        leaves = [x.detach().requires_grad_(i == index) for i, x in enumerate(tensors)]
        y = expert_mlp(*leaves[:2], plan, *leaves[2:])
        assert torch.equal(torch.autograd.grad(y, leaves[index], grad)[0], expected), name


def test_unneeded_gradients_and_pre_activations_are_not_computed(monkeypatch):
    """Frozen experts need no weight gradient GEMM. Without grad, the pre-activation is not stored."""
    tensors, plan = inputs(9, 17, 5, 3)
    grad = randn(*tensors[0].shape, seed=5)
    y, dx, *_ = run(expert_mlp, tensors, plan, grad)
    calls = []
    plain = module.grouped_weight_grad
    monkeypatch.setattr(module, "grouped_weight_grad", lambda *arguments: calls.append(1) or plain(*arguments))
    x = tensors[0].detach().requires_grad_()
    frozen = expert_mlp(x, tensors[1], plan, *tensors[2:])
    frozen.backward(grad)
    assert torch.equal(frozen, y)
    assert torch.equal(x.grad, dx)
    assert not calls
    pre_activations = []
    up = module.expert_up

    def recorded(*arguments):
        h, act = up(*arguments)
        pre_activations.append(h)
        return h, act

    monkeypatch.setattr(module, "expert_up", recorded)
    with torch.no_grad():
        assert torch.equal(expert_mlp(*tensors[:2], plan, *tensors[2:]), y)
    assert pre_activations[0].numel() == 0


def test_backward_accepts_an_expanded_gradient():
    tensors, plan = inputs(9, 17, 5, 3)
    leaves = [x.detach().requires_grad_() for x in tensors]
    expert_mlp(*leaves[:2], plan, *leaves[2:]).sum().backward()  # the gradient of a sum has strides of 0
    _, *expected = run(expert_mlp, tensors, plan, torch.ones_like(tensors[0]))
    assert_equal([leaf.grad for leaf in leaves], expected)


def test_zero_tokens_are_accepted():
    ids = torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)
    tensors, _ = inputs(5, 16, 8, 3)
    tensors = [x[:0] if i < 2 else x for i, x in enumerate(tensors)]
    y, *grads = run(expert_mlp, tensors, dispatch_plan(ids, 3), tensors[0])
    assert y.shape == (0, 16)
    assert [grad.shape for grad in grads] == [x.shape for x in tensors]
    assert not grads[2].any()
    assert not grads[3].any()


def test_results_are_deterministic_with_and_without_grad():
    # On a GPU, the shape is large enough that programs can finish in different orders.
    case = CASES["tiny, full size"] if DEVICE == "cuda" else (20, 32, 40, 5, None, 4)
    tensors, plan = inputs(*case, dtype=torch.float16)
    first = run(expert_mlp, tensors, plan, tensors[0])
    assert_equal(run(expert_mlp, tensors, plan, tensors[0]), first)
    with torch.no_grad():
        assert torch.equal(expert_mlp(*tensors[:2], plan, *tensors[2:]), first[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_output_of_a_token_does_not_depend_on_the_batch(dtype):
    """The other rows of its tile and its position in the tile do not matter, because sums run over the inner width."""
    (x, scores, w13, w2), plan = inputs(*CASES["tiny"], dtype=dtype)
    full = expert_mlp(x, scores, plan, w13, w2)
    ids = torch.searchsorted(plan.offsets[1:], plan.scatter_idx_TK, right=True).to(torch.int32)
    some = slice(17, 40)
    part = expert_mlp(x[some], scores[some], dispatch_plan(ids[some].contiguous(), 4), w13, w2)
    assert torch.equal(part, full[some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scores_of_zero_do_not_change_the_results_of_top_2(dtype):
    """Output and gradients for K = 5 with three scores of zero are bitwise equal to those for K = 2."""
    (x, scores, *weights), _ = inputs(20, 33, 17, 6, top_k=5, dtype=dtype)
    ids = torch.stack([randn(6, seed=t).argsort()[:5] for t in range(20)]).to(torch.int32)
    scores[:, 2:] = 0
    results = []
    for top_k in (2, 5):
        plan = dispatch_plan(ids[:, :top_k].contiguous(), 6)
        results.append(run(expert_mlp, [x, scores[:, :top_k].contiguous(), *weights], plan, x))
    (y, dx, dscores, *_), (padded_y, padded_dx, padded_dscores, *_) = results
    assert_equal([padded_y, padded_dx, padded_dscores[:, :2]], [y, dx, dscores])
    assert padded_dscores.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_does_not_reach_other_tokens_or_experts(dtype):
    tensors, plan = inputs(12, 32, 32, 4, dtype=dtype)
    grad = randn(12, 32, seed=5)
    good = run(expert_mlp, tensors, plan, grad)
    x = tensors[0].clone()
    x[7] = torch.nan
    bad = run(expert_mlp, [x, *tensors[1:]], plan, grad)
    others = torch.arange(12, device=DEVICE) != 7
    for name, ours, expected in zip(("y", "x", "topk_scores"), bad, good, strict=False):
        assert torch.equal(ours[others], expected[others]), name
        assert ours[7].isnan().all(), name
    nan_experts = torch.searchsorted(plan.offsets[1:], plan.scatter_idx_TK[7], right=True).tolist()
    for ours, expected in zip(bad[3:5], good[3:5], strict=True):
        for expert in range(4):
            assert ours[expert].isnan().any() if expert in nan_experts else torch.equal(ours[expert], expected[expert])


def test_backward_saves_only_x_the_pre_activation_and_the_plan():
    """A token takes 2 D + 8 F bytes in 16 bits plus 24 for scores and plan (SonicMoE's "minimal activation memory")."""
    T, D, width, E = 43, 40, 48, 8  # no other test uses these shapes
    (x, _, w13, w2), _ = inputs(T, D, width, E, dtype=torch.float16)
    leaves = [t.detach().requires_grad_() for t in (x, randn(T, E, seed=1), w13, w2)]
    x, logits, w13, w2 = leaves
    with saved_tensors() as saved:
        routing = route_topk(logits)
        plan = dispatch_plan(routing.topk_ids_TK, E)
        y = expert_mlp(x, routing.topk_scores_TK, plan, w13, w2)
    # Nothing else is saved: no live tensor has the shape of the activation or of the expert-sorted rows.
    alive = {t.shape for t in gc.get_objects() if type(t) is torch.Tensor}
    assert y.requires_grad
    assert (2 * T, 2 * width) in alive
    assert not alive & {(2 * T, width), (2 * T, D)}
    known = {t.data_ptr() for t in (logits, w13, w2, *routing, *plan)}
    rest = {pointer: t for pointer, t in saved.items() if pointer not in known}
    assert rest.pop(x.data_ptr()).shape == (T, D)
    assert [t.shape for t in rest.values()] == [(2 * T, 2 * width)]
    total = sum(t.untyped_storage().nbytes() for t in (x, *rest.values()))
    assert 0.98 * T * (2 * D + 8 * width) <= total <= 1.02 * T * (2 * D + 8 * width)
    small = [t for t in (routing.topk_scores_TK, *plan) if t.data_ptr() in saved]
    assert sum(t.untyped_storage().nbytes() for t in small) == 24 * T + 4 * (E + 1)


@pytest.mark.parametrize("top_k", [2, 3])
def test_custom_ops_pass_opcheck(top_k):
    ops = torch.ops.acceleron_triton
    (x, scores, w13, w2), (gather_idx, scatter_idx_TK, offsets) = inputs(3, 8, 12, 3, top_k=top_k)
    dy, dy_rows = randn(3, 8, seed=5), randn(3 * top_k, 8, seed=6)
    h, act = module.expert_up(x, w13, gather_idx, offsets, True)
    for with_h in (True, False):
        opcheck(ops.expert_up.default, (x, w13, gather_idx, offsets, with_h))
    for added in ((dy, x), (None, None)):
        opcheck(ops.expert_down.default, (act, w2, scores, scatter_idx_TK, offsets, *added))
    opcheck(ops.hidden_grad.default, (dy_rows, w2, h, scores, gather_idx, offsets))
    for added in ((dy, randn(3, 3), randn(3, 8)), (None, None, None)):
        opcheck(ops.token_grad.default, (dy_rows, scatter_idx_TK, *added))


@pytest.mark.parametrize("top_k", [2, 4])
def test_compiles_without_graph_breaks(top_k):
    tensors, plan = inputs(9, 17, 5, 4, top_k=top_k)
    grad = randn(9, 17, seed=5)
    compiled = torch.compile(expert_mlp, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, tensors, plan, grad), run(expert_mlp, tensors, plan, grad))
