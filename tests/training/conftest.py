import multiprocessing

import pytest
from runs import SMALL_NANO, write_shard

from acceleron.config import PRESETS


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def kill_children():
    """Kill child processes that a failed test left waiting."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture
def small_nano(monkeypatch):
    """A model that trains a step in milliseconds, for tests that do not depend on what it learns."""
    monkeypatch.setitem(PRESETS, "nano", SMALL_NANO)
