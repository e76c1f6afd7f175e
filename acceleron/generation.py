"""Text from a checkpoint: sampling with a KV cache."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .attention import KVCache, best_sdpa
from .checkpoint import assign_weights
from .data.tokenizer import END_OF_TEXT, encode, find_tokenizer, load_tokenizer, num_ids
from .errors import InputError
from .model import Acceleron

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte-fallback tokenizer's token of one byte


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 keep all tokens. Raises InputError for values out of range."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature}: must be 0 (greedy) or above, and finite")
        if self.top_k < 0:
            raise InputError(f"--top_k {self.top_k}: must be 0 (keep all) or above")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p {self.top_p}: must be above 0 and at most 1")


def load_model(contents: dict, path: str | Path, device: torch.device, dtype: torch.dtype) -> Acceleron:
    """The model of a loaded checkpoint, ready to generate. Raises InputError if its weights don't fit its config."""
    with torch.device("meta"):
        model = Acceleron(contents["config"])
    assign_weights(model, contents, path)
    model.build_rope()
    return prepare_for_inference(model, dtype).to(device)


def prepare_for_inference(model: Acceleron, dtype: torch.dtype) -> Acceleron:
    """Cast the matrices to dtype once, so that no step has to; routers and norms stay fp32."""
    model.compute_dtype = dtype
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        keep = weight.dim() == 1 or name.endswith("router")
        weight.data = weight.data.to(weight.dtype if keep else dtype, copy=True)
    return model.eval()


def open_tokenizer(explicit: str | None, checkpoint: str | Path, contents: dict, scripts_dir: Path) -> Tokenizer:
    """The tokenizer asked for, else the one beside the checkpoint or beside the scripts.

    Raises InputError if there is none, if it has more entries than the model, or if the checkpoint has another one
    beside it.
    """
    path = find_tokenizer(explicit, Path(checkpoint).parent, scripts_dir)
    if path is None:
        raise InputError(f"no tokenizer beside {checkpoint} or the scripts: name one with --tokenizer")
    tokenizer = load_tokenizer(path)
    own = Path(checkpoint).parent / "tokenizer.json"
    if own.is_file() and own.read_bytes() != path.read_bytes():
        raise InputError(f"--tokenizer {path} is not {own}, which {checkpoint} was trained with: leave the flag out")
    vocab_size = contents["config"].vocab_size
    if num_ids(tokenizer) > vocab_size:
        raise InputError(
            f"{path} has {num_ids(tokenizer)} entries, more than the model's vocabulary of {vocab_size}: "
            "name the tokenizer it was trained with by --tokenizer"
        )
    return tokenizer


def pick(logits_V: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """The next token's id, int64 [1]. Candidates are narrowed by top-k, then top-p, after the temperature.

    Raises InputError for logits that are not finite.
    """
    logits_V = logits_V.float()
    if not logits_V.max().isfinite():
        raise InputError("the model's logits are not finite: the run that wrote this checkpoint had diverged")
    if sampling.temperature == 0:
        return logits_V.argmax(dim=-1, keepdim=True)
    # Below 1e-6 all but equal logits are told apart for certain, and fp32 would overflow.
    logits_V = (logits_V - logits_V.max()) / max(sampling.temperature, 1e-6)
    if 0 < sampling.top_k < len(logits_V):
        logits, ids = logits_V.topk(sampling.top_k)
    else:
        logits, ids = logits_V.sort(descending=True)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        # Keep the fewest tokens that reach top_p together; the first is always kept.
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        beyond[0] = False
        probabilities = probabilities.masked_fill(beyond, 0.0)
    return ids[torch.multinomial(probabilities, 1, generator=generator)]


@torch.inference_mode()
def generate(
    model: Acceleron,
    prompt_ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    num_entries: int | None = None,
    stop_id: int | None = None,
) -> Iterator[int]:
    """New token ids, one by one, until `stop_id` (which is not yielded), max_new_tokens, or the context is full.

    Ids from `num_entries` on, which the tokenizer lacks, are never drawn. Raises InputError for a prompt that fills
    the model's context, or an empty one.
    """
    config = model.config
    if not 0 < len(prompt_ids) < config.max_seq_len:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens; the model takes 1 to {config.max_seq_len - 1}")
    device = model.embedding.device
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(device).manual_seed(sampling.seed)
    length = min(config.max_seq_len, len(prompt_ids) + max_new_tokens)
    cache = KVCache(config, 1, length, device, model.compute_dtype)
    input_ids = torch.tensor([prompt_ids], device=device)
    with best_sdpa() if device.type == "cuda" else nullcontext():
        for _ in range(length - len(prompt_ids)):
            x, _ = model.hidden_states(input_ids, cache)
            logits_V = model.head(x[0, -1])[:num_entries]
            next_id = pick(logits_V, sampling, generator)
            token = int(next_id)
            if token == stop_id:
                return
            yield token
            input_ids = next_id[None]


def stream_text(
    model: Acceleron, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling
) -> Iterator[tuple[int | None, str]]:
    """(token id, piece of the continuation) per token; the piece is "" while a character is incomplete.

    What is still incomplete at the end comes with None, so that the pieces together are the decoded continuation. An
    empty prompt starts a new document. Ends where the model ends the document.
    """
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not valid UTF-8") from error
    prompt_ids = encode(tokenizer, [prompt])[0] or [end_id]
    # Decode all ids each time: the text of a token depends on the tokens before it, and every decoder has its own
    # rules. It takes half a millisecond for 2,048 ids.
    ids, shown = list(prompt_ids), len(tokenizer.decode(prompt_ids))
    for token in generate(model, prompt_ids, max_new_tokens, sampling, num_entries=num_ids(tokenizer), stop_id=end_id):
        ids.append(token)
        piece = ""
        # Byte fallback decodes all bytes in a row as U+FFFD if one of them completes no character.
        if not _BYTE.fullmatch(tokenizer.id_to_token(token) or ""):
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):
                piece, shown = text[shown:], len(text)
        yield token, piece
    if rest := tokenizer.decode(ids)[shown:]:
        yield None, rest
