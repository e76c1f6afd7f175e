"""transformers' models of the same dimensions, on SDPA and its fastest experts, and our weights in them."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import (
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from acceleron import Acceleron, ModelConfig

EXPERTS = ("eager", "grouped_mm", "batched_mm")
# Ours, and theirs; of the experts the name since they are one module, and the name before.
LAYER_NAMES = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "moe.router": ("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),
    "moe.w13_E2FD": ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
    "moe.w2_EDF": ("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
    "moe.shared.w13": ("shared_mlp.input_linear.weight",),
    "moe.shared.w2": ("shared_mlp.output_linear.weight",),
    "mlp.w2": ("mlp.down_proj.weight",),
}


def _shared_fields(config: ModelConfig) -> dict:
    return dict(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=True,
        use_cache=False,
    )


def granite_moe(config: ModelConfig, dtype: torch.dtype, experts: str, balance: float = 0.001):
    """The MoE's peer, a GraniteMoeSharedForCausalLM whose parameters are in dtype.

    `experts` is one of EXPERTS; `balance` is the coefficient of its balance loss, which is not ours: 0 for our loss
    without the router's.
    """
    other = GraniteMoeSharedConfig(
        **_shared_fields(config),
        intermediate_size=config.d_ff,
        shared_intermediate_size=config.d_ff_shared,
        num_local_experts=config.num_experts,
        num_experts_per_tok=2,
        attention_multiplier=config.head_dim**-0.5,
        output_router_logits=True,
        router_aux_loss_coef=balance,
    )
    return GraniteMoeSharedForCausalLM._from_config(
        other, attn_implementation="sdpa", experts_implementation=experts, dtype=dtype
    )


def llama(config: ModelConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """The dense twin's peer, parameters in dtype."""
    other = LlamaConfig(**_shared_fields(config), intermediate_size=config.d_ff_dense)
    return LlamaForCausalLM._from_config(other, attn_implementation="sdpa", dtype=dtype)


def to_transformers(tensors: Mapping[str, Tensor], other: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors of our parameters' names and shapes (weights or gradients) by the names of `other`, as views.

    `other` is a model of `granite_moe` or `llama` of the same dimensions.
    """
    config, theirs = other.config, {name for name, _ in other.named_parameters()}
    head_dim = config.hidden_size // config.num_attention_heads
    rows = [n * head_dim for n in (config.num_attention_heads, *2 * [config.num_key_value_heads])]
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith("blocks."):
            found["model.embed_tokens.weight" if name == "embedding" else f"model.{name}"] = tensor
            continue
        _, layer, part = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if part == "attention.qkv.weight":
            for letter, piece in zip("qkv", tensor.split(rows), strict=True):
                found[f"{prefix}self_attn.{letter}_proj.weight"] = piece
        elif part == "mlp.w13":
            found[f"{prefix}mlp.gate_proj.weight"], found[f"{prefix}mlp.up_proj.weight"] = tensor.chunk(2)
        else:
            found[next(prefix + n for n in LAYER_NAMES[part] if prefix + n in theirs)] = tensor
    return found


@torch.no_grad()
def load_weights(other: PreTrainedModel, model: Acceleron):
    """Give `other` our weights, rounded to its dtype: the two are then the same function."""
    weights = to_transformers(dict(model.named_parameters()), other)
    parameters = dict(other.named_parameters())
    assert weights.keys() == parameters.keys()
    for name, weight in weights.items():
        parameters[name].copy_(weight)
