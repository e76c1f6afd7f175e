"""The names of the model's weights in other formats.

Other formats store some matrices in parts: one tensor each for q, k and v, or for gate and up. A table maps each of our
parameters to the tensors whose rows it concatenates. N is the layer.
"""

from collections.abc import Iterator

from torch import Tensor

from .model import Acceleron

HUGGING_FACE = {
    "embedding": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "blocks.N.attention_norm.weight": ["model.layers.N.input_layernorm.weight"],
    "blocks.N.attention.qkv.weight": [f"model.layers.N.self_attn.{part}_proj.weight" for part in "qkv"],
    "blocks.N.attention.out.weight": ["model.layers.N.self_attn.o_proj.weight"],
    "blocks.N.ffn_norm.weight": ["model.layers.N.post_attention_layernorm.weight"],
    "blocks.N.mlp.w13": ["model.layers.N.mlp.gate_proj.weight", "model.layers.N.mlp.up_proj.weight"],
    "blocks.N.mlp.w2": ["model.layers.N.mlp.down_proj.weight"],
    "blocks.N.moe.router": ["model.layers.N.block_sparse_moe.router.layer.weight"],
    "blocks.N.moe.w13_E2FD": ["model.layers.N.block_sparse_moe.input_linear.weight"],
    "blocks.N.moe.w2_EDF": ["model.layers.N.block_sparse_moe.output_linear.weight"],
    "blocks.N.moe.shared.w13": ["model.layers.N.shared_mlp.input_linear.weight"],
    "blocks.N.moe.shared.w2": ["model.layers.N.shared_mlp.output_linear.weight"],
}
GGUF = {
    "embedding": ["token_embd.weight"],
    "norm.weight": ["output_norm.weight"],
    "blocks.N.attention_norm.weight": ["blk.N.attn_norm.weight"],
    "blocks.N.attention.qkv.weight": [f"blk.N.attn_{part}.weight" for part in "qkv"],
    "blocks.N.attention.out.weight": ["blk.N.attn_output.weight"],
    "blocks.N.ffn_norm.weight": ["blk.N.ffn_norm.weight"],
    "blocks.N.mlp.w13": ["blk.N.ffn_gate.weight", "blk.N.ffn_up.weight"],
    "blocks.N.mlp.w2": ["blk.N.ffn_down.weight"],
    "blocks.N.moe.router": ["blk.N.ffn_gate_inp.weight"],
    "blocks.N.moe.w13_E2FD": ["blk.N.ffn_gate_exps.weight", "blk.N.ffn_up_exps.weight"],
    "blocks.N.moe.w2_EDF": ["blk.N.ffn_down_exps.weight"],
    "blocks.N.moe.shared.w13": ["blk.N.ffn_gate_shexp.weight", "blk.N.ffn_up_shexp.weight"],
    "blocks.N.moe.shared.w2": ["blk.N.ffn_down_shexp.weight"],
}


def named_parts(model: Acceleron, table: dict[str, list[str]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of another format: (name, view of our parameter).

    Read the views to write a file; copy a file's tensors into them to load it.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        weight, names = parameter.detach(), table.get(name)
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            names = [part.replace("N", layer) for part in table[f"blocks.N.{rest}"]]
        if name.endswith("qkv.weight"):
            rows = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
            yield from zip(names, weight.split(rows), strict=True)
        else:  # experts have their rows in the second dimension
            yield from zip(names, weight.chunk(len(names), dim=-2 if weight.dim() > 1 else 0), strict=True)
