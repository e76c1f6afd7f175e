import multiprocessing

import pytest
from runs import SMALL_NANO, write_shard

from acceleron.config import PRESETS


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_child_left():
    """Some wait for what a failed test no longer does."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture
def small_nano(monkeypatch):
    """Steps of milliseconds, for tests that ask when, and not what, a model learns."""
    monkeypatch.setitem(PRESETS, "nano", SMALL_NANO)
