"""Complete training runs, and unit tests of their parts."""

import dataclasses
import json
import math
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_bitwise_equal, options, records

from acceleron import Acceleron, ModelConfig
from acceleron.checkpoint import load_checkpoint
from acceleron.data.prepare import prepare
from acceleron.data.tokenizer import train_tokenizer
from acceleron.device import missing_compiler
from acceleron.errors import InputError
from acceleron.training import TrainOptions, loop, train
from acceleron.training.metrics import expert_health
from acceleron.training.optimizer import build_optimizer, learning_rate
from acceleron.training.options import parse_options

GOLDEN = Path(__file__).parent / "golden_losses.json"
REAL_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def test_run_learns_and_writes_all_metrics_and_checkpoints(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda *_: (1e12, "a constant"))
    train(options(data_dir, tmp_path, max_steps=60))
    log = records(tmp_path)
    assert [r["step"] for r in log] == list(range(1, 61))
    fields = {"step", "loss", "z_loss", "balance_loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu"}
    fields |= {"memory_bytes", "expert_least_share", "expert_most_share", "expert_entropy", "dead_experts"}
    assert all(fields <= r.keys() for r in log)
    assert [r["step"] for r in log if "val_loss" in r] == list(range(6, 61, 6))
    assert log[0]["loss"] == pytest.approx(math.log(64), abs=0.2)
    assert log[-1]["val_loss"] < 2.0  # the unigram entropy is about log 64 = 4.16, the chain's entropy log 4 = 1.39
    assert log[-1]["tokens"] == 60 * 4 * 64
    config = ModelConfig.preset("nano", vocab_size=64)
    flops = Acceleron(config).flops_per_token(64)
    assert all(0 < r["mfu"] == pytest.approx(r["tokens_per_second"] * flops / 1e12) for r in log)
    assert {p.name for p in tmp_path.glob("checkpoint_*")} == {f"checkpoint_{s}.pt" for s in range(6, 61, 6)}
    assert list((tmp_path / "tensorboard").iterdir())


def test_other_shape_learns(data_dir, tmp_path):
    shape = dict(num_experts=8, top_k=4, d_ff=64, d_ff_shared=0, num_dense_layers=1)
    train(options(data_dir, tmp_path, max_steps=40, **shape))
    log = records(tmp_path)
    assert log[-1]["val_loss"] < 3.0  # the unigram entropy is about 4.16
    assert all(1 / 8 <= r["expert_most_share"] <= 1 / 4 for r in log)  # a token's four experts are distinct
    counts = load_checkpoint(tmp_path / "checkpoint_40.pt")["statistics"]["tokens_per_expert_LE"]
    assert counts.shape == (3, 8)  # nano has four layers


def test_checkpoint_loads_with_weights_only_and_uncompiled_names(small_nano, data_dir, tmp_path):
    """Compiled training keeps the parameter names of the uncompiled model.

    The settings equal those of a compiled run in test_resume.py, so torch's compile cache is used.
    """
    settings = dict(batch_size=8, no_compile=False, deterministic=True, dtype="bf16")
    train(options(data_dir, tmp_path, max_steps=1, **settings))
    contents = torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)
    model = Acceleron(ModelConfig(**contents["config"]))
    model.load_state_dict(contents["model"])
    assert all(w.dtype == torch.float32 for w in contents["model"].values())


def test_acceleron_load_returns_the_trained_model(small_nano, data_dir, tmp_path):
    train(options(data_dir, tmp_path, max_steps=2, no_gradient_checkpointing=True))
    path = tmp_path / "checkpoint_2.pt"
    expected = load_checkpoint(path)
    weights = {name: weight.clone() for name, weight in expected["model"].items()}
    model = Acceleron.load(path)
    path.unlink()  # the model does not need the file
    assert model.config == expected["config"]
    assert_bitwise_equal(dict(model.state_dict()), weights)
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    other = Acceleron(model.config)
    other.load_state_dict(weights)
    assert torch.equal(model(ids).logits, other(ids).logits)
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad.any() for weight in model.parameters())
    with pytest.raises(InputError, match=r"checkpoint_2\.pt"):
        Acceleron.load(path)


def test_accumulation_equals_a_larger_batch(data_dir, tmp_path):
    """Uses the dense baseline, because the balance loss is a product of means over the micro-batch."""
    train(options(data_dir, tmp_path / "one", dense=True, batch_size=4, max_steps=3))
    train(options(data_dir, tmp_path / "two", dense=True, batch_size=2, grad_accum=2, max_steps=3))
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)


def test_forced_load_balance_gives_equal_expert_shares(data_dir, tmp_path):
    """Applies in both training and evaluation. Checkpoints from before this option existed also load."""
    train(options(data_dir, tmp_path, debug_force_load_balance=True, max_steps=2))
    shares = {record[name] for record in records(tmp_path) for name in ("expert_least_share", "expert_most_share")}
    assert shares == {1 / 8}
    path = tmp_path / "checkpoint_2.pt"
    assert load_checkpoint(path)["config"].debug_force_load_balance
    contents = torch.load(path, weights_only=True)
    del contents["config"]["debug_force_load_balance"]
    torch.save(contents, path)
    assert not load_checkpoint(path)["config"].debug_force_load_balance


def test_golden_losses(data_dir, tmp_path):
    """20 steps are bitwise equal on the machine that recorded them, and close elsewhere.

    To record new losses after an intended change, delete golden_losses.json and run this test.
    """
    train(options(data_dir, tmp_path, max_steps=20, eval_interval=20, save_interval=20))
    losses = [[r["loss"], r["z_loss"], r["balance_loss"], r["grad_norm"]] for r in records(tmp_path)]
    capability = torch.backends.cpu.get_cpu_capability()
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model\t")), "")
    machine = f"torch {torch.__version__}, {capability}, CPU model {model}"
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps({"machine": machine, "losses": losses}, indent=1) + "\n")
        pytest.fail(f"recorded {GOLDEN.name}: review and commit it")
    golden = json.loads(GOLDEN.read_text())
    if golden["machine"] == machine:
        assert losses == golden["losses"]
    else:
        # Hardware differs in rounding, and training amplifies it: between AVX2 and AVX-512, 3e-5 up to step 9,
        # then 3e-4 for the cross-entropy and 4e-3 for the rest.
        losses, golden = np.array(losses), np.array(golden["losses"])
        assert losses[:9] == pytest.approx(golden[:9], rel=1e-4)
        assert losses[:, 0] == pytest.approx(golden[:, 0], rel=1e-3)
        assert losses == pytest.approx(golden, rel=1e-2)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def test_memory_test_prints_the_peak_and_writes_nothing(data_dir, tmp_path, capsys):
    train(options(data_dir, tmp_path / "run", memory_test=True))
    line = capsys.readouterr().out
    peak, total = (float(line.split(" GiB")[i].split()[-1].removeprefix("device's ")) for i in (0, 1))
    assert 0.05 < peak < total
    assert not (tmp_path / "run").exists()


def test_missing_compiler_warns_and_uses_eager_mode(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    train(options(data_dir, tmp_path, max_steps=1, no_compile=False))
    assert "warning: torch.compile needs the compiler no-such-compiler" in capsys.readouterr().err
    assert (tmp_path / "checkpoint_1.pt").exists()


@pytest.mark.parametrize(("device", "name", "default"), [("cpu", "CXX", "g++"), ("cuda", "CC", "gcc")])
def test_blank_compiler_variable_means_the_default_compiler(monkeypatch, device, name, default):
    monkeypatch.setattr("shutil.which", lambda command: None)
    monkeypatch.setattr("sys.platform", "linux")
    for value in ("", "  "):
        monkeypatch.setenv(name, value)
        assert missing_compiler(torch.device(device)) == default
    monkeypatch.setenv(name, "ccache clang -O2")
    assert missing_compiler(torch.device(device)) == "ccache"


@pytest.mark.parametrize(
    "extra", ["", "--no_compile", "--no_gradient_checkpointing", "--save_interval 1000", "--max_steps 10000"]
)
def test_command_lines_of_the_predecessor_still_parse(extra):
    command = f"--model_size tiny --data_dir ./data --batch_size 32 --grad_accum 4 {extra}"
    parsed = parse_options(shlex.split(command))
    assert (parsed.model_size, parsed.data_dir, parsed.batch_size, parsed.grad_accum) == ("tiny", "./data", 32, 4)
    assert parsed.save_interval == (1000 if "save_interval" in extra else 5000)
    assert parsed.no_compile == ("--no_compile" in extra)
    assert parsed.no_gradient_checkpointing == ("no_gradient" in extra)


def test_learning_rate_schedules():
    cosine = TrainOptions(lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    rates = [learning_rate(step, cosine) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[109] == pytest.approx(0.1)
    middle = 10 + 99 / 3  # one third of the way through the cosine: cos(pi / 3) = 1/2
    assert rates[int(middle)] == pytest.approx(0.1 + 0.9 * 0.75)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    wsd = dataclasses.replace(cosine, schedule="wsd", max_steps=100)
    rates = [learning_rate(step, wsd) for step in range(100)]
    assert rates[9:81] == pytest.approx([1.0] * 72)
    assert rates[80:] == pytest.approx(np.linspace(1.0, 0.1, 20))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warmup_ends_at_lr_and_the_last_step_has_min_lr(schedule):
    """The last step has min_lr only if it comes after the peak."""
    for max_steps in range(1, 30):
        for warmup in (None, *range(max_steps + 1)):
            run = TrainOptions(lr=1.0, min_lr=0.1, schedule=schedule, max_steps=max_steps, warmup_steps=warmup)
            rates = [learning_rate(step, run) for step in range(max_steps)]
            peak = max(run.num_warmup_steps - 1, 0)
            assert rates[peak] == 1.0, (max_steps, warmup)
            assert peak == max_steps - 1 or rates[-1] == pytest.approx(0.1), (max_steps, warmup)
            assert all(a >= b for a, b in pairwise(rates[peak:])), (max_steps, warmup)


def test_norms_have_no_weight_decay():
    model = Acceleron(ModelConfig.preset("nano"))
    decayed, plain = build_optimizer(model, 0.1).param_groups
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert {id(p) for p in plain["params"]} == {id(p) for p in norms}
    assert len(decayed["params"]) == len(list(model.parameters())) - len(norms)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_expert_health_reports_shares_entropy_and_dead_experts():
    tokens_per_expert = torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0]])
    health = expert_health(tokens_per_expert)
    assert health == {
        "expert_least_share": 0.0,
        "expert_most_share": 1.0,
        "expert_entropy": pytest.approx(0.5),
        "dead_experts": 3,
    }


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_DATA / "wikitext2-valid.txt").exists(), reason="needs the wikitext data")
def test_real_text_loss_falls_below_the_unigram_entropy(tmp_path):
    """Uses wikitext with the 50,000-entry tokenizer."""
    tokenizer, text = REAL_DATA / "pile_tokenizer.json", REAL_DATA / "wikitext2-valid.txt"
    prepare([str(text)], str(tmp_path / "data"), tokenizer_path=str(tokenizer))
    shard = np.load(tmp_path / "data" / "shard_00000.npy")
    share = np.bincount(shard.ravel()) / shard.size
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    settings = dict(vocab_size=None, seq_len=128, batch_size=8, max_steps=200, lr=5e-3, weight_decay=0.01)
    settings |= dict(log_interval=50, eval_interval=200, save_interval=200)
    train(options(tmp_path / "data", tmp_path / "run", no_gradient_checkpointing=True, **settings))
    last = records(tmp_path / "run")[-1]
    assert last["val_loss"] < entropy - 0.4
    # Their ratio is the bytes per token of this text, about 4.5.
    assert last["val_loss"] / math.log(2) / last["val_bits_per_byte"] == pytest.approx(
        text.stat().st_size / shard.size, rel=0.1
    )


def test_existing_tokenizer_is_never_overwritten(data_dir, tmp_path):
    for name, size in (("ours.json", 270), ("run/tokenizer.json", 262)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        train_tokenizer(["some words to merge, and some more words " * 3], size).save(str(tmp_path / name))
    before = (tmp_path / "run" / "tokenizer.json").read_bytes()
    with pytest.raises(InputError, match="differs from the tokenizer"):
        train(options(data_dir, tmp_path / "run", vocab_size=320, tokenizer=str(tmp_path / "ours.json")))
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == before
