"""Greedy decoding at batch 1 on this machine, against transformers' generate on the same weights' dimensions.

python -m bench.decoding [--model_size tiny] [--dtype bf16] [--rounds 5]
"""

import argparse
import time

import torch

from acceleron import Acceleron, ModelConfig
from acceleron.device import DTYPES
from acceleron.generation import Sampling, generate, prepare_for_inference

from .peers import EXPERTS, granite_moe
from .timing import interleave, print_machine, report

PROMPT_TOKENS = 16


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", default="tiny")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    torch.manual_seed(0)
    config = ModelConfig.preset(arguments.model_size)
    prompt = torch.randint(config.vocab_size, (1, PROMPT_TOKENS))
    model = prepare_for_inference(Acceleron(config), dtype)

    def ours() -> float:
        start = time.perf_counter()
        tokens = list(generate(model, prompt[0].tolist(), arguments.tokens, Sampling(temperature=0)))
        assert len(tokens) == arguments.tokens
        return time.perf_counter() - start

    def theirs(other):
        other.eval()

        @torch.inference_mode()
        def run() -> float:
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
            assert out.shape[1] == PROMPT_TOKENS + arguments.tokens
            return time.perf_counter() - start

        return run

    providers = {"Acceleron": ours}
    providers |= {f"transformers ({e})": theirs(granite_moe(config, dtype, e)) for e in EXPERTS}
    seconds = interleave(providers, arguments.rounds)
    print_machine()
    print(f"{arguments.model_size}, {dtype}, greedy, batch 1, {arguments.tokens} tokens after {PROMPT_TOKENS}")
    fastest = min((name for name in seconds if name != "Acceleron"), key=lambda name: sorted(seconds[name])[0])
    report(seconds, arguments.tokens, [("Acceleron", fastest)])


if __name__ == "__main__":
    main()
