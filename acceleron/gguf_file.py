"""GGUF files for llama.cpp and Ollama, on the gguf package. Names and keys follow llama.cpp's own converter."""

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor

from .config import ModelConfig
from .data.tokenizer import END_OF_TEXT, PAD
from .errors import InputError
from .files import atomic_write
from .hf_config import model_type
from .model import Acceleron
from .pretrained import convert
from .weight_names import GGUF, named_parts

logger = logging.getLogger(__name__)

TENSOR_TYPES = {"fp32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # the names in the gguf package
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Q8_BLOCK = 32  # consecutive values of a row that share a scale
Q8_MAX = 127


def import_gguf():
    """Return the gguf package. Raises InputError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF files need the gguf package: run `pip install gguf`") from error
    return gguf


def check_gguf_tokenizer(tokenizer: Tokenizer):
    """Raise InputError that names what is unsupported, unless llama.cpp's GPT-2 tokenizer gives the same tokens.

    That is a byte-level BPE with the GPT-2 split and without a normalizer, as `train_tokenizer` trains.
    """
    import_gguf()
    found = list(_unsupported(json.loads(tokenizer.to_str())))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise InputError(
            f"the tokenizer has {', '.join(found[:3])}{more}: llama.cpp would split text differently, so it cannot be "
            "written to GGUF; use --format hf"
        )


def _unsupported(document: dict) -> Iterator[str]:
    """Yield the features of a tokenizer.json that llama.cpp's GPT-2 tokenizer lacks."""
    model, split = document["model"], document["pre_tokenizer"] or {"type": "no pre-tokenizer"}
    if model["type"] != "BPE":
        yield f"a {model['type']} model instead of BPE"
        return
    if document["normalizer"]:
        yield f"a normalizer ({document['normalizer']['type']})"
    if split["type"] == "Sequence" and len(split["pretokenizers"]) == 1:
        split = split["pretokenizers"][0]
    if split["type"] != "ByteLevel":
        parts = "+".join(part["type"] for part in split.get("pretokenizers", [split]))
        yield f"{parts} instead of a ByteLevel pre-tokenizer"
    elif split["add_prefix_space"]:
        yield "add_prefix_space true"
    elif not split["use_regex"]:
        yield "use_regex false"
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model[name]:
            yield f"{name} {model[name]}"
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - model["vocab"].keys()
    if missing:
        yield f"no token for {len(missing)} of the 256 bytes"
    for token in document["added_tokens"]:
        for flag in ("single_word", "lstrip", "rstrip"):
            if token[flag]:
                yield f"{flag} for the added token {token['content']!r}"


def write_gguf(model: Acceleron, tokenizer: Tokenizer, path: Path, dtype: str, name: str):
    """Write the model and its tokenizer to a GGUF file. Holds one converted weight in memory at a time.

    Args:
        tokenizer: its ids are the model's vocabulary: `num_ids(tokenizer) == model.config.vocab_size`.
        dtype: "fp32", "f16", "bf16" or "q8_0", for the matrices. Norms and routers are always fp32. Matrices with rows
            that do not divide into blocks of q8_0 are f16.
        name: the model's name in the file.

    Raises InputError if llama.cpp has no architecture that equals the model, if check_gguf_tokenizer refuses the
    tokenizer, or if the dtype cannot represent a weight. An error leaves no file.
    """
    gguf = import_gguf()
    arch = "llama" if model_type(model.config) == "llama" else "granitemoe"
    check_gguf_tokenizer(tokenizer)
    types = {part: _tensor_type(part, shape, dtype) for part, shape, _ in gguf_parts(model)}
    others = sum(part_type == "F16" for part_type in types.values())
    if dtype == "q8_0" and others:
        logger.warning("%d of %d tensors have rows that are not multiples of 32: f16, not q8_0", others, len(types))
    with atomic_write(path) as file:
        writer = gguf.GGUFWriter(file.name, arch)
        writer.add_type("model")
        writer.add_name(name)
        kind = TENSOR_TYPES[dtype]
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_config(writer, model.config)
        _add_tokenizer(writer, tokenizer, model.config.vocab_size)
        for part, shape, view in gguf_parts(model):
            tensor_type = gguf.GGMLQuantizationType[types[part]]
            block, size = gguf.GGML_QUANT_SIZES[tensor_type]
            writer.add_tensor_info(part, shape, np.dtype("float32"), view.numel() // block * size, tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        # GGUFWriter writes data with ndarray.tofile, whose errors have no errno: a full disk would look like a bug.
        file.seek(0, os.SEEK_END)
        for part, shape, view in gguf_parts(model):
            file.write(bytes(-file.tell() % writer.data_alignment))
            file.write(_encode(view.reshape(shape), types[part], part))
        file.write(bytes(-file.tell() % writer.data_alignment))


def gguf_parts(model: Acceleron) -> Iterator[tuple[str, torch.Size, Tensor]]:
    """Yield the tensors of the GGUF file: (name, shape, view of our parameter with the file's order of rows).

    llama.cpp rotates rows 2i and 2i + 1 of a q or k head together, Acceleron rows i and i + head_dim / 2. These views
    have the shape (heads, head_dim / 2, 2, d_model).
    """
    heads = {"attn_q": model.config.num_heads, "attn_k": model.config.num_kv_heads}
    for name, part in named_parts(model, GGUF):
        kind = name.split(".")[-2]
        yield name, part.shape, part.unflatten(0, (heads[kind], 2, -1)).transpose(1, 2) if kind in heads else part


def _tensor_type(name: str, shape: torch.Size, dtype: str) -> str:
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % Q8_BLOCK else TENSOR_TYPES[dtype]


def _encode(weight: Tensor, tensor_type: str, name: str) -> np.ndarray:
    """Return the tensor's data. Raises InputError if the type cannot represent a value."""
    if tensor_type != "Q8_0":
        return convert(weight, TORCH_DTYPES[tensor_type], name).view(torch.uint8).numpy()
    gguf = import_gguf()
    convert(weight / Q8_MAX, torch.float16, name)  # check: a block's scale is the largest of these, in f16
    return gguf.quants.quantize(convert(weight, torch.float32, name).numpy(), gguf.GGMLQuantizationType.Q8_0)


def _add_config(writer, config: ModelConfig):
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff_dense if config.dense else config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.dense:
        return
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.top_k)
    if config.d_ff_shared:
        writer.add_expert_shared_feed_forward_length(config.d_ff_shared)
    writer.add_attention_scale(config.head_dim**-0.5)
    writer.add_embedding_scale(1.0)
    writer.add_residual_scale(1.0)
    writer.add_logit_scale(1.0)  # llama.cpp divides by it, and does not load the file without it


def _add_tokenizer(writer, tokenizer: Tokenizer, vocab_size: int):
    """Add the vocabulary, the merges and the special tokens. Ids that the tokenizer lacks are unused tokens."""
    kinds = import_gguf().TokenType
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], [kinds.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        tokens[index], types[index] = token, kinds.NORMAL
    for index, token in tokenizer.get_added_tokens_decoder().items():
        types[index] = kinds.CONTROL if token.special else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    end_id, pad_id = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PAD)
    writer.add_bos_token_id(end_id)
    writer.add_eos_token_id(end_id)
    if pad_id is not None:
        writer.add_pad_token_id(pad_id)
    writer.add_add_bos_token(False)  # training adds no tokens, either
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def load_gguf(path: Path) -> Acceleron:
    """Load the model of a file from `write_gguf`, to verify it."""
    gguf = import_gguf()
    reader = gguf.GGUFReader(path)
    model = Acceleron(_read_config(reader)).requires_grad_(False)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, _, view in gguf_parts(model):
        weight = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        view.copy_(torch.tensor(weight).reshape(view.shape))
    return model


def _read_config(reader) -> ModelConfig:
    """Return the config that the keys of the file describe. Raises RuntimeError for a factor that Acceleron lacks."""
    arch = reader.fields["general.architecture"].contents()
    keys = {name.removeprefix(f"{arch}."): field.contents() for name, field in reader.fields.items()}
    fields = {
        "vocab_size": keys["vocab_size"],
        "d_model": keys["embedding_length"],
        "num_layers": keys["block_count"],
        "num_heads": keys["attention.head_count"],
        "num_kv_heads": keys["attention.head_count_kv"],
        "d_ff": keys["feed_forward_length"],
        "max_seq_len": keys["context_length"],
        "rope_theta": keys["rope.freq_base"],
        "norm_eps": keys["attention.layer_norm_rms_epsilon"],
    }
    if arch == "llama":
        return ModelConfig(dense=True, top_k=1, d_ff_shared=0, **fields)
    shared = keys.get("expert_shared_feed_forward_length", 0)
    fields |= {"num_experts": keys["expert_count"], "top_k": keys["expert_used_count"], "d_ff_shared": shared}
    config = ModelConfig(**fields)
    factors = {f"{name}_scale": 1.0 for name in ("embedding", "residual", "logit")}
    for name, expected in (factors | {"attention.scale": config.head_dim**-0.5}).items():
        if not math.isclose(keys[name], expected, rel_tol=1e-6):
            raise RuntimeError(f"{arch}.{name} is {keys[name]}, not {expected}")
    return config


def write_modelfile(path: Path, gguf_name: str, max_seq_len: int):
    """Write an Ollama Modelfile for a GGUF file in the same directory.

    The template is the prompt alone, because a base model has no chat format.
    """
    lines = [
        f"FROM ./{gguf_name}",
        'TEMPLATE "{{ .Prompt }}"',
        f"PARAMETER num_ctx {max_seq_len}",
        f'PARAMETER stop "{END_OF_TEXT}"',
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
