"""Tokens/s of greedy decoding at batch 1, against transformers' generate with the same weights.

Checked are the tokens of the last round: given those before it, each must have the largest logit of the fp32 reference,
or one about as large. The error is the mean distance in standard deviations of the logits; a random token's is about 4.
The exit status is 1 if ours failed.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from acceleron import Acceleron, ModelConfig, ops
from acceleron.config import PRESETS
from acceleron.device import dtype_name
from acceleron.generation import Sampling, generate, prepare_for_inference

from .command import compete, parse
from .peers import PEERS, load_weights, transformers_model
from .rows import Results, Row

PROMPT_TOKENS, TOKENS = 16, 60
# In bf16 a token near a tie of its router's logits may have another expert, which has moved one of 60 tokens by 3.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@torch.no_grad()
def deciding_model(size: str) -> Acceleron:
    """A model whose blocks decide; at its initialization the embedding does, and the last token is repeated."""
    torch.manual_seed(0)
    model = Acceleron(ModelConfig.preset(size))
    for name, weight in model.named_parameters():
        scale = 5 if name.startswith("blocks.") and weight.dim() > 1 else 1
        weight.copy_((scale * weight).bfloat16())  # so that bf16 rounds no weight
    return model


@torch.no_grad()
def distance(model: Acceleron, prompt: Tensor, tokens: list[int]) -> float:
    """The check's error, of the tokens that follow a prompt (1, S)."""
    ids = torch.cat([prompt, torch.tensor([tokens], device=prompt.device)], dim=1)
    logits = model(ids).logits[0, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(1, ids[0, prompt.shape[1] :, None])[:, 0]
    return ((logits.amax(dim=1) - chosen) / logits.std(dim=1)).mean().item()


def decoder(source: str, size: str, dtype: torch.dtype, prompt: Tensor) -> Callable[[], list[int]]:
    """A function that returns the TOKENS tokens after the prompt. source: "Acceleron" or PEERS[False]."""
    model = deciding_model(size)
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
    """For `compete`."""
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
        row.error = distance(deciding_model(size).to(prompt.device), prompt, tokens)
    row.check = "mean distance from the fp32 reference's choices, in standard deviations of the logits"
    row.allowed = ALLOWED[dtype]


def main():
    arguments = parse(__doc__, device="cpu", model_size="tiny", dtype="bf16", rounds=5)
    prompt = torch.randint(PRESETS[arguments.model_size].vocab_size, (1, PROMPT_TOKENS), device=arguments.device)
    entries = [entry(source, arguments.model_size, arguments.dtype, prompt) for source in ("Acceleron", PEERS[False])]
    compete(entries, arguments.rounds, Results(arguments.output, arguments.device), ours=1)
