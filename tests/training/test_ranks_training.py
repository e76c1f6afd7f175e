"""A run on several ranks equals one process on the same global batch: losses, data, checkpoints and messages."""

import dataclasses
import errno
import math
import os
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from ranks import Job, on_ranks
from runs import assert_bitwise_equal, final_state, options, records, shrink_nano, write_shard

from acceleron import Acceleron
from acceleron.checkpoint import load_checkpoint
from acceleron.data import Loader, Shards
from acceleron.data.tokenizer import train_tokenizer
from acceleron.distributed import Ranks, full_tensor, join_ranks
from acceleron.errors import InputError
from acceleron.lock import DirectoryLock
from acceleron.training import checkpointing, loop, metrics, setup, train
from acceleron.training import trainer as trainer_module
from acceleron.training.options import TrainOptions, parse_options
from acceleron.training.trainer import Trainer

GLOBAL_BATCH, GRAD_ACCUM, SEQ_LEN = 8, 2, 64
LOSSES = ("loss", "z_loss", "balance_loss", "grad_norm", "val_loss")
EQUAL = ("step", "tokens", "lr", "skipped_rows", "skipped_steps", "dead_experts")


def write_shards(directory, rows: int = 72):
    """Six shards, each with one validation row."""
    ids = np.load(write_shard(directory, rows) / "shard_00000.npy")
    for index, part in enumerate(np.split(ids, 6)):
        np.save(directory / f"shard_{index:05d}.npy", part)
    return directory


def damage(shard, row: int):
    """Write ids outside the vocabulary to a row."""
    ids = np.load(shard)
    ids[row] = 9999
    np.save(shard, ids)


def record_ids(directory: str):
    """Hook: write the ids that the model receives to <directory>/<train or eval><rank>."""
    shrink_nano()
    forward, rank = Acceleron.forward, os.environ["RANK"]

    def recorded(self, input_ids, labels=None):
        kind = "train" if torch.is_grad_enabled() else "eval"
        with open(f"{directory}/{kind}{rank}", "ab") as file:
            file.write(input_ids.numpy().tobytes())
        return forward(self, input_ids, labels)

    Acceleron.forward = recorded


def received(run, kind: str, size: int, steps: int) -> np.ndarray:
    """Return the ids that the ranks received in each of the micro-batches, in the order of the stream."""
    ranks = [np.fromfile(run / f"{kind}{rank}", dtype=np.int64).reshape(steps, -1, SEQ_LEN) for rank in range(size)]
    return np.concatenate(ranks, axis=1)


class Runs:
    """Runs of 20 steps on the same global batch, each made once: `run(size, plan)` returns its directory."""

    def __init__(self, directory):
        self.directory = directory
        self.data_dir = write_shards(directory / "data")
        for shard, row in ((0, 3), (2, 1), (5, 9)):
            damage(self.data_dir / f"shard_{shard:05d}.npy", row)

    def settings(self, run, size: int, plan: str, **changes) -> TrainOptions:
        settings = dict(batch_size=GLOBAL_BATCH // size, grad_accum=GRAD_ACCUM, seq_len=SEQ_LEN, lr=2e-3)
        settings |= dict(max_steps=20, eval_interval=10, save_interval=10, bad_data="skip", data_parallel=plan)
        return options(self.data_dir, run / "run", **settings | changes)

    def __call__(self, size: int, plan: str = "auto"):
        run = self.directory / f"{size} {plan}"
        if not run.exists():
            hook = partial(record_ids, str(run))
            job = Job(self.settings(run, size, plan), size, run, hook, per_node=2 if plan == "hsdp" else None)
            assert job.statuses() == [0] * size, job.output()
        return run

    def resumed(self, run, size: int, plan: str, directory, **changes) -> Job:
        """Continue a copy of the run from step 10."""
        (directory / "run").mkdir(parents=True)
        for name in ("metrics.jsonl", "checkpoint_10.pt"):
            shutil.copy(run / "run" / name, directory / "run" / name)
        settings = self.settings(directory, size, plan, resume="auto", **changes)
        job = Job(settings, size, directory, shrink_nano, per_node=2 if plan == "hsdp" else None)
        assert job.statuses() == [0] * size, job.output()
        return job


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def assert_same_trajectory(run, expected):
    lines, expected_lines = records(run / "run"), records(expected / "run")
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line.keys() == expected_line.keys()
        for name in LOSSES:
            if name in line:
                assert line[name] == pytest.approx(expected_line[name], rel=1e-4), (line["step"], name)
        for name in EQUAL:
            assert line[name] == expected_line[name], (line["step"], name)


# hsdp has two nodes of two ranks.
PLANS = [
    (2, "zero2"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "fsdp"), (4, "ddp"), (4, "hsdp"))),
]


@pytest.mark.parametrize(("size", "plan"), PLANS)
def test_run_on_ranks_equals_one_process(run, size, plan):
    """With accumulation and recomputation, across an epoch, with unreadable rows."""
    single, several = run(1), run(size, plan)
    assert_same_trajectory(several, single)
    losses = [line["loss"] for line in records(single / "run")]
    assert losses[0] > losses[-1] + 0.3
    assert [line["step"] for line in records(single / "run") if "val_loss" in line] == [10, 20]

    stream = received(single, "train", 1, 20 * GRAD_ACCUM)
    np.testing.assert_array_equal(received(several, "train", size, 20 * GRAD_ACCUM), stream)
    chunks = (72 - 6) * 256 // SEQ_LEN
    assert stream.size // SEQ_LEN > chunks  # the run continues into a second epoch
    # 24 validation sequences, evaluated twice
    np.testing.assert_array_equal(received(several, "eval", size, 6), received(single, "eval", 1, 6))

    # Only rank 0 logs. It reports the rows of all ranks.
    log, *others = [(several / f"rank{rank}").read_text() for rank in range(size)]
    assert others == [""] * (size - 1)
    assert f"{size} ranks" in log
    assert f"data parallelism: {plan} " in log
    assert f"global batch: 2 x {size} ranks x {GLOBAL_BATCH // size} sequences of 64 tokens" in log
    skipped = records(several / "run")[-1]["skipped_rows"]
    assert 12 <= skipped == log.count("warning: skipped: rank ") < 20  # 12 in the first epoch
    assert {f"skipped: rank {rank}: " in log for rank in range(size)} == {True}


@pytest.mark.parametrize(
    ("size", "plan", "then", "then_plan"),
    [
        (2, "zero2", 2, "zero2"),
        (2, "zero2", 1, "auto"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (4, "hsdp", 4, "hsdp"), (4, "hsdp", 2, "ddp"), (4, "hsdp", 1, "auto"), (1, "auto", 2, "fsdp"),
            )
        ),
    ],
)  # fmt: skip
def test_resumed_run_continues_the_same_trajectory(run, tmp_path, size, plan, then, then_plan):
    job = run.resumed(run(size, plan), then, then_plan, tmp_path)
    if then == size:
        assert_bitwise_equal(final_state(tmp_path / "run", 20), final_state(run(size, plan) / "run", 20))
    else:
        assert_same_trajectory(tmp_path, run(1))
        assert f"ranks is {then}, but was {size} before: results will not be bitwise equal" in job.output()
    assert "global batch is" not in job.output()


def test_checkpoint_of_ranks_is_an_ordinary_checkpoint(run):
    single, several = (load_checkpoint(run(*case) / "run" / "checkpoint_20.pt") for case in ((1,), (2, "zero2")))
    assert several.keys() == single.keys()
    assert [(name, w.shape) for name, w in several["model"].items()] == [
        (name, w.shape) for name, w in single["model"].items()
    ]
    for tensor, expected in ((several[part], single[part]) for part in ("statistics", "data")):
        assert tensor.keys() == expected.keys()
    for index, state in single["optimizer"]["state"].items():
        for name, expected in state.items():
            found = several["optimizer"]["state"][index][name]
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    ids = torch.arange(SEQ_LEN)[None]
    models = [Acceleron.load(run(*case) / "run" / "checkpoint_20.pt") for case in ((1,), (2, "zero2"))]
    with torch.no_grad():
        expected, found = (model(ids).logits for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1


@pytest.mark.slow
def test_changed_global_batch_is_named_on_resume(run, tmp_path, capsys, small_nano):
    settings = run.settings(tmp_path, 1, "auto", resume=str(run(2, "zero2") / "run" / "checkpoint_10.pt"), max_steps=11)
    train(dataclasses.replace(settings, batch_size=4))
    changes = "the global batch is 2 x 1 ranks x 4 sequences, but was 2 x 2 ranks x 4 sequences before"
    assert f"warning: {changes}: pass --batch_size 8 --grad_accum 2 to continue" in capsys.readouterr().err
    train(dataclasses.replace(settings, batch_size=4, grad_accum=4, save_dir=str(tmp_path / "same")))
    log = capsys.readouterr().err
    assert "note: the global batch is now 4 x 1 ranks x 4 sequences instead of 2 x 2 ranks x 4 sequences" in log
    assert "warning: the global" not in log
    assert "grad_accum is" not in log


def test_bits_per_byte_are_those_of_one_process(data_dir, tmp_path, small_nano):
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer([" ".join(f"{number} rainy days" for number in range(3000))], 320).save(str(tokenizer))
    settings = dict(tokenizer=str(tokenizer), vocab_size=320, max_steps=1, eval_interval=1)
    train(options(data_dir, tmp_path / "single", batch_size=4, **settings))
    job = Job(options(data_dir, tmp_path / "run", batch_size=2, **settings), 2, tmp_path / "out", shrink_nano)
    assert job.statuses() == [0, 0], job.output()
    ((found,), (expected,)) = (records(tmp_path / name) for name in ("run", "single"))
    assert found["val_bits_per_byte"] == pytest.approx(expected["val_bits_per_byte"], rel=1e-5)
    assert expected["val_bits_per_byte"] > 1


def initial_weights(ranks: Ranks, settings: list[TrainOptions]) -> list[dict]:
    found = []
    for own in settings:
        trainer, _ = setup.build_trainer(own, None, ranks)
        found.append({name: full_tensor(w.detach()).numpy() for name, w in trainer.model.named_parameters()})
        trainer.loader.close()
    return found


@pytest.mark.slow
def test_init_from_starts_from_exactly_these_weights(run, tmp_path):
    path = run(1) / "run" / "checkpoint_20.pt"
    model = Acceleron.load(path)
    model.save_pretrained(tmp_path / "export")
    own = run.settings(tmp_path, 2, "fsdp", model_size="tiny", vocab_size=None)
    settings = [dataclasses.replace(own, init_from=str(name)) for name in (path, tmp_path / "export")]
    expected = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    for rank in on_ranks(2, initial_weights, settings):
        for weights in rank:
            np.testing.assert_equal(weights, expected)


def fake_clock():
    """Hook: a step takes 25 s. Rank 1's second batch arrives after 75 s, and rank 1 has more memory in use."""
    shrink_nano()
    second = os.environ["RANK"] == "1"
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = clock.monotonic = lambda: clock.now
    clock.time, clock.time_ns = (lambda: 0.0), (lambda: 0)
    step, poll = Trainer.train_step, Loader.poll

    def timed_step(self, lr):
        step(self, lr)
        clock.now += 25.0

    def slow_poll(self, timeout):
        batch = poll(self, runs.TIMEOUT)
        if second and self.position == 2 * self.batch_size * self.world_size:
            clock.now += 75.0
        return batch

    for module in (loop, metrics, trainer_module):
        module.time = clock
    Trainer.train_step, Loader.poll = timed_step, slow_poll
    trainer_module.peak_memory = lambda device: 2000 if second else 1000
    loop.peak_flops = lambda device, dtype: (1e9, "given")


def test_metrics_are_those_of_the_run_not_of_a_rank(data_dir, tmp_path):
    settings = options(data_dir, tmp_path / "run", batch_size=2, max_steps=2, eval_interval=2)
    job = Job(settings, 2, tmp_path / "out", fake_clock)
    assert job.statuses() == [0, 0], job.output()
    first, second = records(tmp_path / "run")
    tokens = 2 * 2 * 64
    assert (first["tokens"], second["tokens"]) == (tokens, 2 * tokens)
    assert first["tokens_per_second"] == second["tokens_per_second"] == tokens / 25  # rank 0's clock
    flops = Acceleron.load(tmp_path / "run" / "checkpoint_2.pt").flops_per_token(64)
    assert first["mfu"] == pytest.approx(tokens / 25 * flops / (2 * 1e9))
    assert (first["data_wait"], second["data_wait"]) == (0, 0.75)
    assert second["memory_bytes"] == 2000


def on_rank_1(change):
    """Hook: call `change` on rank 1."""
    shrink_nano()
    if os.environ["RANK"] == "1":
        change()


def change_lr():
    runs.train = lambda settings: train(dataclasses.replace(settings, lr=0.5))


def lose_checkpoint():
    def missing(path):
        raise InputError(f"checkpoint {path} does not exist")

    setup.load_checkpoint = missing


BAD_INPUT = {
    "missing data": (dict(data_dir="missing"), None, "--data_dir missing does not exist"),
    "other flags": ({}, partial(on_rank_1, change_lr), "--lr is 0.004 on rank 0, but 0.5 on rank 1"),
    "one node": (dict(data_parallel="hsdp"), None, "--data_parallel hsdp: needs several nodes"),
    "device": (dict(device="cuda:1"), None, "--device cuda:1: torchrun assigns a GPU to each rank"),
    "few sequences": (dict(seq_len=256), None, "1 sequences of 256 tokens, fewer than 2 ranks: use fewer ranks"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_reported_once_and_ends_all_ranks(data_dir, tmp_path, case):
    changes, hook, message = BAD_INPUT[case]
    settings = dataclasses.replace(options(data_dir, tmp_path / "run"), **changes)
    job = Job(settings, 2, tmp_path / "out", hook or shrink_nano)
    assert job.statuses() == [2, 2], job.output()
    assert [line[:6] for line in job.output().splitlines()] == ["error:"]
    assert message in job.output()
    assert not (tmp_path / "run").exists()


def test_checkpoint_that_one_rank_cannot_read(run, tmp_path):
    settings = run.settings(tmp_path, 2, "zero2", resume=str(run(1) / "run" / "checkpoint_10.pt"))
    job = Job(settings, 2, tmp_path, partial(on_rank_1, lose_checkpoint))
    assert job.statuses() == [2, 2], job.output()
    assert job.output() == f"error: rank 1: checkpoint {settings.resume} does not exist\n"
    damaged_path = tmp_path / "checkpoint_1.pt"
    damaged_path.write_bytes(b"not a checkpoint")
    job = Job(dataclasses.replace(settings, resume=str(damaged_path)), 2, tmp_path / "damaged", shrink_nano)
    assert job.statuses() == [2, 2], job.output()
    assert job.output().startswith(f"error: {damaged_path}: truncated, damaged or not a checkpoint")
    assert job.output().count("\n") == 1


def test_locked_save_dir_is_reported_once(data_dir, tmp_path):
    with DirectoryLock(tmp_path / "run"):
        job = Job(options(data_dir, tmp_path / "run"), 2, tmp_path / "out", shrink_nano)
        assert job.statuses() == [2, 2], job.output()
    assert job.output().startswith(f"error: --save_dir {tmp_path / 'run'} is in use by process {os.getpid()} on ")
    assert job.output().count("\n") == 1


def test_flags_are_reported_once_per_node(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="--batchsize"):
        parse_options(["--batchsize", "8"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end:
        parse_options(["--batchsize", "8"])
    assert end.value.code == 2


def test_incomplete_environment_of_torchrun_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(InputError, match="RANK is not set: start several ranks with torchrun, or unset WORLD_SIZE"),
        join_ranks("cpu", 1),
    ):
        pass


def row_of_rank_1(data_dir, first_step: int):
    """Return a row that rank 1 of 2 reads in a step from `first_step` on: (step, shard, row). The first step is 1."""
    loader = Loader(Shards(data_dir), seq_len=256, batch_size=2, vocab_size=64, seed=42, rank=1, world_size=2)
    for step in range(first_step, len(loader.chunks) // 4):
        shard, row, _ = (int(value[0]) for value in loader.chunks.locate(loader.chunks.stream(4 * (step - 1) + 2, 1)))
        if row not in (0, 6, 11):  # these identify a shard of 12 rows
            return step, data_dir / f"shard_{shard:05d}.npy", row
    raise AssertionError


@pytest.mark.slow
def test_row_that_one_rank_cannot_read_ends_all_ranks_after_a_save(tmp_path, small_nano):
    """The run continues after the row is repaired."""
    data_dir = write_shards(tmp_path / "data")
    step, path, row = row_of_rank_1(data_dir, first_step=4)
    settings = options(data_dir, tmp_path / "run", batch_size=2, seq_len=256, max_steps=step + 1, lr=1e-3)
    train(dataclasses.replace(settings, batch_size=4, save_dir=str(tmp_path / "single")))
    good = path.read_bytes()
    damage(path, row)
    job = Job(settings, 2, tmp_path / "out", shrink_nano)
    assert job.statuses() == [2, 2], job.output()
    (error,) = [line for line in job.output().splitlines() if line.startswith("error")]
    assert error.startswith(f"error: rank 1: {path}: row {row} contains token id 9999")
    checkpoint = tmp_path / "run" / f"checkpoint_{step - 1}.pt"
    assert error.endswith(f"stopped at step {step - 1}; everything is saved in {checkpoint}")
    path.write_bytes(good)
    job = Job(dataclasses.replace(settings, resume="auto"), 2, tmp_path / "resumed", shrink_nano)
    assert job.statuses() == [0, 0], job.output()
    found, expected = (records(tmp_path / name) for name in ("run", "single"))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    assert len(expected) == step + 1


def full_disk():
    """Hook: no checkpoint after the first can be written, and the final save is not repeated for minutes."""
    shrink_nano()
    checkpointing.FINAL_TIMEOUT = checkpointing.FINAL_RETRY_SECONDS = 0.0
    save, attempts = torch.save, []

    def save_to_disk(contents, file):
        attempts.append(1)
        if len(attempts) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(contents, file)

    torch.save = save_to_disk


@pytest.mark.slow
def test_full_disk_fails_on_all_ranks(data_dir, tmp_path):
    settings = options(data_dir, tmp_path / "run", batch_size=2, max_steps=3, eval_interval=3, save_interval=1)
    job = Job(settings, 2, tmp_path / "out", full_disk)
    assert job.statuses() == [3, 3], job.output()
    (error,) = [line for line in job.output().splitlines() if line.startswith("error")]
    last_good = f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint_1.pt'}"
    assert error.startswith(f"error: step 3 could not be saved in 3 attempts; {last_good}")
    assert job.output().count("No space left on device") == 2  # in step 2, and once for the final save
    assert load_checkpoint(tmp_path / "run" / "checkpoint_1.pt")["step"] == 1


def diverge():
    """Hook: from the fifth step, the loss of rank 1 is NaN."""
    shrink_nano()
    forward, steps = Acceleron.forward, []

    def diverging(self, input_ids, labels=None):
        output = forward(self, input_ids, labels)
        steps.append(1)
        if len(steps) >= 5 and os.environ["RANK"] == "1":
            output = output._replace(loss=output.loss * math.nan, cross_entropy=output.cross_entropy * math.nan)
        return output

    Acceleron.forward = diverging


@pytest.mark.slow
def test_divergence_on_one_rank_ends_all_ranks_with_the_same_files(tmp_path):
    data_dir = write_shards(tmp_path / "data")
    settings = options(data_dir, tmp_path / "run", batch_size=2, save_interval=1, eval_interval=50, seq_len=256)
    job = Job(dataclasses.replace(settings, max_bad_steps=2, max_steps=20), 2, tmp_path / "out", diverge)
    assert job.statuses() == [3, 3], job.output()
    (error,) = [line for line in job.output().splitlines() if line.startswith("error")]
    last_good = f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint_3.pt'}"
    assert error.startswith(f"error: stopped at step 6 without saving, after 2 skipped steps in a row; {last_good}")
    names = {path.name for path in (tmp_path / "run").glob("checkpoint*")}
    assert names == {*(f"checkpoint_{step}.pt" for step in (1, 2, 3)), "checkpoint_4.pt.diverged"}
    # The warning lists the four rows of both ranks.
    (warning,) = [line for line in job.output().splitlines() if line.startswith("warning: step 5: loss nan")]
    loader = Loader(Shards(data_dir), seq_len=256, batch_size=4, vocab_size=64, seed=42)
    assert warning.endswith(f"skipped; batch from {loader.describe_rows(16)}")
