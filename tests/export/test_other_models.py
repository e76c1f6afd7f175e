"""Acceleron opens model directories that transformers wrote. `make test-all` also runs this file on transformers 4."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import random_ids, relative_error

from acceleron import Acceleron
from acceleron.errors import InputError

SIZES = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
HYBRID = dict(layer_types=["attention"] * 2, position_embedding_type="rope")
HYBRID |= dict(mamba_expand=1, mamba_n_heads=4, mamba_d_head=8)  # unused, but transformers checks them
MULTIPLIERS = dict(
    embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625, logits_scaling=6.0
)
MODELS = {
    "GraniteMoeShared": ("GraniteMoeShared", MOE | {"shared_intermediate_size": 16}),
    "multipliers": ("GraniteMoeShared", MOE | MULTIPLIERS | {"shared_intermediate_size": 16}),
    "GraniteMoe": ("GraniteMoe", MOE | {"num_experts_per_tok": 3, "num_key_value_heads": 1}),
    "GraniteMoe with multipliers": ("GraniteMoe", MOE | MULTIPLIERS | {"rms_norm_eps": 1e-3}),
    "GraniteMoeHybrid": ("GraniteMoeHybrid", MOE | HYBRID | MULTIPLIERS | {"shared_intermediate_size": 16}),
    "Llama": ("Llama", {}),
    "Llama, one K/V head": ("Llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "Llama, all K/V heads": ("Llama", {"num_key_value_heads": None}),
}
DEFAULTS = {"GraniteMoeShared": {}, "GraniteMoe": {}, "Llama": {}, "GraniteMoeHybrid": HYBRID}


def make_config(kind: str, **fields):
    return getattr(transformers, f"{kind}Config")(**SIZES | fields)


def make_model(config) -> torch.nn.Module:
    """A model with matrices of a standard deviation of 0.3, so every weight matters."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            mean, std = (1.0, 0.2) if weight.dim() == 1 else (0.0, 0.3)
            weight.normal_(mean, std, generator=generator)
    return model


@torch.no_grad()
def check_logits(model, directory):
    """Relative to the logits, whose size depends on the multipliers. The largest RMS error seen is 2.3e-6."""
    ids = random_ids(3, 64, vocab_size=96)
    ours, theirs = Acceleron.from_pretrained(directory)(ids).logits, model(ids).logits
    assert theirs.std() > 0.05
    assert relative_error(ours, theirs) < 1e-5
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal(tmp_path, name, shard_size):
    kind, fields = MODELS[name]
    model = make_model(make_config(kind, **fields))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_size == "10KB")
    check_logits(model, tmp_path)


def test_rope_theta_of_each_release(tmp_path):
    """transformers 5 writes rope_parameters, transformers 4 a flat rope_theta."""
    old, new = {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    model = make_model(make_config("Llama", **(old if transformers.__version__ < "5" else new)))
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values = {key: value for key, value in values.items() if not key.startswith("rope")}
    for fields in (old, new, old | {"rope_scaling": None}):
        (tmp_path / "config.json").write_text(json.dumps(values | fields))
        check_logits(model, tmp_path)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_fields_missing_from_config_json_have_the_defaults_of_transformers(tmp_path, kind):
    model = make_model(make_config(kind, num_key_value_heads=None, max_position_embeddings=2048, **DEFAULTS[kind]))
    model.save_pretrained(tmp_path)
    given = {"model_type": model.config.model_type} | SIZES | DEFAULTS[kind]
    del given["num_key_value_heads"], given["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(given))
    check_logits(model, tmp_path)
    check_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_open_in_fp32(tmp_path, dtype):
    model = make_model(make_config("GraniteMoeShared", **MODELS["multipliers"][1])).to(dtype)
    model.save_pretrained(tmp_path)
    check_logits(model.float(), tmp_path)


def test_redundant_tensors_of_old_releases_are_ignored(tmp_path):
    """The tied output head, and a constant of RoPE. A different output head is an error: transformers 5 uses it."""
    model = make_model(make_config("GraniteMoe", **MODELS["GraniteMoe with multipliers"][1]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | {"lm_head.weight": head} | inv_freq, path)
    check_logits(model, tmp_path)
    head[3, 3] += 1
    save_file(tensors | {"lm_head.weight": head}, path)
    with pytest.raises(InputError, match=r"lm_head\.weight differs from the embedding"):
        Acceleron.from_pretrained(tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXTRAL, QWEN = dict(num_local_experts=4), dict(num_experts=4, moe_intermediate_size=16)
OTHERS = {
    "untied": ("Llama", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    "attention bias": ("Llama", {"attention_bias": True}, "attention_bias"),
    "MLP bias": ("Llama", {"mlp_bias": True}, "mlp_bias"),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    "llama3": ("Llama", {"rope_scaling": LLAMA3}, "rope_type 'llama3'"),
    "yarn": ("Llama", {"rope_scaling": YARN}, "rope_type 'yarn'"),
    "head_dim": ("Llama", {"head_dim": 16}, "head_dim 16"),
    "odd head_dim": ("Llama", {"hidden_size": 36, "num_attention_heads": 12}, "hidden_size 36"),
    "activation": ("GraniteMoeShared", MOE | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "no experts": ("GraniteMoeHybrid", HYBRID | {"num_local_experts": 0}, "num_local_experts"),
    "one expert": ("GraniteMoe", {"num_local_experts": 1, "num_experts_per_tok": 1}, "num_local_experts 1"),
    "large K": ("GraniteMoe", {"num_local_experts": 32, "num_experts_per_tok": 17}, "num_experts_per_tok 17"),
    "Mamba": ("GraniteMoeHybrid", HYBRID | {"layer_types": ["mamba", "attention"]}, "layer_types"),
    "all Mamba": ("GraniteMoeHybrid", HYBRID | {"layer_types": None}, "layer_types"),
    "NoPE": ("GraniteMoeHybrid", HYBRID | {"position_embedding_type": None}, "position_embedding_type None"),
    "Mistral": ("Mistral", {}, "model_type 'mistral'"),
    "Mixtral": ("Mixtral", MIXTRAL, "model_type 'mixtral'"),
    "Qwen3Moe": ("Qwen3Moe", QWEN, "model_type 'qwen3_moe'"),
    "Granite": ("Granite", {}, "model_type 'granite'"),
    "quantized": ("Llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "sliding window": ("Llama", {"sliding_window": 16}, "sliding_window 16"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_differ_are_refused_by_the_field(tmp_path, name):
    kind, fields, expected = OTHERS[name]
    make_config(kind, **fields).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"config\.json: .*{expected}") as error:
        Acceleron.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
