"""Data parallelism on FSDP2: how weights, gradients and optimizer state are divided among the ranks."""

import logging
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from .device import total_memory
from .distributed import Ranks
from .errors import InputError

# `auto` replicates models with fewer parameters: their gradients are small, and a plain all-reduce has the fewest
# launches. Above this share of a device's memory, fp32 weights are not kept gathered between forward and backward.
REPLICATED_PARAMETERS, GATHERED_SHARE = 500e6, 0.25
logger = logging.getLogger(__name__)


class Plan(NamedTuple):
    """How weights, gradients and optimizer state are divided among the ranks. All plans are FSDP2."""

    name: str  # a value of --data_parallel
    mesh: DeviceMesh  # (shard,) or (replicate, shard)
    why: str


PLANS = {
    "ddp": "every rank has all weights",
    "zero2": "weights are gathered once per step; gradients and optimizer state are sharded",
    "fsdp": "weights, gradients and optimizer state are sharded; weights are gathered per layer",
    "hsdp": "zero2 within a node, replicated across nodes",
}


def choose_plan(name: str, ranks: Ranks, device: torch.device, num_parameters: int) -> Plan:
    """Return the plan `name`, or for "auto" the one that fits the model's size and the number of nodes.

    Raises InputError for hsdp on a single node, and for nodes with different numbers of ranks.
    """
    per_node, memory = zip(*ranks.gather((ranks.per_node, total_memory(device))), strict=True)
    if len(set(per_node)) > 1:
        numbers = " or ".join(map(str, sorted(set(per_node))))
        raise InputError(f"the nodes have {numbers} ranks: start all nodes with the same --nproc_per_node")
    nodes, why = ranks.size // ranks.per_node, "as requested"
    if name == "auto":
        name, why = _automatic(nodes, num_parameters, min(memory))
    if name == "hsdp" and nodes == 1:
        raise InputError("--data_parallel hsdp: needs several nodes: use zero2 or fsdp on one node")
    shapes = {"ddp": (ranks.size, 1), "hsdp": (nodes, ranks.per_node)}
    shape = shapes.get(name, (ranks.size,))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    ranks.add_groups(mesh.get_all_groups())
    return Plan(name, mesh, why)


def _automatic(nodes: int, num_parameters: int, memory: int) -> tuple[str, str]:
    if num_parameters < REPLICATED_PARAMETERS:
        return "ddp", f"fewer than {REPLICATED_PARAMETERS / 1e6:.0f}M parameters"
    gathered = 4 * num_parameters
    if gathered > GATHERED_SHARE * memory:
        return "fsdp", f"fp32 weights of {gathered / 2**30:.1f} GiB are more than {GATHERED_SHARE:.0%} of the memory"
    return ("zero2", "one node") if nodes == 1 else ("hsdp", f"{nodes} nodes")


def shard_model(model: nn.Module, blocks: nn.ModuleList, plan: Plan, gather_dtype: torch.dtype):
    """Shard the parameters of a model and its blocks in place: they become DTensors with the same names.

    gather_dtype: of gathered weights and their gradients. Gradients are reduced in fp32. ddp ignores it.
    """
    shards = plan.mesh.size(plan.mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard:
        # FSDP2 pads an uneven dimension 0 (8 experts on 16 ranks) and rejects other uneven dimensions.
        return Shard(next((d for d in range(parameter.dim()) if parameter.shape[d] % shards == 0), 0))

    precision = MixedPrecisionPolicy()
    if gather_dtype != torch.float32 and plan.name == "ddp":
        logger.warning("--gather_dtype is ignored: ddp gathers no weights")
    elif gather_dtype != torch.float32:  # inputs are not cast: cos and sin stay in fp32
        precision = MixedPrecisionPolicy(gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shared = dict(mesh=plan.mesh, mp_policy=precision, shard_placement_fn=placement)
    # Nothing changes a block's output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        fully_shard(block, reshard_after_forward=plan.name == "fsdp", **shared)
    fully_shard(model, reshard_after_forward=False, **shared)
    if plan.mesh.device_type == "cpu":  # gloo cannot scale in a reduction
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def prepare_backward(model: FSDPModule, plan: Plan, last: bool):
    """Set what the backward pass of a micro-batch communicates. last: whether it is the last one of the step."""
    if plan.name == "ddp":
        model.set_requires_gradient_sync(last)
    if plan.name == "hsdp":
        model.set_requires_all_reduce(last)
    if plan.name != "fsdp":
        model.set_reshard_after_backward(last)
