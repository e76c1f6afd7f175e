"""Malicious checkpoints are rejected: absurd values, code, memory exhaustion, compression."""

import functools
import operator
import pickle
import zipfile

import pytest
import torch
from hostile_files import VOCAB_SIZE, exponential_list, limits, rewrite, use_checkpoint

from acceleron.checkpoint import load_checkpoint
from acceleron.errors import InputError


def test_unmodified_checkpoint_is_accepted(small_run, small_checkpoint):
    """Without this test, a loader that rejects everything would pass."""
    use_checkpoint(small_run, small_checkpoint)
    assert small_run.step == 3


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["format"], torch.zeros(2)),
        (["step"], -1),
        (["tokens"], 2**62),
        (["options", "lr"], torch.zeros(2)),
        (["environment"], {"torch": exponential_list(40)}),
        (["config", "d_model"], 2**40),
        (["config", "num_layers"], exponential_list(40)),
        (["data", "position"], 2**63),
        (["data", "shards", 0, 0], "../shard_00000.npy"),
        (["statistics", "steps"], 10**400),
        (["statistics", "tokens_per_expert_LE"], torch.zeros(1, dtype=torch.int64).expand(10**10)),
        (["optimizer", "state", 0, "exp_avg"], torch.zeros(())),
        (["model", "embedding"], torch.zeros(VOCAB_SIZE, 16, dtype=torch.float64)),
    ],
)
def test_checkpoint_with_an_absurd_value_is_rejected(small_run, small_checkpoint, tmp_path, keys, value):
    contents = torch.load(small_checkpoint, weights_only=True)
    *path, last = keys
    functools.reduce(operator.getitem, path, contents)[last] = value
    torch.save(contents, tmp_path / "bad.pt")
    with limits(str(keys)), pytest.raises(InputError):
        use_checkpoint(small_run, tmp_path / "bad.pt")


# Pickles that run code, one per opcode that can.
COMMAND = b"X\x0c\x00\x00\x00touch sprung"
CODE = {
    "GLOBAL and REDUCE": b"cposix\nsystem\n" + COMMAND + b"\x85R.",
    "INST": b"(" + COMMAND + b"iposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\n" + COMMAND + b"o.",
    "NEWOBJ": b"csubprocess\nPopen\n" + COMMAND + b"\x85\x81.",
    "STACK_GLOBAL": b"\x8c\x05posix\x8c\x06system\x93" + COMMAND + b"\x85R.",
    "BUILD": b"cposix\nsystem\n}X\x08\x00\x00\x00__dict__" + COMMAND + b"sb.",
    "BUILD of an OrderedDict": b"ccollections\nOrderedDict\n)R}X\x0a\x00\x00\x00__reduce__cposix\nsystem\nsb.",
    "nested": b"](cos.path\ngenericpath.os.system\n" + COMMAND + b"\x85Re.",
}


@pytest.mark.parametrize("case", CODE)
def test_pickle_that_would_run_code_is_rejected_by_name(small_checkpoint, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    rewrite(small_checkpoint, tmp_path / "bad.pt", lambda name, c: [(name, CODE[case] if "data.pkl" in name else c)])
    with pytest.raises(
        InputError, match=r"bad\.pt: unsafe: .*would run .*(posix\.system|subprocess\.Popen|os\.system)"
    ):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "sprung").exists()


def test_malicious_pickles_really_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for case in ("GLOBAL and REDUCE", "INST", "OBJ", "STACK_GLOBAL"):
        pickle.loads(b"\x80\x04" + CODE[case])
        (tmp_path / "sprung").unlink()


MEMORY = {
    "bytearray": b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "FloatTensor": b"ctorch\nFloatTensor\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "bytes": b"\x8e\x00\x00\x00\x00\x00\x01\x00\x00.",
    "int": b"\x8b\xff\xff\xff\x7f.",
    "nesting": b"(" * 10**5 + b"t" * 10**5 + b".",
    "itself": b"]q\x00h\x00a.",
}


@pytest.mark.parametrize("case", MEMORY)
def test_pickle_that_exhausts_memory_is_rejected(small_checkpoint, tmp_path, case):
    rewrite(small_checkpoint, tmp_path / "bad.pt", lambda name, c: [(name, MEMORY[case] if "data.pkl" in name else c)])
    with limits(case), pytest.raises(InputError, match=r"bad\.pt"):
        load_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize("level", [0, 9])
def test_compressed_record_is_rejected(small_checkpoint, tmp_path, level):
    """Covers a zip bomb, and valid weights that torch would read in compressed form."""

    def change(name, content):
        return [(name, bytes(1 << 28) if level and name.endswith("data/0") else content)]

    rewrite(small_checkpoint, tmp_path / "bad.pt", change, compression=zipfile.ZIP_DEFLATED, compresslevel=level)
    assert (tmp_path / "bad.pt").stat().st_size < 1 << 20
    with limits("bomb"), pytest.raises(InputError, match=r"bad\.pt: not written by torch\.save"):
        load_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize("extra", [torch.zeros(1).expand(10**10), [torch.zeros(10**5)] * 100])
def test_checkpoint_with_tensors_larger_than_the_file_is_rejected(small_checkpoint, tmp_path, extra):
    torch.save(torch.load(small_checkpoint, weights_only=True) | {"extra": extra}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match=r"bad\.pt: damaged: its tensors are larger than the file"):
        load_checkpoint(tmp_path / "bad.pt")
