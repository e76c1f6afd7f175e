"""Kernels access only the memory of their arguments: a stray load changes no result, but can fault on a GPU.

Under the interpreter, every access of every kernel is checked at small sizes. prove_bounds.py proves it at training
sizes for the kernels that triton-viz supports.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import DEVICE, randn
from triton.runtime.interpreter import GridExecutor, InterpreterError, interpreter_builder

from acceleron.kernels import grouped_gemm, triton_ops

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("prove_bounds.py")
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter needs CPU tensors")
installed = pytest.mark.skipif(
    importlib.util.find_spec("triton_viz") is None, reason='triton-viz is not installed: pip install -e ".[dev]"'
)


@pytest.fixture
def launched(monkeypatch):
    """Make each access outside the arguments of its kernel fail. Returns the names of the launched kernels."""
    names, memory = [], []
    run, builder = GridExecutor.__call__, type(interpreter_builder)

    def recorded(executor, *args, **kwargs):
        names.append(executor.fn.__name__)
        tensors = [x for x in (getattr(arg, "base", arg) for arg in args) if isinstance(x, torch.Tensor) and x.numel()]
        last = [sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        memory[:] = [(x.data_ptr(), x.data_ptr() + i * x.element_size()) for x, i in zip(tensors, last, strict=True)]
        return run(executor, *args, **kwargs)

    def check(operation, pointer, mask):
        access = getattr(builder, operation)

        def checked(self, *args, **kwargs):
            addresses = args[pointer].data[args[mask].data]
            inside = np.zeros(addresses.shape, dtype=bool)
            for first, last in memory:
                inside |= (addresses >= first) & (addresses <= last)
            assert inside.all(), f"{names[-1]} accesses memory outside its arguments"
            return access(self, *args, **kwargs)

        monkeypatch.setattr(builder, operation, checked)

    monkeypatch.setattr(GridExecutor, "__call__", recorded)
    check("create_masked_load", 0, 1)
    check("create_masked_store", 0, 2)
    check("create_atomic_rmw", 1, 3)
    return names


def run(op, *args, **kwargs):
    """Run the op forward and backward. All floating-point arguments get gradients."""
    for x in args:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    outputs = op(*args, **kwargs)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def run_every_op(T, D, F, E, K, dtype):
    """Run every op on T tokens, width D, and E experts of width F, K per token."""
    x, router, labels = randn(T, D, dtype=dtype), randn(E, D), torch.tensor([0, -100, 78, 79, *[5] * T])[:T]
    w13, w2, shared13, shared2 = (randn(*s, dtype=dtype) for s in ((E, 2 * F, D), (E, D, F), (2 * F, D), (D, F)))
    run(triton_ops.moe, x, router, w13, w2, shared13, shared2, x.clone(), top_k=K, normalize=K > 1)
    run(triton_ops.router_logits, x, router)
    run(triton_ops.rms_norm, x, randn(D), 1e-6, x.clone())
    run(triton_ops.linear_cross_entropy, x, randn(79, D), labels)
    run(triton_ops.rope, randn(2, T, 3, 6), randn(2, T, 1, 6), randn(T, 6), randn(T, 6))
    run(triton_ops.split_rope, randn(2, T, 5, 6), randn(T, 6), randn(T, 6), 3, 1)
    # The last expert has no rows, so its tiles are in the tail, whose shares another kernel adds.
    plan = triton_ops.dispatch_plan(torch.arange(K, dtype=torch.int32).repeat(T, 1), E)
    grouped_gemm.add_weight_grad(randn(T * K, D), randn(T, F), plan.offsets, plan.scatter_idx_TK, randn(E, D, F))


@interpreted
def test_no_kernel_accesses_memory_outside_its_arguments(launched):
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    jitted = re.findall(r"@triton\.jit.*\ndef (\w+)", sources)
    kernels = {name for name in jitted if len(re.findall(rf"\b{name}\(", sources)) == 1}  # no other kernel calls it
    run_every_op(T=5, D=33, F=17, E=3, K=1, dtype=torch.float32)  # odd sizes load without TMA
    run_every_op(T=37, D=64, F=32, E=5, K=2, dtype=torch.float16)
    run_every_op(T=37, D=33, F=17, E=11, K=8, dtype=torch.float16)
    assert set(launched) == kernels


@interpreted
def test_access_outside_an_argument_fails(launched):
    with pytest.raises(InterpreterError, match="_scatter_kernel accesses memory outside its arguments"):
        grouped_gemm.scatter_rows(randn(4, 33), torch.arange(5, dtype=torch.int32)[:, None])


def prove(root: Path) -> list[str]:
    """Return the lines that prove_bounds.py prints about the kernels in root/acceleron/kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    process = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout.splitlines()


@installed
def test_kernels_are_in_bounds_at_training_sizes():
    assert prove(ROOT) == []


@installed
def test_proof_fails_if_a_kernel_includes_the_row_after_the_last(tmp_path):
    """The same kernels, with `row < N + 1` for `row < N` in every mask."""
    (tmp_path / "acceleron").mkdir()
    (tmp_path / "acceleron/__init__.py").touch()
    shutil.copytree(ROOT / "kernels", tmp_path / "acceleron/kernels")
    for path in (tmp_path / "acceleron/kernels").glob("*.py"):
        path.write_text(re.sub(r"\b(\w+ < ([BNST]|num_rows))\b", r"\1 + 1", path.read_text()))
    proven = set(re.findall(r'"(_\w+_kernel)"', SCRIPT.read_text()))
    assert {line.split()[0] for line in prove(tmp_path)} == proven
