"""The export command, from a trained run to other engines and back."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import hub_environment, loopback_hub
from waiting import TIMEOUT

from acceleron import Acceleron, export, pretrained
from acceleron.checkpoint import load_checkpoint
from acceleron.data.prepare import prepare
from acceleron.data.tokenizer import load_tokenizer, train_tokenizer
from acceleron.errors import InputError, run_command
from acceleron.generation import Sampling, generate, load_model
from acceleron.training import TrainOptions, train

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "She sells sea shells by the sea shore.",
    "How much wood would a woodchuck chuck?",
    "Peter Piper picked a peck of pickled peppers.",
    "It is raining cats and dogs today, isn't it?",
)
PROMPTS = ("The quick", "Peter", "How much", "It is")
NUM_TOKENS, VOCAB_SIZE, STEPS = 30, 320, 40


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The directory of a nano that has learned sentences in part. Its embedding has 64 more rows than tokens."""
    root = tmp_path_factory.mktemp("run")
    (root / "text.txt").write_text(" ".join(random.Random(0).choices(SENTENCES, k=4000)))
    prepare([str(root / "text.txt")], str(root / "data"), None, VOCAB_SIZE)
    options = TrainOptions(
        model_size="nano", vocab_size=VOCAB_SIZE + 64, data_dir=str(root / "data"), save_dir=str(root / "save"),
        batch_size=8, seq_len=64, max_steps=STEPS, lr=1e-2, save_interval=STEPS // 2, eval_interval=STEPS // 2,
        num_workers=1, no_compile=True, no_gradient_checkpointing=True, device="cpu", dtype="fp32",
    )  # fmt: skip
    train(options)
    return root / "save"


@pytest.fixture(scope="module")
def checkpoint(run) -> Path:
    return run / f"checkpoint_{STEPS}.pt"


@pytest.fixture(scope="module")
def tokenizer(run):
    return load_tokenizer(run / "tokenizer.json")


def open_checkpoint(path: Path) -> Acceleron:
    return load_model(load_checkpoint(path), path, torch.device("cpu"), torch.float32)


def greedy_texts(model: Acceleron, tokenizer) -> list[str]:
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    settings = dict(sampling=Sampling(temperature=0), num_entries=VOCAB_SIZE)
    return [tokenizer.decode(list(generate(model, prompt, NUM_TOKENS, **settings))) for prompt in prompts]


def test_a_trained_nano_gives_equal_text_at_each_stop(checkpoint, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("xllamacpp")  # Linux only
    from llama_engine import Engine

    expected = greedy_texts(open_checkpoint(checkpoint), tokenizer)
    assert len(set("".join(expected))) > 10  # not one token again and again

    export.export(checkpoint, tmp_path / "hf")
    theirs, auto = (
        c.from_pretrained(tmp_path / "hf") for c in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    for prompt, text in zip(PROMPTS, expected, strict=True):
        inputs = auto(prompt, return_tensors="pt")
        ids = theirs.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert auto.decode(ids) == text

    export.export(checkpoint, tmp_path / "gguf", format="gguf")
    engine = Engine(tmp_path / "gguf" / "gguf-F32.gguf", 2048)
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert engine.generate(tokenizer.encode(prompt).ids, NUM_TOKENS, VOCAB_SIZE, [])[1] == text

    assert greedy_texts(Acceleron.from_pretrained(tmp_path / "hf"), tokenizer) == expected
    theirs.save_pretrained(tmp_path / "theirs")
    assert greedy_texts(Acceleron.from_pretrained(tmp_path / "theirs"), tokenizer) == expected


def run_export(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    return run_command(export.main)


def test_rows_without_a_token_are_removed(checkpoint, tokenizer, tmp_path):
    export.export(checkpoint, tmp_path / "model")
    before, after = open_checkpoint(checkpoint), Acceleron.from_pretrained(tmp_path / "model")
    assert (before.config.vocab_size, after.config.vocab_size) == (VOCAB_SIZE + 64, VOCAB_SIZE)
    ids = torch.tensor([tokenizer.encode(SENTENCES[0]).ids])
    torch.testing.assert_close(after(ids).logits, before(ids).logits[..., :VOCAB_SIZE], rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_the_model_card_has_the_figures_of_the_run(run, checkpoint, tmp_path, format):
    """The figures are those of the exported step, not of the run's last step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for path, step in ((checkpoint, STEPS), (run / f"checkpoint_{STEPS // 2}.pt", STEPS // 2)):
        output = tmp_path / str(step)
        export.export(path, output, format=format, dtype="f16")
        (record,) = [record for record in records if record["step"] == step]
        card = ModelCard.load(output / "README.md")
        figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert figures == {name: round(record[name], 4) for name in ("val_loss", "val_bits_per_byte")}
        assert f"| training loss | {record['loss']:.4f} nats per token |" in card.text
        assert f"| tokens | {record['tokens']:,} |" in card.text
        assert "| architecture | GraniteMoeShared |" in card.text
        total, active = open_checkpoint(checkpoint).num_parameters()
        rows = 64 * 128  # removed from the embedding
        assert f"| parameters | {total - rows:,}, {active - rows:,} active per token |" in card.text
        assert (output / "loss.png").stat().st_size > 10_000
        assert str(tmp_path) not in card.content
        assert str(run) not in card.content


def test_a_checkpoint_alone_with_a_tokenizer_is_enough(run, checkpoint, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / checkpoint.name).symlink_to(checkpoint)
    tokenizer = str(run / "tokenizer.json")
    export.export(tmp_path / "copy" / checkpoint.name, tmp_path / "model", tokenizer=tokenizer)
    assert "training loss" not in (tmp_path / "model" / "README.md").read_text()
    assert not (tmp_path / "model" / "loss.png").exists()
    assert Acceleron.from_pretrained(tmp_path / "model").config.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "q8_0"], "--dtype q8_0 needs --format gguf"),
        (["--format", "gguf", "--hybrid"], "--hybrid needs --format hf"),
        (["--format", "onnx"], "--format: invalid choice: 'onnx': choose from hf, gguf"),
        (["--push_to_hub", "nameless"], "--push_to_hub nameless: pass user/name"),
        (["--tokenizer", "absent.json"], "absent.json"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    status = run_export(monkeypatch, "--checkpoint", checkpoint, "--output", tmp_path / "model", *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert line.startswith("error: ")
    assert message in line
    assert not any(tmp_path.iterdir())


def test_a_directory_with_files_is_not_touched(checkpoint, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty: choose a new directory"):
        export.export(checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_tokenizer_of_another_model_is_refused(checkpoint, tmp_path):
    other = tmp_path / "other.json"
    train_tokenizer(["another text"], 300).save(str(other))
    with pytest.raises(InputError, match=r"other\.json is not .*tokenizer\.json, which the model was trained with"):
        export.export(checkpoint, tmp_path / "model", tokenizer=str(other))
    assert not (tmp_path / "model").exists()


def test_a_file_that_differs_from_the_checkpoint_is_an_error(checkpoint, tmp_path, monkeypatch):
    """The export reads back what it wrote."""
    write = export.write_model

    def write_another(model, *arguments):
        write(model, *arguments)
        with torch.no_grad():
            model.blocks[2].moe.w2_EDF[5] += 1e-4

    monkeypatch.setattr(export, "write_model", write_another)
    with pytest.raises(RuntimeError, match=r"blocks\.2\.moe\.w2_EDF differs after reading back"):
        export.export(checkpoint, tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "key"), [("hf", "rms_norm_eps"), ("gguf", "rope")])
def test_a_wrong_setting_in_the_files_is_an_error(checkpoint, tmp_path, monkeypatch, format, key):
    """Equal weights are not enough."""
    if format == "hf":
        right = pretrained.to_hf_config
        monkeypatch.setattr(pretrained, "to_hf_config", lambda *arguments: right(*arguments) | {key: 0.1})
    else:
        gguf = pytest.importorskip("gguf")
        right = gguf.GGUFWriter.add_rope_freq_base
        monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda writer, value: right(writer, 100 * value))
    with pytest.raises(RuntimeError, match="the logits differ after reading back"):
        export.export(checkpoint, tmp_path / "model", format=format)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "dtype", "scale"), [("hf", "f16", 1e-6), ("gguf", "q8_0", 1e-8)])
def test_weights_that_are_too_small_for_the_dtype_are_refused(run, checkpoint, tmp_path, format, dtype, scale):
    contents = load_checkpoint(checkpoint)
    contents["config"] = contents["config"].to_dict()
    contents["model"]["blocks.1.moe.w2_EDF"] = contents["model"]["blocks.1.moe.w2_EDF"] * scale
    torch.save(contents, tmp_path / "small.pt")
    with pytest.raises(InputError, match=rf"w2_EDF has values that {dtype} cannot represent: export in fp32"):
        export.export(
            tmp_path / "small.pt", tmp_path / "model", format=format, dtype=dtype, tokenizer=str(run / "tokenizer.json")
        )
    assert not (tmp_path / "model").exists()


PUSH = """
import os, sys
from acceleron.errors import run_command
from acceleron.export import main
for token in ("hf_bad", "hf_write"):
    os.environ["HF_TOKEN"] = token
    sys.argv[1:] = ["--checkpoint", {checkpoint!r}, "--output", {output!r} + token, "--push_to_hub", "someone/nano"]
    print(run_command(main), flush=True)
"""


def test_push_to_hub_checks_the_login_before_it_writes(checkpoint, tmp_path):
    code = PUSH.format(checkpoint=str(checkpoint), output=str(tmp_path / "model_"))
    with loopback_hub() as hub:
        environment = hub_environment(hub.url, tmp_path / "home")
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT,
            check=True,
        )  # fmt: skip
        first, *_, url, last = process.stdout.splitlines()
        assert (first, last, url) == ("2", "0", f"{hub.url}/someone/nano")
        assert process.stderr.startswith("error: --push_to_hub someone/nano: the token is not valid")
        assert not (tmp_path / "model_hf_bad").exists()
        assert hub.repos["someone/nano"].keys() >= {path.name for path in (tmp_path / "model_hf_write").iterdir()}
        assert b'from_pretrained("someone/nano")' in hub.repos["someone/nano"]["README.md"]
