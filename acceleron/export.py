"""Export a checkpoint for transformers, vLLM and mlx-lm, or as a GGUF file for llama.cpp and Ollama."""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .checkpoint import find_checkpoint, load_checkpoint
from .data.tokenizer import num_ids
from .errors import InputError, run_command
from .files import new_directory
from .flags import Parser, nonempty
from .generation import load_model, open_tokenizer
from .gguf_file import check_gguf_tokenizer, load_gguf_weights, write_gguf, write_modelfile
from .hf_config import ARCHITECTURES, model_type
from .hub import check_login, push
from .model import Acceleron
from .model_card import write_card
from .pretrained import DTYPES, write_model

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
# The largest relative rounding error. q8_0 stores 32 values as multiples of the largest one / 127.
TOLERANCES = {"fp32": 0.0, "bf16": 2**-8, "f16": 2**-11, "q8_0": 2**-6}

logger = logging.getLogger("acceleron.export")  # __name__ is "__main__" in the command


def trim_vocabulary(model: Acceleron, num_entries: int):
    """Remove the rows of the embedding that have no token, because other engines would generate their ids."""
    if num_entries < model.config.vocab_size:
        logger.info(f"vocabulary: {num_entries:,} of {model.config.vocab_size:,} rows, those of the tokenizer")
        model.embedding = nn.Parameter(model.embedding[:num_entries].clone(), requires_grad=False)
        model.config = replace(model.config, vocab_size=num_entries)


def export(
    checkpoint: str | Path, output: str | Path, *, format: str = "hf", dtype: str = "fp32", hybrid: bool = False,
    tokenizer: str | None = None, push_to_hub: str | None = None,
) -> None:  # fmt: skip
    """Write the model of a checkpoint to the new directory `output`, read it back, and compare the logits.

    The arguments are those of the command. Raises InputError for bad input, before anything is written.
    """
    path, output = find_checkpoint(str(checkpoint), Path("checkpoints")), Path(output)
    if dtype == "q8_0" and format != "gguf":
        raise InputError("--dtype q8_0 needs --format gguf")
    if hybrid and format != "hf":
        raise InputError("--hybrid needs --format hf")
    contents = load_checkpoint(path)
    architecture = ARCHITECTURES[model_type(contents["config"])]
    opened = open_tokenizer(tokenizer, path.parent, contents["config"].vocab_size, None)
    if format == "gguf":
        check_gguf_tokenizer(opened)
    if push_to_hub:
        check_login(push_to_hub)
    with new_directory(output) as partial:
        model = load_model(contents, path, torch.device("cpu"), torch.float32)
        trim_vocabulary(model, num_ids(opened))
        name = push_to_hub or output.resolve().name
        gguf_file = f"{name.rpartition('/')[2]}-{dtype}.gguf" if format == "gguf" else None
        logger.info(f"writing {architecture}, {dtype}, to {output}")
        if gguf_file:
            write_gguf(model, opened, partial / gguf_file, dtype, name)
            write_modelfile(partial / "Modelfile", gguf_file, model.config.max_seq_len)
        else:
            write_model(model, partial, opened, TORCH_DTYPES[dtype], hybrid)
        verify(model, read_back(partial, gguf_file, model), dtype)
        write_card(partial, name, model, contents, path.parent / "metrics.jsonl", gguf_file)
        size = sum(file.stat().st_size for file in partial.iterdir())
    print(f"{output}: {gguf_file or architecture}, {size / 1e6:,.1f} MB")
    if push_to_hub:
        print(push(output, push_to_hub))


def read_back(directory: Path, gguf_file: str | None, model: Acceleron) -> Acceleron:
    if not gguf_file:
        return Acceleron.from_pretrained(directory)
    copy = Acceleron(model.config).requires_grad_(False)
    load_gguf_weights(directory / gguf_file, copy)
    return copy


@torch.no_grad()
def verify(model: Acceleron, copy: Acceleron, dtype: str):
    """Compare the weights and logits with those of the files. Raises RuntimeError if they differ by more than rounding.

    Logs the difference of the logits on random tokens.
    """
    copied = dict(copy.named_parameters())
    for name, weight in model.named_parameters():
        if not (copied[name] - weight).norm() <= TOLERANCES[dtype] * weight.norm():
            raise RuntimeError(f"{name} differs after reading back the exported file")
    shape = (2, min(64, model.config.max_seq_len))
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (m(ids).logits for m in (model, copy))
    error = float((theirs - ours).norm() / ours.norm())
    equal = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    logger.info(f"read back: the logits differ by {error:.2%} (RMS); {equal:.1%} of the most likely tokens are equal")


def main():
    parser = Parser(prog="python -m acceleron.export", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=nonempty, required=True, help="checkpoint_<step>.pt from train.py")
    add("--output", type=nonempty, required=True, help="new directory for the model")
    add("--format", default="hf", choices=("hf", "gguf"), help="hf: safetensors; gguf: for llama.cpp (default hf)")
    add("--dtype", default="fp32", choices=("fp32", "bf16", "f16", "q8_0"), help="of the weights (default fp32)")
    add("--hybrid", action="store_true", help="write a GraniteMoeHybrid config, which mlx-lm needs")
    add("--tokenizer", type=nonempty, help="default: the one next to the checkpoint")
    add("--push_to_hub", metavar="USER/NAME", type=nonempty, help="also upload the directory to the Hugging Face Hub")
    export(**vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(run_command(main))
