"""Tokens/s of forward and backward: MoE and dense baseline against transformers' models with the same weights.

Our models are compiled if a compiler is installed. No optimizer runs. The check compares the gradients of the last
round with the fp32 reference. The exit status is 1 if one of our models fails.

All contenders compute the same function: bf16 represents every weight exactly, and the router losses have weight 0,
because transformers defines them differently.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from acceleron import Acceleron, ModelConfig, ops
from acceleron.attention import best_sdpa
from acceleron.config import PRESETS
from acceleron.device import dtype_name, missing_compiler, synchronize
from acceleron.errors import InputError

from .command import parse, run_entries
from .rows import Results, Row

PEERS = {False: "transformers GraniteMoeShared, grouped_mm experts", True: "transformers Llama"}  # by `dense`
# transformers' names for our parameters. Each of ours concatenates one or more of theirs along dimension 0.
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
# The allowed relative RMS error is FACTOR times the reference's error in the same dtype, plus FLOOR. transformers also
# rounds the router logits, which raises its error to as much as 1.7 times the reference's.
FACTOR, FLOOR = 3, {torch.float32: 1e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Contender:
    """A model. source: our kernel backend, "triton" or "reference", or "transformers". block: only one layer."""

    source: str
    size: str
    dtype: torch.dtype
    batch_size: int
    seq_len: int
    dense: bool = False
    checkpointing: bool = False
    compiled: bool = False
    block: bool = False

    def row(self, benchmark: str, unit: str, **case) -> Row:
        provider = f"{'dense' if self.dense else 'MoE'}, {self.source}" + (", compiled" if self.compiled else "")
        provider = PEERS[self.dense] if self.source == "transformers" else provider
        case = {"size": self.size, "dtype": dtype_name(self.dtype)} | case
        return Row(benchmark, provider, case, unit, group=self.size + (", block" if self.block else ""))

    def build(self, device: torch.device) -> tuple[nn.Module, Callable, Callable]:
        """Return the model, a function that runs forward and backward, and one that returns CPU gradients by our names.

        Raises ImportError if the model needs transformers but it is not installed.
        """
        overrides = dict(num_layers=1, vocab_size=1024) if self.block else {}
        config = ModelConfig.preset(self.size, self.dense, z_loss_coef=0.0, balance_loss_coef=0.0, **overrides)
        torch.manual_seed(0)
        ids = torch.randint(config.vocab_size, (self.batch_size, self.seq_len)).to(device)
        model = model_with_clear_routing(config, self.dtype)
        backend, parameters = self.source, {name: [weight] for name, weight in model.named_parameters()}
        model.gradient_checkpointing = self.checkpointing
        if self.compiled:
            model.compile_blocks()
        if self.source == "transformers":
            ours = model
            backend = "auto"
            model = transformers_model(config, self.dtype)
            parameters = load_weights(model, ours)
        model.to(device)

        def run():
            with ops.using_backend(backend, device), best_sdpa(device):
                model(input_ids=ids, labels=ids).loss.backward()

        return model, run, lambda: {name: torch.cat([p.grad for p in ps]).cpu() for name, ps in parameters.items()}

    def check(self, row: Row, gradients: dict[str, Tensor], device: torch.device):
        """Set the row's check from the gradient with the largest ratio of error to allowed error."""
        same = replace(self, source="reference", compiled=False, checkpointing=True)
        truth, plain = (_gradients(replace(same, dtype=dtype), device) for dtype in (torch.float32, self.dtype))

        def errors(grads: dict[str, Tensor]) -> dict[str, float]:
            return {name: ((grads[name] - true).norm() / true.norm()).item() for name, true in truth.items()}

        error, allowed = errors(gradients), {name: FACTOR * e + FLOOR[self.dtype] for name, e in errors(plain).items()}
        worst = max(truth, key=lambda name: (not error[name] <= allowed[name], error[name] / allowed[name]))  # or NaN
        row.check = f"gradient of {worst} (worst) against the fp32 reference"
        row.error, row.allowed = error[worst], allowed[worst]


def our_backend(device: torch.device, dtype: torch.dtype) -> str:
    return "triton" if ops.uses_triton(device, dtype) else "reference"


@cache
def _gradients(contender: Contender, device: torch.device) -> dict[str, Tensor]:
    _, run, gradients = contender.build(device)
    run()
    return gradients()


@torch.no_grad()
def model_with_clear_routing(config: ModelConfig, dtype: torch.dtype) -> Acceleron:
    """Build a model with bf16 weights whose routers rank the E experts by a token's first E embedding values.

    With random routers, tokens near a tie select different experts in bf16 and fp32. That changes gradients by up to
    40% and hides wrong ones.
    """
    model, experts = Acceleron(config, compute_dtype=dtype), config.num_experts
    model.embedding[:, :experts] = 0.5 * torch.rand(config.vocab_size, experts).argsort(dim=1)
    for name, weight in model.named_parameters():
        if name.endswith("router"):
            weight.copy_(0.2 * torch.eye(*weight.shape))
        weight.copy_(weight.bfloat16())
    return model


def transformers_model(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """Build transformers' GraniteMoeShared or, for a dense config, Llama, with parameters in `dtype`."""
    import transformers  # slow to import

    fields = dict(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_seq_len, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    if config.dense:
        theirs = transformers.LlamaConfig(**fields, intermediate_size=config.d_ff_dense)
    else:
        theirs = transformers.GraniteMoeSharedConfig(
            **fields, intermediate_size=config.d_ff, shared_intermediate_size=config.d_ff_shared,
            num_local_experts=config.num_experts, num_experts_per_tok=config.top_k,
            attention_multiplier=config.head_dim**-0.5, experts_implementation="grouped_mm",
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa", dtype=dtype)


@torch.no_grad()
def load_weights(peer: nn.Module, model: Acceleron) -> dict[str, list[Tensor]]:
    """Copy our weights into the transformers model of the same config. Returns its parameters by our names."""
    theirs, found = dict(peer.named_parameters()), {}
    for name, weight in model.named_parameters():
        *layer, part = name.split(".", 2) if name.startswith("blocks.") else [name]
        prefix = f"model.layers.{layer[1]}." if layer else "model."
        found[name] = [theirs.pop(prefix + their_name) for their_name in THEIR_NAMES[part]]
        for parameter, rows in zip(found[name], weight.split([len(p) for p in found[name]]), strict=True):
            parameter.copy_(rows)
    assert not theirs, f"uninitialized parameters: {[*theirs]}"
    return found


def entry(contender: Contender, device: torch.device) -> Iterator:
    """Yield an entry for `run_entries`."""
    shape = dict(batch_size=contender.batch_size, seq_len=contender.seq_len)
    row = contender.row("peers", "tokens/s", **shape)
    yield row
    model, run, gradients = contender.build(device)

    def rate() -> float:
        model.zero_grad(set_to_none=True)
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        return math.prod(shape.values()) / (time.perf_counter() - start)

    yield rate
    contender.check(row, gradients(), device)


def main():
    arguments = parse(__doc__, model_size="tiny", dtype="auto", rounds=5, batch_size=2, seq_len=1024)
    device, longest = arguments.device, PRESETS[arguments.model_size].max_seq_len
    if not 2 <= arguments.seq_len <= longest:
        raise InputError(f"--seq_len {arguments.seq_len}: expected 2 to {longest}")
    shape = (arguments.model_size, arguments.dtype, arguments.batch_size, arguments.seq_len)
    compiled, ours = missing_compiler(device) is None, our_backend(device, arguments.dtype)
    contenders = [Contender(ours, *shape, dense=dense, compiled=compiled) for dense in (False, True)]
    contenders += [Contender("transformers", *shape, dense=dense) for dense in (False, True)]
    entries = [entry(contender, device) for contender in contenders]
    run_entries(entries, arguments.rounds, Results(arguments.output, device), ours=2)
