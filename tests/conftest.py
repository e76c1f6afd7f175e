"""What every test runs under.

Without a GPU, Triton kernels run under its interpreter, which must be chosen before triton is imported.
"""

import os
import signal

# One thread, here and in the processes that tests start: two gain nothing on models of milliseconds, and pytest-xdist's
# workers share the cores. Where a test takes two, they sleep while they wait for each other. OpenMP reads both once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch
from hypothesis import HealthCheck, settings

if torch.cuda.is_available():
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only with it, and read it once
else:
    os.environ["TRITON_INTERPRET"] = "1"
    collect_ignore = ["kernels/test_cuda.py", "training/test_cuda_training.py"]

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would the processes that tests start
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


@pytest.fixture(autouse=True)
def threads_restored():
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Of hostile_files.CONFIG."""
    import hostile_files

    run = hostile_files.small_run(tmp_path_factory.mktemp("data"))
    yield run
    run.loader.close()


@pytest.fixture(scope="module")
def small_checkpoint(small_run, tmp_path_factory):
    """Path of a checkpoint of the run's step 2."""
    import hostile_files

    return hostile_files.write_checkpoint(small_run, tmp_path_factory.mktemp("original"))
