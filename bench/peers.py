"""Tokens/s of forward and backward: MoE and dense baseline against transformers' models with the same weights.

Nothing is checkpointed, and no optimizer runs. Ours are compiled, unless --no_compile. The gradients of the last round
are checked. The exit status is 1 if one of ours failed.

A `Contender` is ours or a peer's. All have the same weights, which bf16 represents exactly. The router losses have
weight 0, as the peers' differ. So all compute the same function, and the fp32 reference gives the true gradients.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acceleron import Acceleron, ModelConfig, kernels
from acceleron.attention import best_sdpa
from acceleron.config import PRESETS
from acceleron.device import dtype_name, missing_compiler, synchronize
from acceleron.errors import InputError

from .command import compete, parse
from .rows import Results, Row

BACKENDS = ("triton", "reference")
GRANITE = ("eager", "grouped_mm")  # implementations of transformers' experts
TRANSFORMERS = (*GRANITE, "llama")
PEERS = {"llama": "transformers Llama", "liger": "MoE, Liger's fused_moe", "torch": "torch, all logits"}
PEERS |= {experts: f"transformers GraniteMoeShared, {experts} experts" for experts in GRANITE}
# transformers' names of our parameters; several where ours is their concatenation along the first dimension.
THEIR_NAMES = {
    "embedding": ["embed_tokens.weight"], "norm.weight": ["norm.weight"],
    "attention_norm.weight": ["input_layernorm.weight"], "ffn_norm.weight": ["post_attention_layernorm.weight"],
    "attention.qkv.weight": [f"self_attn.{letter}_proj.weight" for letter in "qkv"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "moe.router": ["block_sparse_moe.router.weight"],
    "moe.w13_E2FD": ["block_sparse_moe.experts.gate_up_proj"],
    "moe.w2_EDF": ["block_sparse_moe.experts.down_proj"],
    "moe.shared.w13": ["shared_mlp.input_linear.weight"], "moe.shared.w2": ["shared_mlp.output_linear.weight"],
    "mlp.w13": ["mlp.gate_proj.weight", "mlp.up_proj.weight"], "mlp.w2": ["mlp.down_proj.weight"],
}  # fmt: skip
SAMPLES = 1 << 14  # of each larger gradient, at least
# Allowed relative RMS error; that of zeros is 1. Ours may have twice the error of the reference in the same dtype, plus
# FLOOR, as compiled passes round at other places. Peers also round the router's logits: a third of its gradient.
FLOOR = {torch.float32: 1e-4, torch.bfloat16: 4e-3}
MOST = {torch.float32: 1e-4, torch.bfloat16: 0.5}


@dataclass
class Pass:
    """A forward and a backward pass. `parameters`: by our names; a peer may have several for one of ours."""

    backend: str
    device: torch.device
    parameters: dict[str, list[Tensor]]
    forward: Callable[[], Tensor]
    dy: Tensor | None = None  # gradient of forward's output; None for a loss
    model: nn.Module | None = None
    tables: tuple[Tensor, ...] = ()  # RoPE's

    def __call__(self, around_forward: AbstractContextManager | None = None):
        kernels.select(self.backend, self.device)
        with best_sdpa() if self.device.type == "cuda" else nullcontext():
            with around_forward or nullcontext():
                y = self.forward()
            y.backward(self.dy)

    def gradients(self) -> dict[str, Tensor]:
        """A sample of each gradient, by our names, on the CPU in fp64."""

        def sample(grad: Tensor) -> Tensor:  # an odd step reaches all columns of rows of an even length
            return grad.flatten()[:: grad.numel() // SAMPLES | 1].double().cpu()

        return {name: sample(torch.cat([p.grad for p in parts])) for name, parts in self.parameters.items()}


@dataclass(frozen=True)
class Contender:
    """An implementation (of BACKENDS, ours, or of PEERS) of a "moe layer", "block", "model step" or "cross-entropy"."""

    source: str
    part: str
    size: str
    dtype: torch.dtype
    batch_size: int
    seq_len: int
    dense: bool = False
    checkpointing: bool = False
    compiled: bool = False

    @property
    def ours(self) -> bool:
        return self.source in BACKENDS

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    def row(self, benchmark: str, unit: str, **case) -> Row:
        name = "linear_cross_entropy" if self.part == "cross-entropy" else "dense" if self.dense else "MoE"
        provider = f"{name}, {self.source}" + ", compiled" * self.compiled if self.ours else PEERS[self.source]
        case = {"size": self.size, "dtype": dtype_name(self.dtype)} | case
        return Row(benchmark, provider, case, unit, group=f"{self.size}, {self.part}")

    def build(self, device: torch.device) -> Pass:
        """Raises ImportError for a peer that is not installed."""
        parts = {"model step": self._model_step, "cross-entropy": self._cross_entropy}
        torch.manual_seed(1)  # of the inputs, which all parts make first
        return Pass(self.source if self.ours else "auto", device, *parts.get(self.part, self._layer)(device))

    def _model_step(self, device: torch.device) -> tuple:
        ids = torch.randint(PRESETS[self.size].vocab_size, (self.batch_size, self.seq_len)).to(device)
        model, parameters = self._model(device)
        return parameters, lambda: model(input_ids=ids, labels=ids).loss, None, model

    def _model(self, device: torch.device, **overrides) -> tuple[nn.Module, dict[str, list[Tensor]]]:
        config = ModelConfig.preset(self.size, self.dense, z_loss_coef=0.0, balance_loss_coef=0.0, **overrides)
        torch.manual_seed(0)
        model = Acceleron(config, compute_dtype=self.dtype)
        for name, weight in model.named_parameters():
            # Where the router's choices are clear, rounding seldom changes one.
            weight.data = (weight.data * (10 if name.endswith("router") else 1)).bfloat16().float()
        if self.source in TRANSFORMERS:
            peer = transformers_model(config, self.source, self.dtype)
            return peer.to(device), load_weights(peer, model)
        model.gradient_checkpointing = self.checkpointing
        if self.compiled:
            model.compile_blocks()
        return model.to(device), {name: [weight] for name, weight in model.named_parameters()}

    def _layer(self, device: torch.device) -> tuple:
        shape = (self.batch_size, self.seq_len, PRESETS[self.size].d_model)
        x, dy = (torch.randn(shape).bfloat16().to(device, self.dtype) for _ in range(2))
        model, parameters = self._model(device, num_layers=1, vocab_size=128)
        if hasattr(model, "blocks"):
            layer, tables = model.blocks[0], (model.cos_SC[: self.seq_len], model.sin_SC[: self.seq_len])
            forward = {
                "block": lambda: layer(x, *tables, self.checkpointing)[0],
                "moe layer": lambda: liger_moe(layer.moe, x) if self.source == "liger" else layer.moe(x)[0],
            }
        else:
            layer, positions = model.model.layers[0], torch.arange(self.seq_len, device=device)[None]
            tables = model.model.rotary_emb(torch.empty(0, dtype=self.dtype, device=device), positions)
            forward = {
                "block": lambda: layer(x, None, positions, position_embeddings=tables),
                "moe layer": lambda: layer.block_sparse_moe(x) + layer.shared_mlp(x),
            }
        prefix = "blocks.0.moe." if self.part == "moe layer" else "blocks.0."
        parameters = {name: parts for name, parts in parameters.items() if name.startswith(prefix)}
        return parameters | {"x": [x.requires_grad_()]}, forward[self.part], dy, model, tables

    def _cross_entropy(self, device: torch.device) -> tuple:
        config = PRESETS[self.size]
        x = torch.randn(self.tokens, config.d_model).bfloat16().to(device, self.dtype).requires_grad_()
        weight = (0.02 * torch.randn(config.vocab_size, config.d_model)).bfloat16().float().to(device).requires_grad_()
        labels = torch.randint(config.vocab_size, (self.tokens,)).to(device)
        parameters = {"x": [x], "weight": [weight]}
        if self.ours:
            return parameters, lambda: kernels.linear_cross_entropy(x, weight, labels)
        return parameters, lambda: F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), labels)

    def check(self, row: Row, found: dict[str, Tensor], device: torch.device):
        """Set the row's check: of the gradient whose error is the largest in comparison with what is allowed."""
        same = replace(self, source="reference", compiled=False, checkpointing=self.part == "model step")
        truth, plain = (_gradients(replace(same, dtype=dtype), device) for dtype in (torch.float32, self.dtype))

        def judge(name: str) -> tuple[float, float]:
            errors = torch.stack([(g[name] - truth[name]).norm() / truth[name].norm() for g in (found, plain)])
            error, least = errors.nan_to_num(math.inf).tolist()
            return error, min(MOST[self.dtype], 2 * least + FLOOR[self.dtype] if self.ours else math.inf)

        judged = {name: judge(name) for name in truth}
        worst = max(truth, key=lambda name: judged[name][0] / judged[name][1])
        row.check = f"gradient of {worst} (the worst) against the fp32 reference"
        row.error, row.allowed = judged[worst]


@cache
def _gradients(contender: Contender, device: torch.device) -> dict[str, Tensor]:
    one_pass = contender.build(device)
    one_pass()
    return one_pass.gradients()


def liger_moe(moe: nn.Module, x: Tensor) -> Tensor:
    """Our MoE layer with Liger's routed experts; Liger has no router and no shared expert."""
    from liger_kernel.ops import LigerFusedMoEFunction

    x_TD = x.flatten(0, 1)
    routing = kernels.route_top2(kernels.router_logits(x_TD, moe.router))
    w13, w2 = moe.w13_E2FD.to(x.dtype), moe.w2_EDF.to(x.dtype)
    y_TD = LigerFusedMoEFunction.apply(x_TD, w13, w2, routing.experts_TK, routing.weights_TK.to(x.dtype))
    return (y_TD + moe.shared(x_TD)).view_as(x)


def transformers_model(config: ModelConfig, source: str, dtype: torch.dtype) -> nn.Module:
    """transformers' model of a config, parameters in dtype: "llama", or GraniteMoeShared with these experts."""
    import transformers  # takes seconds

    settings = dict(attn_implementation="sdpa", dtype=dtype)
    fields = dict(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_seq_len, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    if source == "llama":
        theirs = transformers.LlamaConfig(**fields, intermediate_size=config.d_ff_dense)
        return transformers.AutoModelForCausalLM.from_config(theirs, **settings)
    theirs = transformers.GraniteMoeSharedConfig(
        **fields, intermediate_size=config.d_ff, shared_intermediate_size=config.d_ff_shared,
        num_local_experts=config.num_experts, num_experts_per_tok=2, attention_multiplier=config.head_dim**-0.5,
        output_router_logits=True, router_aux_loss_coef=0.0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(theirs, experts_implementation=source, **settings)


@torch.no_grad()
def load_weights(peer: nn.Module, model: Acceleron) -> dict[str, list[Tensor]]:
    """Copy our weights into transformers' model of the same config. Returns its parameters by our names."""
    theirs, found = dict(peer.named_parameters()), {}
    for name, weight in model.named_parameters():
        *layer, part = name.split(".", 2) if name.startswith("blocks.") else [name]
        prefix = f"model.layers.{layer[1]}." if layer else "model."
        found[name] = [theirs.pop(prefix + their_name) for their_name in THEIR_NAMES[part]]
        for parameter, rows in zip(found[name], weight.split([len(p) for p in found[name]]), strict=True):
            parameter.copy_(rows)
    assert not theirs, f"parameters without weights: {[*theirs]}"
    return found


def entry(contender: Contender, device: torch.device) -> Iterator:
    """For `compete`."""
    row = contender.row("peers", "tokens/s", batch_size=contender.batch_size, seq_len=contender.seq_len)
    yield row
    one_pass = contender.build(device)

    def rate() -> float:
        one_pass.model.zero_grad(set_to_none=True)
        synchronize(device)
        start = time.perf_counter()
        one_pass()
        synchronize(device)
        return contender.tokens / (time.perf_counter() - start)

    yield rate
    contender.check(row, one_pass.gradients(), device)


def main():
    shape = dict(size="tiny", batch_size=2, seq_len=1024)
    arguments = parse(__doc__, dtype="auto", kernels="auto", rounds=5, no_compile=False, **shape)
    size, device, longest = arguments.size, arguments.device, PRESETS[arguments.size].max_seq_len
    if not 2 <= arguments.seq_len <= longest:
        raise InputError(f"--seq_len {arguments.seq_len}: expected 2 to {longest}")
    try:
        backend = "triton" if kernels.select(arguments.kernels, device).startswith("Triton") else "reference"
    except ValueError as error:
        raise InputError(str(error)) from error
    shape = dict(size=size, dtype=arguments.dtype, batch_size=arguments.batch_size, seq_len=arguments.seq_len)
    make, compiled = (
        partial(Contender, part="model step", **shape),
        not (arguments.no_compile or missing_compiler(device)),
    )
    contenders = [make(backend, dense=dense, compiled=compiled) for dense in (False, True)]
    contenders += [*map(make, GRANITE), make("llama", dense=True)]
    entries = [entry(contender, device) for contender in contenders]
    compete(entries, arguments.rounds, Results(arguments.output, device), ours=2)
