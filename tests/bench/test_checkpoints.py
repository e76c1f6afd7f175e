"""The cost of a checkpoint, and the check of what is written."""

import numpy as np
import pytest
import torch

from acceleron.training.saver import Saver
from bench import checkpoints, rows

ZEROS, NAN = torch.zeros(2), torch.tensor(float("nan"))


@pytest.mark.parametrize("bit", [0, 1])
def test_a_bit_altered_on_its_way_to_the_file_fails_the_check(bit, monkeypatch, tmp_path):
    """Otherwise the row has ratios. On random tokens, with short steps."""
    ids, copy = np.random.default_rng(0).integers(2048, size=(8, 2048), dtype=np.int32), Saver._copy

    def altered(self, value, key=()):
        copied = copy(self, value, key)
        if not key:
            copied["optimizer"]["state"][3]["exp_avg"].view(torch.int32)[0] ^= bit
        return copied

    monkeypatch.setattr(Saver, "_copy", altered)
    monkeypatch.setattr(checkpoints, "write_corpus", lambda *_: np.save(tmp_path / "shard_00000.npy", ids))
    monkeypatch.setattr(checkpoints, "Shards", lambda _, shards=checkpoints.Shards: shards(tmp_path))
    monkeypatch.setattr(checkpoints, "missing_compiler", lambda device: "none here")
    monkeypatch.setattr(checkpoints, "CPU_BATCH", {"nano": 1})
    monkeypatch.setattr(checkpoints, "CPU_SEQ_LEN", 16)
    flags = ["--interval", "1", "--rounds", "2", "--device", "cpu", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["bench checkpoints", *flags])
    if bit:
        with pytest.raises(SystemExit, match="1"):
            checkpoints.main()
    else:
        checkpoints.main()
    [row] = rows.read(tmp_path / "out")
    assert row.error == 3 * bit  # one in each round, and in the one that warms up
    assert row.complaint().startswith("wrong: tensors" if bit else "")
    assert len(row.values) == 2 * (1 - bit)
    assert row.details["bytes"] > 12e6  # three fp32 values for each of a million parameters
    assert row.details["blocked_seconds"] > 0


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({"a": [ZEROS], "b": NAN, "step": 1}, 0),
        ({"a": [-ZEROS], "b": NAN}, 1),
        ({"a": [ZEROS.double()], "b": NAN}, 1),
        ({"a": [ZEROS]}, 1),
        ({"a": [ZEROS, ZEROS], "b": -NAN}, 2),
    ],
)
def test_tensors_that_differ_in_a_bit_are_counted(found, wrong, monkeypatch, tmp_path):
    saved = checkpoints.tensors_of({"a": [ZEROS], "b": NAN})
    assert checkpoints.wrong_tensors(tmp_path / "not_there.pt", saved) == 2
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda path: found)
    assert checkpoints.wrong_tensors(tmp_path, saved) == wrong
