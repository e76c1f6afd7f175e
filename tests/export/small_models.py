"""Shared code for tests of exports: small models with visible differences, and a tokenizer."""

import torch

from acceleron import Acceleron, ModelConfig
from acceleron.data.tokenizer import train_tokenizer

# Every architecture that a model can be exported as. K = 2, 3 and 1, with and without a shared expert.
SHAPES = {
    "shared expert": {},
    "no shared expert": dict(num_experts=5, top_k=3, d_ff_shared=0, norm_eps=1e-5),
    "K = 1": dict(num_layers=3, top_k=1, num_kv_heads=1, rope_theta=5e5),
    "dense": dict(dense=True, num_kv_heads=4),
}


def random_model(seed: int = 0, **overrides) -> Acceleron:
    """A model whose matrices have a standard deviation of 0.3, so its logits are around 2 and every weight matters."""
    sizes = dict(vocab_size=320, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=4, d_ff=24)
    model = Acceleron(ModelConfig(**sizes | dict(d_ff_shared=16, max_seq_len=64) | overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            mean, std = (1.0, 0.2) if weight.dim() == 1 else (0.0, 0.3)
            weight.normal_(mean, std, generator=generator)
    return model


def random_ids(*shape: int, vocab_size: int = 320) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The RMS of the difference, divided by the RMS of the expected values."""
    output, expected = output.detach().double(), expected.detach().double()
    return ((output - expected).square().mean() / expected.square().mean()).sqrt().item()


def small_tokenizer(size: int = 320):
    """A byte-level BPE with `size` entries. It merges some words."""
    text = "the rain in spain stays mainly in the plain, they say. However, some of it falls on hills and coasts. "
    tokenizer = train_tokenizer([text * 9, "def f(x): return x\n" * 9], size)
    assert tokenizer.get_vocab_size() == size
    return tokenizer
