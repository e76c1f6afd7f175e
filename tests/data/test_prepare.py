"""prepare: shards decode to the input text, and a rejected command leaves no files."""

import bz2
import gzip
import json
import lzma
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_tokenizers import TOKENIZERS, random_text
from tokenizers import Tokenizer

from acceleron.data import __main__ as cli
from acceleron.data import prepare as prepare_module
from acceleron.data.prepare import prepare, read_documents
from acceleron.data.shards import ROW_LENGTH, Shards
from acceleron.data.tokenizer import END_OF_TEXT, PAD, ByteCounter, find_tokenizer, split_document
from acceleron.data.tokenizer import train_tokenizer as train
from acceleron.errors import InputError, RunFailed


@pytest.fixture(scope="module")
def tokenizer():
    return train([random_text(0)], 400)


# Any Unicode text, and text made of characters that affect splits and byte-level pre-tokenization.
anything = st.text().filter(lambda text: END_OF_TEXT not in text and PAD not in text)
mostly_spaces = st.text(st.sampled_from("ab1'.\n\r\t \x1c\x85\xa0\u2028\u3000\u200bé🙂"), max_size=200)


def shard_ids(directory) -> np.ndarray:
    arrays = [np.load(path) for path in sorted(directory.glob("shard_*.npy"))]
    assert all(array.dtype == np.int32 and array.shape[1] == ROW_LENGTH for array in arrays)
    return np.concatenate([array.ravel() for array in arrays])


def assert_shards_contain(directory, documents: list[str]):
    """The shards contain the documents in order, each followed by end-of-text, without the last partial row."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    whole = "".join(document + END_OF_TEXT for document in documents)
    found = tokenizer.decode(shard_ids(directory).tolist(), skip_special_tokens=False)
    assert whole.startswith(found.rstrip("\ufffd"))  # the last row can end inside a character
    assert len(tokenizer.encode(whole[len(found) :]).ids) < ROW_LENGTH


def test_shards_decode_to_the_input_text(tmp_path):
    documents = [random_text(seed) for seed in range(3)]
    (tmp_path / "in.txt").write_text(END_OF_TEXT.join(documents), encoding="utf-8", newline="")
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=400)
    assert_shards_contain(tmp_path / "out", documents)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "shard_00000.npy",
        "shards.json",
        "tokenizer.json",
    ]


def test_all_shards_but_the_last_are_full(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "ROWS_PER_SHARD", 3)
    documents = [random_text(seed) for seed in range(3)]
    (tmp_path / "in.txt").write_text(END_OF_TEXT.join(documents), encoding="utf-8", newline="")
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=400)
    rows = [len(np.load(path)) for path in sorted((tmp_path / "out").glob("shard_*.npy"))]
    assert rows[:-1] == [3] * (len(rows) - 1)
    assert len(rows) > 2
    assert 1 <= rows[-1] <= 3
    assert_shards_contain(tmp_path / "out", documents)


def test_shards_that_differ_from_shards_json_are_rejected(tmp_path, monkeypatch):
    """Shards with a different size and extra shards are errors. Missing shards are fine: downloads can be partial."""
    monkeypatch.setattr(prepare_module, "ROWS_PER_SHARD", 3)
    write(tmp_path / "in.txt", random_text(0))
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=400)
    first, second, *others = sorted((tmp_path / "out").glob("shard_*.npy"))
    for path in others:
        path.unlink()
    assert Shards(tmp_path / "out").num_rows.tolist() == [3, 3]
    np.save(second, np.load(first)[:2])
    with pytest.raises(InputError, match=r"shard_00001\.npy has 2 rows, but 3 in .*shards\.json"):
        Shards(tmp_path / "out")
    second.rename(tmp_path / "out" / "shard_00077.npy")
    with pytest.raises(InputError, match=r"shard_00077\.npy is not in .*shards\.json"):
        Shards(tmp_path / "out")


def test_json_lines_files_are_read(tmp_path):
    documents = [random_text(seed) for seed in range(3)]
    lines = [json.dumps({"id": 7, "text": text}) + "\n" for text in documents]
    (tmp_path / "in.jsonl").write_text("".join(lines), encoding="utf-8")
    prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), vocab_size=400)
    assert_shards_contain(tmp_path / "out", documents)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def json_lines(*documents: str) -> str:
    return "".join(json.dumps({"text": document}) + "\n" for document in documents)


LINES = json_lines("The rain in Spain. " * 9).encode()
CONVERT = "decompress it or convert it to UTF-8 text"
BINARY = {
    "in.jsonl.gz": gzip.compress(LINES),
    "in.jsonl.bz2": bz2.compress(LINES),
    "in.jsonl.xz": lzma.compress(LINES),
    "in.jsonl.zst": b"\x28\xb5\x2f\xfd" + LINES,
    "in.zip": b"PK\3\4\x14\0" + LINES,
    "in.parquet": b"PAR1" + LINES + b"\x40\0\0\0PAR1",
    "in.npy": b"\x93NUMPY\1\0" + LINES,
    "picture.png": b"\x89PNG\r\n\x1a\n",
}


def test_directory_is_read_in_order_and_skipped_files_are_logged(tmp_path, capsys):
    documents = [random_text(seed, 2000) for seed in range(8)]
    source = tmp_path / "in"
    names = ("a.txt", "b/deep/x.md", "b/y.txt", "c.JSONL", "d.NDJson", "e.json", "f.jsonlines", "g.JL")
    for name, text in zip(names, documents, strict=True):
        write(source / name, text if name.endswith(("txt", "md")) else json_lines(text))
    write(source / "windows.txt", "text".encode("utf-16"))
    for name, content in BINARY.items():
        write(source / name, content)
    write(source / ".git" / "config", "hidden in a directory")
    write(source / ".hidden.txt", "hidden")
    (source / "broken").symlink_to("nowhere")
    os.mkfifo(source / "pipe")
    prepare([str(source)], str(tmp_path / "out"), vocab_size=400)
    assert_shards_contain(tmp_path / "out", documents)
    log = capsys.readouterr().err
    for name in BINARY:
        assert re.search(rf"skipped: {source}/{re.escape(name)} \((not UTF-8|contains NUL) .*: {CONVERT}\)", log)
    assert f"skipped: {source}/windows.txt (UTF-16 text; convert it with" in log
    assert f"{source}/broken (cannot be read (No such file or directory))" in log
    assert f"{source}/pipe (neither a file nor a directory; save it to a file)" in log
    assert f"skipped: 2 hidden files and directories, such as {source}/.git" in log
    assert log.count("skipped:") == len(BINARY) + 4


def test_links_are_followed_and_each_file_is_read_once(tmp_path, capsys):
    documents = [random_text(seed, 3000) for seed in range(3)]
    source, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    write(source / "a.txt", documents[0])
    write(elsewhere / "b.txt", documents[1])
    write(source / "c.txt", documents[2])
    (source / "b").symlink_to(elsewhere)
    (source / "b" / "loop").symlink_to(source)
    (source / "copy.txt").symlink_to(source / "a.txt")
    inputs = [source, source / "c.txt", elsewhere, source / ".." / "in" / "a.txt"]
    prepare([str(path) for path in inputs], str(tmp_path / "out"), vocab_size=400)
    assert_shards_contain(tmp_path / "out", documents)
    log = capsys.readouterr().err
    for path in (source / "b" / "loop", source / "copy.txt", *inputs[2:]):
        assert f"skipped: {path} (the same file as " in log
    assert f"skipped: {source / 'c.txt'} (given twice)" in log
    assert log.count("skipped:") == 5


def test_log_of_skipped_files_is_limited(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "MAX_SKIPPED_LOGGED", 3)
    write(tmp_path / "in" / "a.txt", random_text(0))
    for number in range(5):
        write(tmp_path / "in" / f"{number}.png", b"\x89")
    prepare([str(tmp_path / "in")], str(tmp_path / "out"), vocab_size=400)
    log = capsys.readouterr().err
    assert log.count("skipped: ") == 4
    assert "skipped: 5 files in total" in log


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl"])
def test_byte_order_mark_is_dropped(tmp_path, name):
    text = random_text(0)
    write(tmp_path / name, b"\xef\xbb\xbf" + (json_lines(text) if "json" in name else text).encode())
    prepare([str(tmp_path / name)], str(tmp_path / "out"), vocab_size=400)
    assert_shards_contain(tmp_path / "out", [text])


def test_unusual_but_valid_json_lines_are_read(tmp_path):
    """The text can contain NUL and escaped surrogate pairs. Other fields can contain any JSON."""
    text = random_text(0) + "\0 🙂"
    line = json.dumps({"x": "\ud800", "n": 10**400, "text": text, "deep": {"text": None}})
    assert "\\ud83d\\ude42" in line
    write(tmp_path / "in.jsonl", f"\n{line}\r\n \n")
    prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), vocab_size=400)
    assert_shards_contain(tmp_path / "out", [text])


def test_splitting_long_documents_keeps_their_tokens(tmp_path, monkeypatch):
    """Covers two tokenizers that mark the start of the text. Only one of them allows splits."""
    for kind in ("Llama 2", "tokens that span words"):
        documents = [random_text(seed, 3000) for seed in range(3)]
        tokenizer = TOKENIZERS[kind]()
        tokenizer.save(str(tmp_path / "given.json"))
        write(tmp_path / "in.txt", END_OF_TEXT.join(documents))
        monkeypatch.setattr(prepare_module, "PIECE_CHARACTERS", 5000)
        monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 7000)
        prepare([str(tmp_path / "in.txt")], str(tmp_path / kind), tokenizer_path=str(tmp_path / "given.json"))
        expected = [token for text in documents for token in (*tokenizer.encode(text).ids, 0)]
        ids = shard_ids(tmp_path / kind).tolist()
        assert ids == expected[: len(ids)]
        assert len(expected) - len(ids) < ROW_LENGTH


def test_given_tokenizer_is_used_and_copied(tmp_path, tokenizer):
    """Truncation and padding settings, which fine-tuning can leave in a file, must not change the text."""
    text = "Short." + END_OF_TEXT + random_text(1)
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
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "given.json").read_bytes()


def test_trained_tokenizer_has_special_tokens_and_requested_size(tokenizer):
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.token_to_id(PAD) == 1
    assert tokenizer.get_vocab_size() == 400
    assert train(["too little to merge"], 8192).get_vocab_size() < 300
    assert len(train([random_text(0)], 258).encode("rain").ids) == 4  # no room for merges: one token per byte


@given(text=anything | mostly_spaces)
def test_trained_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(text=anything | mostly_spaces)
def test_token_bytes_sum_to_the_text_bytes(tokenizer, text):
    assert ByteCounter(tokenizer, 512).count(np.array([[0, *tokenizer.encode(text).ids]])) == len(text.encode())


def test_token_bytes_are_zero_for_special_and_missing_ids(tokenizer):
    table = ByteCounter(tokenizer, 512).table
    assert table.shape == (2, 512)
    assert not table[:, [0, 1]].any()
    assert not table[:, 400:].any()
    assert (table[:, 2:400] > 0).all()


@settings(max_examples=500)
@given(text=mostly_spaces, size=st.integers(1, 8))
def test_split_keeps_pre_tokenizer_words(tokenizer, text, size):
    parts = list(split_document(text, size))
    assert "".join(parts) == text
    # Merges never cross word boundaries, so equal words mean equal tokens for every vocabulary.
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    assert [word for part in parts for word, _ in split(part)] == [word for word, _ in split(text)]


def test_long_document_is_split_at_the_requested_size():
    text = random_text(0, words=20_000)
    lengths = [len(part) for part in split_document(text, 1000)]
    assert len(lengths) > 40
    assert max(lengths) < 2000


def test_find_tokenizer_prefers_the_flag_then_the_first_directory(tmp_path):
    data, scripts = tmp_path / "data", tmp_path / "scripts"
    assert find_tokenizer(None, data, scripts) is None
    for directory, name in ((scripts, "pile_tokenizer.json"), (data, "pile_tokenizer.json"), (data, "tokenizer.json")):
        directory.mkdir(exist_ok=True)
        (directory / name).touch()
        assert find_tokenizer(None, data, scripts) == directory / name  # takes precedence over all files above
    assert find_tokenizer("mine.json", data, scripts).name == "mine.json"


def error_line(monkeypatch, capsys, *arguments) -> str:
    """Run `prepare` with bad arguments and return its one-line error."""
    monkeypatch.setattr("sys.argv", ["acceleron.data", "prepare", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]  # skip the progress bars
    assert line.startswith("error: ")
    return line


LONG = random_text(0)
REJECTED = {
    "a missing input": ({}, ["--input", "nowhere.txt"], "--input nowhere.txt does not exist"),
    "an empty directory": ({"below/.hidden": ""}, ["--input", "below"], "no files found"),
    "the output": ({"out/in.txt": LONG}, ["--input", "out"], "out is or contains the output"),
    "a parent of the output": ({"in.txt": LONG}, ["--input", "."], ". is or contains the output"),
    "a device": ({}, ["--input", "/dev/null"], "/dev/null: neither a file nor a directory"),
    "empty text": ({"in.txt": " \n"}, [], "fills 0 rows"),
    "too little text": ({"in.txt": "Once. " * 600}, ["--vocab_size", "258"], "fills 1 rows"),
    "a tokenizer and a size": ({"in.txt": LONG}, ["--tokenizer", "t.json", "--vocab_size", "300"], "--vocab_size"),
    "too small a vocabulary": ({"in.txt": LONG}, ["--vocab_size", "10"], "--vocab_size 10"),
    "a missing tokenizer": ({"in.txt": LONG}, ["--tokenizer", "t.json"], "t.json does not exist"),
    "a damaged tokenizer": ({"in.txt": LONG, "t.json": "{"}, ["--tokenizer", "t.json"], "t.json"),
    "UTF-16": ({"in.txt": "text".encode("utf-16")}, [], "in.txt: UTF-16 text"),
    "UTF-16 without a BOM": ({"in.txt": LONG.encode("utf-16-le")}, [], "in.txt: contains NUL characters"),
    "UTF-32": ({"in.txt": "text".encode("utf-32")}, [], "in.txt: UTF-32 text"),
    "UTF-32, big-endian": ({"in.txt": b"\0\0\xfe\xff" + "text".encode("utf-32-be")}, [], "in.txt: UTF-32 text"),
    "UTF-16 lines": ({"in.jsonl": "{}".encode("utf-16")}, ["--input", "in.jsonl"], "in.jsonl, line 1: UTF-16 text"),
    "bad JSON": ({"in.jsonl": '{"text": "a"}\n{"text": \n'}, ["--input", "in.jsonl"], "in.jsonl, line 2"),
    "JSON without text": ({"in.jsonl": '{"txt": "a"}'}, ["--input", "in.jsonl"], "in.jsonl, line 1"),
    "JSON with a number": ({"in.jsonl": '{"text": 1}'}, ["--input", "in.jsonl"], "in.jsonl, line 1"),
    "a lone surrogate": ({"in.jsonl": '{"text": "\\ud83d"}'}, ["--input", "in.jsonl"], "in.jsonl, line 1"),
    "bad JSON in a directory": ({"below/in.jsonl": "{"}, ["--input", "below"], "in.jsonl, line 1"),
    "other JSON in a directory": ({"below/in.json": '{\n"text": ""}'}, ["--input", "below"], "rename it to .txt"),
}
for name, content in BINARY.items():
    REJECTED[name] = ({name: content}, ["--input", name], CONVERT)
for name in ("shards.json", "tokenizer.json"):
    REJECTED[f"a prepared directory: {name}"] = (
        {"below/in.txt": LONG, f"below/{name}": "{}"},
        ["--input", "below"],
        f"--input below is already prepared: it contains {name}",
    )
EXTREME_LINES = {
    "nested": '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"text": "a", "x": ' + "9" * 5000 + "}",
    "lone surrogate": '{"text": "a\\ud800"}',
    "NUL": '{"text": "a\0"}',
    "only NUL": "\0" * 4096,
    "duplicate key": '{"text": "a", "text": "b"}',
    "null": '{"text": null}',
    "list": '{"text": ["a"]}',
    "not UTF-8": b'{"text": "\xff"}',
    "long": '{"text": "' + "a" * 300_000 + '"}',
    "not an object": '["text"]',
}
for case, line in EXTREME_LINES.items():
    content = b'{"text": "good"}\n\n' + (line if isinstance(line, bytes) else line.encode())
    REJECTED[f"an extreme line: {case}"] = ({"in.jsonl": content}, ["--input", "in.jsonl"], "in.jsonl, line 3: ")


BAD_LINES = {
    '{"text": null}': '"text" is null',
    '{"text": [1]}': '"text" is an array',
    '{"text": true}': '"text" is a boolean',
    '{"id": 1, "body\\n": ""}': r'no "text" key; the keys are id, body\n',
    "{}": 'no "text" key; the keys are none',
    '["text"]': "the line is an array",
    "null": "the line is null",
    "{": "not JSON (Expecting property name enclosed in double quotes)",
    '{"text": "a", "text": "b"}': "not JSON (duplicate key in an object)",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_error_describes_an_invalid_json_line(line, tmp_path):
    write(tmp_path / "in.jsonl", line)
    with pytest.raises(InputError) as raised:
        list(read_documents(tmp_path / "in.jsonl"))
    assert str(raised.value).startswith(f"{tmp_path / 'in.jsonl'}, line 1: {BAD_LINES[line]}; each line must be ")


def test_file_with_only_a_byte_order_mark_is_empty(tmp_path):
    write(tmp_path / "in.jsonl", b"\xef\xbb\xbf")
    assert list(read_documents(tmp_path / "in.jsonl")) == []


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_input_leaves_no_files(case, tmp_path, monkeypatch, capsys):
    files, arguments, culprit = REJECTED[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_module, "MAX_LINE_BYTES", 1 << 18)
    for name, content in files.items():
        write(tmp_path / name, content)
    before = sorted(tmp_path.rglob("*"))
    if "--input" not in arguments:
        arguments = ["--input", "in.txt", *arguments]
    line = error_line(monkeypatch, capsys, *arguments, "--output", "out")
    assert culprit in line
    assert len(line) < 300
    assert sorted(tmp_path.rglob("*")) == before


def test_output_with_shards_is_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text(LONG, encoding="utf-8")
    arguments = ("--input", tmp_path / "in.txt", "--output", tmp_path, "--vocab_size", 300)
    (tmp_path / "shard_00007.npy").write_text("precious")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "already contains prepared data (shard_00007.npy)" in error_line(monkeypatch, capsys, *arguments)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_output_with_a_different_tokenizer_is_not_overwritten(tmp_path, monkeypatch, capsys, tokenizer):
    """Passing the existing file with --tokenizer is allowed."""
    write(tmp_path / "in.txt", LONG)
    own = tmp_path / "out" / "tokenizer.json"
    own.parent.mkdir()
    tokenizer.save(str(own), pretty=False)
    train([LONG], 300).save(str(tmp_path / "other.json"))
    content = own.read_bytes()
    arguments = ("--input", tmp_path / "in.txt", "--output", own.parent)
    for choice in ((), ("--tokenizer", tmp_path / "other.json")):
        assert "out already contains a different tokenizer.json" in error_line(monkeypatch, capsys, *arguments, *choice)
    assert [path.name for path in own.parent.iterdir()] == ["tokenizer.json"]
    prepare([str(tmp_path / "in.txt")], str(own.parent), tokenizer_path=str(own))
    assert own.read_bytes() == content
    assert_shards_contain(own.parent, [LONG])


def test_failed_prepare_removes_only_directories_it_created(tmp_path):
    write(tmp_path / "in.txt", " ")
    (tmp_path / "empty").mkdir()
    for output in ("empty", "new/a/b"):
        with pytest.raises(InputError, match="fills 0 rows"):
            prepare([str(tmp_path / "in.txt")], str(tmp_path / output), vocab_size=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "in.txt"]


def test_late_failure_leaves_the_output_unchanged(tmp_path, monkeypatch):
    """The first shards are written by then, but only to the staging directory."""
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_reported_and_leaves_no_output(tmp_path, monkeypatch):
    write(tmp_path / "in.txt", LONG)
    plain = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode: plain(Path("/dev/full") if path.suffix == ".npy" else path, mode)
    )
    with pytest.raises(RunFailed, match=f"--output {tmp_path / 'out'}: cannot be written .No space left on device"):
        prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=400)
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moves", range(4))
def test_interrupted_file_moves_are_detected_or_undone(tmp_path, monkeypatch, moves):
    """An error or Ctrl-C leaves no files. After a kill, prepare starts over unless it has already moved files."""
    monkeypatch.setattr(prepare_module, "ROWS_PER_SHARD", 1)
    write(tmp_path / "in.txt", random_text(0))
    rename, moved = Path.replace, []

    def replace(path, target):
        if len(moved) == moves:
            raise Killed
        moved.append(target)
        rename(path, target)

    def prepare_until_killed(killed=False):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            if killed:
                patch.setattr(Path, "unlink", lambda path: None)
                patch.setattr(prepare_module.shutil, "rmtree", lambda path: None)
            with pytest.raises(Killed):
                prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=400)
        assert len(moved) == moves

    prepare_until_killed()
    assert not (tmp_path / "out").exists()
    moved.clear()
    prepare_until_killed(killed=True)
    assert len([path for path in (tmp_path / "out").iterdir() if path.is_file()]) == moves
    if moves:
        with pytest.raises(InputError, match=r"out contains \.prepare: .* empty the directory"):
            Shards(tmp_path / "out")
        with pytest.raises(InputError, match=r"already contains prepared data \(shard_.*remove"):
            prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=400)
    else:
        prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), vocab_size=400)
        assert_shards_contain(tmp_path / "out", [random_text(0)])


def test_real_text_with_the_published_tokenizer(tmp_path, pytestconfig):
    data = pytestconfig.rootpath.parent / "shared" / "data"
    if not (data / "pile_tokenizer.json").is_file() or not (data / "wikitext2-valid.txt").is_file():
        pytest.skip("pile_tokenizer.json and wikitext2-valid.txt are not in ../shared/data")
    prepare([str(data / "wikitext2-valid.txt")], str(tmp_path), tokenizer_path=str(data / "pile_tokenizer.json"))
    text = (data / "wikitext2-valid.txt").read_bytes().decode()
    assert_shards_contain(tmp_path, [text])
    tokenizer = Tokenizer.from_file(str(data / "pile_tokenizer.json"))
    ids = tokenizer.encode(text).ids  # prepare encodes the text in several pieces
    assert shard_ids(tmp_path).tolist() == ids[: len(ids) // ROW_LENGTH * ROW_LENGTH]
    assert ByteCounter(tokenizer, 50304).count(np.array([[0, *ids]])) == len(text.encode())
