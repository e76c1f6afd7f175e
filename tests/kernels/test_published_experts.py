"""The experts of published models, scaled down: transformers' MoE blocks and their routers, with the same weights."""

import pytest
import torch
from compare import DEVICE, error, randn

from acceleron import ops

# model, block, experts, experts per token, and whether the scores of a token's experts are normalized.
MODELS = [
    ("olmoe", "Olmoe", 64, 8, False),
    ("qwen3_moe", "Qwen3Moe", 32, 8, True),
    ("mixtral", "Mixtral", 8, 2, True),
]


@pytest.mark.parametrize(("model", "name", "experts", "top_k", "normalize"), MODELS, ids=[name for name, *_ in MODELS])
def test_output_and_gradients_match_transformers(model, name, experts, top_k, normalize, backend):
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    widths = dict(hidden_size=32, intermediate_size=24, moe_intermediate_size=24)
    config = getattr(module, f"{name}Config")(
        **widths, num_experts=experts, num_local_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=normalize
    )
    config._experts_implementation = "eager"
    block = getattr(module, f"{name}SparseMoeBlock")(config).to(DEVICE)
    weights = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    with torch.no_grad():
        for seed, weight in enumerate(weights):
            weight.copy_(randn(*weight.shape, seed=seed) / weight.shape[-1] ** 0.5)
    leaves = [randn(21, 32, seed=3).requires_grad_(), *weights]
    ours, theirs = ops.moe(*leaves, top_k=top_k, normalize=normalize).y_TD, block(leaves[0][None])[0]
    results, expected = ((y, *torch.autograd.grad(y, leaves, randn(21, 32, seed=4))) for y in (ours, theirs))
    for result, truth in zip(results, expected, strict=True):
        assert error(result, truth.double()) < 1e-6
