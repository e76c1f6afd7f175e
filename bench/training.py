"""Forward and backward of a size on this machine: MoE, dense twin, and transformers' models of their dimensions.

python -m bench.training [--model_size tiny] [--dtype fp32] [--no_compile] [--rounds 5]
"""

import argparse
import time

import torch

from acceleron import Acceleron, ModelConfig
from acceleron.device import DTYPES, resolve_device, resolve_dtype

from .peers import EXPERTS, granite_moe, llama
from .timing import interleave, print_machine, report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", default="tiny")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no_compile", action="store_true", help="run ours in eager mode too, as the peers run")
    arguments = parser.parse_args()
    device = resolve_device("cpu")
    dtype = resolve_dtype(arguments.dtype, device)
    torch.manual_seed(0)
    config = ModelConfig.preset(arguments.model_size)
    ids = torch.randint(config.vocab_size, (arguments.batch_size, arguments.seq_len))

    def ours(dense: bool):
        model = Acceleron(ModelConfig.preset(arguments.model_size, dense=dense), compute_dtype=dtype)
        if not arguments.no_compile:
            model.compile_blocks()
        return step(model, lambda: model(ids, labels=ids).loss)

    def theirs(model):
        return step(model, lambda: model(input_ids=ids, labels=ids).loss)

    def step(model, loss):
        def run() -> float:
            start = time.perf_counter()
            loss().backward()
            elapsed = time.perf_counter() - start
            model.zero_grad(set_to_none=True)
            return elapsed

        return run

    providers = {"MoE": ours(dense=False), "dense twin": ours(dense=True)}
    # batched_mm copies an expert's weights for each token: it is made for decoding, and never the fastest here.
    providers |= {f"GraniteMoeShared ({e})": theirs(granite_moe(config, dtype, e)) for e in EXPERTS[:2]}
    providers["Llama"] = theirs(llama(config, dtype))
    seconds = interleave(providers, arguments.rounds)
    print_machine()
    mode = "eager" if arguments.no_compile else "torch.compile (the peers eager)"
    print(f"{arguments.model_size}, {dtype}, forward and backward of {tuple(ids.shape)}, {mode}, no checkpointing")
    fastest = min((name for name in seconds if name.startswith("Granite")), key=lambda name: sorted(seconds[name])[0])
    report(seconds, ids.numel(), [("MoE", "dense twin"), ("dense twin", "Llama"), ("MoE", fastest)])


if __name__ == "__main__":
    main()
