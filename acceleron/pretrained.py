"""Hugging Face model directories: config.json, safetensors, and the files of AutoTokenizer. Loading runs no code."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors

from .config import read_json
from .data.tokenizer import END_OF_TEXT, PAD, num_ids
from .errors import InputError, file_error, path_error
from .files import new_directory
from .hf_config import HFConfig, from_hf_config, to_hf_config
from .hub import download_model, is_model_id
from .model import Acceleron
from .weight_names import HUGGING_FACE, named_parts

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "f16"}


def save_pretrained(
    model: Acceleron, directory: str | Path, tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32, hybrid: bool = False,
):  # fmt: skip
    """Write a model directory. `Acceleron.save_pretrained` has the arguments."""
    if tokenizer is not None and num_ids(tokenizer) > model.config.vocab_size:
        entries, rows = num_ids(tokenizer), model.config.vocab_size
        raise InputError(f"the tokenizer has {entries} entries, more than the model's vocabulary of {rows}")
    with new_directory(Path(directory)) as partial:
        write_model(model, partial, tokenizer, dtype, hybrid)


def write_model(model: Acceleron, directory: Path, tokenizer: Tokenizer | None, dtype: torch.dtype, hybrid: bool):
    """Write the files of a model directory. Raises InputError if no other architecture equals the model."""
    ids = [tokenizer.token_to_id(name) if tokenizer else None for name in (END_OF_TEXT, PAD)]
    write_json(directory / "config.json", to_hf_config(model.config, *ids, hybrid))
    tensors = {name: convert(part, dtype, name) for name, part in named_parts(model, HUGGING_FACE)}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod((directory / "config.json").stat().st_mode)  # safetensors restricts it to the owner
    if tokenizer:
        write_tokenizer(tokenizer, directory, model.config.max_seq_len)
        values = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), (ids[0], *ids), strict=True))
        write_json(directory / "generation_config.json", values)


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
    if copy.encode("a").ids != copy.encode("a", add_special_tokens=False).ids:
        copy.post_processor = processors.Sequence([])
    copy.save(str(directory / "tokenizer.json"))
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    if tokenizer.token_to_id(PAD) is not None:
        special["pad_token"] = PAD
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    settings |= {"clean_up_tokenization_spaces": False, "add_bos_token": False, "add_eos_token": False, **special}
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "special_tokens_map.json", special)


def find_pretrained(name: str | Path) -> Path:
    """Return the model directory `name`, or download the Hub model of that name. Raises InputError."""
    path = Path(name)
    if not path.exists() and is_model_id(str(name)):
        return download_model(str(name))
    if not path.is_dir():
        raise path_error("model directory", path, "directory")
    return path


def read_config(directory: Path) -> HFConfig:
    """Read config.json. Raises InputError if it is missing, invalid, or of a model that Acceleron cannot represent."""
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory} has no config.json: pass a directory that save_pretrained wrote")
    try:
        return from_hf_config(read_json(path))
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix('config: ')}") from error


def load_pretrained(name: str | Path, device: torch.device | str, compute_dtype: torch.dtype) -> Acceleron:
    """Load a model directory or a Hub model. `Acceleron.from_pretrained` has the arguments."""
    directory = find_pretrained(name)
    config, factors = read_config(directory)
    with torch.device("meta"):
        model = Acceleron(config, compute_dtype)
    files = weight_files(directory)
    expected = {name: part.shape for name, part in named_parts(model, HUGGING_FACE)}
    check_tensors(files, expected)
    model.to_empty(device=device)
    model.build_rope()
    parts = dict(named_parts(model, HUGGING_FACE))
    for path in files:
        with open_weights(path) as file:
            for key in expected.keys() & set(file.keys()):
                weight = file.get_tensor(key).to(torch.float32)
                if not weight.isfinite().all():
                    raise InputError(f"{path}: {key} has values that are not finite: damaged; get the file again")
                factor = factors.get(key.removesuffix(".weight").rpartition(".")[-1], 1.0)
                parts[key].copy_(weight * factor)
    return model.to(device)


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files: one, or those of an index. Raises InputError if one is missing."""
    names = [WEIGHTS]
    if (directory / INDEX).is_file() and not (directory / WEIGHTS).is_file():
        names = read_json(directory / INDEX).get("weight_map")
        names = sorted(set(names.values())) if isinstance(names, dict) else []
        if not names or any(Path(name).name != name or Path(name).suffix != ".safetensors" for name in names):
            raise InputError(f"{directory / INDEX}: not an index of safetensors files")
    for name in names:
        if not (directory / name).is_file():
            others = [path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf")]
            found = f"; {', '.join(sorted(others))[:200]} are not read" if others else ""
            raise InputError(f"{directory} has no {name}{found}")
    return [directory / name for name in names]


def open_weights(path: Path) -> safe_open:
    """Open a safetensors file. Raises InputError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error}); get the file again") from error
    except OSError as error:
        raise file_error(f"{path}: cannot be read", error) from error


def check_tensors(files: list[Path], expected: dict[str, torch.Size]):
    """Raise InputError if the files lack a tensor, or one has another shape, or there is one that the model lacks."""
    found, shapes = {}, {}
    for path in files:
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118
                found[name], shapes[name] = path, torch.Size(file.get_slice(name).get_shape())
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise InputError(f"{files[0].parent}: has no tensor {missing[0]} ({len(missing)} missing)")
    # lm_head is the tied embedding again; inv_freq is a constant that old releases of transformers wrote.
    extra = [name for name in found if name not in expected and not name.endswith(("lm_head.weight", "inv_freq"))]
    if extra:
        raise InputError(f"{found[extra[0]]}: Acceleron has no tensor {extra[0]} ({len(extra)} unknown)")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InputError(f"{found[name]}: {name} is {tuple(shapes[name])}, but config.json implies {tuple(shape)}")
