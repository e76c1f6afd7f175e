"""transformers models with our weights, and the commands that use `run_entries`."""

import pytest
import torch

from acceleron.training.checkpointing import CheckpointManager
from bench import checkpoints, decoding, loader, peers, rows

CPU = torch.device("cpu")
NANO = ["--model_size", "nano", "--device", "cpu"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run_command(module, *flags, status=None):
        monkeypatch.setattr("sys.argv", ["bench", *flags, "--rounds", "2", "--output", str(tmp_path)])
        if status:
            with pytest.raises(SystemExit, match=status):
                module.main()
        else:
            module.main()
        return rows.read(tmp_path)

    return run_command


@pytest.mark.parametrize("dense", [False, True])
def test_transformers_with_our_weights_matches_logits_and_gradients(dense):
    pytest.importorskip("transformers")
    contenders = [peers.Contender(name, "nano", torch.float32, 2, 24, dense) for name in ("reference", "transformers")]
    (ours, *mine), (theirs, *their) = (contender.build(CPU) for contender in contenders)
    ids = torch.randint(2048, (2, 24))
    expected = ours(input_ids=ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    (expected, found) = ((run(), gradients())[1] for run, gradients in (mine, their))
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).norm() < 1e-4 * expected[name].norm(), name


def test_a_failing_model_does_not_affect_the_other_rows(run, monkeypatch):
    """Granite's shared expert has swapped gate and up rows, and the dense baseline raises."""
    pytest.importorskip("transformers")

    def swapped(peer, model, load=peers.load_weights):
        found = load(peer, model)
        for weight in found.get("blocks.1.moe.shared.w13", ()):
            weight.data = weight.data.roll(len(weight) // 2, 0)
        return found

    def compile_blocks(model):
        if model.config.dense:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(peers, "load_weights", swapped)
    monkeypatch.setattr(peers, "missing_compiler", lambda device: None)
    monkeypatch.setattr(peers.Acceleron, "compile_blocks", compile_blocks)
    flags = ["--dtype", "bf16", "--batch_size", "1", "--seq_len", "64"]
    moe, dense, granite, llama = run(peers, *NANO, *flags, status="1")
    assert [len(row.values) for row in (moe, llama)] == [2, 2]
    assert "no room" in dense.failed
    assert granite.failed.startswith("wrong: gradient of")
    assert all(row.allowed < 0.2 for row in (moe, granite, llama))  # tight enough to fail a halved gradient


def test_decoding_check_passes_and_finds_wrong_tokens(run):
    pytest.importorskip("transformers")
    found = run(decoding, *NANO, "--dtype", "fp32")
    assert [row.problem() for row in found] == ["", ""]
    model, prompt = decoding.model_with_large_weights("nano"), torch.randint(2048, (1, 16), generator=torch.Generator())
    tokens = list(decoding.generate(model, prompt[0].tolist(), 8, decoding.Sampling(temperature=0)))
    allowed = decoding.ALLOWED[torch.float32]
    assert decoding.distance(model, prompt, tokens) < allowed
    assert decoding.distance(model, prompt, tokens[:-1] + [tokens[-1] ^ 1]) > allowed
    assert decoding.distance(model, prompt, [0] * 8) > 4 * decoding.ALLOWED[torch.bfloat16]


@pytest.mark.parametrize("wrong", [0, 1])
def test_loader_check_finds_wrong_sequences(run, monkeypatch, wrong):
    following = loader.Loader.__next__
    monkeypatch.setattr(loader, "ROWS", 100)
    monkeypatch.setattr(loader.Loader, "__next__", lambda self: following(self) + wrong)
    problems = [row.problem() for row in run(loader, status="1" if wrong else None)]
    assert [problem[:16] for problem in problems] == ["wrong: sequences" * wrong] * 2


@pytest.mark.parametrize("bit", [0, 1])
def test_a_flipped_bit_in_a_checkpoint_fails_the_check(bit, run, monkeypatch):
    copy = CheckpointManager._copy

    def flip_bit(self, contents):
        copied, ready = copy(self, contents)
        copied["optimizer"]["state"][3]["exp_avg"].view(torch.int32)[0] ^= bit
        return copied, ready

    monkeypatch.setattr(CheckpointManager, "_copy", flip_bit)
    monkeypatch.setattr("acceleron.training.setup.missing_compiler", lambda device: "none here")
    monkeypatch.setattr(checkpoints, "CPU_BATCH", {"nano": 1})
    monkeypatch.setattr(checkpoints, "CPU_SEQ_LEN", 16)
    monkeypatch.setattr(checkpoints, "CORPUS_CHARACTERS", 1_000_000)
    [row] = run(checkpoints, *NANO, "--interval", "1", status="1" if bit else None)
    assert row.error == 3 * bit  # two rounds plus the warmup
    assert row.problem().startswith("wrong: checkpoints" if bit else "")
    assert len(row.values) == 2 * (1 - bit)
    assert row.details["bytes"] > 12e6  # a million parameters with three fp32 values each
    assert row.details["blocked_seconds"] > 0
