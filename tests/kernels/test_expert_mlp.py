"""The experts' kernels. Their error against float64 may be FACTOR times that of the reference in the same dtype."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import DEVICE, DTYPES, FACTOR, error, randn

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.kernels import configs, formulas, torch_ops
from acceleron.kernels import expert_mlp as module
from acceleron.kernels import grouped_gemm as gemms
from acceleron.kernels.configs import Config
from acceleron.kernels.dispatch import dispatch_plan
from acceleron.kernels.routing import route_top2

expert_mlp = module.expert_mlp
ROOT = Path(__file__).parents[2]
NAMES = ("x", "weights", "w13", "w2")


def floor(length: int) -> float:
    """The relative error of a sum of `length` fp32 products, added one after another, where torch's order is better.

    A partial sum of i unit products is sqrt(i) and each rounding's error eps / sqrt(12) of it: sqrt(length / 24) eps.
    """
    return max(4, (length / 24) ** 0.5) * torch.finfo(torch.float32).eps


def inputs(T, D, width, E, used=None, dtype=torch.float32):
    """The op's arguments, routed by the logits of a random router, of which some experts may be out of use."""
    logits = randn(T, E, seed=1)
    if used:
        logits[:, [e for e in range(E) if e not in used]] -= 100
    routing = route_top2(logits)
    # Weights of scale 1 / sqrt(fan-in) keep every tensor at unit scale.
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
    dtypes = [x.dtype, *(t.dtype for t in tensors)]
    allowed = floor(max(*x.shape, *tensors[2].shape))
    for name, dtype, ours, plain, truth in zip(("y", *NAMES), dtypes, results, plains, truths, strict=True):
        assert (ours.dtype, ours.shape) == (dtype, truth.shape)
        # Of a few values the reference's may be right by luck: then half a rounding of what they are computed from.
        few = torch.finfo(x.dtype).eps / 2 if ours.numel() < 10 else 0
        assert error(ours, truth) <= FACTOR[x.dtype] * error(plain, truth) + allowed + few, name
    return results


# T, D, F, E and which experts are in use; the interpreter's blocks are 32 x 32 x 32, and its programs three. First each
# model's experts and about its ratio of D to F; only tiny's have two tiles of rows each.
SIZES = {
    "nano": (20, 64, 64, 8, None),
    "tiny": (60, 16, 44, 4, None),
    "small": (20, 24, 28, 8, None),
    "medium": (20, 32, 52, 8, None),
    "large": (20, 24, 30, 8, None),
}
CASES = SIZES | {
    "one token": (1, 32, 64, 4, None),
    "empty experts": (37, 32, 40, 6, (1, 3, 4)),  # the first and the last among them
    "hot experts": (40, 64, 32, 5, (4, 2)),  # all tokens on the same two, whose rows are two tiles each
    "two experts": (33, 32, 32, 2, None),
    "many experts": (16, 8, 8, 64, None),
    "odd widths": (33, 33, 17, 5, None),  # pointers instead of descriptors, and partial tiles of everything
    "wide rows": (9, 264, 8, 3, None),  # two programs a token in the kernels that sum its two rows
}
if DEVICE == "cuda":
    for size in PRESETS:
        config = ModelConfig.preset(size)
        CASES[f"{size} itself"] = (8192, config.d_model, config.d_ff, config.num_experts, None)
    RUNS = [(case, dtype) for case in CASES for dtype in DTYPES]
else:  # in fp16, which takes bf16's path, and some in fp32, as the interpreter is slow; more sizes in test_moe_layer.py
    RUNS = [(case, torch.float16) for case in CASES if case not in ("nano", "small", "medium")]
    RUNS += [(case, torch.float32) for case in ("one token", "empty experts", "hot experts", "odd widths")]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_output_and_every_gradient(case, dtype):
    _, _, _, E, used = CASES[case]
    _, _, _, grad_w13, grad_w2 = check_errors(*inputs(*CASES[case], dtype=dtype))
    for expert in set(range(E)) - set(used or range(E)):
        assert not grad_w13[expert].any()  # exactly 0, though memory is poisoned
        assert not grad_w2[expert].any()


def test_fp32_weights_get_fp32_gradients():
    """As the model has them: cast for the GEMMs, and their gradients never rounded to 16 bits."""
    (x, weights, w13, w2), plan = inputs(*CASES["odd widths"], dtype=torch.float16)
    grad = randn(*x.shape, seed=5, dtype=x.dtype)
    narrow = run(expert_mlp, (x, weights, w13, w2), plan, grad)
    wide = run(expert_mlp, (x, weights, w13.float(), w2.float()), plan, grad)
    assert all(torch.equal(a, b) for a, b in zip(narrow[:3], wide[:3], strict=True))
    for a, b in zip(narrow[3:], wide[3:], strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(b.half(), a)
        assert not torch.equal(b.half().float(), b)


def test_bfloat16():
    """With a residual: of four roundings in a row, which the interpreter all cuts off, the errors have one sign."""
    tensors, plan = inputs(*CASES["two experts"], dtype=torch.bfloat16)
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
def test_other_configurations(config, dtype, monkeypatch):
    monkeypatch.setattr(configs, "find_config", lambda *args: config)
    check_errors(*inputs(30, 48, 72, 2, dtype=dtype))


def test_the_cases_take_both_paths(monkeypatch):
    """Tensor descriptors for 16-bit rows of 16 bytes and whole inner blocks, pointers for the rest."""
    used = []
    for user in (module, gemms):
        monkeypatch.setattr(user, "choose", lambda *args: used.append(configs.choose(*args)) or used[-1])

    def paths(D, width, dtype):
        used.clear()
        tensors, plan = inputs(3, D, width, 2, dtype=dtype)
        run(expert_mlp, tensors, plan, tensors[0])
        return [tma for _, tma in used]

    descriptors = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    # Up, down; w2.T dy, dW2, dW13, dX's rows.
    assert paths(64, 32, torch.float16) == [descriptors] * 6
    assert paths(64, 32, torch.float32) == [False] * 6
    assert paths(33, 17, torch.float16) == [False] * 6


@pytest.mark.parametrize("names", ["up", "rows", "weight_grad", "rows, up", "all"])
def test_results_without_tma_are_those_with_it(names, monkeypatch):
    tensors, plan = inputs(50, 64, 96, 3, dtype=torch.float16)
    expected, used = run(expert_mlp, tensors, plan, tensors[0]), {}

    def recorded(op, *args):
        config, used[op] = configs.choose(op, *args)
        return config, used[op]

    for user in (module, gemms):
        monkeypatch.setattr(user, "choose", recorded)
    monkeypatch.setenv("ACCELERON_NO_TMA", names)
    for without, with_tma in zip(run(expert_mlp, tensors, plan, tensors[0]), expected, strict=True):
        assert with_tma.any()
        assert torch.equal(without, with_tma)
    if DEVICE == "cpu":
        assert used == {op: names != "all" and op not in names for op in configs.OPS}


def test_configurations_are_looked_up_by_the_documented_sizes(monkeypatch):
    """Those of the table in configs.py."""
    calls = []

    def recorded(op, device, dtype, sizes, tma):
        calls.append((op, sizes))
        return Config(32, 32, 32, 4, 1)

    monkeypatch.setattr(configs, "find_config", recorded)
    tensors, plan = inputs(3, 8, 12, 2)
    run(expert_mlp, tensors, plan, tensors[0])
    forward = [("up", (2, 8, 12)), ("rows", (2, 12, 8, 1))]
    assert calls[:2] == forward
    backward = [("rows", (2, 8, 12, 0)), ("rows", (2, 24, 8, 0))]
    backward += [("weight_grad", (2, 8, 12)), ("weight_grad", (2, 24, 8))]
    assert sorted(calls[2:]) == sorted(backward)


GUARDED = """
import ctypes, mmap
import torch

def guarded(x):
    # The tensor's last byte is the last that may be read: a page without permissions follows.
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    pages = -(-size // page) + 1
    memory = mmap.mmap(-1, pages * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + (pages - 1) * page), page, 0) == 0  # PROT_NONE
    view = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=(pages - 1) * page - size).view(x.shape)
    view.copy_(x)
    return view

from acceleron.kernels import dispatch, expert_mlp as mlp, grouped_gemm as gemms, routing
for D, F, dtype in ((33, 17, torch.float32), (64, 32, torch.float32), (64, 32, torch.float16)):
    E, T = 3, 5
    logits = guarded(torch.randn(T, E))
    weights, experts, _, _, counts = map(guarded, routing.route(logits))
    routing.route_backward(logits, experts, counts, guarded(torch.randn(T, 2)), torch.ones(()), torch.ones(()))
    gather_idx, scatter_idx, offsets = map(guarded, dispatch.build_plan(experts, E))
    x, dy, shared = (guarded(torch.randn(T, D).to(dtype)) for _ in range(3))
    w13, w2 = guarded(torch.randn(E, 2 * F, D).to(dtype)), guarded(torch.randn(E, D, F).to(dtype))
    dy_rows = guarded(gemms.gather_rows(dy, gather_idx))
    h, act = map(guarded, mlp.expert_up(x, w13, gather_idx, offsets, True))
    mlp.expert_down(act, w2, weights, scatter_idx, offsets, shared, dy)
    dh, act, dots = map(guarded, mlp.hidden_grad(dy_rows, w2, h, weights, gather_idx, offsets))
    rows = guarded(gemms.grouped_rows(dh, w13, offsets, False))
    mlp.token_grad(rows, scatter_idx, shared, logits, guarded(torch.randn(E, D)))
    gemms.grouped_weight_grad(dy_rows, act, offsets, None, dtype)
    gemms.grouped_weight_grad(dh, x, offsets, gather_idx, dtype)
print("done")
"""


@pytest.mark.skipif(DEVICE == "cuda" or sys.platform != "linux", reason="guard pages are a Linux CPU's")
def test_nothing_is_read_past_an_arguments_end():
    """A mask that lacks shows in no result, as what it lets in is never stored; on a GPU it may be a fault."""
    process = subprocess.run([sys.executable, "-c", GUARDED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (0, "done\n"), process.stderr[-2000:]


def test_each_gradient_alone():
    """As each is asked for alone, the others' absence changes no bit."""
    tensors, plan = inputs(9, 17, 5, 3)
    grad = randn(*tensors[0].shape, seed=5)
    _, *together = run(expert_mlp, tensors, plan, grad)
    for index, (name, expected) in enumerate(zip(NAMES, together, strict=True)):
        leaves = [x.detach().requires_grad_(i == index) for i, x in enumerate(tensors)]
        y = expert_mlp(*leaves[:2], plan, *leaves[2:])
        assert torch.equal(torch.autograd.grad(y, leaves[index], grad)[0], expected), name


def test_nothing_is_computed_for_backward_that_it_does_not_need(monkeypatch):
    """Frozen experts cost no GEMM, an evaluation no pre-activation; and what remains is the same."""
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
    heights = []
    up = module.expert_up
    monkeypatch.setattr(module, "expert_up", lambda *arguments: heights.append(up(*arguments)[0]) or up(*arguments))
    with torch.no_grad():
        assert torch.equal(expert_mlp(*tensors[:2], plan, *tensors[2:]), y)
    assert heights[0].numel() == 0


def test_expanded_gradient():
    tensors, plan = inputs(9, 17, 5, 3)
    leaves = [x.detach().requires_grad_() for x in tensors]
    expert_mlp(*leaves[:2], plan, *leaves[2:]).sum().backward()  # its gradient has strides of 0
    _, *expected = run(expert_mlp, tensors, plan, torch.ones_like(tensors[0]))
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected, strict=True))


def test_no_tokens():
    experts = torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)
    tensors, _ = inputs(5, 16, 8, 3)
    tensors = [x[:0] if i < 2 else x for i, x in enumerate(tensors)]
    y, *grads = run(expert_mlp, tensors, dispatch_plan(experts, 3), tensors[0])
    assert y.shape == (0, 16)
    assert [grad.shape for grad in grads] == [x.shape for x in tensors]
    assert not grads[2].any()
    assert not grads[3].any()


def test_same_bits_every_time_and_without_gradients():
    # Where programs run at once, of a size at which the order of their ends can differ.
    tensors, plan = inputs(*(CASES["tiny itself"] if DEVICE == "cuda" else (20, 32, 40, 2)), dtype=torch.float16)
    first, second = (run(expert_mlp, tensors, plan, tensors[0]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        assert torch.equal(expert_mlp(*tensors[:2], plan, *tensors[2:]), first[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_tokens_output_does_not_depend_on_its_batch(dtype):
    """Neither on who else is in its tile, nor on its row there: a row's sums run over the inner width alone."""
    (x, weights, w13, w2), plan = inputs(*CASES["tiny"], dtype=dtype)
    whole = expert_mlp(x, weights, plan, w13, w2)
    experts = torch.searchsorted(plan.offsets[1:], plan.scatter_idx_TK, right=True).to(torch.int32)
    some = slice(17, 40)
    part = expert_mlp(x[some], weights[some], dispatch_plan(experts[some].contiguous(), 4), w13, w2)
    assert torch.equal(part, whole[some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_stays_with_its_token_and_its_experts(dtype):
    tensors, plan = inputs(12, 32, 32, 4, dtype=dtype)
    grad = randn(12, 32, seed=5)
    good = run(expert_mlp, tensors, plan, grad)
    x = tensors[0].clone()
    x[7] = torch.nan
    bad = run(expert_mlp, [x, *tensors[1:]], plan, grad)
    others = torch.arange(12, device=DEVICE) != 7
    for name, ours, expected in zip(("y", "x", "weights"), bad, good, strict=False):
        assert torch.equal(ours[others], expected[others]), name
        assert ours[7].isnan().all(), name
    its = torch.searchsorted(plan.offsets[1:], plan.scatter_idx_TK[7], right=True).tolist()
    for ours, expected in zip(bad[3:5], good[3:5], strict=True):
        for expert in range(4):
            assert ours[expert].isnan().any() if expert in its else torch.equal(ours[expert], expected[expert])


def test_backward_keeps_x_the_pre_activation_and_the_plan_alone():
    """2 D + 8 F bytes a token in 16 bits, and 24 of weights and plan: see SonicMoE's "minimal activation memory"."""
    T, D, width, E = 43, 40, 48, 8  # shapes of no other test
    (x, _, w13, w2), _ = inputs(T, D, width, E, dtype=torch.float16)
    leaves = [t.detach().requires_grad_() for t in (x, randn(T, E, seed=1), w13, w2)]
    x, logits, w13, w2 = leaves
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        routing = route_top2(logits)
        plan = dispatch_plan(routing.topk_ids_TK, E)
        y = expert_mlp(x, routing.topk_scores_TK, plan, w13, w2)
    # By no other way either: of all that is alive with y, nothing has the activation's or the rows' shape.
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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x_TD", lambda x: x.double(), "expected bfloat16 or float16 or float32, but got float64"),
        ("x_TD", lambda x: x[None], "expected shape"),
        ("x_TD", lambda x: x.t().contiguous().t(), r"call .contiguous\(\)"),
        ("topk_scores_TK", lambda weights: weights.half(), "expected float32, but got float16"),
        ("topk_scores_TK", lambda weights: weights[1:], "expected shape"),
        ("topk_scores_TK", lambda weights: weights.t().contiguous().t(), r"call .contiguous\(\)"),
        ("w13_E2FD", lambda w13: w13.int(), "expected bfloat16 or .*, but got int32"),
        ("w13_E2FD", lambda w13: w13.double(), "expected bfloat16 or float16 or float32, but got float64"),
        ("w13_E2FD", lambda w13: w13[:, 1:].contiguous(), r"expected shape \(5, 34, 33\)"),  # not w2's F
        ("w13_E2FD", lambda w13: w13[1:], "expected shape"),  # not w2's E
        ("w2_EDF", lambda w2: w2[:, 1:].contiguous(), "expected shape"),
        ("w2_EDF", lambda w2: w2.transpose(1, 2).contiguous().transpose(1, 2), r"call .contiguous\(\)"),
        ("w2_EDF", lambda w2: w2.to("meta"), "expected a tensor on"),
        ("plan", lambda plan: dispatch_plan(torch.zeros(9, 2, dtype=torch.int32, device=DEVICE), 5), "expected shape"),
        ("plan", lambda plan: plan._replace(offsets=plan.offsets[1:]), r"expected shape \(6\)"),
        ("plan", lambda plan: plan._replace(gather_idx=plan.gather_idx.long()), "expected int32, but got int64"),
        ("plan", lambda plan: plan._replace(scatter_idx_TK=plan.scatter_idx_TK.flatten()), "expected shape"),
        ("x_TD", lambda x: x[:, :0], "a last axis that is not empty"),
    ],
)
def test_refusals_name_the_argument(name, change, message):
    tensors, plan = inputs(*CASES["odd widths"])
    names = ("x_TD", "topk_scores_TK", "w13_E2FD", "w2_EDF")
    arguments = dict(zip(names, tensors, strict=True)) | dict(plan=plan)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=rf"expert_mlp: {name}.*{message}"):
        expert_mlp(**arguments)


def test_custom_ops_pass_opcheck():
    torch.use_deterministic_algorithms(False)  # opcheck compares runs on memory it does not own
    ops = torch.ops.acceleron_triton
    (x, weights, w13, w2), (gather_idx, scatter_idx_TK, offsets) = inputs(3, 8, 12, 2)
    dy, dy_rows = randn(3, 8, seed=5), randn(6, 8, seed=6)
    h, act = module.expert_up(x, w13, gather_idx, offsets, True)
    for with_h in (True, False):
        torch.library.opcheck(ops.expert_up.default, (x, w13, gather_idx, offsets, with_h))
    for added in ((dy, x), (None, None)):
        torch.library.opcheck(ops.expert_down.default, (act, w2, weights, scatter_idx_TK, offsets, *added))
    torch.library.opcheck(ops.hidden_grad.default, (dy_rows, w2, h, weights, gather_idx, offsets))
    for added in ((dy, randn(3, 2), randn(2, 8)), (None, None, None)):
        torch.library.opcheck(ops.token_grad.default, (randn(6, 8), scatter_idx_TK, *added))


def test_compiles_without_a_graph_break():
    tensors, plan = inputs(9, 17, 5, 3)
    grad = randn(9, 17, seed=5)
    compiled = torch.compile(expert_mlp, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, tensors, plan, grad), run(expert_mlp, tensors, plan, grad), strict=True):
        assert torch.equal(ours, eager)
