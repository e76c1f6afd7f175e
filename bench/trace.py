"""The kernels that a training step launches on a GPU, their FLOPs and bytes, and its peak memory, without a GPU.

The step is train.py's own (`Run.step`), compiled as shipped, on tensors without data (bench/offline.py); a step that
waits for the device raises. Inductor goes as far as its schedule, which says what it fuses, and is asked for its Triton
backend on what passes for a CPU. Our custom ops go as far as the launches of their kernels.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from math import prod
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from acceleron import ModelConfig
from acceleron.data import Shards
from acceleron.data.shards import ROW_LENGTH
from acceleron.kernels.launch import Device
from acceleron.training.metrics import flops_per_token
from acceleron.training.options import TrainOptions
from acceleron.training.run import Run

from .offline import Launching, offline
from .shapes import NANO_VOCAB

H100 = Device("any", "sm_90", 132)
ROWS = 64  # of the shard, which is read again and again


class Launch(NamedTuple):
    """One kernel. moved: the bytes that it reads and writes, a gathered row as often as it is gathered.

    For a grouped GEMM, `tiles` is the number of tiles (half a tile more per expert than its rows fill), `tile_loads`
    the bytes that they read, most of it from L2, and `programs` the number that run at one time.
    """

    name: str
    flops: float
    moved: float
    head_dim: int = 0
    tiles: float = 0
    tile_loads: float = 0
    programs: int = 0


class Step(NamedTuple):
    """The launches of one optimizer step, the most bytes that its tensors take at one time, and the MFU's FLOPs."""

    launches: list[Launch]
    peak_bytes: int
    tokens: int
    model_flops: int


def nbytes(value) -> int:
    """The bytes of a tensor as a kernel sees it: for a view those that it shows."""
    value = value.base if isinstance(value, TensorDescriptor) else value
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def grouped_gemm(name: str, a: dict, programs: int) -> dict | None:
    """FLOPs, tiles and the bytes that they load, if this is a grouped GEMM's kernel. a: its arguments."""
    if name == "_weight_grad_kernel":
        rows, M, N = a["order_ptr"].numel(), a["M"], a["N"]
        flops, inner = 2 * rows * M * N, rows / a["E"] / a["split"]
        tiles = a["E"] * a["split"] * -(-M // a["BLOCK_M"]) * -(-N // a["BLOCK_N"])
        width = a["BLOCK_N"]
    elif name in ("_up_kernel", "_hidden_grad_kernel", "_rows_kernel"):
        matrices = 2 if name == "_up_kernel" else 1
        if name == "_rows_kernel":
            rows, inner, columns = a["y_ptr"].shape[0], a["I"], a["O"]
        else:
            rows, inner, columns = a["order_ptr"].numel(), a["D"], a["F"]
        flops, width = 2 * matrices * rows * inner * columns, matrices * a["BLOCK_N"]
        tiles = (rows / a["BLOCK_M"] + a["E"] / 2) * -(-columns // a["BLOCK_N"])
    else:
        return None
    return dict(flops=flops, tiles=tiles, tile_loads=2 * tiles * (a["BLOCK_M"] + width) * inner, programs=programs)


def triton_launch(function: JITFunction, grid: tuple, args: tuple, kwargs: dict) -> Launch:
    """A launch of one of our kernels: each argument is read or written once, with these exceptions."""
    a, name = dict(zip(function.arg_names, args, strict=False)) | kwargs, function.__name__
    moved = sum(nbytes(value) for value in a.values())
    gathered = a.get({"_up_kernel": "x", "_hidden_grad_kernel": "dy"}.get(name, a.get("GATHER")))
    if gathered is not None:
        moved += (a["order_ptr"].numel() / gathered.shape[0] - 1) * nbytes(gathered)
    if name == "_cross_entropy_kernel":
        moved += nbytes(a["logits_ptr"])  # read, and overwritten; its second reading is from L2
    logits = a.get({"_logits_kernel": "logits_ptr"}.get(name, "dlogits_ptr"))
    flops = nbytes(logits) // 4 * 2 * a.get("D", 0)  # a router GEMM's, if it is one
    return Launch(name, moved=moved, **(grouped_gemm(name, a, grid[0]) or dict(flops=flops)))


# Ops of torch, besides views, that launch nothing. Others launch one kernel, or a few that are counted as one.
SILENT = {
    *("device", "empty", "empty_like", "new_empty", "scalar_tensor", "_unsafe_view"),
    *("_record_function_enter_new", "_record_function_exit"),
}
LIBRARY_GEMMS = ("mm", "addmm", "bmm")  # which inductor leaves to libraries, besides attention
SHAPES = {"permute", "reshape", "view", "expand", "unsqueeze"}  # left out of the names of what inductor fuses


def torch_launch(func, name: str, args: tuple, kwargs: dict, results) -> Launch:
    """A launch of torch's: inputs are read, outputs written, and what is changed in place both."""
    moved, flops, head_dim, known = 0.0, 0.0, 0, set()
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
        moved += 2 * nbytes(args[0]) * (name == "addmm")  # copied to where the GEMM adds
    elif name.startswith("_scaled_dot_product"):
        backward = name.endswith("backward")
        B, H, S, head_dim = args[backward].shape
        # Half of two GEMMs, as no query sees what comes after it; backward has five.
        flops, name = (5 if backward else 2) * B * H * S * S * head_dim, "attention" + " backward" * backward
    return Launch(name, flops, moved, head_dim)


class Recorder(Launching):
    """A context that collects `launches`, and the most bytes of memory, `peak_bytes`, that tensors take in it."""

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []
        self.in_graph = False
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.held_bytes = self.peak_bytes = 0  # the former of `storages`, expired ones included

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # graphs that are compiled already may then run under it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "acceleron_triton":
            with mock.patch.object(self, "in_graph", False):
                return super().__torch_dispatch__(func, types, args, kwargs)
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        results = func(*args, **kwargs)
        left_to_libraries = name in LIBRARY_GEMMS or name.startswith("_scaled_dot_product")
        if not (func.is_view or name in SILENT) and (left_to_libraries or not self.in_graph):
            self.launches.append(torch_launch(func, name, args, kwargs, results))
        self.hold(results)
        return results

    def hold(self, values):
        """Count the memory of these tensors, as long as they live."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self.storages:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.held_bytes += storage.nbytes()
        # Expired ones are looked for only where the peak might rise, as there are a thousand at each of 10,000 calls.
        if self.held_bytes > self.peak_bytes:
            self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
            self.held_bytes = sum(size for _, size in self.storages.values())
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def run_kernel(self, function: JITFunction, *args, grid, warmup, **kwargs):
        """In place of JITFunction.run."""
        self.launches.append(triton_launch(function, grid, args, kwargs))

    def load_graph(self, graph: GraphLowering) -> SimpleNamespace:
        """In place of GraphLowering.compile_to_module: its `call` interprets the graph and records what it launches."""
        graph.init_wrapper_code()
        graph._update_scheduler()
        fused = []
        for node in graph.scheduler.nodes:
            if not (node.is_extern() or type(node).__name__.startswith("Nop")):
                origins = {origin.target for part in node.get_nodes() for origin in part.node.get_origins()}
                origins = [str(origin).split(".") for origin in origins]
                names = {name for library, name, *_ in origins if library in ("aten", "prims")} - SHAPES
                names = sorted(name for name in names if not name.startswith("_scaled_dot_product"))
                name = "inductor: " + (", ".join(names) or "copy")
                fused.append(Launch(name, 0.0, node.get_read_write_buffers_sizes()))

        def call(values: list):
            self.launches += fused
            with mock.patch.object(self, "in_graph", True):
                return torch.fx.Interpreter(graph.module).boxed_run(values)

        return SimpleNamespace(call=call, __file__=__file__, __name__="graph")


# Under checkpointing attention comes in these, as it may have dropout; ours has none.
@run_and_save_rng_state.py_impl(Recorder)
def _(recorder: Recorder, op, *args, **kwargs):
    with recorder:
        return torch.empty(0), op(*args, **kwargs)


@run_with_rng_state.py_impl(Recorder)
def _(recorder: Recorder, state: Tensor, op, *args, **kwargs):
    with recorder:
        return op(*args, **kwargs)


@contextmanager
def recording(device: Device) -> Iterator[Recorder]:
    """In this context steps run on tensors without data, as on `device`; those in the yielded one's are recorded."""
    recorder = Recorder()
    torch._dynamo.reset()
    with ExitStack() as stack:
        stack.callback(torch._dynamo.reset)
        stack.enter_context(inductor_config.patch(cpu_backend="triton", fx_graph_cache=False))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(GraphLowering, "compile_to_module", lambda graph: recorder.load_graph(graph))
        patch(nn.Module, "to", lambda module, device: module)  # which tensors without data refuse
        patch(_foreach_utils, "_foreach_supported_types", [Tensor, FakeTensor])
        stack.enter_context(offline(device, recorder.run_kernel))
        yield recorder


def trace_step(
    size: str,
    dense: bool = False,
    batch_size: int = 1,
    grad_accum: int = 1,
    checkpointing: bool = False,
    seq_len: int = ROW_LENGTH,
    device: Device = H100,
) -> Step:
    """The second training step in bf16 of a named size, or of its dense baseline.

    Raises RuntimeError under TRITON_INTERPRET=1; and torch's DataDependentOutputException or a subclass of
    NotImplementedError for a step that waits for the device.
    """
    options = dict(model_size=size, dense=dense, batch_size=batch_size, grad_accum=grad_accum, seq_len=seq_len)
    options |= dict(dtype="bf16", device="cpu", kernels="triton", no_gradient_checkpointing=not checkpointing)
    with tempfile.TemporaryDirectory() as directory:
        rows = np.random.default_rng(0).integers(0, 1000, (ROWS, ROW_LENGTH), dtype=np.int32)
        np.save(f"{directory}/shard_00000.npy", rows)
        options = TrainOptions(data_dir=directory, **options)
        shards = Shards(directory)
        with recording(device) as recorder:
            config = ModelConfig.preset(size, dense=dense, **({"vocab_size": NANO_VOCAB} if size == "nano" else {}))
            run = Run(options, config, shards, torch.device("cpu"), torch.bfloat16)
            run.model.compile_blocks()
            with closing(run.loader):  # whose threads would else outlive a step that fails
                run.step(1e-3)  # compiles, and makes the optimizer's state
                run.fetch()
                recorder.launches.clear()
                recorder.hold([[*run.model.parameters()], [*run.optimizer.state.values()]])
                with recorder:
                    run.step(1e-3)
        tokens, active = options.tokens_per_step, run.model.num_parameters()[1]
    model_flops = tokens * flops_per_token(config, active, seq_len)
    return Step(recorder.launches, recorder.peak_bytes, tokens, model_flops)
