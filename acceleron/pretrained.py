"""Hugging Face model directories: config.json, safetensors, and the files of AutoTokenizer. Loading runs no code."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors

from .checkpoint import find_checkpoint, list_checkpoints
from .config import read_json
from .data.tokenizer import END_OF_TEXT, PAD, num_ids
from .errors import InputError, file_error, path_error
from .files import new_directory
from .hf_config import HFConfig, from_hf_config, to_hf_config
from .model import Acceleron
from .weight_names import HUGGING_FACE, named_parts

WEIGHTS, INDEX, HEAD = "model.safetensors", "model.safetensors.index.json", "lm_head.weight"
EMBEDDING = HUGGING_FACE["embedding"][0]
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)  # a name in the same directory
FLOATS = ("F32", "F16", "BF16")  # 8-bit and integer tensors need scales, which Acceleron does not read
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "f16"}


def save_pretrained(
    model: Acceleron, directory: str | Path, tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32, hybrid: bool = False,
):  # fmt: skip
    """Write a model directory. `Acceleron.save_pretrained` has the arguments."""
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, but got {dtype}")
    if tokenizer is not None:
        if not isinstance(tokenizer, Tokenizer):
            kind = type(tokenizer).__name__
            raise InputError(f"tokenizer: expected a tokenizers.Tokenizer, such as .backend_tokenizer, but got {kind}")
        if tokenizer.token_to_id(END_OF_TEXT) is None:
            raise InputError(f"the tokenizer has no {END_OF_TEXT}: pass the one that the model was trained with")
        entries, rows = num_ids(tokenizer), model.config.vocab_size
        if entries > rows:
            raise InputError(f"the tokenizer has {entries} entries, more than the model's vocabulary of {rows}")
    with new_directory(Path(directory)) as partial:
        write_model(model, partial, tokenizer, dtype, hybrid)


def write_model(model: Acceleron, directory: Path, tokenizer: Tokenizer | None, dtype: torch.dtype, hybrid: bool):
    """Write the files of a model directory. Raises InputError if no other architecture equals the model.

    Embedding rows without a token are left out, because engines could generate their ids. Norms and routers are fp32:
    they are small, and a rounded router selects other experts for some tokens.
    """
    ids = [tokenizer.token_to_id(name) if tokenizer else None for name in (END_OF_TEXT, PAD)]
    rows = num_ids(tokenizer) if tokenizer else model.config.vocab_size
    write_json(directory / "config.json", to_hf_config(replace(model.config, vocab_size=rows), *ids, hybrid))
    tensors = {}
    for name, part in named_parts(model, HUGGING_FACE):
        keep = part.dim() == 1 or name.endswith("router.layer.weight")
        tensors[name] = convert(part[:rows] if name == EMBEDDING else part, torch.float32 if keep else dtype, name)
    write_weights(tensors, directory / WEIGHTS)
    (directory / WEIGHTS).chmod((directory / "config.json").stat().st_mode)  # safetensors restricts it to the owner
    if tokenizer:
        write_tokenizer(tokenizer, directory, model.config.max_seq_len)
        values = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), (ids[0], *ids), strict=True))
        write_json(directory / "generation_config.json", values)


def write_weights(tensors: dict[str, torch.Tensor], path: Path):
    """Write a safetensors file. Raises OSError where safetensors would raise SafetensorError."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def convert(weight: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Cast a weight, on the CPU. Raises InputError if the weight or the result is not finite."""
    if not weight.isfinite().all():
        raise InputError(f"{name} has values that are not finite: the run diverged; use an earlier checkpoint")
    converted = weight.to("cpu", dtype).contiguous()
    if not converted.isfinite().all():
        raise InputError(f"{name} has values that {DTYPES[dtype]} cannot represent: export in fp32 or bf16")
    return converted


def write_json(path: Path, values: dict):
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int):
    """Write the files that AutoTokenizer loads. Its encoding adds no special tokens, as in training."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    if copy.num_special_tokens_to_add(False):
        copy.post_processor = processors.Sequence([])
    copy.save(str(directory / "tokenizer.json"))
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    if tokenizer.token_to_id(PAD) is not None:
        special["pad_token"] = PAD
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    # Without the names, transformers 4 also returns token_type_ids, which the model rejects.
    settings |= {"model_input_names": ["input_ids", "attention_mask"]}
    settings |= {"clean_up_tokenization_spaces": False, "add_bos_token": False, "add_eos_token": False, **special}
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "special_tokens_map.json", special)


def find_local(name: str | Path, what: str = "model") -> Path | None:
    """Return the checkpoint or the model directory `name`, or None for the name of a Hub model, user/name.

    Raises InputError for a missing path. The message starts with `what`.
    """
    path = find_checkpoint(str(name), Path("checkpoints"))
    if os.path.exists(path):
        if path.suffix == ".safetensors" or path.name == "config.json":
            raise path_error(what, path, "directory")
        if path.suffix == ".gguf":
            raise InputError(
                f"{what} {path}: GGUF files cannot be opened: pass the checkpoint, or an export to safetensors"
            )
        return path
    from .hub import is_model_id  # importing huggingface_hub takes 0.3 s

    if path.suffix == ".pt" or not is_model_id(str(name)):
        raise path_error(what, path, "directory")
    return None


def find_model(name: str | Path, weights: bool = True) -> Path:
    """Return the path of a checkpoint or a model directory. Downloads a Hub model, or only its JSON files."""
    path = find_local(name)
    if path is None:
        from .hub import download_model

        path = download_model(str(name), weights)
    return path


def read_config(directory: Path) -> HFConfig:
    """Read config.json. Raises InputError if it is missing, invalid, or of a model that Acceleron cannot represent."""
    path = directory / "config.json"
    if not path.is_file():
        if checkpoints := [*list_checkpoints(directory).values()]:
            raise InputError(f"{directory} has checkpoints but no config.json: pass one, such as {checkpoints[-1]}")
        raise path_error("model", path, "file")
    values = read_json(path)
    try:
        return from_hf_config(values)
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix('config: ')}") from error


def load_pretrained(name: str | Path, device: torch.device | str, compute_dtype: torch.dtype) -> Acceleron:
    """Load a model directory or a Hub model. `Acceleron.from_pretrained` has the arguments."""
    directory = find_model(name)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a model directory; for a checkpoint, use Acceleron.load")
    config, factors = read_config(directory)
    files = weight_files(directory)
    check_layers(files, config.num_layers)
    with torch.device("meta"):
        model = Acceleron(config, compute_dtype)
    expected = {name: part.shape for name, part in named_parts(model, HUGGING_FACE)}
    check_tensors(files, expected)
    model.to_empty(device=device)
    model.build_rope()
    parts, head = dict(named_parts(model, HUGGING_FACE)), None
    for path in files:
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in parts:
                    parts[name].copy_(read_weight(file, path, name, factors))
                elif name == HEAD:
                    head = read_weight(file, path, name, factors)
    if head is not None and not torch.equal(head, model.embedding.cpu()):  # transformers 5 then uses both
        raise InputError(f"{directory}: {HEAD} differs from the embedding; Acceleron has tied embeddings")
    return model.to(device)


def read_weight(file: safe_open, path: Path, name: str, factors: dict[str, float]) -> torch.Tensor:
    """Return a tensor in fp32, times its factor. Raises InputError if it is not finite."""
    weight = file.get_tensor(name).to(torch.float32)
    weight = weight * factors.get(name.removesuffix(".weight").rpartition(".")[-1], 1.0)
    if not weight.isfinite().all():
        raise InputError(f"{path}: {name} has values that are not finite: damaged; get the file again")
    return weight


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files: one, or those of an index. Raises InputError if one is missing."""
    names = [WEIGHTS]
    if (directory / INDEX).is_file() and not (directory / WEIGHTS).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
            raise InputError(f"{directory / INDEX}: not an index of safetensors files; get the file again")
        names = sorted(set(names))
    for name in names:
        if not (directory / name).is_file():
            others = [path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf")]
            found = f", only {', '.join(sorted(others))[:200]}" if others else ""
            raise InputError(f"{directory} has no {name}{found}: get the model's safetensors files")
    return [directory / name for name in names]


def open_weights(path: Path) -> safe_open:
    """Open a safetensors file. Raises InputError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        reason = repr(str(error)[:200])[1:-1]  # one line
        raise InputError(f"{path}: damaged or not a safetensors file ({reason}); get the file again") from error
    except OSError as error:
        raise file_error(f"{path}: cannot be read", error) from error


def check_layers(files: list[Path], num_layers: int):
    """Raise InputError if a damaged config.json has many more layers than the files. Building them would be slow."""
    total = 0
    for path in files:
        with open_weights(path) as file:
            total += len(file.keys())
    if num_layers > total:
        raise InputError(f"{files[0].parent}: config.json has {num_layers} layers, but the files have {total} tensors")


def check_tensors(files: list[Path], expected: dict[str, torch.Size]):
    """Check that the files have the expected tensors and no others, before any is read. Raises InputError."""
    # lm_head is the tied embedding again; inv_freq is a constant that old releases of transformers wrote.
    allowed, missing = expected | {HEAD: expected[EMBEDDING]}, set(expected)
    for path in files:
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name not in allowed and not name.endswith("inv_freq"):
                    raise InputError(f"{path}: Acceleron's model has no tensor {name[:100]!r}")
                if name in allowed:
                    check_tensor(f"{path}: {name}", file.get_slice(name), allowed[name])
                    missing.discard(name)
    if missing:
        raise InputError(f"{files[0].parent}: tensor {min(missing)} is missing ({len(missing)} in total)")


def check_tensor(name: str, tensor, shape: torch.Size):
    if tensor.get_dtype() not in FLOATS:
        raise InputError(f"{name} is {tensor.get_dtype()}, not one of {', '.join(FLOATS)}")
    if torch.Size(tensor.get_shape()) != shape:
        raise InputError(f"{name} is {tuple(tensor.get_shape())}, but config.json implies {tuple(shape)}")
