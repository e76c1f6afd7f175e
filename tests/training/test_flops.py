"""Tests flops_per_token against torch's FlopCounterMode on a model of plain GEMMs, forward and backward.

The counter sees matmuls and F.linear, but neither custom ops nor SDPA on a CPU. This model therefore runs each expert
as F.linear on its own rows, and attention as two batched matmuls over all pairs of positions.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from acceleron import Acceleron, ModelConfig
from acceleron.kernels import torch_ops

BATCH, SEQ_LEN = 2, 24
# All widths differ, so no two terms are equal.
CONFIG = dict(vocab_size=160, d_model=48, num_layers=3, num_heads=4, num_kv_heads=2, num_experts=5, d_ff=40)
CONFIG |= dict(d_ff_shared=28, max_seq_len=32)
CONFIGS = {
    "MoE": ModelConfig(**CONFIG),
    "dense baseline": ModelConfig(**CONFIG, dense=True),
    "other shape": ModelConfig(**CONFIG | dict(d_ff_shared=0, top_k=3, num_dense_layers=1)),
    "nano": ModelConfig.preset("nano", vocab_size=256),
    "nano's dense baseline": ModelConfig.preset("nano", dense=True, vocab_size=256),
}


def swiglu_mlp(x, w13, w2):
    gate, up = F.linear(x, w13).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w2)


def plain_moe(moe, x_TD, top_k):
    logits = F.linear(x_TD, moe.router)
    top = logits.topk(top_k)
    weights, y = top.values.softmax(-1), torch.zeros_like(x_TD)
    if moe.shared is not None:
        y = swiglu_mlp(x_TD, moe.shared.w13, moe.shared.w2)
    for expert, (w13, w2) in enumerate(zip(moe.w13_E2FD, moe.w2_EDF, strict=True)):
        tokens, choice = (top.indices == expert).nonzero(as_tuple=True)
        rows = swiglu_mlp(x_TD[tokens], w13, w2) * weights[tokens, choice, None]
        y = y.index_add(0, tokens, rows)
    return y


def plain_attention(attention, x, model):
    """Causal attention with matmuls over all pairs. A causal kernel computes only half of them."""
    config = model.config
    qkv = F.linear(x, attention.qkv.weight).unflatten(-1, (-1, config.head_dim))
    q, k, v = qkv.split(attention.splits, dim=-2)
    q, k = torch_ops.rope(q, k, model.cos_SC[:SEQ_LEN], model.sin_SC[:SEQ_LEN])
    repeats = config.num_heads // config.num_kv_heads
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)))
    scores = (q @ k.mT * config.head_dim**-0.5).masked_fill(torch.ones(SEQ_LEN, SEQ_LEN).triu(1).bool(), -torch.inf)
    return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2), attention.out.weight)


def plain_cross_entropy(model, ids):
    x = F.embedding(ids, model.embedding)
    for block in model.blocks:
        x = x + plain_attention(block.attention, block.attention_norm(x)[0], model)
        normed = block.ffn_norm(x)[0].flatten(0, 1)
        if hasattr(block, "mlp"):
            y = swiglu_mlp(normed, block.mlp.w13, block.mlp.w2)
        else:
            y = plain_moe(block.moe, normed, model.config.top_k)
        x = x + y.view_as(x)
    logits = F.linear(model.norm(x)[0], model.embedding)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_per_token_equals_torchs_count_with_half_the_attention(name):
    """The match is exact, even for the router. The head counts for all positions, even the last, which has no label."""
    config = CONFIGS[name]
    torch.manual_seed(0)
    model = Acceleron(config)
    ids = torch.randint(config.vocab_size, (BATCH, SEQ_LEN))
    with FlopCounterMode(display=False) as counter:
        loss = plain_cross_entropy(model, ids)
        loss.backward()
    # The plain model computes the same loss.
    assert loss.item() == pytest.approx(model(ids, labels=ids).cross_entropy.item(), rel=1e-5)
    matmuls = counter.get_flop_counts()["Global"]
    # Only attention uses batched matmuls: two in the forward pass and four in the backward pass.
    attention = matmuls[torch.ops.aten.bmm]
    pairs = BATCH * config.num_heads * SEQ_LEN**2
    assert attention == 6 * config.num_layers * 2 * pairs * config.head_dim
    counted = counter.get_total_flops() - attention // 2
    assert model.flops_per_token(SEQ_LEN) * BATCH * SEQ_LEN == counted
