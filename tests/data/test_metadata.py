"""shards.json records the tokenizer and the shards; a damaged file raises a one-line error."""

import hashlib
import json
import os
import re

import pytest
from counting_shards import ROWS, write_shards

from acceleron.data import Shards
from acceleron.data.shards import METADATA, metadata
from acceleron.errors import InputError

SHARDS = {f"shard_{index:05d}.npy": rows for index, rows in enumerate(ROWS)}


@pytest.fixture
def path(tmp_path):
    write_shards(tmp_path)
    (tmp_path / METADATA).write_bytes(metadata(b"{}", 300, SHARDS))
    return tmp_path / METADATA


def error_for(path) -> str:
    with pytest.raises(InputError) as raised:
        Shards(path.parent)
    assert len(str(raised.value)) < 300 + len(str(path))
    assert str(raised.value).isprintable()
    return str(raised.value)


def test_check_tokenizer_compares_content(path, tmp_path):
    shards = Shards(tmp_path)
    assert shards.num_rows.tolist() == list(ROWS)
    assert json.loads(path.read_text())["tokenizer_sha256"] == hashlib.sha256(b"{}").hexdigest()
    (tmp_path / "same.json").write_text("{}")
    (tmp_path / "other.json").write_text("[]")
    assert shards.check_tokenizer(tmp_path / "same.json")
    with pytest.raises(InputError, match=r"other\.json is not the tokenizer of .* one with 300 ids: pass"):
        shards.check_tokenizer(tmp_path / "other.json")
    path.unlink()
    assert not Shards(tmp_path).check_tokenizer(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "\x1b[2J\n"}, r"its format is '\x1b[2J\n', not 1"),
        ({"format": 10**299}, "its format is 10000"),
        ({"format": [[1] * 999] * 999}, "its format is [[1, "),
        ({"vocab_size": 10**299}, "10000"),
        ({"vocab_size": "\x1b[2J"}, r"'\x1b[2J' is not a valid number of ids or rows"),
        ({"shards": SHARDS | {"shard_00000.npy": 10**299}}, "10000"),
        ({"shards": SHARDS | {"shard_00000.npy": 130.5}}, "130.5 is not a valid number of ids or rows"),
        ({"shards": SHARDS | {"shard_00000.npy": -1}}, "-1 is not a valid number of ids or rows"),
    ],
    ids=range(8),
)
def test_damaged_value_is_quoted_in_the_error(path, changes, reason):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert re.match(re.escape(f"{path}: damaged or from a different version ({reason}"), error_for(path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_shards_json_must_be_a_regular_file(path, make):
    path.unlink()
    make(path)
    assert error_for(path) == f"{path}: not a regular file; remove it or prepare the data again"
