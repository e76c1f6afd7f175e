"""The cost of a checkpoint: what its figures are of, and its check."""

import numpy as np
import pytest
import torch

from acceleron.training.saver import Saver
from bench import checkpoints, rows


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the command on random shards with an interval of 4 steps, not compiled. Returns the run, and its row."""

    def write_corpus(directory, vocab_size, characters):
        checkpoints.Path(directory).mkdir(parents=True)
        ids = np.random.default_rng(0).integers(vocab_size, size=(8, 2048), dtype=np.int32)
        np.save(f"{directory}/shard_00000.npy", ids)
        return "random ids"

    monkeypatch.setattr(checkpoints, "write_corpus", write_corpus)
    monkeypatch.setattr(checkpoints, "missing_compiler", lambda device: "none here")
    monkeypatch.setattr(checkpoints, "CPU_BATCH", {"nano": 1})
    monkeypatch.setattr(checkpoints, "CPU_SEQ_LEN", 16)

    def run_command():
        flags = ["--interval", "4", "--rounds", "2", "--device", "cpu", "--output", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["bench checkpoints", *flags])
        checkpoints.main()
        [row] = rows.read(tmp_path / "out")
        return row

    return run_command


def test_the_ratio_is_of_the_same_steps_with_save_and_write_within_them(bench, monkeypatch):
    """A step takes 1 s of a made clock, the start of saving 0.1 s, and the end of the write 0.5 s."""
    now, step, save, wait = [0.0], checkpoints.Run.step, Saver.save, Saver.wait

    def takes(seconds, call):
        def timed(self, *args):
            now[0] += seconds(self) if callable(seconds) else seconds
            return call(self, *args)

        return timed

    monkeypatch.setattr(checkpoints.Run, "step", takes(1.0, step))
    monkeypatch.setattr(Saver, "save", takes(0.1, save))
    monkeypatch.setattr(Saver, "wait", takes(lambda saver: 0.5 * (saver._thread is not None), wait))
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: now[0])
    row = bench()
    assert not row.complaint()
    assert row.values == pytest.approx([4.6 / 4] * 2)
    assert row.details["interval_seconds"] == pytest.approx(4.0)
    assert row.details["blocked_seconds"] == pytest.approx(0.1)
    assert row.details["bytes"] > 3 * 4 * 1e6


def test_a_tensor_altered_on_its_way_to_the_file_fails_the_check(bench, monkeypatch, tmp_path):
    copy = Saver._copy

    def altered(self, value, key=()):
        copied = copy(self, value, key)
        if not key:
            copied["optimizer"]["state"][3]["exp_avg"].view(torch.int32)[0] ^= 1
        return copied

    monkeypatch.setattr(Saver, "_copy", altered)
    with pytest.raises(SystemExit, match="1"):
        bench()
    [row] = rows.read(tmp_path / "out")
    assert "wrong: tensors that differ" in row.failed
    assert row.error == 3  # one in each of the two rounds, and of the round that warms up


ZEROS, NAN = torch.zeros(2), torch.tensor(float("nan"))


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
