"""What a checkpoint costs: the figures are of what they say, and a checkpoint that is not what was saved is told."""

import time

import numpy as np
import pytest
import torch

from acceleron import kernels
from acceleron.errors import InputError
from acceleron.training.options import TrainOptions
from acceleron.training.saver import Saver
from bench import checkpoints
from bench import rows as fields
from bench.results import complaint
from bench.worker import NANO_VOCAB, Case, build


@pytest.fixture
def run(tmp_path):
    """Of a nano model on random shards, not compiled."""
    (tmp_path / "data").mkdir()
    ids = np.random.default_rng(0).integers(NANO_VOCAB, size=(8, 2048), dtype=np.int32)
    np.save(tmp_path / "data" / "shard_00000.npy", ids)
    options = TrainOptions(
        data_dir=str(tmp_path / "data"), model_size="nano", batch_size=2, seq_len=32, device="cpu", dtype="fp32",
        kernels="reference", no_compile=True, no_gradient_checkpointing=True, num_workers=1,
    )  # fmt: skip
    made = build(Case(options))
    yield made
    made.loader.close()
    kernels.select("auto", torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by what is done: a step takes 1 s, to begin saving 0.1 s, and the end of a write 0.5 s."""
    now, events = [0.0], []
    save, wait = Saver.save, Saver.wait

    def passes(seconds, name):
        now[0] += seconds
        events.append(name)

    def saves(self, contents, good_step):
        save(self, contents, good_step)
        passes(0.1, "save")

    def waits(self):
        writing = self._thread is not None
        wait(self)
        if writing:
            passes(0.5, "written")

    monkeypatch.setattr(Saver, "save", saves)
    monkeypatch.setattr(Saver, "wait", waits)
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: now[0])
    return passes, events


def test_the_ratio_is_of_the_same_steps_with_save_and_write_within_them(run, clock, tmp_path, monkeypatch):
    passes, events = clock
    step = run.step
    monkeypatch.setattr(run, "step", lambda lr: (step(lr), passes(1.0, "step")))
    row = checkpoints.measure(run, 4, 3, tmp_path)
    assert complaint(row) is None
    assert row["check_error"] == 0
    alone, saving = ["step"] * 4, ["save", *["step"] * 4, "written"]
    warm_up = len(events) - 3 * len(alone + saving)
    assert events[warm_up:] == alone + saving + saving + alone + alone + saving  # in turns
    assert row["rounds"] == pytest.approx([4.6 / 4] * 3)
    assert (row["ratio_p20"], row["ratio"], row["ratio_p80"]) == pytest.approx((1.15, 1.15, 1.15))
    assert (row["interval_seconds"], row["blocked_seconds"]) == pytest.approx((4.0, 0.1))
    [path] = tmp_path.glob("checkpoint_*.pt")  # the last one
    assert row["bytes"] == path.stat().st_size > 3 * 4 * sum(p.numel() for p in run.model.parameters())


def flip_a_bit(copied):
    copied["optimizer"]["state"][3]["exp_avg"].view(torch.int32)[0] ^= 1


def lose_a_tensor(copied):
    del copied["statistics"]["grad_norm"]


def negate_a_zero(copied):
    copied["statistics"]["losses"].zero_().neg_()


@pytest.mark.parametrize("damage", [flip_a_bit, lose_a_tensor, negate_a_zero])
def test_a_tensor_altered_on_the_way_to_the_file_fails_the_check(run, damage, tmp_path, monkeypatch):
    copy = Saver._copy

    def copies(self, value, key=()):
        copied = copy(self, value, key)
        if key == ():
            damage(copied)
        return copied

    if damage is negate_a_zero:  # which a comparison of numbers would not see
        monkeypatch.setattr(run, "_losses", torch.zeros(3, dtype=torch.float64))
        monkeypatch.setattr(run, "step", lambda lr: setattr(run, "steps", run.steps + 1))
    monkeypatch.setattr(Saver, "_copy", copies)
    row = checkpoints.measure(run, 1, 2, tmp_path)
    assert row["check_error"] == 2  # one a round
    assert "bit for bit" in complaint(row)


def test_a_state_that_is_not_copied_before_the_next_step_fails_the_check(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Saver, "_copy", lambda self, value: value)
    write = Saver._write

    def writes_late(self, *arguments):
        time.sleep(0.3)
        write(self, *arguments)

    monkeypatch.setattr(Saver, "_write", writes_late)
    row = checkpoints.measure(run, 1, 1, tmp_path)
    assert row["check_error"] > len(list(run.model.parameters()))


def test_a_file_altered_on_the_disk_fails_the_check_with_all_its_tensors(run, tmp_path):
    run.step(1e-3)
    run.judgements()
    saver, state = Saver(tmp_path), run.state_dict()
    about = {"format": checkpoints.FORMAT, "config": run.model.config.to_dict(), "options": {}, "environment": {}}
    saver.save(about | state, 0)
    saver.wait()
    path, saved = saver.outcome().path, dict(checkpoints.tensors(state))
    assert checkpoints.wrong_tensors(path, saved) == 0
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert checkpoints.wrong_tensors(path, saved) == len(saved) > 100


def test_a_disk_that_refuses_is_told(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"No space left on device.*TMPDIR"):
        checkpoints.measure(run, 1, 1, tmp_path)


@pytest.mark.parametrize("flag", ["--interval", "--rounds"])
def test_mistakes_are_told_in_a_line(flag, monkeypatch):
    monkeypatch.setattr("sys.argv", ["checkpoints", flag, "0"])
    with pytest.raises(InputError, match=f"{flag} 0"):
        checkpoints.main()


def test_the_command_writes_a_row_that_the_report_shows(run, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "write_corpus", lambda *_: "no corpus")
    monkeypatch.setattr(checkpoints, "build", lambda case: run)
    flags = ["--interval", "2", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["checkpoints", *flags])
    checkpoints.main()
    rows = fields.read(tmp_path / "out")
    [row] = rows.used["checkpoints"]
    assert (row["size"], row["interval"], row["dtype"]) == ("nano", 2, "fp32")
    assert not rows.refused
