"""Faults planted in the process that runs the op benchmarks: it is spawned, so that monkeypatch does not reach it."""

import os
import signal
import threading

from acceleron import kernels
from bench import op_cases, ops

SERVE = ops.serve


def raises(*args):
    raise RuntimeError("planted\nin two lines")


def hangs(*args):
    threading.Event().wait()


def kills(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def without_tma_only(run):
    def kernel(*args):
        if "up" in os.environ.get("ACCELERON_NO_TMA", ""):
            return run(*args)
        raise RuntimeError("planted TMA")

    return kernel


def serve(connection, settings):
    """`ops.serve` with a Triton op that raises, one that hangs, one that kills its process, and a GEMM kernel that
    fails unless it avoids TMA."""
    kernels._triton |= {"swiglu": raises, "rms_norm": hangs, "rope": kills}
    gemm_cases = op_cases.gemm_cases

    def planted(*args):
        return [gemm._replace(ours=without_tma_only(gemm.ours)) for gemm in gemm_cases(*args)]

    op_cases.gemm_cases = planted
    SERVE(connection, settings)
