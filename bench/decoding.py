"""Tokens/s of greedy decoding at batch 1, against transformers' generate with the same weights.

Checked are the tokens of the last round: given those before it, each must have the largest logit of the fp32 reference,
or one about as large. The error is the mean distance in standard deviations of the logits; a random token's is about 4.
The exit status is 1 if ours failed.
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from acceleron import Acceleron, ModelConfig, kernels
from acceleron.config import PRESETS
from acceleron.device import dtype_name
from acceleron.errors import InputError
from acceleron.generation import Sampling, generate, prepare_for_inference

from .command import compete, parse
from .peers import GRANITE, load_weights, transformers_model
from .rows import Results, Row

PROMPT_TOKENS = 16
# For rounding of logits. In bf16 a token near a tie of its router's logits may also choose another expert, which has
# moved one of transformers' 60 tokens by 3.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.25}


def deciding_model(size: str) -> Acceleron:
    """A model whose blocks decide; at its initialization the embedding does, and the last token is repeated."""
    torch.manual_seed(0)
    model = Acceleron(ModelConfig.preset(size))
    for name, weight in model.named_parameters():
        scale = 5 if name.startswith("blocks.") and weight.dim() > 1 else 1
        weight.data = (scale * weight.data).bfloat16().float()  # so that bf16 rounds no weight
    return model


@torch.no_grad()
def distance(model: Acceleron, prompt: Tensor, tokens: list[int]) -> float:
    """The check's error, of the tokens that follow a prompt (1, S)."""
    ids = torch.cat([prompt, torch.tensor([tokens], device=prompt.device)], dim=1)
    logits = model(ids).logits[0, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(1, ids[0, prompt.shape[1] :, None])[:, 0]
    return ((logits.amax(dim=1) - chosen) / logits.std(dim=1)).mean().item()


def entry(experts: str, size: str, dtype: torch.dtype, prompt: Tensor, num_tokens: int) -> Iterator:
    """For `compete`: ours if `experts` is empty, else GraniteMoeShared with these experts."""
    provider = f"transformers GraniteMoeShared, {experts} experts" if experts else "Acceleron"
    case = {"size": size, "dtype": dtype_name(dtype), "batch_size": 1, "tokens": num_tokens}
    row, tokens = Row("decoding", provider, case, "tokens/s", group="decoding"), []
    yield row
    model = deciding_model(size)
    if experts:
        peer = transformers_model(model.config, experts, dtype)
        load_weights(peer, model)
        peer.to(prompt.device).eval()
        settings = dict(max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, use_cache=True)
        settings |= dict(attention_mask=torch.ones_like(prompt), pad_token_id=0)
    else:
        model = prepare_for_inference(model, dtype).to(prompt.device)

    def rate() -> float:
        start = time.perf_counter()
        if experts:
            tokens[:] = peer.generate(prompt, **settings)[0, prompt.shape[1] :].tolist()
        else:
            tokens[:] = generate(model, prompt[0].tolist(), num_tokens, Sampling(temperature=0))
        return num_tokens / (time.perf_counter() - start)

    yield rate
    kernels.select("reference", prompt.device)
    row.check = "mean distance from the fp32 reference's choices, in standard deviations of the logits"
    row.error, row.allowed = distance(deciding_model(size).to(prompt.device), prompt, tokens), ALLOWED[dtype]


def main():
    arguments = parse(__doc__, device="cpu", size="tiny", dtype="bf16", tokens=100, rounds=5)
    most = PRESETS[arguments.size].max_seq_len - PROMPT_TOKENS
    if arguments.tokens > most:
        raise InputError(f"--tokens {arguments.tokens}: expected at most {most}")
    results = Results(arguments.output, arguments.device)
    kernels.select("auto", arguments.device)
    prompt = torch.randint(PRESETS[arguments.size].vocab_size, (1, PROMPT_TOKENS), device=arguments.device)
    common = (arguments.size, arguments.dtype, prompt, arguments.tokens)
    entries = [entry(experts, *common) for experts in ("", *GRANITE, "batched_mm")]
    compete(entries, arguments.rounds, results, ours=1)
