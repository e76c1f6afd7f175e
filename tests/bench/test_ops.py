"""The op benchmarks at very small shapes: what is right is timed, what is wrong is not, and the counts are right."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from acceleron import ModelConfig, kernels
from acceleron.errors import InputError
from bench import op_cases, op_peers, ops, timing
from bench.op_cases import BOTH, FORWARD, OPS
from bench.op_peers import Provider
from bench.results import Results, complaint, read_results

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# grouped_mm wants widths of 16 bytes. Two sequences, and rows that no tile of the kernels divides.
CONFIG = ModelConfig(
    d_model=64, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=4, d_ff=40, d_ff_shared=24, vocab_size=128,
    max_seq_len=13,
)  # fmt: skip
TOKENS = 26
CEILINGS = (1e12, 1e11)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On shapes this small, threads that wait for one another on a busy machine take all the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case_of(op: str, dtype=torch.float32, config=CONFIG, tokens=TOKENS) -> op_cases.Case:
    return {case.op: case for case in op_cases.cases("small", config, tokens, dtype)}[op]


def wrong_gradient(case: op_cases.Case, index: int) -> Provider:
    """The reference, but for one input's gradient, which is 1 % too large."""

    def run(*inputs):
        x = inputs[index]
        off = 1.01 * x - (0.01 * x).detach()
        off.data.copy_(x.detach())
        return op_peers.plain(case.op)(*inputs[:index], off, *inputs[index + 1 :])

    return Provider("wrong", run)


def inputs_with_gradients(case: op_cases.Case) -> list[int]:
    inputs = case.make(ops.Draw(torch.float32, DEVICE))
    return [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_triton_the_reference_and_torch_pass_their_checks(op, dtype):
    case = case_of(op, dtype)
    named = [p for p in op_peers.providers(op, DEVICE) if p.name in ("triton", "reference", "torch", "acceleron")]
    assert len(named) == (2 if op == "attention" else 3)
    checks = ops.check_case(case, named, dtype, DEVICE)[2]
    for provider, checked in checks.items():
        assert "failed" not in checked, (provider.name, checked)
        assert complaint(checked) is None, (provider.name, checked)
        assert checked["check_allowed"] < 0.01
        assert op == "dispatch_plan" or checked["check_error"] > 0


@pytest.mark.parametrize("op", [op for op in OPS if op != "dispatch_plan"])
def test_a_gradient_that_is_one_percent_off_fails_the_check(op):
    case = case_of(op, torch.bfloat16)
    wrong = {wrong_gradient(case, index): case.inputs[index] for index in inputs_with_gradients(case)}
    checks = ops.check_case(case, list(wrong), torch.bfloat16, DEVICE)[2]
    assert checks
    for provider, checked in checks.items():
        assert checked["check_error"] == pytest.approx(0.01, rel=0.5)
        assert f"gradient of {wrong[provider]}" in checked["check"]
        assert complaint(checked)


def test_an_output_that_is_off_without_gradients_alone_fails_the_check():
    case = case_of("swiglu")
    run = op_peers.plain("swiglu")
    provider = Provider("wrong", lambda x: run(x) * (1 if torch.is_grad_enabled() else 1.01))
    checked = ops.check_case(case, [provider], torch.float32, DEVICE)[2][provider]
    assert complaint(checked)
    assert "y alone" in checked["check"]


def test_a_nan_a_wrong_plan_and_a_wrong_shape_fail():
    swiglu, plan = case_of("swiglu"), case_of("dispatch_plan")
    bad = {
        "nan": (swiglu, lambda x: op_peers.plain("swiglu")(x) * float("nan")),
        "zeros": (swiglu, lambda x: op_peers.plain("swiglu")(x) * 0),
        "shape": (swiglu, lambda x: op_peers.plain("swiglu")(x)[:1]),
        "plan": (plan, lambda e, n: [x.roll(1) for x in op_peers.plain("dispatch_plan")(e, n)]),
    }
    for name, (case, run) in bad.items():
        provider = Provider(name, run)
        checked = ops.check_case(case, [provider], torch.float32, DEVICE)[2][provider]
        assert "failed" in checked or complaint(checked), name


def test_a_wrong_provider_has_no_seconds_and_the_others_go_on(tmp_path):
    case = case_of("expert_mlp")

    def broken(*inputs):
        raise RuntimeError("no such luck\nat all")

    served = [wrong_gradient(case, 4), Provider("broken", broken), Provider("right", op_peers.plain("expert_mlp"))]
    results = Results(str(tmp_path), "ops", DEVICE)
    for row in ops.measure_case(case, served, torch.float32, DEVICE, 2, CEILINGS):
        results.write(row)
    rows = {(row["provider"], row["pass"]): row for row in read_results(results.path)}
    assert len(rows) == 6
    for step in (FORWARD, BOTH):
        assert "wrong" in rows["wrong", step]["failed"]
        assert rows["broken", step]["failed"] == "RuntimeError: no such luck"
        assert not any("seconds" in field for name in ("wrong", "broken") for field in rows[name, step])
        assert "failed" not in rows["right", step]
        assert 0 < rows["right", step]["seconds_p20"] <= rows["right", step]["seconds_p80"]
    assert rows["right", FORWARD]["seconds"] < rows["right", BOTH]["seconds"]


def test_a_provider_that_overwrites_its_inputs_gets_them_back():
    case = case_of("swiglu")
    seen = []

    def run(x):
        seen.append(x.detach().clone())
        y = op_peers.plain("swiglu")(x)
        x.data.zero_()
        return y

    provider = Provider("greedy", run, in_place=True)
    inputs = case.make(ops.Draw(torch.float32, DEVICE))
    output_grads = [torch.ones(TOKENS, CONFIG.d_ff_shared, device=DEVICE)]
    calls, restore = ops.bind(provider, inputs, output_grads)
    seen.clear()
    calls[FORWARD]()
    assert not seen[0].any()  # after the warm-up
    restore()
    calls[FORWARD]()
    assert torch.equal(seen[-1], inputs[0])
    assert inputs[0].abs().sum() > 0


def run_main(monkeypatch, tmp_path, *flags: str) -> list[dict]:
    monkeypatch.setattr(op_cases, "PRESETS", {"nano": CONFIG})
    monkeypatch.setattr(ModelConfig, "preset", classmethod(lambda cls, size: CONFIG))
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(
        "sys.argv",
        ["ops", "--size", "nano", "--tokens", str(TOKENS), "--dtype", "fp32", *flags, "--output", str(tmp_path)],
    )
    ops.main()
    (path,) = tmp_path.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_complete_and_an_absent_peer_is_listed_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels.launch, "INTERPRETED", False)
    flags = ["--op", "expert_mlp", "swiglu", "--provider", "reference", "sonic-moe", "torch", "--rounds", "3"]
    rows = run_main(monkeypatch, tmp_path, *flags)
    absent = [row for row in rows if "absent" in row]
    assert [(row["op"], row["provider"], row["absent"]) for row in absent] == [
        ("expert_mlp", "sonic-moe", "sonic-moe is not installed")
    ]
    measured = [row for row in rows if "absent" not in row]
    assert {(row["op"], row["pass"], row["provider"]) for row in measured} == {
        (op, step, name)
        for op in ("expert_mlp", "swiglu")
        for step in (FORWARD, BOTH)
        for name in ("reference", "torch")
    }
    for row in measured:
        assert row["shape"] == "nano"
        assert row["dtype"] == "float32"
        assert row["samples"] == 3
        assert row["seconds_p20"] <= row["seconds"] <= row["seconds_p80"]
        assert row["check_error"] <= row["check_allowed"]
        assert {"commit", "device", "versions", "date", "command"} <= row.keys()
        compute, memory = row["flops"] / CEILINGS[0], row["bytes"] / CEILINGS[1]
        assert row["bound"] == ("compute" if compute > memory else "memory")
        assert row["share_of_ceiling"] == pytest.approx(max(compute, memory) / row["seconds"])
        assert row["rate"] == pytest.approx(
            row["share_of_ceiling"] * row[f"ceiling_{'flops' if compute > memory else 'bytes'}"]
        )
    assert {row["op"]: row["sizes"] for row in measured}["expert_mlp"] == {"T": TOKENS, "D": 64, "E": 4, "F": 40}
    out = capsys.readouterr().out
    assert "absent: sonic-moe (expert_mlp)" in out


def test_check_only_writes_no_seconds_and_fails_for_a_wrong_kernel(monkeypatch, tmp_path):
    rows = run_main(monkeypatch, tmp_path / "right", "--check_only", "--op", "swiglu", "rms_norm")
    assert (tmp_path / "right" / "kernels.jsonl").exists()
    assert [(row["op"], row["provider"]) for row in rows] == [
        (op, name) for op in ("swiglu", "rms_norm") for name in ("triton", "reference")
    ]
    assert all(row["checked_only"] is True and "seconds" not in row and "failed" not in row for row in rows)
    right = kernels._triton["swiglu"]
    monkeypatch.setitem(kernels._triton, "swiglu", lambda x: right(x) * 1.01)
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, tmp_path / "wrong", "--check_only", "--op", "swiglu")
    assert stopped.value.code == 1
    first, second = read_results(tmp_path / "wrong" / "kernels.jsonl")
    assert first["provider"] == "triton"
    assert "wrong" in first["failed"]
    assert "failed" not in second


def test_interpreted_kernels_are_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels.launch, "INTERPRETED", True)
    with pytest.raises(InputError, match="check_only"):
        run_main(monkeypatch, tmp_path)


def expert_linears(x, weights, experts, w13, w2):
    """Each expert's SwiGLU MLP on its own tokens."""
    y = torch.zeros_like(x)
    for expert in range(len(w13)):
        tokens, choice = (experts == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[tokens], w13[expert]).chunk(2, dim=-1)
        y = y.index_add(0, tokens, F.linear(F.silu(gate) * up, w2[expert]) * weights[tokens, choice, None])
    return y


def expert_linear(x, w, plan):
    bounds = plan.offsets.tolist()
    return torch.cat([F.linear(x[a:b], w[e]) for e, (a, b) in enumerate(pairwise(bounds))])


COUNTED = {
    "router_logits": F.linear,
    "expert_mlp": expert_linears,
    "grouped_gemm": expert_linear,
    "linear_cross_entropy": lambda x, weight, labels: F.cross_entropy(F.linear(x, weight), labels),
    "attention": op_peers.matmul_attention,
}


@pytest.mark.parametrize("op", COUNTED)
def test_flops_are_those_that_torch_counts(op):
    case = case_of(op)
    inputs = case.make(ops.Draw(torch.float32, DEVICE))
    with FlopCounterMode(display=False) as forward:
        y = COUNTED[op](*inputs)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    # Half of attention's scores are of later positions, which a causal kernel leaves out.
    share = 0.5 if op == "attention" else 1
    counted = {FORWARD: forward.get_total_flops(), BOTH: forward.get_total_flops() + backward.get_total_flops()}
    assert {step: flops for step, (flops, _) in case.work.items()} == {s: share * n for s, n in counted.items()}


@pytest.mark.parametrize("op", OPS)
def test_the_least_bytes_of_forward_are_those_of_inputs_and_outputs(op):
    # Large enough that scalars, counts and offsets, which are left out, do not matter.
    case = case_of(op, torch.bfloat16, tokens=1300)
    inputs = case.make(ops.Draw(torch.bfloat16, DEVICE))
    outputs = (op_peers.TORCH if op == "attention" else {op: op_peers.plain(op)})[op](*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    moved = sum(x.nbytes for x in [*inputs, *outputs] if isinstance(x, torch.Tensor))
    assert case.work[FORWARD][1] == pytest.approx(moved, rel=0.01)


# Of tiny in bf16, where x has 1024 bytes a token, q and k together 1280, and the shared expert's act 1408.
@pytest.mark.parametrize(
    ("op", "each"),
    [
        ("router_logits", 3 * 1024 + 2 * 4 * 4),  # x twice and its gradient; 4 logits in fp32 and their gradients
        ("rope", 4 * 1280),
        ("swiglu", 3 * 2816 + 2 * 1408),
        ("rms_norm", 8 * 1024),  # x, residual, norm and sum; two gradients in, the sum again, one gradient out
    ],
)
def test_the_least_bytes_of_both_passes_are_those_summed_by_hand(op, each):
    tokens = 65536  # so many that the router's weight and the angles do not matter
    case = case_of(op, torch.bfloat16, ModelConfig.preset("tiny"), tokens)
    assert case.work[BOTH][1] == pytest.approx(each * tokens, rel=0.01)
