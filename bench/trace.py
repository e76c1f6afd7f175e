"""Trace a training step without a GPU: the kernels it launches on a GPU, their FLOPs and bytes, and its peak memory.

The step is train.py's own (`Trainer.train_step`), compiled, on fake tensors (`offline`). A step that waits for the
device fails. Inductor compiles for Triton up to its schedule, which lists the fused kernels. Our custom ops run up to
launch.
"""

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import prod
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import get_fused_kernel_name
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from acceleron import ModelConfig
from acceleron.data import Shards
from acceleron.data.shards import ROW_LENGTH
from acceleron.training.options import TrainOptions
from acceleron.training.trainer import Trainer

from .compile import GEMMS, LaunchMode, offline


class Launch(NamedTuple):
    """One kernel launch. bytes_moved: bytes read and written."""

    name: str
    flops: float
    bytes_moved: float
    head_dim: int = 0


class Step(NamedTuple):
    """One optimizer step. peak_bytes: the peak memory of its tensors. model_flops: the FLOPs that MFU counts."""

    launches: list[Launch]
    peak_bytes: int
    tokens: int
    model_flops: int


def nbytes(value) -> int:
    """Return the bytes of a tensor, or of the part that a view covers; 0 for non-tensors."""
    value = value.base if isinstance(value, TensorDescriptor) else value
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def grouped_flops(name: str, a: dict) -> float:
    """Return the FLOPs of a grouped GEMM kernel with arguments `a`."""
    if name in ("_up_kernel", "_hidden_grad_kernel"):
        return (4 if name == "_up_kernel" else 2) * a["act_ptr"].shape[0] * a["D"] * a["F"]
    x = a["a" if name == "_weight_grad_kernel" else "x"]
    return 2 * (x.base if isinstance(x, TensorDescriptor) else x).shape[0] * a["I"] * a["O"]


def triton_launch(function: JITFunction, *args, grid, warmup: bool, **kwargs) -> Launch:
    """Return a launch of one of our kernels. Each argument is read or written once unless noted."""
    a, name = dict(zip(function.arg_names, args, strict=False)) | kwargs, function.__name__
    moved = sum(nbytes(value) for value in a.values())
    if a.get("ADD"):
        moved += nbytes(a["out_ptr"])  # read and written
    if name == "_cross_entropy_kernel":
        moved += nbytes(a["logits_ptr"])  # read and overwritten; the second read hits L2
    if name in GEMMS:
        return Launch(name, grouped_flops(name, a), moved)
    logits = a.get("logits_ptr" if name == "_logits_kernel" else "dlogits_ptr")
    return Launch(name, nbytes(logits) // 4 * 2 * a.get("D", 0), moved)  # 0 FLOPs unless it is a router GEMM


# Torch ops, in addition to views, that launch nothing. Every other op counts as one launch.
SILENT = {
    "device", "empty", "empty_like", "new_empty", "scalar_tensor", "_unsafe_view", "_record_function_enter_new",
    "_record_function_exit",
}  # fmt: skip
LIBRARY_GEMMS = ("mm", "addmm", "bmm")  # inductor calls libraries for these and for attention


def torch_launch(func, name: str, args: tuple, kwargs: dict, results) -> Launch:
    """Return a launch of a torch op. It reads inputs, writes outputs, and does both for tensors modified in place."""
    moved = 0.0
    flops = 0.0
    head_dim = 0
    known = set()
    arguments = func._schema.arguments
    inputs = [*zip(arguments, args, strict=False), *((x, kwargs[x.name]) for x in arguments if x.name in kwargs)]
    for argument, value in inputs:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if name == "_fused_adamw_" and argument.name == "grads":
            written = kwargs.get("grad_scale") is not None
        for leaf in tree_leaves(value):
            moved += ((not argument.is_out) + written) * nbytes(leaf)
            known.add(id(leaf))
    moved += sum(nbytes(leaf) for leaf in tree_leaves(results) if id(leaf) not in known)
    if name in LIBRARY_GEMMS:
        flops = 2 * prod(args[-2].shape) * args[-1].shape[-1]
        moved += 2 * nbytes(args[0]) * (name == "addmm")  # copied to the output first
    elif name.startswith("_scaled_dot_product"):
        backward = name.endswith("backward")
        B, H, S, head_dim = args[backward].shape
        # Causal: half of two GEMMs, or of five in backward.
        flops, name = (
            (5 if backward else 2) * B * H * S * S * head_dim,
            "attention backward" if backward else "attention",
        )
    return Launch(name, flops, moved, head_dim)


class Recorder(LaunchMode):
    """Context manager that records `launches` and `peak_bytes`, the peak memory of tensors."""

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []
        self.in_graph = False
        self.storages = weakref.WeakSet()
        self.held_bytes = self.peak_bytes = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # lets compiled graphs run under this mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "acceleron_triton":
            with mock.patch.object(self, "in_graph", False):
                return super().__torch_dispatch__(func, types, args, kwargs)
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        results = func(*args, **kwargs)
        library_call = name in LIBRARY_GEMMS or name.startswith("_scaled_dot_product")
        if not (func.is_view or name in SILENT) and (library_call or not self.in_graph):
            self.launches.append(torch_launch(func, name, args, kwargs, results))
        self.track(results)
        return results

    def track(self, values):
        """Count the memory of these tensors while they are alive."""
        for leaf in tree_leaves(values):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and storage not in self.storages:
                self.storages.add(storage)
                self.held_bytes += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def release(self, size: int):
        self.held_bytes -= size

    def load_graph(self, graph: GraphLowering) -> SimpleNamespace:
        """Replace GraphLowering.compile_to_module: `call` interprets the graph and records its launches."""
        graph.init_wrapper_code()
        graph._update_scheduler()
        fused = [
            Launch(get_fused_kernel_name(node.get_nodes(), "original_aten"), 0.0, node.get_read_write_buffers_sizes())
            for node in graph.scheduler.nodes
            if not (node.is_extern() or type(node).__name__.startswith("Nop"))
        ]

        def call(values: list):
            self.launches += fused
            with mock.patch.object(self, "in_graph", True):
                return torch.fx.Interpreter(graph.module).boxed_run(values)

        return SimpleNamespace(call=call, __file__=__file__, __name__="graph")


@contextmanager
def recording() -> Iterator[Recorder]:
    """Run steps on fake tensors as if on an H100. The yielded object records them."""
    recorder = Recorder()
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(cpu_backend="triton", fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        mock.patch.object(GraphLowering, "compile_to_module", lambda graph: recorder.load_graph(graph)),
        mock.patch.object(nn.Module, "to", lambda module, device: module),  # fake tensors cannot move
        mock.patch.object(torch.utils._foreach_utils, "_foreach_supported_types", [Tensor, FakeTensor]),
        offline("sm_90", lambda *args, **kwargs: recorder.launches.append(triton_launch(*args, **kwargs))),
    ):
        yield recorder


def trace_step(config: ModelConfig, batch_size: int = 1, grad_accum: int = 1, seq_len: int = ROW_LENGTH) -> Step:
    """Trace the second bf16 training step of a model. A step that waits for the device fails."""
    with tempfile.TemporaryDirectory() as directory:
        options = TrainOptions(
            data_dir=directory, batch_size=batch_size, grad_accum=grad_accum, seq_len=seq_len, dtype="bf16",
            kernels="triton", no_gradient_checkpointing=True,
        )  # fmt: skip
        np.save(f"{directory}/shard_00000.npy", np.zeros((64, ROW_LENGTH), dtype=np.int32))  # repeated every epoch
        shards = Shards(directory)
        with recording() as recorder:
            trainer = Trainer(options, config, shards, torch.device("cpu"), torch.bfloat16)
            trainer.model.compile_blocks()
            with closing(trainer.loader):  # a failing step must not leave reader threads behind
                trainer.train_step(1e-3)  # compiles, and creates the optimizer state
                trainer.fetch()
                recorder.launches.clear()
                recorder.track([[*trainer.model.parameters()], [*trainer.optimizer.state.values()]])
                with recorder:
                    trainer.train_step(1e-3)
    model_flops = trainer.tokens_per_step * trainer.model.flops_per_token(seq_len)
    return Step(recorder.launches, recorder.peak_bytes, trainer.tokens_per_step, model_flops)
