"""Reader threads: start, exit and errors."""

import gc
import threading
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from counting_shards import ROW_LENGTH, VOCAB_SIZE, held_out_order, make_loader, make_validation, write_shards
from waiting import TIMEOUT

from acceleron.data import Loader, Shards
from acceleron.data import loader as loader_module
from acceleron.data.loader import Chunks
from acceleron.errors import InputError


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "data")


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader-")]


@contextmanager
def assert_readers_end():
    """Wait for leftover readers from other tests first. On exit, all readers must have ended."""
    gc.collect()
    for thread in readers():
        thread.join(TIMEOUT)
    assert not readers()
    yield
    for thread in readers():
        thread.join(TIMEOUT)
    assert not readers()


def test_readers_start_with_the_first_batch_and_end_with_close(shards, monkeypatch):
    monkeypatch.setattr(loader_module, "CLOSE_SECONDS", TIMEOUT)
    expected = list(islice(make_loader(shards), 2))
    with assert_readers_end():
        loader = make_loader(shards, num_workers=3)
        assert not readers()
        assert torch.equal(next(loader), expected[0])
        assert len(readers()) == 3
        assert all(thread.daemon for thread in readers())
        loader.close()
        assert not readers()
        loader.close()
        assert torch.equal(next(loader), expected[1])  # the loader continues where it stopped
        loader.load_state_dict(loader.state_dict())
        loader.close()


def test_readers_end_when_their_loader_is_deleted(shards):
    with assert_readers_end():
        loader = make_loader(shards, num_workers=2)
        next(loader)
        assert len(readers()) == 2
        del loader
        gc.collect()


def test_readers_end_when_their_loader_loads_a_state(shards):
    with assert_readers_end():
        loader = make_loader(shards)
        next(loader)
        (first,) = readers()
        loader.load_state_dict(loader.state_dict())
        first.join(TIMEOUT)
        assert not first.is_alive()
        loader.close()


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 20), (5, [5] * 4), (24, [24]), (25, [24])])
def test_validation_reader_reads_at_most_20_batches_and_ends(shards, batch_size, sizes):
    """The split has 24 chunks. The reader reads no chunk beyond the last batch."""
    read_rows, plain = [], Shards.read
    with assert_readers_end(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "read", lambda *args: read_rows.append(args[1:4]) or plain(*args))
        loader, count = make_validation(shards, batch_size=batch_size)
        assert count == len(sizes)
        batches = [loader.poll(TIMEOUT) for _ in range(count)]
        for reader in readers():
            reader.join(TIMEOUT)
        assert not readers()
        assert len(read_rows) == sum(sizes)
        assert torch.equal(torch.cat(batches), held_out_order(ROW_LENGTH // 4)[: sum(sizes)])
        assert [len(batch) for batch in batches] == sizes
        for _ in range(2):
            with pytest.raises(StopIteration):
                loader.poll(0)
        assert not readers()


def test_stopping_validation_early_ends_its_reader(shards):
    with assert_readers_end():
        # more batches than the prefetch limit
        for batch in make_loader(shards, seq_len=1, batch_size=1).held_out():
            assert torch.equal(batch, held_out_order(1)[:1])
            assert len(readers()) == 1
            break


def stall_reads(monkeypatch) -> threading.Event:
    """Block all reads until the returned event is set."""
    gate, plain = threading.Event(), Shards.read
    monkeypatch.setattr(Shards, "read", lambda *arguments: gate.wait(TIMEOUT) and plain(*arguments))
    return gate


@pytest.mark.parametrize("num_workers", [1, 3])
def test_poll_returns_none_while_a_reader_stalls(shards, monkeypatch, num_workers):
    expected = list(islice(make_loader(shards), 2))
    gate = stall_reads(monkeypatch)
    loader = make_loader(shards, num_workers=num_workers)
    assert loader.poll(0.05) is None
    assert loader.poll(0) is None
    assert loader.position == 0
    gate.set()
    assert torch.equal(loader.poll(TIMEOUT), expected[0])
    assert torch.equal(next(loader), expected[1])


@pytest.mark.parametrize("make", [make_loader, lambda shards: make_validation(shards)[0]], ids=["training", "held out"])
def test_closing_does_not_wait_for_a_stalled_reader(shards, monkeypatch, make):
    monkeypatch.setattr(loader_module, "CLOSE_SECONDS", 0.0)
    with assert_readers_end():
        gate = stall_reads(monkeypatch)
        loader = make(shards)
        assert loader.poll(0) is None
        loader.close()
        assert not gate.is_set()
        assert len(readers()) == 1
        gate.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # from SystemExit
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ZeroDivisionError("division by zero"), "a reader thread failed: ZeroDivisionError: division by zero"),
        (MemoryError("out of memory"), "a reader thread failed: MemoryError: out of memory"),
        (SystemExit(0), "a reader thread exited without an error"),
    ],
)
@pytest.mark.parametrize("num_workers", [1, 3])
def test_reader_failure_raises_in_the_next_call_and_is_retried(shards, monkeypatch, failure, message, num_workers):
    expected = list(islice(make_loader(shards), 8))
    loader = make_loader(shards, num_workers=num_workers)
    plain = Chunks.batch

    def batch(chunks, indices, *arguments):
        result = plain(chunks, indices, *arguments)
        if failing and torch.equal(result, expected[6]):
            raise failure
        return result

    failing = True
    monkeypatch.setattr(Chunks, "batch", batch)
    for intact in expected[:6]:
        assert torch.equal(next(loader), intact)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message) as raised:
            next(loader)
        assert isinstance(failure, SystemExit) or type(raised.value.__cause__) is type(failure)
    failing = False
    assert torch.equal(next(loader), expected[6])
    assert torch.equal(next(loader), expected[7])


def test_zero_workers_is_rejected(shards):
    with pytest.raises(InputError, match="--num_workers 0"):
        Loader(shards, seq_len=ROW_LENGTH, batch_size=1, vocab_size=VOCAB_SIZE, seed=0, num_workers=0)
