"""transformers' models of the same dimensions, on SDPA and its fastest experts."""

import torch
from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM, LlamaConfig, LlamaForCausalLM

from acceleron import ModelConfig

EXPERTS = ("eager", "grouped_mm", "batched_mm")


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


def granite_moe(config: ModelConfig, dtype: torch.dtype, experts: str) -> GraniteMoeSharedForCausalLM:
    other = GraniteMoeSharedConfig(
        **_shared_fields(config),
        intermediate_size=config.d_ff,
        shared_intermediate_size=config.d_ff_shared,
        num_local_experts=config.num_experts,
        num_experts_per_tok=2,
        attention_multiplier=config.head_dim**-0.5,
        output_router_logits=True,
    )
    return GraniteMoeSharedForCausalLM._from_config(
        other, attn_implementation="sdpa", experts_implementation=experts, dtype=dtype
    )


def llama(config: ModelConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """The dense twin's peer."""
    other = LlamaConfig(**_shared_fields(config), intermediate_size=config.d_ff_dense)
    return LlamaForCausalLM._from_config(other, attn_implementation="sdpa", dtype=dtype)
