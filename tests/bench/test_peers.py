"""transformers' models with our weights, and the commands that race providers, at small sizes."""

import json

import numpy as np
import pytest
import torch

from acceleron import Acceleron, ModelConfig, kernels
from bench import loader
from bench.results import complaint

transformers_models = pytest.importorskip("bench.transformers_models")
decoding, peers, rounds = (__import__(f"bench.{name}", fromlist=["main"]) for name in ("decoding", "peers", "rounds"))


@pytest.fixture(autouse=True)
def selection_restored(monkeypatch):
    monkeypatch.setattr(kernels, "_choice", kernels._choice)


def run(module, monkeypatch, tmp_path, *flags):
    name = module.__name__.split(".")[1]
    monkeypatch.setattr("sys.argv", [f"bench {name}", *flags, "--output", str(tmp_path)])
    module.main()
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    for row in rows:
        assert complaint(row) is None, row
        assert "failed" not in row, row["failed"]
        assert row["tokens_per_second_p20"] <= row["tokens_per_second"] <= row["tokens_per_second_p80"]
        assert len(row["rounds"]) == 2
        assert row["group"]
    return rows


def model_and_peer(dense, experts="eager"):
    config = ModelConfig.preset("nano", dense=dense, vocab_size=256, num_layers=2, z_loss_coef=0, balance_loss_coef=0)
    torch.manual_seed(0)
    model = Acceleron(config)
    for name, weight in model.named_parameters():
        weight.data = torch.randn_like(weight) / weight.shape[-1] ** 0.5 if weight.dim() > 1 else weight + 0.1
        assert name
    other = transformers_models.llama(config, torch.float32)
    if not dense:
        other = transformers_models.granite_moe(config, torch.float32, experts, balance=0.0)
    transformers_models.load_weights(other, model)
    return model, other, torch.randint(256, (2, 24))


@pytest.mark.parametrize(("dense", "experts"), [(True, ""), *((False, e) for e in ("eager", "grouped_mm"))])
def test_with_our_weights_transformers_gives_our_logits_loss_and_gradients(dense, experts):
    model, other, ids = model_and_peer(dense, experts)
    ours, theirs = model(ids, labels=ids), other(input_ids=ids, labels=ids)
    assert theirs.loss.item() == pytest.approx(ours.cross_entropy.item(), rel=1e-5)
    torch.testing.assert_close(theirs.logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert theirs.logits.std() > 0.5
    ours.loss.backward()
    theirs.loss.backward()
    grads = transformers_models.to_transformers({n: p.grad for n, p in model.named_parameters()}, other)
    parameters = dict(other.named_parameters())
    assert grads.keys() == parameters.keys()
    for name, grad in grads.items():
        assert grad.norm() > 0, name
        assert (parameters[name].grad - grad).norm() < 1e-4 * grad.norm(), name


def test_peers_are_raced_and_checked_on_the_same_weights(monkeypatch, tmp_path, capsys):
    flags = ("--size", "nano", "--batch_size", "1", "--seq_len", "16", "--rounds", "2", "--dtype", "fp32")
    rows = run(peers, monkeypatch, tmp_path, *flags, "--no_compile", "--device", "cpu", "--kernels", "reference")
    assert [row["model"] for row in rows] == ["moe", "dense", "moe", "moe", "dense"]
    assert len({row["provider"] for row in rows}) == 5
    assert {row["group"] for row in rows} == {"nano, fp32, 1 x 16"}
    assert "MoE, reference / dense twin, reference: " in capsys.readouterr().out


def test_a_peer_of_another_function_is_no_result(monkeypatch):
    """As if its experts' gate and up rows were swapped: the others' rows stand."""
    load = transformers_models.load_weights

    def swapped(other, model):
        load(other, model)
        for name, weight in other.named_parameters():
            if name.endswith("shared_mlp.input_linear.weight"):
                weight.data = weight.data.roll(len(weight) // 2, 0)

    monkeypatch.setattr(transformers_models, "load_weights", swapped)
    fields = dict(what="speed", part="model step", size="nano", tokens=16, dtype="fp32")
    ours = peers.Run(**fields, model="moe", source="ours", kernels="reference")
    granite = peers.Run(**fields, model="moe", source="eager", kernels=None)
    good, bad = peers.race([ours, granite], torch.device("cpu"), 1)
    assert complaint(good) is None
    assert complaint(bad).startswith("wrong: the gradients")


def test_decoding(monkeypatch, tmp_path):
    flags = ("--size", "nano", "--tokens", "6", "--rounds", "2", "--dtype", "fp32")
    rows = run(decoding, monkeypatch, tmp_path, *flags)
    assert rows[0]["provider"] == "Acceleron"
    assert len(rows) == 4


def test_tokens_that_are_not_the_models_choices_are_far_from_them():
    model = decoding.weights_that_tell("nano")
    prompt = torch.randint(2048, (1, decoding.PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    sampling = decoding.Sampling(temperature=0)
    tokens = list(decoding.generate(model, prompt[0].tolist(), 8, sampling))
    assert decoding.distance(model, prompt, tokens) < decoding.ALLOWED["fp32"]
    assert decoding.distance(model, prompt, tokens[:-1] + [tokens[-1] ^ 1]) > decoding.ALLOWED["fp32"]
    for wrong in ([int(prompt[0, -1])] * 8, [0] * 8):
        assert decoding.distance(model, prompt, wrong) > 4 * decoding.ALLOWED["bf16"]


def test_loader(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "ROWS", 100)
    monkeypatch.setattr(loader, "TRAINING_ROWS", 99)
    rows = run(loader, monkeypatch, tmp_path, "--rounds", "2", "--seconds", "0.01")
    assert [row["seq_len"] for row in rows] == [2048, 1024, 256]


def test_a_loader_of_other_rows_is_found_out(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    for shard in range(2):
        np.save(tmp_path / f"shard_{shard:05d}.npy", rng.integers(50304, size=(20, 2048), dtype=np.int32))
    monkeypatch.setattr(loader, "TRAINING_ROWS", 19)
    assert loader.wrong_sequences(tmp_path, 1024, 2) == 0
    monkeypatch.setattr(loader, "TRAINING_ROWS", 18)  # the loader then gives a row too many of each shard
    assert loader.wrong_sequences(tmp_path, 1024, 2) > 0
    plain = loader.Loader.__next__
    monkeypatch.setattr(loader.Loader, "__next__", lambda self: plain(self) + 1)
    monkeypatch.setattr(loader, "TRAINING_ROWS", 19)
    assert loader.wrong_sequences(tmp_path, 1024, 2) == 2 * 19 * 2


def test_rates_and_ratios_are_of_the_same_rounds(capsys):
    a, b = rounds.rates([1.0, 2.0, 4.0], 8), rounds.rates([2.0, 4.0, 8.0], 8)
    assert a["rounds"] == [8, 4, 2]
    assert a["tokens_per_second"] == 4
    checked = dict(check="c", check_error=0, check_allowed=1)
    wrong = dict(check="c", check_error=2, check_allowed=1)
    rows = [{"provider": "a"} | a | checked, {"provider": "b"} | b | checked, {"provider": "c"} | b | wrong]
    rounds.print_race(rows, [("a", "b"), ("a", "c")])
    shown = capsys.readouterr().out
    assert "a / b: 2.00 (2.00 .. 2.00)" in shown
    assert "a / c" not in shown
    assert "c  wrong" in shown
