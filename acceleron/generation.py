"""Generate text from a checkpoint with a KV cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .attention import KVCache, best_sdpa
from .checkpoint import assign_weights, load_checkpoint
from .data.tokenizer import BYTE_TOKEN, END_OF_TEXT, encode, find_tokenizer, load_tokenizer, num_ids, vocabulary
from .errors import InputError
from .model import Acceleron
from .pretrained import find_model


def open_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Acceleron, Path]:
    """Load a checkpoint, a model directory or a Hub model for inference. Return it and its directory.

    Raises InputError if it does not exist or is damaged.
    """
    path = find_model(name)
    if path.is_file():
        return load_model(load_checkpoint(path), path, device, dtype), path.parent
    return prepare_for_inference(Acceleron.from_pretrained(path), dtype).to(device), path


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens. Raises InputError for values out of range."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature}: must be finite and at least 0 (greedy)")
        if self.top_k < 0:
            raise InputError(f"--top_k {self.top_k}: must be at least 0 (keep all)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p {self.top_p}: must be above 0 and at most 1")


def load_model(contents: dict, path: str | Path, device: torch.device, dtype: torch.dtype) -> Acceleron:
    """Build the model of a loaded checkpoint for inference. Raises InputError if the weights do not fit the config."""
    return prepare_for_inference(map_model(contents, path), dtype).to(device)


def map_model(contents: dict, path: str | Path) -> Acceleron:
    """Build the fp32 model of a loaded checkpoint on the CPU. Its weights stay memory-mapped from the file.

    Raises InputError if they do not fit the config.
    """
    with torch.device("meta"):
        model = Acceleron(contents["config"])
    assign_weights(model, contents, path)
    model.build_rope()
    return model


def prepare_for_inference(model: Acceleron, dtype: torch.dtype) -> Acceleron:
    """Cast the matrices to dtype once instead of on every use. Routers and norms stay fp32."""
    model.compute_dtype = dtype
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        keep = weight.dim() == 1 or name.endswith("router")
        weight.data = weight.data.to(weight.dtype if keep else dtype, copy=True)
    return model.eval()


def open_tokenizer(explicit: str | None, directory: Path, vocab_size: int, scripts_dir: Path | None) -> Tokenizer:
    """Load `explicit`, or the tokenizer in the model's directory or next to the scripts.

    Raises InputError if none exists, if it has more ids than the model's vocabulary, or if `explicit` differs from the
    tokenizer in the model's directory.
    """
    path = find_tokenizer(explicit, directory, scripts_dir)
    if path is None:
        raise InputError(f"no tokenizer.json in {directory}: pass one with --tokenizer")
    tokenizer = load_tokenizer(path)
    own = directory / "tokenizer.json"
    if own.is_file() and own != path and vocabulary(load_tokenizer(own)) != vocabulary(tokenizer):
        raise InputError(f"--tokenizer {path} is not {own}, which the model was trained with: omit the flag")
    if num_ids(tokenizer) > vocab_size:
        raise InputError(
            f"{path} has {num_ids(tokenizer)} entries, more than the model's vocabulary of {vocab_size}: "
            "pass the model's own tokenizer with --tokenizer"
        )
    return tokenizer


def sample_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Sample the next token id, int64 [1]: apply the temperature, then top-k, then top-p.

    Raises InputError for non-finite logits.
    """
    logits_V = logits_V.float()
    if not logits_V.max().isfinite():
        raise InputError("the model's logits are not finite: its training run diverged; use an earlier checkpoint")
    if sampling.temperature == 0:
        return logits_V.argmax(dim=-1, keepdim=True)
    # A temperature below 1e-6 is effectively greedy, and smaller values would overflow fp32.
    logits_V = (logits_V - logits_V.max()) / max(sampling.temperature, 1e-6)
    if 0 < sampling.top_k < len(logits_V):
        logits, ids = logits_V.topk(sampling.top_k)
    else:
        logits, ids = logits_V.sort(descending=True)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        # Keep the smallest set of tokens with a total probability of top_p, and always keep the first token.
        dropped = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        dropped[0] = False
        probabilities = probabilities.masked_fill(dropped, 0.0)
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
    """Yield new token ids until `stop_id` (not yielded), `max_new_tokens` or the end of the context.

    Samples only ids below `num_entries`, the tokenizer's ids. Raises InputError for a prompt that is empty or fills
    the context.
    """
    config = model.config
    if not 0 < len(prompt_ids) < config.max_seq_len:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens; the model accepts 1 to {config.max_seq_len - 1}")
    device = model.embedding.device
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(device).manual_seed(sampling.seed)
    length = min(config.max_seq_len, len(prompt_ids) + max_new_tokens)
    cache = KVCache(config, 1, length, device, model.compute_dtype)
    input_ids = torch.tensor([prompt_ids], device=device)
    with best_sdpa(device):
        for _ in range(length - len(prompt_ids)):
            x, _ = model.hidden_states(input_ids, cache)
            logits_V = model.head(x[0, -1])[:num_entries]
            next_id = sample_token(logits_V, sampling, generator)
            token = int(next_id)
            if token == stop_id:
                return
            yield token
            input_ids = next_id[None]


def stream_text(
    model: Acceleron, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling
) -> Iterator[tuple[int | None, str]]:
    """Yield (token id, text) per token. The text is "" while a character is incomplete.

    If a character is incomplete at the end, a final (None, text) follows. Concatenated, the texts are the decoded
    continuation. An empty prompt starts a new document. Stops at the end-of-text token.
    """
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not valid UTF-8") from error
    prompt_ids = encode(tokenizer, [prompt])[0] or [end_id]
    # Decode all ids each time, because a token's text depends on the tokens before it: 0.5 ms for 2,048 ids.
    ids, shown = list(prompt_ids), len(tokenizer.decode(prompt_ids))
    for token in generate(model, prompt_ids, max_new_tokens, sampling, num_entries=num_ids(tokenizer), stop_id=end_id):
        ids.append(token)
        piece = ""
        # With byte fallback, a run of byte tokens decodes to U+FFFD until it is valid UTF-8.
        if not BYTE_TOKEN.fullmatch(tokenizer.id_to_token(token) or ""):
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):
                piece, shown = text[shown:], len(text)
        yield token, piece
    if rest := tokenizer.decode(ids)[shown:]:
        yield None, rest
