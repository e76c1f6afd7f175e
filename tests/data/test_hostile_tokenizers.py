"""Hostile tokenizer files either raise an error that names the cause or load safely."""

import base64
import json
import os

import pytest
from hostile_files import PADDING, REPLACE, TOKENIZER, limits
from tokenizers import Tokenizer

from acceleron.data.tokenizer import find_tokenizer, load_tokenizer
from acceleron.errors import InputError


def charsmap(content: bytes) -> dict:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def with_model(**changes) -> dict:
    return TOKENIZER | {"model": TOKENIZER["model"] | changes}


def with_id(token_id: int) -> dict:
    return with_model(vocab=TOKENIZER["model"]["vocab"] | {"word": token_id})


def with_token(content: str) -> dict:
    tokens = TOKENIZER["added_tokens"]
    return TOKENIZER | {"added_tokens": [*tokens, tokens[0] | {"content": content}]}


# Some of these crash the process when the library loads them.
HOSTILE_TOKENIZERS = {
    "id 2**24": (with_id(2**24), "token id 16777216"),
    "id 2**32 - 1": (with_id(2**32 - 1), "token id 4294967295"),
    "id 2**32": (with_id(2**32), "4294967296"),
    "prefix": (with_model(continuing_subword_prefix="#" * 50), "continuing_subword_prefix"),
    "charsmap": (TOKENIZER | {"normalizer": charsmap(b"\xff\xff\xff\xff")}, "Precompiled"),
    "untyped charsmap": (TOKENIZER | {"normalizer": {"precompiled_charsmap": "/////w=="}}, "None"),
    "chunks of 0": (TOKENIZER | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "FixedLength"),
    "strip": (TOKENIZER | {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 2**63}}, "Strip"),
    "longer": (TOKENIZER | {"normalizer": REPLACE | {"content": "aaaaaaaa"}}, "Replace"),
    "pattern": (TOKENIZER | {"normalizer": REPLACE | {"pattern": {"Regex": ""}}}, "Replace"),
    "sequence": (TOKENIZER | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}}, "16"),
    "long token": (with_token("x" * 10**6), "too long"),
    "long tokens": (TOKENIZER | {"model": {"type": "Unigram", "vocab": [["x" * 900, 0]] * 5000}}, "too long"),
    "duplicate key": (json.dumps(TOKENIZER).replace('"vocab"', '"vocab": {}, "vocab"'), "duplicate"),
    "nested": ("[" * 10**6, "recursion"),
    "not UTF-8": (json.dumps(TOKENIZER).encode().replace(b"word", b"w\xffrd"), "utf-8"),
    "lone surrogate": (json.dumps(TOKENIZER).replace("word", "\\ud800"), "hex escape"),
    "digits": (json.dumps(TOKENIZER).replace("299", "9" * 5000), "digits"),
    "large": (b" " * ((64 << 20) + 1), "64 MiB"),
}


@pytest.mark.parametrize("case", HOSTILE_TOKENIZERS)
def test_hostile_tokenizers_are_rejected(tmp_path, case):
    document, culprit = HOSTILE_TOKENIZERS[case]
    text = json.dumps(document) if isinstance(document, dict) else document
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with limits(case), pytest.raises(InputError) as raised:
        load_tokenizer(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert culprit in str(raised.value)


def test_extreme_padding_and_truncation_are_disabled(tmp_path):
    path = tmp_path / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 2**64 - 1, "strategy": "LongestFirst", "stride": 2**64 - 1}
    padding = PADDING | {"strategy": {"Fixed": 2**40}, "pad_to_multiple_of": 0}
    path.write_text(json.dumps(TOKENIZER | {"truncation": truncation, "padding": padding}))
    with limits("padding"):
        assert load_tokenizer(path).encode("word1").ids == Tokenizer.from_str(json.dumps(TOKENIZER)).encode("word1").ids


def test_library_panic_becomes_an_input_error(tmp_path):
    path = tmp_path / "tokenizer.json"
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    template["single"] = [{"Sequence": {"id": "B", "type_id": 1}}]  # the second text of a pair
    path.write_text(json.dumps(TOKENIZER | {"post_processor": template}))
    with pytest.raises(InputError, match=r"tokenizer\.json: not a valid tokenizer\.json .*out of bounds"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("make", "reason"), [(os.mkfifo, "is neither a file nor a directory"), (os.mkdir, "is a directory: pass a file")]
)
def test_tokenizer_must_be_a_regular_file(tmp_path, make, reason):
    for name in ("data", "scripts"):
        (tmp_path / name).mkdir()
    (tmp_path / "scripts" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    make(tmp_path / "data" / "tokenizer.json")
    with pytest.raises(InputError, match=rf"data/tokenizer\.json {reason}"):
        load_tokenizer(find_tokenizer(None, tmp_path / "data", tmp_path / "scripts"))
