"""Greedy decoding at batch 1, against transformers' generate on the same weights.

python -m bench decoding [--size tiny] [--dtype bf16] [--tokens 100] [--rounds 5] [--output DIR]

Rows of decoding.jsonl: provider, size, dtype, tokens (new ones, after a prompt of PROMPT_TOKENS), batch_size 1;
`rounds`, tokens/s a round, the same round of all providers of a `group` run in turns; their median
`tokens_per_second`, `tokens_per_second_p20` and `_p80`. Checked are the tokens of the last round: each must be the one
with the largest logit of the reference in fp32, given the tokens before it, or one about as large. The error is the
mean distance, in standard deviations of the logits at its position; a token drawn at random is about 4 away.
"""

import argparse
import time

import torch
from torch import Tensor

from acceleron import Acceleron, ModelConfig, kernels
from acceleron.config import PRESETS
from acceleron.device import DTYPES, resolve_device, synchronize
from acceleron.errors import InputError
from acceleron.generation import Sampling, generate, prepare_for_inference

from .results import Results
from .rounds import print_race, rates
from .timing import interleave

PROMPT_TOKENS = 16
# Rounding of logits, and in bf16 a token's other choice of experts where its router's logits are about equal, which has
# moved one token of transformers' 60 by 3.
ALLOWED = {"fp32": 1e-3, "bf16": 0.25}


def weights_that_tell(size: str) -> Acceleron:
    """A model whose layers decide: at its initialisation the embedding does, and repeats the last token for ever."""
    torch.manual_seed(0)
    model = Acceleron(ModelConfig.preset(size))
    for name, weight in model.named_parameters():
        if name.startswith("blocks.") and weight.dim() > 1:
            weight.data *= 5
        weight.data = weight.data.bfloat16().float()  # so that bf16 rounds no weight
    return model


@torch.no_grad()
def distance(model: Acceleron, prompt: Tensor, tokens: list[int]) -> float:
    """How far the tokens are from the model's own choices, on average: see above."""
    ids = torch.cat([prompt, torch.tensor([tokens], device=prompt.device)], dim=1)
    logits = model(ids).logits[0, PROMPT_TOKENS - 1 : -1].float()
    chosen = logits.gather(1, ids[0, PROMPT_TOKENS:, None])[:, 0]
    return ((logits.amax(dim=1) - chosen) / logits.std(dim=1)).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=tuple(PRESETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="directory for decoding.jsonl (default bench/results/<date>-<device>)")
    arguments = parser.parse_args()
    device, dtype, size = resolve_device(arguments.device), DTYPES[arguments.dtype], arguments.size
    most = PRESETS[size].max_seq_len - PROMPT_TOKENS
    if not 1 <= arguments.tokens <= most:
        raise InputError(f"--tokens {arguments.tokens}: must be 1 to {most}")
    if arguments.rounds < 1:
        raise InputError(f"--rounds {arguments.rounds}: must be at least 1")
    try:
        from .transformers_models import EXPERTS, granite_moe, load_weights
    except ImportError as error:
        raise InputError("bench decoding compares with transformers: pip install transformers") from error
    results = Results(arguments.output, "decoding", device)
    kernels.select("auto", device)
    truth = weights_that_tell(size).to(device)
    prompt = torch.randint(truth.config.vocab_size, (1, PROMPT_TOKENS), device=device)
    model = prepare_for_inference(weights_that_tell(size), dtype).to(device)
    generated: dict[str, list[int]] = {}

    def ours() -> float:
        synchronize(device)
        start = time.perf_counter()
        generated["Acceleron"] = list(generate(model, prompt[0].tolist(), arguments.tokens, Sampling(temperature=0)))
        return time.perf_counter() - start

    def theirs(experts: str, name: str):
        other = granite_moe(truth.config, dtype, experts)
        load_weights(other, truth.cpu())
        other.to(device).eval()

        @torch.inference_mode()
        def run() -> float:
            synchronize(device)
            start = time.perf_counter()
            out = other.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=arguments.tokens,
                min_new_tokens=arguments.tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
            generated[name] = out[0, PROMPT_TOKENS:].tolist()
            return time.perf_counter() - start

        return run

    providers = {"Acceleron": ours}
    for experts in EXPERTS:
        name = f"transformers, {experts} experts"
        providers[name] = theirs(experts, name)
    truth.to(device)
    rows = []
    for name, seconds in interleave(providers, arguments.rounds).items():
        assert len(generated[name]) == arguments.tokens
        row = {"provider": name, "size": size, "dtype": arguments.dtype, "batch_size": 1, "tokens": arguments.tokens}
        row |= {"group": f"{size}, {arguments.dtype}, greedy"} | rates(seconds, arguments.tokens)
        row |= {
            "check": "mean distance of the tokens from fp32's choices, in standard deviations of the logits",
            "check_error": distance(truth, prompt, generated[name]),
            "check_allowed": ALLOWED[arguments.dtype],
        }
        results.write(row)
        rows.append(row)
    print(f"{size}, {arguments.dtype}, greedy, batch 1, {arguments.tokens} tokens after {PROMPT_TOKENS}")
    print_race(rows, [("Acceleron", name) for name in list(providers)[1:]])


if __name__ == "__main__":
    main()
