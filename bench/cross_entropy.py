"""Peak memory of the cross-entropy with its gradients: chunked, against torch's on the full logits.

python -m bench.cross_entropy [--tokens 8192]. Each runs in a process of its own, as a peak can't be reset.
"""

import argparse
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F

from acceleron import ModelConfig
from acceleron.device import peak_memory
from acceleron.kernels import linear_cross_entropy

from .timing import print_machine

CPU = torch.device("cpu")


def measure(provider: str, tokens: int) -> int:
    """Bytes of the process's peak above what it held before."""
    config = ModelConfig.preset("tiny")
    x = torch.randn(tokens, config.d_model, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.d_model, requires_grad=True)
    labels = torch.randint(config.vocab_size, (tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if provider == "chunked":
        linear_cross_entropy(x, weight, labels).backward()
    else:
        F.cross_entropy(F.linear(x, weight), labels).backward()
    return peak_memory(CPU) - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--provider", choices=("chunked", "full logits"), help="measure this one in this process")
    arguments = parser.parse_args()
    if arguments.provider:
        print(measure(arguments.provider, arguments.tokens))
        return
    print_machine()
    logits = arguments.tokens * ModelConfig.preset("tiny").vocab_size * 4
    print(f"{arguments.tokens} tokens of tiny in fp32; all logits are {logits / 2**20:.0f} MiB, their gradient as many")
    for provider in ("chunked", "full logits"):
        command = [
            sys.executable,
            "-m",
            "bench.cross_entropy",
            "--tokens",
            str(arguments.tokens),
            "--provider",
            provider,
        ]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{provider:12} peak {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
