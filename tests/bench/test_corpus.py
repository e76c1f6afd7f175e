"""The benchmarks' text: real, the same each time, and held out from all over."""

import numpy as np
import pytest

from acceleron.data import Shards
from acceleron.data.tokenizer import load_tokenizer
from acceleron.errors import InputError
from bench import corpus

VOCAB = 512


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    corpus.write_corpus(directory, VOCAB, 1_000_000)
    return directory


def test_the_tokens_are_pythons_source(directory):
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    assert tokenizer.get_vocab_size() == VOCAB
    text = tokenizer.decode(np.load(directory / "shard_00000.npy").flatten().tolist())
    first = corpus.source_files()[0].read_text(encoding="utf-8")
    assert text[:300] == first[:300]


def test_a_part_of_every_shard_is_held_out(directory):
    shards = Shards(directory)
    assert len(shards.paths) > 3
    assert (shards.num_validation_rows == 1).all()
    assert (shards.num_rows[:-1] == corpus.ROWS_PER_SHARD).all()


def test_the_same_text_is_written_each_time(directory, tmp_path):
    corpus.write_corpus(tmp_path, VOCAB, 1_000_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in directory.iterdir())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (directory / path.name).read_bytes()


def test_without_source_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "source_files", lambda packages: [])
    with pytest.raises(InputError, match="too few"):
        corpus.write_corpus(tmp_path, VOCAB, 1_000_000)
