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
from .generation import map_model, open_tokenizer
from .gguf_file import TENSOR_TYPES, check_gguf_tokenizer, load_gguf, write_gguf, write_modelfile
from .hf_config import to_hf_config
from .hub import check_login, push
from .model import Acceleron
from .model_card import gguf_usage, hf_usage, write_card
from .pretrained import DTYPES, write_model

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
# Limits for the relative rounding error. q8_0 stores 32 values as multiples of the largest one / 127.
ROUNDING = {"fp32": 0.0, "bf16": 2**-8, "f16": 2**-11, "q8_0": 2**-5}

logger = logging.getLogger("acceleron.export")  # __name__ is "__main__" in the command


def export(
    checkpoint: str | Path, output: str | Path, *, format: str = "hf", dtype: str = "fp32", hybrid: bool = False,
    tokenizer: str | None = None, push_to_hub: str | None = None,
):  # fmt: skip
    """Write the model of a checkpoint to the new directory `output`, read it back, and compare weights and logits.

    The arguments are those of the command. Raises InputError for bad input, and RunFailed for a full disk. Then nothing
    is left in `output`, unless only the upload failed.
    """
    path, output = find_checkpoint(str(checkpoint), Path("checkpoints")), Path(output)
    if dtype == "q8_0" and format != "gguf":
        raise InputError("--dtype q8_0 needs --format gguf")
    if hybrid and format != "hf":
        raise InputError("--hybrid needs --format hf")
    contents = load_checkpoint(path)
    opened = open_tokenizer(tokenizer, path.parent, contents["config"].vocab_size, None)
    if format == "gguf":
        check_gguf_tokenizer(opened)
    # Raises InputError for a model that no architecture equals, before anything is written.
    architecture = to_hf_config(contents["config"], None, None, hybrid)["architectures"][0]
    if push_to_hub:
        check_login(push_to_hub)
    with new_directory(output) as partial:
        model = map_model(contents, path)
        trim_vocabulary(model, num_ids(opened))
        name = push_to_hub or output.resolve().name
        logger.info(f"writing {architecture}, {dtype}, to {output}")
        if format == "gguf":
            gguf_file = f"{name.rpartition('/')[2]}-{TENSOR_TYPES[dtype]}.gguf"
            write_gguf(model, opened, partial / gguf_file, dtype, name)
            write_modelfile(partial / "Modelfile", gguf_file, model.config.max_seq_len)
            copy = load_gguf(partial / gguf_file)
            usage = gguf_usage(name, gguf_file)
        else:
            write_model(model, partial, opened, TORCH_DTYPES[dtype], hybrid)
            copy = Acceleron.from_pretrained(partial)
            usage = hf_usage(name)
        verify(model, copy, dtype)
        write_card(partial, name, architecture, model, contents, path.parent / "metrics.jsonl", usage)
        size = sum(file.stat().st_size for file in partial.iterdir())
    print(f"{output}: {architecture}, {dtype}, {size / 1e6:,.1f} MB")
    if push_to_hub:
        print(push(output, push_to_hub))


def trim_vocabulary(model: Acceleron, num_entries: int):
    """Remove the rows of the embedding that have no token. Other engines could otherwise generate their ids."""
    if num_entries < model.config.vocab_size:
        logger.info(f"vocabulary: {num_entries:,} of {model.config.vocab_size:,} rows, those of the tokenizer")
        model.embedding = nn.Parameter(model.embedding[:num_entries].detach().clone())
        model.config = replace(model.config, vocab_size=num_entries)


@torch.no_grad()
def verify(model: Acceleron, copy: Acceleron, dtype: str):
    """Compare the model with its copy from the files: all weights, and the logits for random tokens.

    Logs the difference. Replaces the model's weights with the copy's. Raises InputError if the dtype cannot represent a
    weight, and RuntimeError, a bug, if the files are wrong.
    """
    shape = (2, min(64, model.config.max_seq_len))
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    before, after = model(ids).logits, copy(ids).logits
    if not before.isfinite().all():
        raise InputError("the model's logits are not finite: its training run diverged; use an earlier checkpoint")
    copied = dict(copy.named_parameters())
    for name, weight in model.named_parameters():
        if dtype == "fp32" and not torch.equal(weight, copied[name]):
            raise RuntimeError(f"{name} differs after reading back the exported file")
        # In double precision, the norm does not overflow.
        if not (copied[name] - weight).double().norm() <= ROUNDING[dtype] * weight.double().norm():
            raise InputError(f"{name} has values that {dtype} cannot represent: export in fp32")
    model.load_state_dict(copied, assign=True)
    expected = model(ids).logits  # with our config; the copy's is that of the files
    if not (after - expected).norm() <= 1e-5 * expected.norm():
        raise RuntimeError("the logits differ after reading back the exported files")
    error = float((after - before).norm() / before.norm())
    equal = float((after.argmax(-1) == before.argmax(-1)).double().mean())
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
