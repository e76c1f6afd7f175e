"""The config.json of Hugging Face models: the architectures that equal ours, and the conversion of their fields.

The MoE is GraniteMoeShared, or GraniteMoe without a shared expert. The dense baseline is Llama.
"""

import json
import math
import re
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
MAX_NUMBER, MIN_MULTIPLIER = 1e12, 1e-6  # far from published values, and their products fit fp32
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# The names of our fields in config.json.
NAMES = dict(zip(("vocab_size", "d_model", "num_layers", "num_heads", "d_ff"), SIZES, strict=True)) | {
    "num_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "num_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "d_ff_shared": "shared_intermediate_size",
    "balance_loss_coef": "router_aux_loss_coef",
    "z_loss_coef": "router_z_loss_coef",
}


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
        # transformers' loss is top_k for uniform routing, and ours is the number of layers. With this coefficient, they
        # are equal in a model with one layer, and for several layers with the same mean probabilities.
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
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise InputError(f"model_type {short_repr(kind)} is not supported; use one of {', '.join(ARCHITECTURES)}")
    for name, wanted in REQUIRED.items():
        value = values.get(name, DEFAULTS[name])
        if value != wanted and not (value is None and name == "partial_rotary_factor"):
            raise InputError(f"{name} {short_repr(value)} is not supported, only {json.dumps(wanted)}")
    missing = [name for name in SIZES if name not in values]
    if missing:
        raise InputError(f"{', '.join(missing)} missing")
    fields = {
        "vocab_size": values["vocab_size"],
        "d_model": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values.get("num_key_value_heads"),
        "d_ff": values["intermediate_size"],
        "max_seq_len": values.get("max_position_embeddings", 2048),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "rope_theta": _rope_theta(values),
    }
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if kind == "llama":
        config = _model_config(dense=True, top_k=1, d_ff_shared=0, **fields)
    else:
        shared_default = {"granitemoe": 0, "granitemoeshared": 0, "granitemoehybrid": 1024}[kind]
        fields |= {
            "num_experts": values.get("num_local_experts", 8),
            "top_k": values.get("num_experts_per_tok", 2),
            "d_ff_shared": 0 if kind == "granitemoe" else values.get("shared_intermediate_size", shared_default),
        }
        config = _model_config(**fields)
        balance = _number(values, "router_aux_loss_coef", 0.001) * config.top_k / config.num_layers
        z_loss = _number(values, "router_z_loss_coef", config.z_loss_coef)
        config = _model_config(**fields, balance_loss_coef=round(balance, 12), z_loss_coef=z_loss)
    if values.get("head_dim") not in (None, config.head_dim):
        raise InputError(f"head_dim {short_repr(values['head_dim'])} is not hidden_size / num_attention_heads")
    if kind == "granitemoehybrid":
        _check_hybrid(values, config)
    return HFConfig(config, {} if kind == "llama" else _factors(values, config))


def _model_config(**fields) -> ModelConfig:
    """Return the config. An error has the names of the fields in config.json."""
    try:
        return ModelConfig(**fields)
    except InputError as error:
        raise InputError(re.sub(r"\w+", lambda word: NAMES.get(word[0], word[0]), str(error))) from error


def _number(values: dict, name: str, default: float) -> float:
    value = values.get(name, default)
    if type(value) not in (int, float) or not abs(value) <= MAX_NUMBER:  # also an int that float() cannot represent
        raise InputError(f"{name} must be a number of at most {MAX_NUMBER:g}, not {short_repr(value)}")
    return float(value)


def _rope_theta(values: dict) -> float:
    """Return theta from the fields of transformers 5 (rope_parameters) or 4. Raises InputError for scaled RoPE."""
    given = [name for name in ("rope_scaling", "rope_parameters") if values.get(name) is not None]
    for name in given:
        if not isinstance(values[name], dict):
            raise InputError(f"{name} must be an object, not {short_repr(values[name])}")
    # In transformers 5, rope_scaling has precedence.
    name, rope = next(((name, values[name]) for name in given if values[name]), ("", {}))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{name}: rope_type {short_repr(kind)} is not supported; Acceleron has unscaled RoPE")
    for key, value in rope.items():
        if key not in ("rope_type", "type", "rope_theta") and (key, value) != ("partial_rotary_factor", 1.0):
            raise InputError(f"{name}: {short_repr(key)} is not supported; Acceleron has unscaled RoPE")
    return _number(rope, "rope_theta", _number(values, "rope_theta", 10000.0))


def _check_hybrid(values: dict, config: ModelConfig):
    names = [name for name in ("layer_types", "layers_block_type") if values.get(name) is not None]
    if not names:
        raise InputError("layer_types missing: the layers are Mamba layers; Acceleron has attention layers only")
    for name in names:
        layers = values[name]
        if not isinstance(layers, list) or len(layers) != config.num_layers:
            raise InputError(f"{name} must be a list of {config.num_layers} entries, one for each of num_hidden_layers")
        other = [kind for kind in layers if kind not in ("attention", "full_attention")]
        if other:
            raise InputError(f"{name} has {short_repr(other[0])}; Acceleron has attention layers only")
    if values.get("position_embedding_type") != "rope":
        kind = short_repr(values.get("position_embedding_type"))
        raise InputError(f"position_embedding_type {kind} is not supported; Acceleron has rope")


def _factors(values: dict, config: ModelConfig) -> dict[str, float]:
    """Return the factors that fold Granite's multipliers into the weights. The function stays the same.

    The embedding also is the output head: the final norm's weight undoes its factor, and divides the logits.
    """
    embedding, residual, attention, logits = (_number(values, name, 1.0) for name in MULTIPLIERS)
    for name, value in zip(MULTIPLIERS, (embedding, residual, attention, logits), strict=True):
        if value < MIN_MULTIPLIER:
            raise InputError(f"{name} {value} must be at least {MIN_MULTIPLIER:g}")
    factors = {"o_proj": residual, "output_linear": residual, "embed_tokens": embedding, "lm_head": embedding}
    factors |= {"q_proj": attention * config.head_dim**0.5, "norm": 1 / (embedding * logits)}
    return {name: factor for name, factor in factors.items() if not math.isclose(factor, 1.0, rel_tol=1e-6)}
