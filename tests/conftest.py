"""Test setup.

Without a GPU, Triton kernels run in the interpreter, which must be enabled before triton is imported.
"""

import os
import signal
import sys

# One thread, here and in subprocesses: tiny models gain nothing from two, and pytest-xdist's workers share the cores.
# Tests that use two threads let them sleep while they wait. OpenMP reads both variables only once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch
from hypothesis import HealthCheck, settings

from acceleron.log import log_to_stderr

if torch.cuda.is_available():
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # needed for deterministic cuBLAS, which reads it once
else:
    os.environ["TRITON_INTERPRET"] = "1"
    collect_ignore = ["kernels/test_cuda.py", "training/test_cuda_training.py"]

# nohup ignores SIGHUP and `command &` in a script ignores SIGINT. Processes that tests start would ignore them, too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")
log_to_stderr()  # as commands do


@pytest.fixture(autouse=True)
def restore_process():
    """Dynamo limits the number of graphs per function, which all compiled tests of a process share."""
    yield
    torch.set_num_threads(1)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A small run with hostile_files.CONFIG."""
    import hostile_files

    run = hostile_files.small_run(tmp_path_factory.mktemp("data"))
    yield run
    run.loader.close()


@pytest.fixture(scope="module")
def small_checkpoint(small_run, tmp_path_factory):
    """The path of the run's checkpoint at step 2."""
    import hostile_files

    return hostile_files.write_checkpoint(small_run, tmp_path_factory.mktemp("original"))
