"""transformers' models with our weights, and the commands that measure in rounds."""

import pytest
import torch

from acceleron import kernels
from bench import decoding, loader, peers, rows

CPU = torch.device("cpu")
NANO = ["--size", "nano", "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_choice", kernels._choice)  # restored at the end

    def run_command(module, *flags, status=None):
        monkeypatch.setattr("sys.argv", ["bench", *flags, "--rounds", "2", "--output", str(tmp_path)])
        if status:
            with pytest.raises(SystemExit, match=status):
                module.main()
        else:
            module.main()
        return rows.read(tmp_path)

    return run_command


@pytest.mark.parametrize("source", ["eager", "grouped_mm", "llama"])
def test_with_our_weights_transformers_gives_our_logits_and_gradients(source):
    pytest.importorskip("transformers")
    shape = ("model step", "nano", torch.float32, 2, 24, source == "llama")
    ours, theirs = (peers.Contender(name, *shape).build(CPU) for name in ("reference", source))
    ids = torch.randint(2048, (2, 24))
    expected, found = (each.model(input_ids=ids).logits for each in (ours, theirs))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ours(), theirs()
    expected, found = ours.gradients(), theirs.gradients()
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).norm() < 1e-4 * expected[name].norm(), name


def test_a_failure_costs_one_row(run, monkeypatch):
    """Peers whose shared expert has its gate and up rows swapped, and a dense baseline that raises."""
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
    moe, dense, *granite, llama = run(peers, *NANO, "--batch_size", "1", "--seq_len", "16", status="1")
    assert [len(row.values) for row in (moe, llama)] == [2, 2]
    assert "no room" in dense.failed
    assert all(row.failed.startswith("wrong: gradient of") and not row.values for row in granite)


def test_decoding(run):
    pytest.importorskip("transformers")
    found = run(decoding, *NANO, "--tokens", "6")
    assert [row.complaint() for row in found] == [""] * 4
    model, prompt = decoding.deciding_model("nano"), torch.randint(2048, (1, 16), generator=torch.Generator())
    tokens = list(decoding.generate(model, prompt[0].tolist(), 8, decoding.Sampling(temperature=0)))
    allowed = decoding.ALLOWED[torch.float32]
    assert decoding.distance(model, prompt, tokens) < allowed
    assert decoding.distance(model, prompt, tokens[:-1] + [tokens[-1] ^ 1]) > allowed
    assert decoding.distance(model, prompt, [0] * 8) > 4 * decoding.ALLOWED[torch.bfloat16]


def test_loader(run, monkeypatch):
    monkeypatch.setattr(loader, "ROWS", 100)
    monkeypatch.setattr(loader, "TRAINING_ROWS", 99)
    assert [row.complaint() for row in run(loader, "--seconds", "0.01")] == [""] * 3
    following = loader.Loader.__next__
    monkeypatch.setattr(loader.Loader, "__next__", lambda self: following(self) + 1)
    assert all("wrong: sequences" in row.failed for row in run(loader, "--seconds", "0.01", status="1")[3:])
