import multiprocessing

import pytest
from runs import write_shard


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_child_left():
    """Some wait for what a failed test no longer does."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
