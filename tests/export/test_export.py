"""The export command, from a trained run to other engines and back."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import WRITE_TOKEN, hub_environment, loopback_hub
from waiting import TIMEOUT

from acceleron import Acceleron, export
from acceleron.checkpoint import load_checkpoint
from acceleron.data.prepare import prepare
from acceleron.data.tokenizer import load_tokenizer
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
NUM_TOKENS, VOCAB_SIZE, STEPS = 30, 384, 40


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
    engine = Engine(tmp_path / "gguf" / "gguf-fp32.gguf", 2048)
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert engine.generate(tokenizer.encode(prompt).ids, NUM_TOKENS, VOCAB_SIZE, [])[1] == text

    assert greedy_texts(Acceleron.from_pretrained(tmp_path / "hf"), tokenizer) == expected
    theirs.save_pretrained(tmp_path / "theirs")
    assert greedy_texts(Acceleron.from_pretrained(tmp_path / "theirs"), tokenizer) == expected
