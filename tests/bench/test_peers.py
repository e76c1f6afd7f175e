"""transformers' models with our weights, and the commands that compete with them."""

import numpy as np
import pytest
import torch

from bench import decoding, loader, peers, rows

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command, and returns its rows."""

    def run_command(module, *flags):
        monkeypatch.setattr("sys.argv", ["bench", *flags, "--rounds", "2", "--output", str(tmp_path)])
        module.main()
        found = rows.read(tmp_path)
        assert all(len(row.values) == 2 and min(row.values) > 0 for row in found if not row.complaint())
        return found

    return run_command


@pytest.mark.parametrize("source", ["eager", "grouped_mm", "llama"])
def test_with_our_weights_transformers_gives_our_logits_and_gradients(source):
    pytest.importorskip("transformers")
    theirs = peers.Contender(source, "model step", "nano", torch.float32, 2, 24, dense=source == "llama")
    ours = peers.Contender("reference", "model step", "nano", torch.float32, 2, 24, dense=source == "llama")
    ours, theirs = ours.build(CPU), theirs.build(CPU)
    ids = torch.randint(2048, (2, 24))
    expected, found = (each.model(input_ids=ids).logits for each in (ours, theirs))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ours(), theirs()
    expected, found = ours.gradients(), theirs.gradients()
    assert found.keys() == expected.keys()
    for name in expected:
        assert expected[name].norm() > 0
        assert (found[name] - expected[name]).norm() < 1e-4 * expected[name].norm(), name


def test_a_failure_costs_one_row(run, monkeypatch, tmp_path):
    """A peer whose shared expert has its gate and up rows swapped, and a dense baseline that raises."""
    pytest.importorskip("transformers")
    load = peers.load_weights

    def swapped(peer, model):
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
    with pytest.raises(SystemExit, match="1"):
        run(peers, "--size", "nano", "--batch_size", "1", "--seq_len", "16", "--dtype", "fp32", "--device", "cpu")
    moe, dense, *granite, llama = rows.read(tmp_path)
    assert not moe.complaint()
    assert not llama.complaint()
    assert "no room" in dense.failed
    assert all(row.failed.startswith("wrong: gradient of") and not row.values for row in granite)


def test_decoding(run):
    pytest.importorskip("transformers")
    found = run(decoding, "--size", "nano", "--tokens", "6", "--dtype", "fp32")
    assert [row.complaint() for row in found] == [""] * 4
    assert found[0].provider == "Acceleron"


def test_tokens_that_are_not_the_models_choices_are_far_from_them():
    model, prompt = decoding.deciding_model("nano"), torch.randint(2048, (1, 16), generator=torch.Generator())
    tokens = list(decoding.generate(model, prompt[0].tolist(), 8, decoding.Sampling(temperature=0)))
    allowed = decoding.ALLOWED[torch.float32]
    assert decoding.distance(model, prompt, tokens) < allowed
    assert decoding.distance(model, prompt, tokens[:-1] + [tokens[-1] ^ 1]) > allowed
    for wrong in ([int(prompt[0, -1])] * 8, [0] * 8):
        assert decoding.distance(model, prompt, wrong) > 4 * decoding.ALLOWED[torch.bfloat16]


def test_loader(run, monkeypatch):
    monkeypatch.setattr(loader, "ROWS", 100)
    monkeypatch.setattr(loader, "TRAINING_ROWS", 99)
    found = run(loader, "--seconds", "0.01")
    assert [(row.case["seq_len"], row.complaint()) for row in found] == [(2048, ""), (1024, ""), (256, "")]


def test_wrong_sequences_of_a_loader_are_counted(monkeypatch, tmp_path):
    for shard in range(2):
        ids = np.random.default_rng(shard).integers(50304, size=(20, 2048), dtype=np.int32)
        np.save(tmp_path / f"shard_{shard:05d}.npy", ids)
    monkeypatch.setattr(loader, "TRAINING_ROWS", 19)
    assert loader.wrong_sequences(tmp_path, 1024, 2) == 0
    following = loader.Loader.__next__
    monkeypatch.setattr(loader.Loader, "__next__", lambda self: following(self) + 1)
    assert loader.wrong_sequences(tmp_path, 1024, 2) == 2 * 19 * 2
    monkeypatch.setattr(loader.Loader, "__next__", following)
    monkeypatch.setattr(loader, "TRAINING_ROWS", 18)  # of each shard, the loader has one row more
    assert loader.wrong_sequences(tmp_path, 1024, 2) > 0
