"""The grouped GEMMs. Their error against float64 may be FACTOR times that of the reference in the same dtype."""

import json

import pytest
import torch
from compare import DEVICE, DTYPES, FACTOR, error, randn

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.kernels import configs, formulas, launch, torch_ops
from acceleron.kernels import grouped_gemm as module
from acceleron.kernels.configs import Config
from acceleron.kernels.torch_ops import dispatch_plan

grouped_gemm = module.grouped_gemm
NAMES = ("y", "x", "w")


def floor(length: int) -> float:
    """The relative error of a sum of `length` fp32 products, added one after another, where torch's order is better.

    A partial sum of i unit products is sqrt(i) and each rounding's error eps / sqrt(12) of it: sqrt(length / 24) eps.
    """
    return max(4, (length / 24) ** 0.5) * torch.finfo(torch.float32).eps


def make_plan(T, E, used=None):
    """Of random experts among those in use; a token may have one expert twice, which the plan doesn't mind."""
    pool = torch.tensor(used or range(E))
    picks = torch.randint(len(pool), (T, 2), generator=torch.Generator().manual_seed(1))
    return dispatch_plan(pool[picks].to(DEVICE, torch.int32), E)


def inputs(T, D, width, E, used, dtype):
    # Weights of scale 1 / sqrt(fan-in) keep every tensor at unit scale.
    x, w = randn(2 * T, D, dtype=dtype), (randn(E, width, D, seed=2) / D**0.5).to(dtype)
    return x, w, make_plan(T, E, used), randn(2 * T, width, seed=3, dtype=dtype)


def run(function, x, w, plan, grad):
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    y = function(*leaves, plan)
    return y, *torch.autograd.grad(y, leaves, grad)


def check_errors(x, w, plan, grad):
    truths = run(formulas.grouped_gemm, x.double(), w.double(), plan, grad.double())
    plains, results = (run(function, x, w, plan, grad) for function in (torch_ops.grouped_gemm, grouped_gemm))
    for name, ours, plain, truth in zip(NAMES, results, plains, truths, strict=True):
        assert (ours.dtype, ours.shape, ours.is_contiguous()) == (x.dtype, truth.shape, True)
        assert error(ours, truth) <= FACTOR[x.dtype] * error(plain, truth) + floor(max(*x.shape, *w.shape)), name
    return results


# T, D, F, E and which experts get rows; the interpreter's blocks are 32 x 32 x 32, and its programs three.
CASES = {
    "several tiles": (50, 64, 96, 3, None),  # of rows, columns and inner width; whole ones but for the rows
    "partial tiles": (37, 40, 72, 3, None),  # rows of 16 bytes, but no whole number of inner blocks
    "odd widths": (50, 33, 17, 5, None),
    "one token": (1, 64, 32, 4, None),  # more experts than rows
    "empty experts": (40, 32, 64, 9, (1, 4, 5, 7)),  # the first, the last, some between
    "hot expert": (48, 32, 32, 4, (2,)),  # with exactly three blocks of rows
    "last expert": (20, 32, 32, 4, (3,)),
    "two experts": (33, 32, 40, 2, None),
    "many experts": (20, 8, 16, 64, None),
    "narrow": (20, 1, 2, 3, None),
}
if DEVICE == "cuda":
    for size in PRESETS:
        config = ModelConfig.preset(size)
        CASES[size] = (8192, config.d_model, 2 * config.d_ff, config.num_experts, None)

    RUNS = [(case, dtype) for case in CASES for dtype in DTYPES]
else:  # all in fp16, which takes bf16's path, and some in fp32: the interpreter is slow
    RUNS = [(case, torch.float16) for case in CASES]
    RUNS += [(case, torch.float32) for case in ("several tiles", "partial tiles", "odd widths", "empty experts")]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_output_and_gradients(case, dtype):
    _, _, _, E, used = CASES[case]
    _, _, grad_w = check_errors(*inputs(*CASES[case], dtype))
    for expert in set(range(E)) - set(used or range(E)):
        assert not grad_w[expert].any()  # exactly 0, though memory is poisoned


def test_bfloat16():
    check_errors(*inputs(*CASES["two experts"], torch.bfloat16))


def test_the_cases_take_both_paths(monkeypatch):
    """Tensor descriptors for 16-bit rows of 16 bytes and whole inner blocks, pointers for the rest."""
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
    # The weight's gradient sums over rows, of which a descriptor reads zeros past the end.
    assert paths(40, 72, torch.float16) == [False, False, descriptors]


@pytest.mark.parametrize("op", configs.OPS)
def test_what_tma_cannot_load_gets_a_small_tile(op):
    """The large tile spills without TMA."""
    x, sizes = torch.zeros(8, 64, dtype=torch.float16), (4, 512, 512, 1)

    def choose(x, inner=64, arch="sm_90"):
        return configs.choose(op, launch.Device("", arch, 132), sizes, inner, torch.zeros_like(x).contiguous(), x)

    config, tma = choose(x)
    assert tma
    assert config.block_m == 128
    odd_address = x.flatten()[1:449].view(7, 64)
    for without in (choose(x, inner=80), choose(x[:, :60].contiguous()), choose(odd_address)):
        assert without[0].block_m == 64
        assert not without[1]
    assert not choose(x.float())[1]
    for arch in ("sm_80", "sm_86", "gfx942"):
        assert not choose(x, arch=arch)[1]


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float16, Config(16, 64, 32, 4, 1, flatten=True, split=1)),  # one loop over tiles and inner width
        (torch.float32, Config(64, 32, 16, 4, 1, flatten=True, split=1)),
        (torch.float16, Config(64, 16, 16, 4, 1, split=3)),  # shares of which some have no rows
        (torch.float16, Config(32, 64, 64, 4, 2, programs=2, flatten=True, split=2)),
        (torch.float32, Config(32, 32, 32, 4, 1, programs=100, split=4)),  # a program for every tile
    ],
    ids=str,
)
def test_other_configurations(config, dtype, monkeypatch):
    monkeypatch.setattr(configs, "find_config", lambda *args: config)
    check_errors(*inputs(40, 64, 96, 5, (0, 2, 4), dtype))


def test_rows_of_an_expert_in_no_multiple_of_the_split(monkeypatch):
    """1, 31, 32, 33, 64, 65 and 97 rows: shares of whole blocks, the last one short or empty."""
    counts = [1, 31, 32, 33, 64, 65, 96]
    experts = torch.arange(7).repeat_interleave(torch.tensor(counts)).to(DEVICE, torch.int32).view(-1, 2)
    plan = dispatch_plan(experts, 7)
    x, w, grad = randn(sum(counts), 16), randn(7, 24, 16, seed=2) / 4, randn(sum(counts), 24, seed=3)
    for split in (1, 2, 3):
        monkeypatch.setattr(configs, "find_config", lambda *args, split=split: Config(32, 32, 32, 4, 1, split=split))
        truths = run(formulas.grouped_gemm, x.double(), w.double(), plan, grad.double())
        for ours, truth in zip(run(grouped_gemm, x, w, plan, grad), truths, strict=True):
            for expert in range(7):  # each expert alone, so that a small one's error is not lost among the large
                rows = slice(*plan.offsets[expert : expert + 2].tolist())
                part = expert if ours.dim() == 3 else rows
                assert error(ours[part], truth[part]) <= floor(96), (split, expert)


@pytest.mark.parametrize("width", [1, 40, 257, 1024])
def test_gathered_rows_are_those_of_each_assignments_token(width):
    plan = make_plan(50, 5, (0, 2, 4))
    x = randn(50, width, dtype=torch.float16)
    rows = module.gather_rows(x, plan.gather_idx)
    assert torch.equal(rows[plan.scatter_idx_TK.long()], x[:, None].expand(-1, 2, -1))


def test_shares_are_summed_in_fp32(monkeypatch):
    """All but exactly the rounded truth, from which shares rounded to 16 bits are 1.4 times as far."""
    monkeypatch.setattr(configs, "find_config", lambda *args: Config(32, 32, 16, 4, 1, split=4))
    _, _, plan, grad = inputs(64, 1, 40, 2, None, torch.float16)
    x = randn(128, 40, dtype=torch.float16)
    truth = torch_ops._grouped_weight_grad(grad.double(), x.double(), plan.offsets)
    ours = module.grouped_weight_grad(grad, x, plan.offsets, None, x.dtype)
    assert error(ours, truth) <= 1.1 * error(truth.half(), truth)


# TMA's ragged descriptors and the pointers' masks are two ways to stop at an expert's end; at an odd width, a load past
# a row's end would meet the next row's NaN.
@pytest.mark.parametrize(("case", "dtype"), [("several tiles", torch.float16), ("odd widths", torch.float32)], ids=str)
def test_nan_stays_with_its_expert(case, dtype):
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


def test_expanded_gradient():
    x, w, plan, _ = inputs(*CASES["odd widths"], torch.float32)
    leaf = x.clone().requires_grad_()
    grouped_gemm(leaf, w, plan).sum().backward()  # its gradient has strides of 0
    y_like = torch.ones(len(x), w.shape[1], device=DEVICE)
    assert torch.equal(leaf.grad, run(grouped_gemm, x, w, plan, y_like)[1])


def test_no_rows():
    y, grad_x, grad_w = run(grouped_gemm, *inputs(0, 16, 24, 3, None, torch.float32))
    assert (y.shape, grad_x.shape, grad_w.shape) == ((0, 24), (0, 16), (3, 24, 16))
    assert not grad_w.any()


def test_same_bits_every_time():
    # Where programs run at once, of a size at which the order of their ends can differ.
    arguments = inputs(*(CASES["tiny"] if DEVICE == "cuda" else (20, 32, 40, 2, None)), torch.float16)
    first, second = (run(grouped_gemm, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x_ND", lambda x: x.double(), "expected bfloat16 or float16 or float32, but got float64"),
        ("x_ND", lambda x: x[None], "expected shape"),
        ("x_ND", lambda x: x[:-1], r"expected shape \(100, any\), but got \(99, 33\)"),  # not the plan's rows
        ("x_ND", lambda x: x.t().contiguous().t(), r"call .contiguous\(\)"),
        ("w_EFD", lambda w: w.half(), "expected float32, but got float16"),
        ("w_EFD", lambda w: w[..., 1:].contiguous(), "expected shape"),
        ("w_EFD", lambda w: w[0], "expected shape"),
        ("w_EFD", lambda w: w.transpose(1, 2).contiguous().transpose(1, 2), r"call .contiguous\(\)"),
        ("w_EFD", lambda w: w.to("meta"), "expected a tensor on"),
        ("plan", lambda plan: plan._replace(gather_idx=plan.gather_idx.long()), "expected int32, but got int64"),
        ("plan", lambda plan: plan._replace(offsets=plan.offsets[1:]), "expected shape"),
        ("plan", lambda plan: plan._replace(scatter_idx_TK=plan.scatter_idx_TK[:-1]), "expected shape"),
    ],
)
def test_refusals_name_the_argument(name, change, message):
    arguments = dict(zip(("x_ND", "w_EFD", "plan"), inputs(*CASES["odd widths"], torch.float32), strict=False))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=rf"grouped_gemm: {name}.*{message}"):
        grouped_gemm(**arguments)


def test_custom_ops_pass_opcheck():
    torch.use_deterministic_algorithms(False)  # opcheck compares runs on memory it does not own
    ops = torch.ops.acceleron_triton
    x, w, plan, grad = inputs(3, 8, 12, 2, None, torch.float32)
    torch.library.opcheck(ops.grouped_rows.default, (x, w, plan.offsets, True))
    torch.library.opcheck(ops.grouped_rows.default, (grad, w, plan.offsets, False))
    for b, gather_idx in ((x, None), (x[:3], plan.gather_idx)):
        torch.library.opcheck(ops.grouped_weight_grad.default, (grad, b, plan.offsets, gather_idx, x.dtype))
    torch.library.opcheck(ops.gather_rows.default, (x[:3], plan.gather_idx))


def test_compiles_without_a_graph_break():
    arguments = inputs(*CASES["odd widths"], torch.float32)
    compiled = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, *arguments), run(grouped_gemm, *arguments), strict=True):
        assert torch.equal(ours, eager)


# --- configurations ---

H100 = launch.Device("NVIDIA H100 80GB HBM3", "sm_90", 132)
ENTRY = dict(
    arch="sm_90",
    device="any",
    op="rows",
    dtype="bfloat16",
    sizes=[4, 512, 704, 1],
    **Config(64, 64, 64, 4, 2)._asdict(),
)


@pytest.fixture
def write_table(tmp_path, monkeypatch):
    def clear():
        configs.table.cache_clear()
        configs.find_config.cache_clear()

    def write(*lines):
        monkeypatch.setenv("ACCELERON_TUNED", str(tmp_path / "tuned.jsonl"))
        (tmp_path / "tuned.jsonl").write_text("".join(f"{line}\n" for line in lines))
        clear()

    yield write
    clear()


def find(device=H100, dtype=torch.bfloat16, sizes=(4, 512, 704, 1), tma=True):
    return configs.find_config("rows", device, dtype, sizes, tma)


def test_the_devices_name_goes_before_its_architecture_before_the_rule(write_table):
    named = ENTRY | dict(device=H100.name, block_m=16)
    write_table(*map(json.dumps, (ENTRY | dict(block_m=32), named, ENTRY | dict(arch="sm_80", op="up"))))
    assert find() == Config(16, 64, 64, 4, 2)
    assert find(H100._replace(name="NVIDIA H200")) == Config(32, 64, 64, 4, 2)
    ampere = launch.Device("NVIDIA A100", "sm_80", 108)
    for other in (dict(device=ampere), dict(dtype=torch.float16), dict(sizes=(4, 512, 704, 0)), dict(tma=False)):
        arguments = dict(device=H100, dtype=torch.bfloat16, sizes=(4, 512, 704, 1), tma=True) | other
        assert find(**arguments) == configs.rule("rows", **arguments)


def test_an_empty_table_leaves_the_rule(write_table):
    write_table()
    assert find() == configs.rule("rows", H100, torch.bfloat16, (4, 512, 704, 1), True)


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", "3", '{"arch": "sm_90"}', ""),
        *(
            json.dumps(ENTRY | change)
            for change in (
                dict(sizes=3),
                dict(block_m="128"),
                dict(block_n=100),
                dict(split=0),
                dict(flatten=1),
            )
        ),
    ],
    ids=("broken", "list", "number", "short", "blank", "sizes", "text", "100", "0", "1"),
)
def test_a_broken_line_is_named(line, write_table):
    write_table(json.dumps(ENTRY), line)
    with pytest.raises(ValueError, match=r"tuned\.jsonl, line 2: .*remove the line"):
        find()


def test_a_missing_table_is_named(write_table, monkeypatch):
    write_table()
    monkeypatch.setenv("ACCELERON_TUNED", "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"ACCELERON_TUNED=nowhere\.jsonl: No such file"):
        find()


def test_an_unknown_op_without_tma_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERON_NO_TMA", "rows,down")
    with pytest.raises(ValueError, match="ACCELERON_NO_TMA=rows,down: expected names among up, "):
        run(grouped_gemm, *inputs(3, 64, 96, 2, None, torch.float16))


def assert_is_a_tile(config):
    for name in ("block_m", "block_n", "block_k", "warps"):
        value = getattr(config, name)
        assert value > 0, name
        assert value & (value - 1) == 0, name
    assert min(config.block_m, config.block_n, config.block_k) >= 16  # tl.dot's least
    assert config.stages >= 1
    assert config.programs >= 1
    assert config.split >= 1
    assert type(config.flatten) is bool


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rules_give_powers_of_two(arch, dtype):
    device = launch.Device("", arch, 108)
    for E, D, F in [(p.num_experts, p.d_model, p.d_ff) for p in PRESETS.values()] + [(2, 33, 17), (256, 8, 64)]:
        sizes = {"up": [(E, D, F)], "rows": [(E, F, D, 1), (E, D, F, 0), (E, 2 * F, D, 0)]}
        sizes["weight_grad"] = [(E, 2 * F, D), (E, D, F)]
        assert set(sizes) == set(configs.OPS)
        for op in configs.OPS:
            for size in sizes[op]:
                assert_is_a_tile(configs.rule(op, device, dtype, size, True))
                assert_is_a_tile(configs.rule(op, device, dtype, size, False))
