"""What a training step does on a GPU that need not be there: every kernel it launches, its FLOPs and bytes.

The step is train.py's own (`Run.step`), compiled as shipped, on tensors without data (torch's FakeTensorMode). They
have no values to wait for: a step that asked the host to read one (`.item()`, a mask as index) raises. Inductor goes as
far as its schedule, which says what it fuses, and our custom ops as far as the launches of their kernels. The tensors
pass for a CPU's, as torch's CPU build holds no others, and inductor's Triton backend is asked to serve them.
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
from torch._library.custom_ops import OPDEFS
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from acceleron import ModelConfig, kernels
from acceleron.data import Shards
from acceleron.data.shards import ROW_LENGTH
from acceleron.kernels import launch
from acceleron.kernels.launch import Device
from acceleron.training.metrics import flops_per_token
from acceleron.training.options import TrainOptions
from acceleron.training.run import Run

H100 = Device("any", "sm_90", 132)
ROWS = 64  # of the shard, which is read again and again


class Launch(NamedTuple):
    """One kernel. moved: the bytes that it reads and writes, a gathered row as often as it is gathered.

    For a grouped GEMM, `tiles` is how many there are (half a tile more an expert than rows fill), `tile_loads` the
    bytes that they read, most of it from L2, and `programs` how many run at one time.
    """

    name: str
    flops: float
    moved: float
    head_dim: int = 0
    tiles: float = 0
    tile_loads: float = 0
    programs: int = 0


class Step(NamedTuple):
    """The launches of one optimizer step, and the most bytes that its tensors took at one time.

    Of these state_bytes are weights, gradients and the optimizer's. model_flops: as train.py's MFU counts them.
    """

    launches: list[Launch]
    peak_bytes: int
    state_bytes: int
    tokens: int
    model_flops: int


def nbytes(value) -> int:
    """Of a tensor, as a kernel sees it; a view's are those it shows."""
    value = value.base if isinstance(value, TensorDescriptor) else value
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def triton_launch(function: JITFunction, grid: tuple, args: tuple, kwargs: dict) -> Launch:
    """One of our kernels, of its arguments: each is read or written once, but for what follows."""
    a = dict(zip(function.arg_names, args, strict=False)) | kwargs
    name, flops, moved = function.__name__, 0.0, sum(nbytes(value) for value in a.values())
    gemm = {}

    def rows_by(rows: float, inner: int, columns: int, width: int = 1):
        """Row tiles times column tiles; each expert's last row tile is half full on average."""
        tiles = (rows / a["BLOCK_M"] + a["E"] / 2) * -(-columns // a["BLOCK_N"])
        loads = tiles * (a["BLOCK_M"] + width * a["BLOCK_N"]) * inner * 2
        return dict(tiles=tiles, tile_loads=loads, programs=grid[0])

    if name == "_up_kernel":
        N, D, F = a["order_ptr"].numel(), a["D"], a["F"]
        flops, gemm = 4 * N * D * F, rows_by(N, D, F, width=2)
        moved += (N - a["x"].shape[0]) * D * a["x"].element_size()
    elif name == "_hidden_grad_kernel":
        N, D, F = a["order_ptr"].numel(), a["D"], a["F"]
        flops, gemm = 2 * N * D * F, rows_by(N, D, F)
        moved += (N - a["dy"].shape[0]) * D * a["dy"].element_size()
    elif name == "_rows_kernel":
        N = a["y_ptr"].shape[0]
        flops, gemm = 2 * N * a["I"] * a["O"], rows_by(N, a["I"], a["O"])
    elif name == "_weight_grad_kernel":
        rows, M, N = a["order_ptr"].numel(), a["M"], a["N"]
        gathered = {"a": a["a"], "b": a["b"]}.get(a["GATHER"])
        flops = 2 * rows * M * N
        if gathered is not None:
            moved += (rows - gathered.shape[0]) * gathered.shape[1] * gathered.element_size()
        tiles = a["E"] * a["split"] * -(-M // a["BLOCK_M"]) * -(-N // a["BLOCK_N"])
        loads = tiles * (a["BLOCK_M"] + a["BLOCK_N"]) * rows / a["E"] / a["split"] * 2
        gemm = dict(tiles=tiles, tile_loads=loads, programs=grid[0])
    elif name == "_cross_entropy_kernel":
        moved += nbytes(a["logits_ptr"])  # read, and overwritten; its second reading is from L2
    elif name == "_logits_kernel":
        flops = 2 * nbytes(a["logits_ptr"]) / 4 * a["D"]
    elif name in ("_input_grad_kernel", "_token_grad_kernel", "_router_grad_kernel"):
        flops = 2 * nbytes(a["dlogits_ptr"]) / 4 * a["D"]
    return Launch(name, flops, moved, **gemm)


# Ops of torch, besides views, that launch nothing. Others launch one kernel, or a few that are counted as one.
SILENT = {
    *("device", "empty", "empty_like", "new_empty", "scalar_tensor", "_unsafe_view"),
    *("_record_function_enter_new", "_record_function_exit"),
}
LIBRARY_GEMMS = ("mm", "addmm", "bmm")  # what inductor leaves to libraries, besides attention
SHAPES = {"permute", "reshape", "view", "expand", "unsqueeze"}  # not worth a name in what inductor fuses


def torch_launch(func, name: str, args: tuple, kwargs: dict, results) -> Launch:
    """An op of torch: inputs are read, outputs written, and what is changed in place both."""
    moved, flops, head_dim = 0.0, 0.0, 0
    arguments = func._schema.arguments
    inputs = [*zip(arguments, args, strict=False), *((x, kwargs[x.name]) for x in arguments if x.name in kwargs)]
    known = set()
    for argument, value in inputs:
        written = argument.alias_info is not None and argument.alias_info.is_write
        reads = 0 if argument.is_out else 1
        if name == "_fused_adamw_" and argument.name == "grads":
            written = kwargs.get("grad_scale") is not None
        for leaf in tree_leaves(value):
            moved += (reads + written) * nbytes(leaf)
            known.add(id(leaf))
    moved += sum(nbytes(leaf) for leaf in tree_leaves(results) if id(leaf) not in known)
    if name in ("mm", "bmm"):
        flops = 2 * prod(args[0].shape) * args[1].shape[-1]
    elif name == "addmm":
        flops = 2 * prod(args[1].shape) * args[2].shape[-1]
        moved += 2 * nbytes(args[0])  # copied to where the GEMM adds
    elif name.startswith("_scaled_dot_product"):
        q = args[1] if name.endswith("backward") else args[0]
        # Half of two GEMMs, as no query sees what comes after it; backward has five.
        B, H, S, head_dim = q.shape
        flops = (5 if name.endswith("backward") else 2) * B * H * S * S * head_dim
        name = "attention backward" if name.endswith("backward") else "attention"
    return Launch(name, flops, moved, head_dim)


class Recorder(TorchDispatchMode):
    """A context that collects `launches`, and the most bytes of memory, `peak_bytes`, that tensors took in it."""

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []
        self.in_graph = False
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.held_bytes = self.peak_bytes = 0  # the former of `storages`, of which some may be gone

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # that is, graphs which are compiled already may run under it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == "acceleron_triton":
            in_graph, self.in_graph = self.in_graph, False
            with self:
                results = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
            self.in_graph = in_graph
            return results
        results = func(*args, **kwargs)
        attention = name.startswith("_scaled_dot_product")
        silent = func.is_view or name in SILENT
        if not silent and (not self.in_graph or name in LIBRARY_GEMMS or attention):
            self.launches.append(torch_launch(func, name, args, kwargs, results))
        self.hold(results)
        return results

    def hold(self, values):
        """Count the memory of these tensors, as long as they live."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.held_bytes += storage.nbytes()
        # Who is gone is looked for only where the peak might rise: there may be a thousand, at each of 10,000 calls.
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
                names = {name for name in names if not name.startswith("_scaled_dot_product")}
                name = "inductor: " + (", ".join(sorted(names)) or "copy")
                fused.append(Launch(name, 0.0, node.get_read_write_buffers_sizes()))

        def call(values: list):
            self.launches += fused
            self.in_graph = True
            try:
                return torch.fx.Interpreter(graph.module).boxed_run(values)
            finally:
                self.in_graph = False

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
    """In this context tensors have no data and kernels do not run, but are those for `device`."""
    recorder, cpu_device, choice = Recorder(), launch.cpu_device, kernels._choice
    launch.cpu_device = device
    kernels.select("triton", torch.device("cpu"))
    torch._dynamo.reset()
    try:
        with ExitStack() as stack:
            stack.enter_context(inductor_config.patch(cpu_backend="triton", fx_graph_cache=False))
            stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
            patch = lambda *args, **kwargs: stack.enter_context(mock.patch.object(*args, **kwargs))  # noqa: E731
            patch(JITFunction, "run", lambda *args, **kwargs: recorder.run_kernel(*args, **kwargs))
            patch(GraphLowering, "compile_to_module", lambda graph: recorder.load_graph(graph))
            patch(FakeTensor, "data_ptr", lambda tensor: 0, create=True)  # aligned, as CUDA's allocator has it
            patch(nn.Module, "to", lambda module, device: module)  # which tensors without data refuse
            patch(_foreach_utils, "_foreach_supported_types", [Tensor, FakeTensor])
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            yield recorder
    finally:
        launch.cpu_device, kernels._choice = cpu_device, choice
        torch._dynamo.reset()


def trace_step(
    size: str,
    dense: bool = False,
    batch_size: int = 1,
    grad_accum: int = 1,
    checkpointing: bool = False,
    seq_len: int = ROW_LENGTH,
    device: Device = H100,
) -> Step:
    """A training step in bf16 of a named size, or of its dense twin, as one after the first does it.

    Raises RuntimeError under TRITON_INTERPRET=1, where kernels are not those that a GPU runs; and torch's
    DataDependentOutputException or a subclass of NotImplementedError for a step that waits for the device.
    """
    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set, under which no step can be traced: unset it")
    options = dict(model_size=size, dense=dense, batch_size=batch_size, grad_accum=grad_accum, seq_len=seq_len)
    options |= dict(dtype="bf16", device="cpu", kernels="triton", no_gradient_checkpointing=not checkpointing)
    with tempfile.TemporaryDirectory() as directory:
        rows = np.random.default_rng(0).integers(0, 1000, (ROWS, ROW_LENGTH), dtype=np.int32)
        np.save(f"{directory}/shard_00000.npy", rows)
        options = TrainOptions(data_dir=directory, **options)
        shards = Shards(directory)
        with recording(device) as recorder:
            overrides = {"vocab_size": 2048} if size == "nano" else {}
            config = ModelConfig.preset(size, dense=dense, **overrides)
            run = Run(options, config, shards, torch.device("cpu"), torch.bfloat16)
            run.model.compile_blocks()
            with closing(run.loader):  # whose threads would else outlive a step that fails
                run.step(1e-3)  # compiles, and makes the optimizer's state
                run.fetch()
                recorder.launches.clear()
                weights = [*run.model.parameters()]
                state = [x for s in run.optimizer.state.values() for x in s.values()]
                recorder.hold([weights, state])
                with recorder:
                    run.step(1e-3)
        state_bytes = sum(map(nbytes, weights)) * 2 + sum(map(nbytes, state))
        tokens, active = options.tokens_per_step, run.model.num_parameters()[1]
    model_flops = tokens * flops_per_token(config, active, seq_len)
    return Step(recorder.launches, recorder.peak_bytes, state_bytes, tokens, model_flops)
