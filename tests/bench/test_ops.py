"""The op benchmarks at very small shapes: only correct results are timed, and FLOPs and bytes are exact."""

import os
import signal
import threading
from contextlib import closing
from functools import partial

import pytest
import torch

from acceleron import ModelConfig
from acceleron.errors import InputError
from acceleron.kernels import triton_ops
from bench import op_cases, op_peers, ops, rows
from bench.op_cases import GEMMS, OPS
from bench.op_peers import Provider
from bench.ops import BOTH, FORWARD
from bench.worker import Worker, serve_calls

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Row widths are multiples of 16 bytes, for grouped_mm. Two sequences have a row count that no kernel tile divides.
CONFIG = ModelConfig(
    d_model=64, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=4, d_ff=40, d_ff_shared=24, vocab_size=128,
    max_seq_len=13,
)  # fmt: skip
TOKENS = 26


def case_of(op: str, dtype=torch.float32, config=CONFIG, tokens=TOKENS) -> op_cases.Case:
    if op in GEMMS:
        return op_cases.gemm_case(op, "small", config, tokens, dtype)
    return {case.op: case for case in op_cases.cases("small", config, tokens, dtype)}[op]


def checked(case: op_cases.Case, provider: Provider, dtype=torch.float32) -> tuple[str, float, float]:
    randn = op_cases.RandomTensors(dtype, DEVICE)
    inputs = case.make(randn)
    return ops.check(case, provider, inputs, ops.compute_truth(case, inputs, randn))


@pytest.mark.parametrize("op", [*OPS, *GEMMS])
def test_triton_and_reference_pass_the_check(op):
    case = case_of(op, torch.float16)
    named = ("triton", "reference", "SDPA math", "acceleron")
    case.make(op_cases.RandomTensors(torch.float16, DEVICE))
    found = [provider for provider in op_peers.providers(case, DEVICE) if provider.name in named]
    assert len(found) == 2
    for provider in found:
        what, error, allowed = checked(case, provider, torch.float16)
        assert error <= allowed < 0.01, (provider.name, what)
        assert op == "dispatch_plan" or error > 0


@pytest.mark.parametrize("op", [op for op in OPS if op != "dispatch_plan"])
def test_a_gradient_off_by_one_percent_fails_the_check(op):
    case = case_of(op, torch.bfloat16)
    inputs = case.make(op_cases.RandomTensors(torch.bfloat16, DEVICE))
    for index, x in enumerate(inputs):
        if not (isinstance(x, torch.Tensor) and x.requires_grad):
            continue

        def wrong(*inputs, index=index):
            x = inputs[index]
            off = 1.01 * x - (0.01 * x).detach()
            off.data.copy_(x.detach())
            return op_peers.plain(case)(*inputs[:index], off, *inputs[index + 1 :])

        what, error, allowed = checked(case, Provider("wrong", wrong), torch.bfloat16)
        assert f"gradient of {case.inputs[index]}" in what
        assert error == pytest.approx(0.01, rel=0.5)
        assert error > allowed


def test_a_wrong_output_fails_the_check():
    swiglu, plan = case_of("swiglu"), case_of("dispatch_plan")
    right, right_plan = op_peers.plain(swiglu), op_peers.plain(plan)
    wrong = {
        "nan": (swiglu, lambda x: right(x) * float("nan")),
        "zeros": (swiglu, lambda x: right(x) * 0),
        "wrong under no_grad": (swiglu, lambda x: right(x) * (1 if torch.is_grad_enabled() else 1.01)),
        "wrong order": (plan, lambda experts, E: [x.roll(1) for x in right_plan(experts, E)]),
    }
    for name, (case, run) in wrong.items():
        _, error, allowed = checked(case, Provider(name, run))
        assert not error <= allowed, name
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        checked(swiglu, Provider("shape", lambda x: right(x)[:1]))


def serve_with_faults(connection):
    """`serve_calls` with Triton ops that raise, hang and kill the process, and a GEMM kernel that fails with TMA.

    It runs in the worker process, which monkeypatch cannot reach.
    """

    def raises(*args):
        raise RuntimeError("planted\nin two lines")

    def up(gemm, *args):
        return gemm.ours(*args) if os.environ.get("ACCELERON_NO_TMA") else raises()

    triton_ops.swiglu = raises
    triton_ops.rms_norm = lambda *args: threading.Event().wait()
    triton_ops.rope = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    gemm_cases = op_cases.gemm_cases
    op_cases.gemm_cases = lambda *args: [gemm._replace(ours=partial(up, gemm)) for gemm in gemm_cases(*args)]
    serve_calls(connection)


def run_cases(settings: ops.Settings, rounds: int, selected: list[str], directory) -> list[rows.Row]:
    checker = ops.Checker(settings, rounds, 600.0)
    with closing(checker.worker):
        ops.run_cases(checker, selected, rows.Results(str(directory), DEVICE))
    return rows.read(directory)


def test_a_fault_fails_one_op_and_sets_the_fallbacks(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERON_NO_TMA", "")
    monkeypatch.setattr(ops, "serve_calls", serve_with_faults)
    ask = Worker.ask

    def ask_with_limit(worker, message, seconds):  # only the hanging op has a limit, so slow machines pass
        settings, number, *rest = message[1]
        hangs = settings.cases()[number].op == "rms_norm" and rest[:1] == ["triton"]
        return ask(worker, message, 1 if hangs else None)

    monkeypatch.setattr(Worker, "ask", ask_with_limit)
    names = ("up", "swiglu", "rms_norm", "rope", "route_topk")
    settings = ops.Settings(("nano",), names, 26, torch.float16, DEVICE)
    found = run_cases(settings, 0, ["triton", "reference"], tmp_path)
    found = {(row.case.get("op"), row.provider): row for row in found}
    reasons = {"swiglu": "RuntimeError: planted in two lines", "rms_norm": "no answer", "rope": "killed by SIGKILL"}
    for op, reason in reasons.items():
        assert reason in found[op, "triton"].failed
    assert all(not found[op, "reference"].problem() for op in names)
    assert not found["route_topk", "triton"].problem()
    assert not found["up", "triton"].problem()
    assert "without TMA; with TMA: RuntimeError: planted" in found["up", "triton"].check
    assert found[None, "triton"].benchmark == "fallbacks"
    assert found[None, "triton"].details == {
        "ACCELERON_NO_TMA": "all",  # because it raised
        "ACCELERON_REFERENCE_OPS": "rms_norm,rope,swiglu",
    }


def test_correct_ops_are_timed_and_absent_peers_listed_once(monkeypatch, tmp_path):
    monkeypatch.setattr(ops.timing, "ceilings", lambda device, dtype: (1e12, 1e11))
    settings = ops.Settings(("nano",), ("expert_mlp", "swiglu"), 32, torch.float32, DEVICE)
    found = run_cases(settings, 3, ["reference", "moe-ops"], tmp_path)
    absent, *measured = sorted(found, key=lambda row: not row.absent)
    assert (absent.case, absent.provider, absent.absent) == ({"op": "expert_mlp"}, "moe-ops", "not installed")
    assert {(row.case["op"], row.case["pass"]) for row in measured} == {
        (op, step) for op in ("expert_mlp", "swiglu") for step in (FORWARD, BOTH)
    }
    for row in measured:
        assert (len(row.values), row.unit, row.problem()) == (3, "s", "")
        compute, memory = row.details["flops"] / 1e12, row.details["bytes"] / 1e11
        assert row.details["bound"] == ("compute" if compute > memory else "memory")
        assert row.details["share_of_ceiling"] == pytest.approx(max(compute, memory) / row.median)


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "check_only"), (["--provider", "nobody"], "nobody"), (["--rounds", "0"], "--rounds 0")],
)
def test_bad_flags_and_interpreted_timings_are_rejected(monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr("sys.argv", ["ops", *flags, "--output", str(tmp_path)])
    monkeypatch.setenv("TRITON_INTERPRET", str(int(flags == [])))
    with pytest.raises(InputError, match=message):
        ops.main()


@pytest.mark.parametrize(
    ("op", "multiplications"),
    [
        ("router_logits", 26 * 64 * 4),
        ("expert_mlp", 2 * 26 * 3 * 64 * 40),  # two experts per token, three matrices each
        ("moe", 26 * 64 * 4 + 2 * 26 * 3 * 64 * 40 + 26 * 3 * 64 * 24),
        ("grouped_gemm", 2 * 26 * 64 * 80),
        ("linear_cross_entropy", 26 * 64 * 128),
        ("attention", 2 * 4 * 16 * 13 * 13),  # scores and values for two sequences, half masked
        ("up", 2 * 26 * 64 * 80),
        ("weight_grad-w2", 2 * 26 * 64 * 40),
    ],
)
def test_flops_are_twice_the_multiplications(op, multiplications):
    assert case_of(op).flops == 2 * multiplications


# In bf16: x has 26 x 64 values; gate and up have 26 x 48 together.
@pytest.mark.parametrize(
    ("op", "forward", "gradients"),
    [("swiglu", 26 * (48 + 24) * 2, 26 * (48 + 24) * 2), ("rms_norm", 26 * 64 * 8 + 64 * 4, 26 * 64 * 8 + 64 * 4)],
)
def test_min_bytes_count_inputs_outputs_and_gradients(op, forward, gradients):
    case = case_of(op, torch.bfloat16)
    moved = ops.min_bytes(case, case.make(op_cases.RandomTensors(torch.bfloat16, DEVICE)))
    assert moved == {FORWARD: forward, BOTH: forward + gradients}
