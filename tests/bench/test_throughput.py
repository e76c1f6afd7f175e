"""The throughput benchmark's parts: what it checks, what it counts, and what becomes of a process that fails."""

import dataclasses
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from acceleron import Acceleron, ModelConfig, MoE, kernels
from acceleron.attention import best_sdpa
from acceleron.training.options import TrainOptions
from bench import op_shares, throughput, worker
from bench.memory import saved_per_token
from bench.worker import Case


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a nano model on random shards."""
    directory = tmp_path_factory.mktemp("data")
    np.save(directory / "shard_00000.npy", np.random.default_rng(0).integers(worker.NANO_VOCAB, size=(8, 2048)))
    return TrainOptions(
        data_dir=str(directory), model_size="nano", batch_size=2, seq_len=64, device="cpu", dtype="fp32",
        kernels="reference", no_compile=True, no_gradient_checkpointing=True, num_workers=1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def selected_kernels():
    yield
    kernels.select("auto", torch.device("cpu"))


@pytest.fixture(scope="module")
def truth(options, tmp_path_factory):
    """Of learned routing."""
    path = str(tmp_path_factory.mktemp("truth") / "0.pt")
    worker.write_truth(Case(options), path)
    return path


@pytest.fixture(scope="module")
def balanced_truth(options, tmp_path_factory):
    """What a worker process is held against: of given experts."""
    path = str(tmp_path_factory.mktemp("truth") / "0.pt")
    with worker.balanced_routing(torch.device("cpu")) as strength:
        strength.fill_(4.0)
        worker.write_truth(Case(options), path)
    return path


def test_the_check_passes_the_reference_and_finds_a_gradient_that_is_one_percent_off(options, truth, monkeypatch):
    run = worker.build(Case(options))
    for _ in range(2):  # the same batch each time
        good = worker.check(worker.gradients(run), truth)
        assert good["check_error"] <= good["check_allowed"] <= 1e-4
    swiglu, tokens = kernels.reference.swiglu, options.batch_size * options.seq_len
    # The shared expert's: it has a row a token where the routed ones have two.
    monkeypatch.setattr(kernels.reference, "swiglu", lambda x: swiglu(x) * (1.01 if len(x) == tokens else 1))
    bad = worker.check(worker.gradients(run), truth)
    assert 0.05 > bad["check_error"] > 5e-3 > bad["check_allowed"]


def test_in_bf16_too_a_wrong_kernel_is_found_and_a_more_exact_one_is_not(options, tmp_path, monkeypatch):
    """Tokens near a tie would choose other experts, which hides the one and accuses the other: they are given."""
    case = Case(dataclasses.replace(options, dtype="bf16", seq_len=256))
    expert_mlp = kernels.reference.expert_mlp
    with worker.balanced_routing(torch.device("cpu")) as strength:
        strength.fill_(4.0)
        worker.write_truth(case, path := str(tmp_path / "truth.pt"))

        def verdict(factor: float, dtype: torch.dtype) -> bool:
            def changed(x, weights, plan, w13, w2):
                return expert_mlp(x.to(dtype), weights, plan, w13, w2 * factor).bfloat16()

            monkeypatch.setattr(kernels.reference, "expert_mlp", changed)
            found = worker.check(worker.gradients(worker.build(case)), path)
            return found["check_error"] <= found["check_allowed"]

        assert verdict(1.0, torch.bfloat16)
        assert verdict(1.0, torch.float32)
        assert not verdict(1.03, torch.bfloat16)


def test_the_check_finds_a_gradient_that_is_not_a_number(options, truth, monkeypatch):
    run = worker.build(Case(options))
    with torch.no_grad():
        run.model.blocks[2].attention_norm.weight[3] = torch.nan
    bad = worker.check(worker.gradients(run), truth)
    assert not bad["check_error"] <= bad["check_allowed"]


def test_the_check_trains_on_nothing(options, truth):
    run, untouched = worker.build(Case(options)), worker.build(Case(options))
    worker.gradients(run)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), untouched.model.parameters(), strict=True))
    losses = []
    for each in (run, untouched):
        each.step(1e-3)
        losses.append(each.read_statistics()["loss"])
    assert losses[0] == pytest.approx(losses[1])  # on the same batch, not the next


def test_balanced_routing_gives_every_expert_the_same_and_ends_with_its_context(options):
    ids = torch.randint(worker.NANO_VOCAB, (2, 64))
    model = worker.build(Case(options)).model
    learned, even = model(ids, ids), 2 * 2 * 64 // 8
    assert not (learned.counts_LE == even).all()
    with worker.balanced_routing(torch.device("cpu")) as strength:
        assert torch.equal(model(ids, ids).loss, learned.loss)
        strength.fill_(4.0)
        assert (model(ids, ids).counts_LE == even).all()
    assert torch.equal(model(ids, ids).loss, learned.loss)


def test_balanced_routing_reaches_the_kernels_too(monkeypatch):
    monkeypatch.setattr(kernels, "_choice", "triton")
    moe, x = MoE(ModelConfig(d_model=32, num_heads=2, num_kv_heads=1, d_ff=16, d_ff_shared=16)), torch.randn(32, 32)
    learned = moe(x)[1].counts_E
    with worker.balanced_routing(torch.device("cpu")) as strength:
        strength.fill_(4.0)
        assert (moe(x)[1].counts_E == 2 * 32 // 4).all()
    assert torch.equal(moe(x)[1].counts_E, learned)
    assert not (learned == 2 * 32 // 4).all()


def test_a_step_is_counted_with_all_its_tokens(options, truth):
    training = worker.Training(Case(options))
    training.run.context = best_sdpa  # a GPU's, which can be entered once only
    about = training.begin(truth, torch.zeros(()))
    assert 0 < about["step_seconds"] < 60
    assert training.build_seconds < about["start_seconds"] < 60
    assert about["check_error"] <= about["check_allowed"]
    assert training.round(2)["seconds"] > 0
    figures = training.finish()
    assert figures["peak_memory_bytes"] > 4 * 4 * sum(p.numel() for p in training.run.model.parameters())
    assert sum(figures["op_shares"].values()) == pytest.approx(1)
    assert figures["op_shares"]["GEMM"] > 0.05
    # Two of eight experts, at least nothing and at most half of the assignments each.
    assert 0 <= figures["expert_least_share"] < 1 / 8 < figures["expert_most_share"] <= 0.5


class Answers:
    """A worker process's connection that answers from a list."""

    def __init__(self, *answers):
        self.answers, self.sent = list(answers), []

    def send(self, message):
        self.sent.append(message)

    def recv(self):
        return self.answers.pop(0)


def test_tokens_per_second_are_the_steps_tokens_over_their_seconds(options):
    started = worker.Worker.__new__(worker.Worker)
    started.case, started.rounds = Case(options), []
    started.connection = Answers({"step_seconds": 0.5}, {"seconds": 4.0})
    started.begin("path")
    started.round(3.1)  # 6 steps of 0.5 s are nearest
    assert started.connection.sent == ["path", 6]
    assert started.rounds == [6 * 2 * 64 / 4.0]


def test_a_process_that_dies_or_fails_is_a_failed_row(options, balanced_truth, tmp_path):
    failing, killed = worker.Worker(Case(options)), worker.Worker(Case(options))
    failing.begin("no truth here")
    assert "FileNotFoundError" in failing.row["failed"]
    killed.begin(balanced_truth)
    assert killed.row["check_error"] <= killed.row["check_allowed"]
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.join()
    killed.round(0.01)
    for each in (failing, killed):
        each.finish()
    assert killed.row == {"failed": "the process ended with status -9"}
    row = throughput.row_of(killed, "eager", "float32", 1e12)
    assert row["failed"]
    assert "tokens_per_second" not in row


def test_without_a_truth_nothing_is_measured(options, tmp_path):
    """The plain reference fails on data that is not there, and so do all who would be held against it."""
    gone = dataclasses.replace(options, data_dir=str(tmp_path / "gone"))
    (found,) = worker.train_in_turns([Case(gone)], truths := {}, str(tmp_path), 1, 0.01)
    assert "the plain reference: InputError" in found.row["failed"]
    assert found.rounds == []
    assert truths == {}


def finished(case: Case, **figures) -> worker.Worker:
    found = worker.Worker.__new__(worker.Worker)
    found.case, found.rounds, found.row = case, [90.0, 110.0, 100.0, 120.0, 80.0], figures
    return found


def test_a_row_has_what_the_report_needs(options):
    figures = {"flops_per_token": 2e6, "peak_memory_bytes": 1}
    row = throughput.row_of(finished(Case(options), **figures), "eager", "float32", 1e9)
    assert (row["tokens_per_second"], row["tokens_per_second_p20"], row["tokens_per_second_p80"]) == (100, 88, 112)
    assert row["mfu"] == pytest.approx(100 * 2e6 / 1e9)
    assert (row["model"], row["kernels"], row["compiled"], row["routing"]) == ("moe", "reference", False, "learned")
    dense = finished(Case(dataclasses.replace(options, dense=True), balanced=True), **figures)
    assert throughput.row_of(dense, "balanced", "float32", 1e9)["routing"] is None


def test_cases_are_moe_and_twin_by_both():
    arguments = SimpleNamespace(batch_size=None, seq_len=None, dtype="auto", grad_accum=None, kernels=None)
    cases = throughput.make_cases("nano", "predecessor", torch.device("cpu"), "data", arguments)
    served = [(case.options.kernels, case.options.dense) for case in cases]
    # Triton's can run in these tests: interpreted.
    assert served == [(by, dense) for by in ("triton", "reference") for dense in (False, True)]
    assert {(case.options.batch_size, case.options.grad_accum) for case in cases} == {(32, 4)}
    assert not any(case.options.no_gradient_checkpointing or case.options.no_compile for case in cases)


def test_the_deterministic_mode_is_the_compiled_one_but_for_the_flag(options):
    arguments = SimpleNamespace(batch_size=None, seq_len=None, dtype="auto", grad_accum=None, kernels=None)
    compiled, deterministic = (
        throughput.make_cases("nano", mode, torch.device("cpu"), "data", arguments)
        for mode in ("compiled", "deterministic")
    )
    assert not any(case.options.deterministic for case in compiled)
    assert deterministic == [
        case._replace(options=dataclasses.replace(case.options, deterministic=True)) for case in compiled
    ]
    figures = {"flops_per_token": 2e6, "peak_memory_bytes": 1}
    row = throughput.row_of(finished(deterministic[0], **figures), "deterministic", "float32", 1e9)
    assert (row["mode"], row["deterministic"]) == ("deterministic", True)


@pytest.mark.parametrize(("device", "measured"), [("cpu", False), ("cuda", True)])
def test_what_tells_of_a_gpu_is_measured_on_a_cpu_only_if_asked_for(device, measured, monkeypatch, tmp_path):
    modes = []
    monkeypatch.setattr(throughput, "resolve_device", lambda _: torch.device(device))
    monkeypatch.setattr(throughput, "Results", lambda *_: SimpleNamespace(path="nowhere"))
    monkeypatch.setattr(throughput, "peak_flops", lambda *_: (1e12, "a guess"))
    monkeypatch.setattr(throughput, "write_corpus", lambda *_: "nothing")
    monkeypatch.setattr(throughput, "make_cases", lambda size, mode, *_: modes.append(mode))
    monkeypatch.setattr(throughput, "train_in_turns", lambda *_: [])
    monkeypatch.setattr(throughput, "print_rows", lambda _: None)
    monkeypatch.setattr("sys.argv", ["throughput", "--size", "nano", "--dtype", "fp32"])
    throughput.main()
    assert {"compiled", "balanced"} <= set(modes)
    assert ("deterministic" in modes, "predecessor" in modes) == (measured, measured)


def test_on_a_gpu_the_reference_is_trained_if_asked_for(monkeypatch):
    """Where the default batch leaves no memory for it."""
    gpu = torch.device("cuda")

    def served(asked: list[str] | None) -> list[str]:
        arguments = SimpleNamespace(batch_size=None, seq_len=None, dtype="auto", grad_accum=None, kernels=asked)
        return [case.options.kernels for case in throughput.make_cases("tiny", "compiled", gpu, "data", arguments)]

    monkeypatch.setattr(kernels, "select", lambda choice, device: "can run")
    assert served(None) == ["triton"] * 2
    assert served(["triton", "reference"]) == ["triton"] * 2 + ["reference"] * 2

    def refuse(choice, device):
        raise ValueError("an old GPU")

    monkeypatch.setattr(kernels, "select", refuse)
    assert served(None) == served(["reference"]) == ["reference"] * 2
    with pytest.raises(throughput.InputError, match="an old GPU"):
        served(["triton"])


@pytest.mark.parametrize("size", throughput.GPU_BATCH)
def test_who_trains_and_who_waits_fit_on_a_gpu_and_twice_the_batch_does_not(size):
    configs = [ModelConfig.preset(size, dense=dense) for dense in (False, True)]
    with torch.device("meta"):
        parameters = [Acceleron(config).num_parameters()[0] for config in configs]

    def taken(batch_size: int) -> float:
        """Of the larger: weights, moments, summed gradients and 2 bytes of copies; what blocks save; and who waits."""
        tokens, kept = batch_size * throughput.GPU_SEQ_LEN, 12 + 2 + 4 * (batch_size < throughput.GPU_STEP)
        saved = [tokens * config.num_layers * saved_per_token(config, "block", 2) for config in configs]
        moe, twin = parameters
        return max(kept * moe + saved[0] + 12 * twin, kept * twin + saved[1] + 12 * moe)

    asked = SimpleNamespace(batch_size=None, grad_accum=None, seq_len=None)
    batch_size, grad_accum, seq_len = throughput.shape_of(size, True, asked)
    assert 0.9 < batch_size * grad_accum * seq_len / (32 * 4 * 2048) <= 1  # of the predecessor's own
    assert taken(batch_size) < 70 * 2**30
    assert batch_size == 128 or taken(2 * batch_size) > 70 * 2**30


def test_our_kernels_go_by_their_file():
    found = op_shares.our_kernels()
    assert found["_up_kernel"] == "kernels/expert_mlp"
    assert found["_route_kernel"] == "kernels/routing"
    assert len(found) > 15


def test_mistakes_are_told_in_a_line(monkeypatch, tmp_path):
    for flag, value in (("--rounds", "0"), ("--seq_len", "100"), ("--batch_size", "0")):
        monkeypatch.setattr("sys.argv", ["throughput", flag, value])
        with pytest.raises(throughput.InputError, match=flag):
            throughput.main()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["throughput", "--output", str(tmp_path / "file" / "below")])
    with pytest.raises(throughput.InputError, match="--output"):
        throughput.main()
