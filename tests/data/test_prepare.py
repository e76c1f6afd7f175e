"""Text into shards and back: whatever goes in comes out again, and a refused command leaves nothing behind."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from acceleron.data import __main__ as cli
from acceleron.data import prepare as prepare_module
from acceleron.data.prepare import prepare
from acceleron.data.shards import ROW_LENGTH
from acceleron.data.tokenizer import END_OF_TEXT, PAD, find_tokenizer, load_tokenizer, pieces, token_bytes
from acceleron.data.tokenizer import train_tokenizer as train
from acceleron.errors import InputError

WORDS = ["the", "rain", "Spain's", "1984", "—", "żółć", "数据", "🙂", "def f(x):\n    return x\n", "\n\n", "  ", "\t"]


def some_text(seed: int, words: int = 8000) -> str:
    """Text of many lengths of tokens: words, numbers, code, spaces, three alphabets, an emoji."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", "\n", ""]) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer():
    return train([some_text(0)], 400)


# Anything Unicode can write, and separately what the cuts between pieces and the byte-level pattern turn on.
anything = st.text()
mostly_spaces = st.text(st.sampled_from("ab1'.\n\r\t \x1c\x85\xa0\u2028\u3000\u200bé🙂"), max_size=200)


def shard_ids(directory) -> np.ndarray:
    arrays = [np.load(path) for path in sorted(directory.glob("shard_*.npy"))]
    assert all(array.dtype == np.int32 and array.shape[1] == ROW_LENGTH for array in arrays)
    return np.concatenate([array.ravel() for array in arrays])


def assert_written(directory, documents: list[str]):
    """The shards hold the documents in order, each with its mark, but for the last tokens, which fill no row."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    whole = "".join(document + END_OF_TEXT for document in documents)
    found = tokenizer.decode(shard_ids(directory).tolist(), skip_special_tokens=False)
    assert whole.startswith(found.rstrip("\ufffd"))  # the last row may end within a character
    assert len(tokenizer.encode(whole[len(found) :]).ids) < ROW_LENGTH


def test_text_comes_back_from_the_shards(tmp_path):
    documents = [some_text(seed) for seed in range(3)]
    (tmp_path / "in.txt").write_text(END_OF_TEXT.join(documents), encoding="utf-8", newline="")
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=400)
    assert_written(tmp_path / "out", documents)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["shard_00000.npy", "tokenizer.json"]


def test_full_shards_and_a_last_smaller_one(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "ROWS_PER_SHARD", 3)
    documents = [some_text(seed) for seed in range(3)]
    (tmp_path / "in.txt").write_text(END_OF_TEXT.join(documents), encoding="utf-8", newline="")
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=400)
    rows = [len(np.load(path)) for path in sorted((tmp_path / "out").glob("shard_*.npy"))]
    assert rows[:-1] == [3] * (len(rows) - 1)
    assert len(rows) > 2
    assert 1 <= rows[-1] <= 3
    assert_written(tmp_path / "out", documents)


def test_json_lines(tmp_path):
    documents = [some_text(seed) for seed in range(3)]
    lines = [json.dumps({"id": 7, "text": text}) + "\n" for text in documents]
    (tmp_path / "in.jsonl").write_text("".join(lines), encoding="utf-8")
    prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), vocab_size=400)
    assert_written(tmp_path / "out", documents)


def test_a_directory_is_read_in_order_without_hidden_and_binary_files(tmp_path, capsys):
    documents = [some_text(seed) for seed in range(4)]
    source = tmp_path / "in"
    for name, text in zip(("a.txt", "b/deep/x.md", "b/y.txt", "c.jsonl"), documents, strict=True):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"text": text}) if name.endswith(".jsonl") else text
        (source / name).write_text(text, encoding="utf-8", newline="")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("hidden in a directory")
    (source / ".hidden.txt").write_text("hidden")
    (source / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    prepare([str(source)], str(tmp_path / "out"), vocab_size=400)
    assert_written(tmp_path / "out", documents)
    assert "skipped 1 files" in capsys.readouterr().out


def test_a_given_tokenizer_is_used_and_copied(tmp_path, tokenizer):
    """Also one that asks for truncation and padding, as fine-tuning leaves it: that must not cut the text."""
    text = "Short." + END_OF_TEXT + some_text(1)
    (tmp_path / "in.txt").write_text(text, encoding="utf-8", newline="")
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(8)
    other.enable_padding(pad_id=1, pad_token=PAD, length=64)
    other.save(str(tmp_path / "given.json"))
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), tokenizer_path=str(tmp_path / "given.json"))
    ids = shard_ids(tmp_path / "out").tolist()
    expected = [*tokenizer.encode(text).ids, 0]
    assert ids == expected[: len(ids)]
    assert len(expected) - len(ids) < ROW_LENGTH
    assert load_tokenizer(tmp_path / "out" / "tokenizer.json").get_vocab() == tokenizer.get_vocab()


def test_the_trained_tokenizer_has_its_special_tokens_and_size(tokenizer):
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.token_to_id(PAD) == 1
    assert tokenizer.get_vocab_size() == 400
    assert train(["too little to merge"], 8192).get_vocab_size() < 300
    assert len(train([some_text(0)], 258).encode("rain").ids) == 4  # no room for merges: a token a byte


@given(text=anything | mostly_spaces)
def test_the_trained_tokenizer_writes_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(text=anything | mostly_spaces)
def test_token_bytes_add_up_to_the_text(tokenizer, text):
    lengths = token_bytes(tokenizer, 512)
    assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode())


def test_token_bytes_are_none_for_special_and_missing_entries(tokenizer):
    lengths = token_bytes(tokenizer, 512)
    assert lengths.shape == (512,)
    assert not lengths[[0, 1]].any()
    assert not lengths[400:].any()
    assert (lengths[2:400] > 0).all()


@settings(max_examples=500)
@given(text=mostly_spaces, size=st.integers(1, 8))
def test_pieces_have_the_tokens_of_the_whole(tokenizer, text, size):
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    # The words, across which no merge reaches: so it holds for every vocabulary.
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    assert [word for part in parts for word, _ in split(part)] == [word for word, _ in split(text)]


def test_a_long_document_is_cut_into_pieces_of_the_size_asked_for():
    text = some_text(0, words=20_000)
    lengths = [len(part) for part in pieces(text, 1000)]
    assert len(lengths) > 40
    assert max(lengths) < 2000


def test_the_tokenizer_asked_for_wins_over_those_lying_about(tmp_path):
    data, scripts = tmp_path / "data", tmp_path / "scripts"
    assert find_tokenizer(None, data, scripts) is None
    for directory, name in ((scripts, "pile_tokenizer.json"), (data, "pile_tokenizer.json"), (data, "tokenizer.json")):
        directory.mkdir(exist_ok=True)
        (directory / name).touch()
        assert find_tokenizer(None, data, scripts) == directory / name  # each before the ones made so far
    assert find_tokenizer("mine.json", data, scripts).name == "mine.json"


def refused(monkeypatch, capsys, *arguments) -> str:
    """The one line with which `prepare` refuses these arguments."""
    monkeypatch.setattr("sys.argv", ["acceleron.data", "prepare", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]  # after the progress bars
    assert line.startswith("error: ")
    return line


LONG = some_text(0)
REFUSALS = {
    "missing input": ({}, ["--input", "nowhere.txt"], "nowhere.txt does not exist"),
    "an empty directory": ({}, ["--input", "."], "no files there"),
    "empty text": ({"in.txt": " \n"}, [], "fills 0 rows"),
    "too little text": ({"in.txt": "Once. " * 600}, ["--vocab_size", "258"], "fills 1 rows"),
    "a tokenizer and a size": ({"in.txt": LONG}, ["--tokenizer", "t.json", "--vocab_size", "300"], "--vocab_size"),
    "too small a vocabulary": ({"in.txt": LONG}, ["--vocab_size", "10"], "--vocab_size 10"),
    "a missing tokenizer": ({"in.txt": LONG}, ["--tokenizer", "t.json"], "t.json does not exist"),
    "a damaged tokenizer": ({"in.txt": LONG, "t.json": "{"}, ["--tokenizer", "t.json"], "t.json"),
    "binary": ({"in.txt": b"\xff\xfe"}, [], "in.txt: not UTF-8"),
    "bad JSON": ({"in.jsonl": '{"text": "a"}\n{"text": \n'}, ["--input", "in.jsonl"], "in.jsonl, line 2"),
    "JSON without text": ({"in.jsonl": '{"txt": "a"}'}, ["--input", "in.jsonl"], "in.jsonl, line 1"),
    "JSON with a number": ({"in.jsonl": '{"text": 1}'}, ["--input", "in.jsonl"], "in.jsonl, line 1"),
    "half a character": ({"in.jsonl": '{"text": "\\ud83d"}'}, ["--input", "in.jsonl"], "in.jsonl, line 1"),
    "bad JSON in a directory": ({"below/in.jsonl": "{"}, ["--input", "below"], "in.jsonl, line 1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_nothing_behind(case, tmp_path, monkeypatch, capsys):
    files, arguments, culprit = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if "--input" not in arguments:
        arguments = ["--input", "in.txt", *arguments]
    assert culprit in refused(monkeypatch, capsys, *arguments, "--output", "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_shards_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text(LONG, encoding="utf-8")
    arguments = ("--input", tmp_path / "in.txt", "--output", tmp_path, "--vocab_size", 300)
    (tmp_path / "shard_00007.npy").write_text("precious")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "already holds shards" in refused(monkeypatch, capsys, *arguments)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failure_half_way_leaves_the_directory_as_it_was(tmp_path, monkeypatch):
    """The first shards are written by then, but under a name that no training run reads."""
    monkeypatch.setattr(prepare_module, "ROWS_PER_SHARD", 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(LONG, encoding="utf-8")
    (tmp_path / "in" / "b.jsonl").write_text("{")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.md").write_text("mine")
    train([LONG], 300).save(str(tmp_path / "t.json"))
    with pytest.raises(InputError, match=r"b\.jsonl"):
        prepare([str(tmp_path / "in")], str(tmp_path / "out"), tokenizer_path=str(tmp_path / "t.json"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.md"]


def test_real_text_with_the_published_tokenizer(tmp_path, pytestconfig):
    data = pytestconfig.rootpath.parent / "shared" / "data"
    if not (data / "pile_tokenizer.json").is_file() or not (data / "wikitext2-valid.txt").is_file():
        pytest.skip("pile_tokenizer.json and wikitext2-valid.txt are not in ../shared/data")
    prepare([str(data / "wikitext2-valid.txt")], str(tmp_path), tokenizer_path=str(data / "pile_tokenizer.json"))
    text = (data / "wikitext2-valid.txt").read_bytes().decode()
    assert_written(tmp_path, [text])
    tokenizer = Tokenizer.from_file(str(data / "pile_tokenizer.json"))
    ids = tokenizer.encode(text).ids  # in one piece, where prepare encodes several
    assert shard_ids(tmp_path).tolist() == ids[: len(ids) // ROW_LENGTH * ROW_LENGTH]
    assert token_bytes(tokenizer, 50304)[ids].sum() == len(text.encode())
