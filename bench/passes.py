"""One forward and backward pass of a layer, a model or its head, ours or a peer's, and the check of its gradients.

All weights are bf16 numbers, and peers have the same: with the router losses weighted with 0 (the peers' are others)
the functions are equal, so that one truth serves all. It is the reference's, eager, in fp32, or in fp64 where the dtype
is fp32. Of every gradient the relative RMS is taken over SAMPLES values, and may be a multiple of the error of the
reference in the run's own dtype, plus a floor (OURS, PEER), and never more than MOST.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acceleron import Acceleron, ModelConfig, kernels
from acceleron.attention import best_sdpa
from acceleron.device import DTYPES
from acceleron.training.optimizer import build_optimizer

SEQ_LEN = 2048
SAMPLES = 1 << 14
PEERS = {
    "llama": "transformers Llama",
    "liger": "Liger's fused_moe in our layer",
    "torch": "torch, all logits",
}
# Factor of the reference's error, and floor. In bf16 compiled passes round elsewhere than eager ones, and tokens near a
# tie choose other experts; the peers round their router's logits too, which is worth a third of a router's gradient.
OURS = {"fp32": (1.5, 4e-6), "bf16": (2, 4e-3)}
PEER = {"fp32": (4, 1e-4), "bf16": (4, 0.4)}
MOST = 0.5  # a gradient of zeros has an error of 1


@dataclass(frozen=True)
class Run:
    """What is measured: the fields that tell one row from another."""

    what: str
    part: str
    size: str
    model: str
    source: str  # ours, transformers' experts, llama, liger, torch
    kernels: str | None
    tokens: int
    dtype: str
    checkpointing: bool = False
    compiled: bool = False
    batch: tuple[int, int] | None = None  # sequences, and tokens of each; else as few as SEQ_LEN allows

    @property
    def is_ours(self) -> bool:
        return self.source == "ours"

    @property
    def provider(self) -> str:
        if self.is_ours:
            name = "ours" if self.part == "cross-entropy" else {"moe": "MoE", "dense": "dense twin"}[self.model]
            return f"{name}, {self.kernels}" + ", compiled" * self.compiled
        return PEERS.get(self.source, f"transformers GraniteMoeShared, {self.source} experts")

    def row(self) -> dict:
        """The fields that say what is measured."""
        fields = asdict(self)
        shape = dict(zip(("batch_size", "seq_len"), self.shape(), strict=True))
        told = {name: fields[name] for name in fields if name not in ("source", "batch")}
        return {"provider": self.provider} | told | shape

    def reference(self, dtype: str) -> "Run":
        """The same passes by the plain reference, eager."""
        return replace(self, source="ours", kernels="reference", checkpointing=False, compiled=False, dtype=dtype)

    def shape(self) -> tuple[int, int]:
        """Sequences, and tokens of each."""
        if self.batch:
            return self.batch
        seq_len = min(self.tokens, SEQ_LEN)
        return self.tokens // seq_len, seq_len


def build(run: Run, device: torch.device, **overrides) -> nn.Module:
    """The run's model: ours, or a peer with the same weights. The router losses have weight 0."""
    config = ModelConfig.preset(run.size, run.model == "dense", z_loss_coef=0.0, balance_loss_coef=0.0, **overrides)
    torch.manual_seed(0)
    model = Acceleron(config, compute_dtype=dtype_of(run))
    for name, weight in model.named_parameters():
        # A router of clear choices, that rounding seldom changes; and numbers of bf16, which peers need not round.
        weight.data = (weight.data * (10 if name.endswith("router") else 1)).bfloat16().float()
    if run.is_ours:
        model = model.double() if run.dtype == "fp64" else model
        model.gradient_checkpointing = run.checkpointing
        if run.compiled:
            model.compile_blocks()
        return model.to(device)
    from . import transformers_models as peers

    dtype = DTYPES[run.dtype]
    other = peers.llama(config, dtype) if config.dense else peers.granite_moe(config, dtype, run.source, balance=0.0)
    peers.load_weights(other, model)
    return other.to(device)


def layer(run: Run, device: torch.device) -> tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor], list[Tensor]]:
    """A model of one layer; the layer, or its MoE; the function of x (B, S, D) that it is; and RoPE's tables."""
    alone = run.part == "moe layer"
    if run.source == "liger":
        model = build(replace(run, source="ours"), device, num_layers=1, vocab_size=128)
        return model, model.blocks[0].moe, lambda x: liger_moe(model.blocks[0].moe, x), []
    model = build(run, device, num_layers=1, vocab_size=128)
    seq_len = run.shape()[1]
    if run.is_ours:
        block, tables = model.blocks[0], (model.cos_SC[:seq_len], model.sin_SC[:seq_len])
        if alone:
            return model, block.moe, lambda x: block.moe(x)[0], []
        return model, block, lambda x: block(x, *tables, run.checkpointing)[0], [*tables]
    block = model.model.layers[0]
    if alone:
        return model, block, lambda x: block.block_sparse_moe(x) + block.shared_mlp(x), []
    positions = torch.arange(seq_len, device=device)[None]
    tables = model.model.rotary_emb(torch.empty(0, dtype=DTYPES[run.dtype], device=device), positions)

    def forward(x: Tensor) -> Tensor:
        y = block(x, attention_mask=None, position_ids=positions, position_embeddings=tables)
        return y[0] if isinstance(y, tuple) else y

    return model, block, forward, [*tables]


def liger_moe(moe: nn.Module, x: Tensor) -> Tensor:
    """Our MoE layer with Liger's routed experts: it has no router and no shared expert of its own."""
    from liger_kernel.ops import LigerFusedMoEFunction

    x_TD = x.flatten(0, 1)
    routing = kernels.route_top2(kernels.router_logits(x_TD, moe.router))
    w13, w2 = moe.w13_E2FD.to(x.dtype), moe.w2_EDF.to(x.dtype)
    y_TD = LigerFusedMoEFunction.apply(x_TD, w13, w2, routing.experts_TK, routing.weights_TK.to(x.dtype))
    return (y_TD + moe.shared(x_TD)).view_as(x)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def sample(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """SAMPLES values of each, the same places of every tensor of a size; all of a smaller one."""
    values = {}
    for name, tensor in tensors.items():
        places = torch.randint(tensor.numel(), (SAMPLES,), generator=torch.Generator().manual_seed(tensor.numel()))
        flat = tensor.detach().flatten()
        values[name] = (flat if flat.numel() <= SAMPLES else flat[places.to(flat.device)]).double().cpu().numpy()
    return values


def layer_gradients(run: Run, device: torch.device, saved=None) -> dict[str, Tensor]:
    """The gradients of parameters and input for a random one of the output.

    The forward pass runs in the context `saved`, whose `count(parameters, tables)` is called before the backward pass.
    """
    kernels.select(run.kernels or "auto", device)
    model, module, forward, tables = layer(run, device)
    generator = torch.Generator().manual_seed(1)
    shape = (*run.shape(), ModelConfig.preset(run.size).d_model)
    x, dy = (torch.randn(shape, generator=generator).bfloat16().to(device, dtype_of(run)) for _ in range(2))
    x.requires_grad_()
    with sdpa(device):
        with saved or nullcontext():
            y = forward(x)
        if saved:
            saved.count(list(module.parameters()), tables)
        y.backward(dy)
    return gradients(model) | {"x": x.grad}


def train_steps(run: Run, device: torch.device, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model after training steps as train.py's, but with learning rate 0; the last step's gradients are in it."""
    kernels.select(run.kernels or "auto", device)
    model = build(run, device)
    if run.checkpointing and not run.is_ours:
        model.gradient_checkpointing_enable()
    optimizer = build_optimizer(model, 0.1)  # its learning rate is 0 until it is set
    ids = token_ids(run, model.config.vocab_size).to(device)
    with sdpa(device):
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=ids, labels=ids).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            optimizer.step()
    return model, optimizer


def head_inputs(run: Run, device: torch.device) -> list[Tensor]:
    """x and weight, which want gradients, and labels, of a model's cross-entropy."""
    config, generator = ModelConfig.preset(run.size), torch.Generator().manual_seed(1)
    x = torch.randn(run.tokens, config.d_model, generator=generator).bfloat16().to(device, dtype_of(run))
    weight = torch.randn(config.vocab_size, config.d_model, generator=generator).mul_(0.02).bfloat16()
    weight = weight.to(device, torch.float64 if run.dtype == "fp64" else torch.float32)
    labels = torch.randint(config.vocab_size, (run.tokens,), generator=generator).to(device)
    return [x.requires_grad_(), weight.requires_grad_(), labels]


def head_backward(run: Run, x: Tensor, weight: Tensor, labels: Tensor):
    """The cross-entropy and its gradients."""
    kernels.select(run.kernels or "auto", x.device)
    if run.is_ours:
        kernels.linear_cross_entropy(x, weight, labels).backward()
    else:
        F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), labels).backward()


def dtype_of(run: Run) -> torch.dtype:
    return DTYPES.get(run.dtype, torch.float64)


def token_ids(run: Run, vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, run.shape(), generator=torch.Generator().manual_seed(1))


def sdpa(device: torch.device):
    """What train.py does: SDPA's fastest backend on CUDA, for the peers too."""
    return best_sdpa() if device.type == "cuda" else nullcontext()


class Truths:
    """The reference's gradients, in the wide dtype and in the run's, kept until a run of another model or shape."""

    def __init__(self, device: torch.device):
        self.device, self.key = device, None

    def of(self, run: Run) -> list[dict[str, Tensor]]:
        dtypes = ("fp64" if run.dtype == "fp32" else "fp32", run.dtype)
        runs = [run.reference(dtype) for dtype in dtypes]
        if runs != self.key:
            self.grads = self.key = None
            self.grads = [{name: grad.cpu() for name, grad in self.compute(r).items()} for r in runs]
            self.key = runs
        return self.grads

    def compute(self, run: Run) -> dict[str, Tensor]:
        if run.part == "model step":
            # Recomputed blocks: the truth must fit where what is checked does.
            return gradients(train_steps(replace(run, checkpointing=True), self.device, 1)[0])
        if run.part == "cross-entropy":
            x, weight, labels = head_inputs(run, self.device)
            head_backward(run, x, weight, labels)
            return {"x": x.grad, "weight": weight.grad}
        return layer_gradients(run, self.device)


def check(run: Run, found: dict[str, np.ndarray], grads: list[dict[str, Tensor]]) -> dict:
    """The fields of a row's check: the gradient that is the farthest off for what is allowed."""
    if not (run.is_ours or run.source in ("liger", "torch")):
        grads = [by_their_names(run, g) for g in grads]
    truths, plains = (sample(g) for g in grads)
    assert found.keys() == truths.keys(), found.keys() ^ truths.keys()

    def error(values, name):
        return float(np.linalg.norm(values[name] - truths[name]) / np.linalg.norm(truths[name]))

    factor, floor = (OURS if run.is_ours else PEER)[run.dtype]
    judged = [(error(found, name), min(MOST, factor * error(plains, name) + floor), name) for name in truths]
    worst, allowed, name = max(judged, key=lambda j: j[0] / j[1] if math.isfinite(j[0]) else math.inf)
    return {
        "check": f"the gradients; the worst is of {name}: relative RMS to the reference's in a wider dtype",
        "check_error": worst,
        "check_allowed": allowed,
    }


def by_their_names(run: Run, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    from . import transformers_models as peers

    layers = {} if run.part == "model step" else dict(num_layers=1, vocab_size=128)
    config = ModelConfig.preset(run.size, run.model == "dense", **layers)
    with torch.device("meta"):
        other = peers.llama(config, None) if config.dense else peers.granite_moe(config, None, run.source)
    weights = {name: grad for name, grad in grads.items() if name != "x"}
    return peers.to_transformers(weights, other) | {name: grad for name, grad in grads.items() if name == "x"}
