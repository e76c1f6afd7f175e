"""--init_from starts a run from the weights of another model. --config starts one from the config of an export."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from runs import SMALL_NANO, assert_bitwise_equal, final_state, options, records

import train as script
from acceleron import Acceleron, ModelConfig
from acceleron.checkpoint import load_checkpoint
from acceleron.data.prepare import prepare
from acceleron.data.tokenizer import train_tokenizer
from acceleron.errors import InputError, run_command
from acceleron.training import TrainOptions, train
from acceleron.training.options import parse_options
from acceleron.training.setup import build_trainer

TEXT = " ".join(f"{number} rainy days" for number in range(3000))
STEPS = dict(max_steps=60, eval_interval=60, save_interval=60)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
SMALL |= dict(intermediate_size=48, max_position_embeddings=128, tie_word_embeddings=True)
# Large weights, so that each part of a model changes the loss; theta and eps that are not the defaults.
SMALL |= dict(initializer_range=0.2, rope_theta=500.0, rms_norm_eps=1e-3)
MULTIPLIERS = dict(embedding_multiplier=6.0, residual_multiplier=0.5, attention_multiplier=0.5, logits_scaling=0.5)
GRANITE = SMALL | MULTIPLIERS | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32)


def initial(name, **changes) -> dict:
    """Options of a run from this model, instead of those in runs.py."""
    return dict(model_size="tiny", vocab_size=None, init_from=str(name)) | changes


@pytest.fixture(scope="module")
def original(data_dir, tmp_path_factory):
    """A directory with a short run, and an export of its model, without a tokenizer."""
    directory = tmp_path_factory.mktemp("original")
    config = dataclasses.replace(SMALL_NANO, vocab_size=64, max_seq_len=128)
    (directory / "model.json").write_text(json.dumps(config.to_dict()))
    train(options(data_dir, directory / "run", config=str(directory / "model.json"), **STEPS))
    Acceleron.load(directory / "run" / "checkpoint_60.pt").save_pretrained(directory / "export")
    return directory


@pytest.fixture
def export(original, tmp_path):
    """A copy of the export that a test can change."""
    return shutil.copytree(original / "export", tmp_path / "export")


@pytest.fixture(scope="module")
def models(original, tmp_path_factory):
    """Names and paths of models in each format. transformers writes the last two."""
    directory = tmp_path_factory.mktemp("theirs")
    configs = dict(llama=transformers.LlamaConfig(**SMALL), granite=transformers.GraniteMoeSharedConfig(**GRANITE))
    for name, config in configs.items():
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory / name)
    ours = dict(export=original / "export", checkpoint=original / "run" / "checkpoint_60.pt")
    return ours | {name: directory / name for name in configs}


@torch.no_grad()
def their_loss(directory, ids: torch.Tensor) -> float:
    kwargs = dict(dtype=torch.float64, experts_implementation="eager")  # its grouped GEMM has no float64
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **kwargs)
    return model(ids, labels=ids).loss.item()


def assert_refused(settings: TrainOptions, *culprits: str, scripts_dir=None):
    """Assert that a run raises a one-line InputError, and that nothing is written."""
    with pytest.raises(InputError) as raised:
        train(settings, scripts_dir)
    message = str(raised.value)
    assert "\n" not in message
    for culprit in culprits:
        assert culprit in message
    assert not Path(settings.save_dir).exists()


@pytest.mark.parametrize("name", ["export", "checkpoint", "llama", "granite"])
def test_first_step_uses_the_weights_and_a_new_optimizer(data_dir, models, tmp_path, name):
    """The loss is compared with transformers in float64. AdamW's first update of a weight is lr times its sign."""
    settings = options(data_dir, tmp_path / "run", max_steps=1, warmup_steps=0, lr=1e-3, **initial(models[name]))
    trainer, _ = build_trainer(settings, None)
    trainer.loader.close()
    assert (trainer.step, trainer.tokens, len(trainer.optimizer.state)) == (0, 0, 0)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    expected = their_loss(models["export" if name == "checkpoint" else name], trainer.batches[0])
    assert abs(expected - np.log(64)) > 0.5  # the loss of a new model
    train(settings)
    [line] = records(tmp_path / "run")
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    after = load_checkpoint(tmp_path / "run" / "checkpoint_1.pt")["model"]
    for weight in ("blocks.1.attention.qkv.weight", "blocks.0.attention.out.weight"):
        change = after[weight] - before[weight] * (1 - 1e-3 * settings.weight_decay)
        assert change.abs().median().item() == pytest.approx(1e-3, rel=0.01)


def test_training_continues_to_lower_the_loss(data_dir, original, tmp_path):
    train(options(data_dir, tmp_path / "run", max_steps=30, eval_interval=30, **initial(original / "export")))
    before, after = (records(path / "run")[-1]["val_loss"] for path in (original, tmp_path))
    assert after < before - 0.1
    assert records(tmp_path / "run")[0]["loss"] < before + 0.1


def test_resumed_run_equals_an_uninterrupted_one(data_dir, export, tmp_path, capsys):
    """The command line stays the same. The resumed run reads the model's config, but not its weights."""
    settings = dict(max_steps=8, save_interval=3, log_interval=4, eval_interval=5, resume="auto") | initial(export)
    train(options(data_dir, tmp_path / "uninterrupted", **settings))
    resumed = options(data_dir, tmp_path / "resumed", **settings)
    train(resumed)
    assert capsys.readouterr().err.count(f"starting from the weights of {export}, with a new optimizer\n") == 2
    for step in (6, 8):  # as if the process had been killed after step 3
        (tmp_path / "resumed" / f"checkpoint_{step}.pt").unlink()
    (export / "model.safetensors").unlink()
    train(resumed)
    output = capsys.readouterr().err
    checkpoint = tmp_path / "resumed" / "checkpoint_3.pt"
    assert f"continuing from {checkpoint}, step 3, not from the weights of {export}\n" in output
    assert "warning" not in output
    states = (final_state(tmp_path / name, 8) for name in ("resumed", "uninterrupted"))
    assert_bitwise_equal(*states)
    assert_refused(options(data_dir, tmp_path / "new", **settings), "has no model.safetensors")


def test_resumed_run_must_have_the_models_config(data_dir, original, models, tmp_path):
    settings = options(data_dir, tmp_path / "run", max_steps=1, resume="auto", **initial(original / "export"))
    train(settings)
    with pytest.raises(InputError, match=r"from a different model: .*dense False"):
        train(dataclasses.replace(settings, max_steps=2, init_from=str(models["llama"])))
    # Without --resume, the directory is refused, as for any new run.
    with pytest.raises(InputError, match="has checkpoints of a different run"):
        train(dataclasses.replace(settings, resume=None))


def test_hub_model_is_downloaded_without_weights_to_resume(data_dir, original, tmp_path, monkeypatch):
    downloads = []

    def download_model(repo, weights=True):
        downloads.append((repo, weights))
        return original / "export"

    monkeypatch.setattr("acceleron.hub.download_model", download_model)
    settings = options(data_dir, tmp_path / "run", max_steps=1, resume="auto", **initial("user/name"))
    train(settings)
    assert downloads == [("user/name", False), ("user/name", True)]
    train(dataclasses.replace(settings, max_steps=2))
    assert downloads[2:] == [("user/name", False)]
    assert records(tmp_path / "run")[0]["loss"] < 3.7


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """An export with a tokenizer, its text data, and other tokenizers."""
    directory = tmp_path_factory.mktemp("tokenized")
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.save(str(directory / "original.json"), pretty=False)
    train_tokenizer(["some different words" * 9], 300).save(str(directory / "vocabulary.json"))
    other = json.loads(tokenizer.to_str())
    other["model"]["merges"].reverse()
    (directory / "merges.json").write_text(json.dumps(other))
    torch.manual_seed(0)
    model = Acceleron(dataclasses.replace(SMALL_NANO, vocab_size=tokenizer.get_vocab_size()))
    model.save_pretrained(directory / "export", tokenizer)
    (directory / "in.txt").write_text(TEXT)
    return directory


def prepared(tokenized, output, tokenizer):
    prepare([str(tokenized / "in.txt")], str(output), tokenizer_path=str(tokenizer))
    return output


def test_equal_tokenizers_can_be_different_files(tokenized, tmp_path):
    own = tokenized / "export" / "tokenizer.json"
    for tokenizer in (tokenized / "original.json", own):
        data_dir, run = prepared(tokenized, tmp_path / tokenizer.name, tokenizer), tmp_path / tokenizer.stem
        train(options(data_dir, run, max_steps=1, **initial(tokenized / "export")))
        assert (run / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
        assert records(run)[0]["val_bits_per_byte"] > 1
    assert own.read_bytes() != (tokenized / "original.json").read_bytes()


@pytest.mark.parametrize("other", ["vocabulary", "merges"])
def test_data_with_different_ids_is_refused(tokenized, tmp_path, other):
    data_dir = prepared(tokenized, tmp_path / "data", tokenized / f"{other}.json")
    fix = f"prepare the data with `python -m acceleron.data prepare --tokenizer {tokenized / 'export/tokenizer.json'}`"
    settings = options(data_dir, tmp_path / "run", **initial(tokenized / "export"))
    assert_refused(settings, f"{data_dir / 'tokenizer.json'} and the tokenizer of --init_from", fix)


def test_tokenizer_of_the_model_is_used_before_that_of_the_scripts(data_dir, tokenized, tmp_path):
    """The data has no tokenizer."""
    scripts, run = tmp_path / "scripts", tmp_path / "run"
    scripts.mkdir()
    shutil.copy(tokenized / "vocabulary.json", scripts / "pile_tokenizer.json")
    settings = options(data_dir, run, max_steps=1, resume="auto", **initial(tokenized / "export"))
    for steps in (1, 2):
        train(dataclasses.replace(settings, max_steps=steps), scripts)
        assert (run / "tokenizer.json").read_bytes() == (tokenized / "export" / "tokenizer.json").read_bytes()


def test_data_with_ids_outside_the_vocabulary_is_refused(tokenized, original, tmp_path, capsys):
    """The model has no tokenizer to compare with."""
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "shard_00000.npy", np.full((4, 64), 64))
    settings = options(tmp_path / "data", tmp_path / "run", **initial(original / "export"))
    assert_refused(settings, "contains token id 64", "prepare the data with the model's tokenizer")
    data_dir = prepared(tokenized, tmp_path / "text", tokenized / "original.json")
    settings = dataclasses.replace(settings, data_dir=str(data_dir))
    assert_refused(settings, "has 300 entries, more than the model's vocabulary of 64: pass a different --tokenizer")
    assert f"note: {original / 'export'} has no tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ("--model_size nano", "not allowed with argument"),
        ("--config model.json", "not allowed with argument"),
        ("--vocab_size 64", "--vocab_size: not allowed with --init_from"),
        ("--dense", "--dense: not allowed with --init_from"),
        ("--top_k 1", "--top_k: not allowed with --init_from"),
        ("--d_ff_shared 0", "--d_ff_shared: not allowed with --init_from"),
    ],
)
def test_flags_of_the_models_shape_are_refused(flags, culprit):
    with pytest.raises(InputError, match=culprit):
        parse_options(["--init_from", "export", *flags.split()])


def test_round_robin_routing_is_a_setting_of_one_run(data_dir, original, tmp_path):
    settings = options(data_dir, tmp_path / "forced", max_steps=1, **initial(original / "export"))
    train(dataclasses.replace(settings, debug_force_load_balance=True))
    checkpoint = tmp_path / "forced" / "checkpoint_1.pt"
    assert load_checkpoint(checkpoint)["config"].debug_force_load_balance
    train(options(data_dir, tmp_path / "later", max_steps=1, **initial(checkpoint)))
    assert not load_checkpoint(tmp_path / "later" / "checkpoint_1.pt")["config"].debug_force_load_balance
    shares = [records(tmp_path / name)[0]["expert_most_share"] for name in ("forced", "later")]
    assert shares[0] == 0.25 < shares[1]


def remove_config(export):
    (export / "config.json").unlink()


def truncate(export):
    path = export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def keep_only_pickles(export):
    (export / "model.safetensors").rename(export / "pytorch_model.bin")


def untie(export):
    path = export / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        (remove_config, "config.json does not exist"),
        (truncate, "model.safetensors: damaged or not a safetensors file"),
        (keep_only_pickles, "has no model.safetensors, only pytorch_model.bin"),
        (untie, "config.json: tie_word_embeddings False is not supported"),
    ],
)
def test_damaged_model_directories_are_refused(data_dir, export, tmp_path, damage, culprit):
    damage(export)
    assert_refused(options(data_dir, tmp_path / "run", **initial(export)), str(export), culprit)


def test_unusable_paths_are_refused(data_dir, original, tmp_path):
    def refused(name, *culprits, **changes):
        assert_refused(options(data_dir, tmp_path / "run", **initial(name, **changes)), str(name), *culprits)

    refused(original / "exprot", "--init_from", "did you mean export?")
    refused(original / "export" / "model.safetensors", "is a file, not a directory: pass its directory")
    refused(original / "run" / "checkpoint_61.pt", "--init_from", "did you mean checkpoint_60.pt?")
    (tmp_path / "damaged.pt").write_bytes((original / "run" / "checkpoint_60.pt").read_bytes()[:-100])
    refused(tmp_path / "damaged.pt", "truncated, damaged or not a checkpoint")
    settings = options(data_dir, tmp_path / "run", **initial(original / "export", seq_len=256))
    assert_refused(settings, "--seq_len 256 is above the model's maximum of 128")


def test_command_reports_a_missing_model_in_one_line(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--init_from", "export", "--data_dir", str(data_dir)])
    assert run_command(script.main) == 2
    error = "error: --init_from export does not exist: the current directory contains nothing\n"
    assert capsys.readouterr().err == error
    assert list(tmp_path.iterdir()) == []


def test_memory_test_of_a_model_writes_nothing(data_dir, original, tmp_path, capsys):
    train(options(data_dir, tmp_path / "run", memory_test=True, **initial(original / "export")))
    assert "peak memory" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_config_of_an_export_starts_a_new_model(data_dir, original, tmp_path):
    """It has the same architecture. Its weights are new: the first loss is that of a uniform distribution."""
    config = str(original / "export" / "config.json")
    expected = load_checkpoint(original / "run" / "checkpoint_60.pt")["config"]
    assert ModelConfig.load(config) == expected
    train(options(data_dir, tmp_path / "run", config=config, vocab_size=None, max_steps=30, eval_interval=30))
    assert load_checkpoint(tmp_path / "run" / "checkpoint_30.pt")["config"] == expected
    lines = records(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(np.log(64), abs=0.1)
    assert lines[-1]["val_loss"] < lines[0]["loss"] - 0.3


def test_config_that_a_new_model_cannot_have_is_refused(data_dir, original, models, tmp_path):
    def refused(path, *culprits):
        assert_refused(options(data_dir, tmp_path / "run", config=str(path)), f"--config {path}: ", *culprits)

    multipliers = [f"{name} {value}" for name, value in MULTIPLIERS.items()]
    refused(models["granite"] / "config.json", *multipliers, "use --init_from with the model's directory")
    values = json.loads((original / "export" / "config.json").read_text())
    for name, value in dict(tie_word_embeddings=False, hidden_act="gelu", model_type="gpt2").items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(values | {name: value}))
        refused(path, f"{name} {value!r} is not supported")
