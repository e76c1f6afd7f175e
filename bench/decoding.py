"""Tokens/s of greedy decoding at batch 1, against transformers' generate with the same weights.

The check compares the last round's tokens with the fp32 reference: given the tokens before it, each token's logit must
be close to the maximum. The error is the mean gap in standard deviations of the logits, about 4 for random tokens. The
exit status is 1 if our model fails.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from acceleron import Acceleron, ModelConfig, ops
from acceleron.config import PRESETS
from acceleron.device import dtype_name
from acceleron.generation import Sampling, generate, prepare_for_inference

from .command import parse, run_entries
from .peers import PEERS, load_weights, transformers_model
from .rows import Results, Row

PROMPT_TOKENS, TOKENS = 16, 60
# In bf16 a token with nearly tied router logits can select a different expert. This has moved 1 of 60 tokens by 3.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@torch.no_grad()
def model_with_large_weights(size: str) -> Acceleron:
    """Build a model that does not just repeat its last token. At initialization embeddings dominate, so it would."""
    torch.manual_seed(0)
    model = Acceleron(ModelConfig.preset(size))
    for name, weight in model.named_parameters():
        scale = 5 if name.startswith("blocks.") and weight.dim() > 1 else 1
        weight.copy_((scale * weight).bfloat16())  # bf16 represents every weight exactly
    return model


@torch.no_grad()
def distance(model: Acceleron, prompt: Tensor, tokens: list[int]) -> float:
    """Return the error of the tokens that follow a prompt (1, S)."""
    ids = torch.cat([prompt, torch.tensor([tokens], device=prompt.device)], dim=1)
    logits = model(ids).logits[0, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(1, ids[0, prompt.shape[1] :, None])[:, 0]
    return ((logits.amax(dim=1) - chosen) / logits.std(dim=1)).mean().item()


def decoder(source: str, size: str, dtype: torch.dtype, prompt: Tensor) -> Callable[[], list[int]]:
    """Return a function that generates TOKENS tokens after the prompt (1, S). source: "Acceleron" or PEERS[False]."""
    model = model_with_large_weights(size)
    if source == "Acceleron":
        model = prepare_for_inference(model, dtype).to(prompt.device)
        return lambda: list(generate(model, prompt[0].tolist(), TOKENS, Sampling(temperature=0)))
    peer = transformers_model(model.config, dtype).eval()
    load_weights(peer, model)
    peer.to(prompt.device)
    settings = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, use_cache=True, pad_token_id=0)
    mask = torch.ones_like(prompt)
    return lambda: peer.generate(prompt, attention_mask=mask, **settings)[0, prompt.shape[1] :].tolist()


def entry(source: str, size: str, dtype: torch.dtype, prompt: Tensor) -> Iterator:
    """Yield an entry for `run_entries`."""
    case = {"size": size, "dtype": dtype_name(dtype), "batch_size": 1, "tokens": TOKENS}
    row, tokens = Row("decoding", source, case, "tokens/s", group="decoding"), []
    yield row
    decode = decoder(source, size, dtype, prompt)

    def rate() -> float:
        start = time.perf_counter()
        tokens[:] = decode()
        return TOKENS / (time.perf_counter() - start)

    yield rate
    with ops.using_backend("reference", prompt.device):
        row.error = distance(model_with_large_weights(size).to(prompt.device), prompt, tokens)
    row.check = "mean distance to the fp32 reference's largest logit, in standard deviations"
    row.allowed = ALLOWED[dtype]


def main():
    arguments = parse(__doc__, device="cpu", model_size="tiny", dtype="bf16", rounds=5)
    prompt = torch.randint(PRESETS[arguments.model_size].vocab_size, (1, PROMPT_TOKENS), device=arguments.device)
    entries = [entry(source, arguments.model_size, arguments.dtype, prompt) for source in ("Acceleron", PEERS[False])]
    run_entries(entries, arguments.rounds, Results(arguments.output, arguments.device), ours=1)
