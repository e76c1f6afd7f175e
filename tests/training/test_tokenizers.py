"""A run uses the tokenizer of its shards, and reports bits per byte with it."""

import json
import math
import shutil
import string

import numpy as np
import pytest
from runs import options, records
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from acceleron.data.prepare import prepare
from acceleron.data.shards import METADATA
from acceleron.data.tokenizer import END_OF_TEXT, SAMPLES, train_tokenizer
from acceleron.errors import InputError
from acceleron.training import train

TEXT = " ".join(f"{number} rainy days" for number in range(3000))
ONE_STEP = dict(vocab_size=320, max_steps=1)


@pytest.fixture
def tokenizer(tmp_path):
    """Path of a tokenizer that, like SentencePiece, adds a leading space that is not in the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [*string.printable, *SAMPLES[-1]]
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT.split(), trainer)
    tokenizer.save(str(tmp_path / "given.json"), pretty=False)
    return tmp_path / "given.json"


@pytest.fixture
def data_dir(tmp_path, tokenizer):
    (tmp_path / "in.txt").write_text(TEXT)
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "data"), tokenizer_path=str(tokenizer))
    return tmp_path / "data"


@pytest.mark.usefixtures("small_nano")
def test_bits_per_byte_counts_the_bytes_of_the_text(data_dir, tokenizer, tmp_path):
    """The expected count comes from the token offsets of the last row, which is held out."""
    train(options(data_dir, tmp_path / "run", seq_len=256, **ONE_STEP))
    rows = len(np.load(data_dir / "shard_00000.npy"))
    offsets = Tokenizer.from_file(str(tokenizer)).encode(TEXT).offsets[(rows - 1) * 2048 : rows * 2048]
    num_bytes = sum(offsets[i + 255][1] - offsets[i][1] for i in range(0, 2048, 256))
    last = records(tmp_path / "run")[-1]
    assert last["val_loss"] > 1
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] * 8 * 255 / math.log(2) / num_bytes, rel=1e-6)


@pytest.mark.usefixtures("small_nano")
def test_no_bits_per_byte_if_the_tokenizer_drops_spaces(tmp_path, capsys):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = list(string.printable)
    trainer = trainers.BpeTrainer(vocab_size=130, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(tmp_path / "given.json"))
    (tmp_path / "in.txt").write_text(TEXT)
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "data"), tokenizer_path=str(tmp_path / "given.json"))
    train(options(tmp_path / "data", tmp_path / "run", **ONE_STEP))
    last = records(tmp_path / "run")[-1]
    assert last["val_loss"] > 1
    assert "val_bits_per_byte" not in last
    line = "val_bits_per_byte is not reported: the tokenizer does not reproduce the text exactly"
    assert capsys.readouterr().err.count(line) == 1


@pytest.mark.usefixtures("small_nano")
def test_tokenizer_of_the_shards_is_accepted_under_any_name(data_dir, tokenizer, tmp_path, capsys):
    train(options(data_dir, tmp_path / "run", **ONE_STEP))
    train(options(data_dir, tmp_path / "run", resume="auto", tokenizer=str(tokenizer), **ONE_STEP | {"max_steps": 2}))
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert METADATA not in capsys.readouterr().err


def test_tokenizer_that_did_not_make_the_shards_is_rejected(data_dir, tmp_path):
    """Covers a tokenizer passed by flag, one next to the scripts, and one that replaces the one in data_dir."""
    scripts, path = tmp_path / "scripts", tmp_path / "scripts" / "pile_tokenizer.json"
    scripts.mkdir()
    train_tokenizer([TEXT], 270).save(str(path))
    own = data_dir / "tokenizer.json"

    def assert_rejected(path, **changes):
        with pytest.raises(InputError) as raised:
            train(options(data_dir, tmp_path / "run", **ONE_STEP | changes), scripts)
        assert str(raised.value) == (
            f"{path} is not the tokenizer of these shards; {data_dir / METADATA} records one with 150 ids: "
            "pass the tokenizer.json that `prepare` wrote next to them"
        )
        assert not (tmp_path / "run").exists()

    assert_rejected(path, tokenizer=str(path))
    own.unlink()
    assert_rejected(path)
    shutil.copy(path, own)
    assert_rejected(own)


@pytest.mark.usefixtures("small_nano")
def test_shards_without_metadata_train_with_a_note(data_dir, tmp_path, capsys):
    (data_dir / METADATA).unlink()
    train(options(data_dir, tmp_path / "run", **ONE_STEP))
    note = f"note: {data_dir} has no shards.json, so {data_dir / 'tokenizer.json'} cannot be checked"
    assert capsys.readouterr().err.count(note) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 60_000,
        "9" * 5000,
        "\xff",
        json.dumps({"format": 2}),
        '{"format": 1, "tokenizer_sha256": ""}',
        '{"format": 1, "tokenizer_sha256": "", "vocab_size": 130, "shards": ["shard_00000.npy"]}',
    ],
    ids=range(9),
)
def test_damaged_metadata_is_rejected(data_dir, tmp_path, content):
    (data_dir / METADATA).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=rf"{METADATA}: damaged or from a different version \(.*\); rerun `prepare`"):
        train(options(data_dir, tmp_path / "run", **ONE_STEP))
