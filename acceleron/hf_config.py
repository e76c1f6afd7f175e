"""The config.json of Hugging Face models: the architectures that equal ours, and the conversion of their fields.

The MoE is GraniteMoeShared, or GraniteMoe without a shared expert. The dense baseline is Llama.
"""

import math
from typing import NamedTuple

from .config import ModelConfig, short_repr
from .errors import InputError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
}
# Fields that change the computation, with the only value that Acceleron implements.
REQUIRED = {"hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}
REQUIRED |= {"sliding_window": None, "quantization_config": None, "partial_rotary_factor": 1.0}
DEFAULTS = REQUIRED | {"tie_word_embeddings": False}  # of transformers, for fields that config.json lacks
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


class HFConfig(NamedTuple):
    """A model's config, and the factors that fold its multipliers into its weights.

    Factors that differ from 1 are keyed by the last part of the name of the Hugging Face tensor, without ".weight".
    """

    config: ModelConfig
    factors: dict[str, float]


def model_type(config: ModelConfig) -> str:
    """Return the Hugging Face model type that equals the model. Raises InputError if there is none."""
    if config.dense:
        return "llama"
    if config.num_dense_layers:
        raise InputError(
            f"num_dense_layers {config.num_dense_layers}: no architecture of transformers or llama.cpp has dense "
            "layers before these MoE layers, so the model cannot be exported; Acceleron.load reads its checkpoints"
        )
    return "granitemoeshared" if config.d_ff_shared else "granitemoe"


def to_hf_config(config: ModelConfig, end_id: int | None, pad_id: int | None, hybrid: bool = False) -> dict:
    """Return the contents of config.json. Raises InputError if no Hugging Face architecture equals the model.

    `hybrid` selects GraniteMoeHybrid, which mlx-lm supports, with the same tensors. All fields are written, because
    their defaults differ between engines and releases.
    """
    kind = model_type(config)
    if hybrid:
        if kind != "granitemoeshared":
            reason = "the dense baseline has no experts" if config.dense else "the model has no shared expert"
            raise InputError(f"--hybrid: {reason}: omit the flag")
        kind = "granitemoehybrid"
    fields = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.d_ff_dense if config.dense else config.d_ff,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": pad_id,
        "torch_dtype": "float32",  # also for 16-bit files: in bf16, transformers would compute the router in bf16
    }
    if config.dense:
        return fields | {"mlp_bias": False, "head_dim": config.head_dim}
    fields |= {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "shared_intermediate_size": config.d_ff_shared,
        "attention_multiplier": config.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        # For uniform routing, the loss of transformers is top_k. Ours is the number of layers.
        "router_aux_loss_coef": config.balance_loss_coef * config.num_layers / config.top_k,
        "router_z_loss_coef": config.z_loss_coef,  # Acceleron reads it; transformers has no z-loss
        "output_router_logits": False,  # true breaks generate() in transformers 4
    }
    if hybrid:
        attention = ["attention"] * config.num_layers
        fields |= {"layer_types": attention, "layers_block_type": attention, "position_embedding_type": "rope"}
        # No layer is a Mamba layer, but the sizes must be consistent.
        fields |= {"mamba_expand": 1, "mamba_n_heads": config.num_heads, "mamba_d_head": config.head_dim}
    return fields


def from_hf_config(values: dict) -> HFConfig:
    """Convert the contents of config.json. Raises InputError that names the field if the model differs from ours."""
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(f"model_type {short_repr(kind)} is not supported; use one of {', '.join(ARCHITECTURES)}")
    for name, wanted in REQUIRED.items():
        value = values.get(name, DEFAULTS[name])
        if value != wanted and not (value is None and name == "partial_rotary_factor"):
            raise InputError(f"{name} {short_repr(value)} is not supported; Acceleron has {wanted}")
    missing = [name for name in SIZES if name not in values]
    if missing:
        raise InputError(f"{', '.join(missing)} missing")
    fields = {
        "vocab_size": values["vocab_size"],
        "d_model": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        "d_ff": values["intermediate_size"],
        "max_seq_len": values.get("max_position_embeddings", 2048),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "rope_theta": _rope_theta(values),
    }
    if kind == "llama":
        config = ModelConfig(dense=True, top_k=1, d_ff_shared=0, **fields)
    else:
        shared_default = {"granitemoe": 0, "granitemoeshared": 0, "granitemoehybrid": 1024}[kind]
        fields |= {
            "num_experts": values.get("num_local_experts", 8),
            "top_k": values.get("num_experts_per_tok", 2),
            "d_ff_shared": 0 if kind == "granitemoe" else values.get("shared_intermediate_size", shared_default),
        }
        config = ModelConfig(**fields)
        balance = _number(values, "router_aux_loss_coef", 0.001) * config.top_k / config.num_layers
        z_loss = _number(values, "router_z_loss_coef", config.z_loss_coef)
        config = ModelConfig(**fields, balance_loss_coef=round(balance, 12), z_loss_coef=z_loss)
    if values.get("head_dim") not in (None, config.head_dim):
        raise InputError(f"head_dim {short_repr(values['head_dim'])} is not hidden_size / num_attention_heads")
    if kind == "granitemoehybrid":
        _check_hybrid(values, config)
    return HFConfig(config, {} if kind == "llama" else _factors(values, config))


def _number(values: dict, name: str, default: float) -> float:
    value = values.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, not {short_repr(value)}")
    return float(value)


def _rope_theta(values: dict) -> float:
    """Return theta from the fields of transformers 5 (rope_parameters) or 4. Raises InputError for scaled RoPE."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"rope_parameters must be an object, not {short_repr(rope)}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"rope_type {short_repr(kind)} is not supported; Acceleron has unscaled RoPE")
    return _number(rope if "rope_theta" in rope else values, "rope_theta", 10000.0)


def _check_hybrid(values: dict, config: ModelConfig):
    layers = values.get("layer_types") or values.get("layers_block_type") or ["mamba"]
    if not isinstance(layers, list) or len(layers) != config.num_layers:
        raise InputError(f"layer_types must list {config.num_layers} layers")
    other = [kind for kind in layers if kind not in ("attention", "full_attention")]
    if other:
        raise InputError(f"layer_types has {short_repr(other[0])}; Acceleron has attention layers only")
    if values.get("position_embedding_type") != "rope":
        kind = short_repr(values.get("position_embedding_type"))
        raise InputError(f"position_embedding_type {kind} is not supported; Acceleron has rope")


def _factors(values: dict, config: ModelConfig) -> dict[str, float]:
    """Return the factors that fold Granite's multipliers into the weights. The function stays the same.

    The embedding also is the output head: the final norm's weight undoes its factor, and divides the logits.
    """
    embedding, residual, attention, logits = (_number(values, name, 1.0) for name in MULTIPLIERS)
    for name, value in zip(MULTIPLIERS, (embedding, residual, attention, logits), strict=True):
        if value <= 0:
            raise InputError(f"{name} {value} must be above 0")
    factors = dict.fromkeys(("o_proj", "output_linear"), residual)
    factors |= {"q_proj": attention * config.head_dim**0.5, "embed_tokens": embedding, "norm": 1 / (embedding * logits)}
    return {name: factor for name, factor in factors.items() if not math.isclose(factor, 1.0, rel_tol=1e-6)}
