"""Byte counts and document splits for every kind of tokenizer."""

import unicodedata
from functools import cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from sample_tokenizers import INEXACT_TOKENIZERS, TOKENIZERS, random_text
from tokenizers import normalizers

from acceleron.data.tokenizer import END_OF_TEXT, ByteCounter, encode, load_tokenizer, split_document


@cache
def tokenizer_of(kind):
    with TemporaryDirectory() as directory:
        path = Path(directory) / "tokenizer.json"
        (TOKENIZERS | INEXACT_TOKENIZERS)[kind]().save(str(path))
        return load_tokenizer(path)


@pytest.fixture(params=TOKENIZERS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind):
    return tokenizer_of(kind)


def representable(kind: str, text: str) -> str:
    """Return the text with the spacing that this kind can represent."""
    return " ".join(text.split()) if kind == "WordPiece" else text


def test_byte_counts_match_the_text(kind, tokenizer):
    """Tests two documents in one row, and the same tokens split into rows of two."""
    counter = ByteCounter(tokenizer, 1024)
    documents = [representable(kind, random_text(seed, 2000)) for seed in range(2)]
    ids = [counter.end_id]
    for tokens in encode(tokenizer, documents):
        ids += [*tokens, counter.end_id]
    expected = sum(len(document.encode()) for document in documents)
    assert counter.count(np.array([ids])) == expected
    assert counter.count(np.stack([ids[:-1], ids[1:]], axis=1)) == expected
    assert expected > 10_000


@pytest.mark.parametrize("kind", TOKENIZERS | INEXACT_TOKENIZERS)
def test_exact_is_true_only_for_lossless_tokenizers(kind):
    assert ByteCounter(tokenizer_of(kind), 1024).exact == (kind not in INEXACT_TOKENIZERS)


LOSSY = {
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "Lowercase": normalizers.Lowercase(),
    "StripAccents": normalizers.StripAccents(),
    "StripAccents after NFD": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "BERT": normalizers.BertNormalizer(),
    "BERT, cased": normalizers.BertNormalizer(lowercase=False),
}


@pytest.mark.parametrize("normalizer", LOSSY)
@pytest.mark.parametrize("kind", ["byte-level", "Metaspace first"])
def test_normalizers_that_change_text_are_not_exact(kind, normalizer):
    tokenizer = TOKENIZERS[kind]()
    assert ByteCounter(tokenizer, 1024).exact
    tokenizer.normalizer = LOSSY[normalizer]
    assert not ByteCounter(tokenizer, 1024).exact


def test_nfc_normalizer_counts_the_nfc_text():
    tokenizer = TOKENIZERS["byte-level"]()
    tokenizer.normalizer = normalizers.NFC()
    counter = ByteCounter(tokenizer, 1024)
    assert counter.exact
    decomposed = unicodedata.normalize("NFD", "żółć café")
    ids = np.array([[counter.end_id, *tokenizer.encode(decomposed).ids]])
    assert counter.count(ids) == len("żółć café".encode()) < len(decomposed.encode())


@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), min_size=1))
@example(" leading spaces")
@example("  ")
@example("żółć\n🙂")
def test_byte_fallback_counts_any_text(text):
    assume(text != END_OF_TEXT)
    counter = ByteCounter(tokenizer := tokenizer_of("Llama 2"), 1024)
    assert counter.count(np.array([[counter.end_id, *tokenizer.encode(text).ids]])) == len(text.encode())


@pytest.mark.parametrize("size", [30, 1000])
def test_split_documents_keep_their_tokens(tokenizer, size):
    text = random_text(3, 1000)
    parts = list(split_document(text, size, tokenizer))
    assert list(chain(*encode(tokenizer, parts))) == tokenizer.encode(text, add_special_tokens=False).ids


def test_every_kind_splits_unless_tokens_span_words(kind, tokenizer):
    assert max(len(part) for part in split_document(random_text(3), 1000, tokenizer)) < 2000
    parts = list(split_document("the rain " * 1000, 1000, tokenizer))
    assert len(parts) == (1 if kind == "tokens that span words" else 9)


LINES = {
    "paragraphs": "rain\n\n",
    "CSV": "the,rain,1984\r\n",
    "code": "    return\n\n",
    "code with tabs": "\treturn;\n\n\n",
}


@pytest.mark.parametrize("lines", LINES)
@pytest.mark.parametrize("kind", ["byte-level", "Llama 3", "Metaspace never"])
def test_text_without_single_spaces_is_split(kind, lines):
    text, tokenizer = LINES[lines] * 1000, tokenizer_of(kind)
    parts = list(split_document(text, 1000, tokenizer))
    assert max(len(part) for part in parts) < 2000
    assert list(chain(*encode(tokenizer, parts))) == tokenizer.encode(text, add_special_tokens=False).ids
