"""Tests the MoE layer against a float64 loop over tokens."""

import dataclasses

import pytest
import torch

from acceleron import ModelConfig, MoE
from acceleron.moe import compute_balance_loss

CONFIG = ModelConfig(vocab_size=64, d_model=16, num_heads=2, num_kv_heads=1, num_experts=5, d_ff=12, d_ff_shared=10)


def swiglu_expert(x, w13, w2):
    gate, up = (w13 @ x).chunk(2)
    return w2 @ (gate * torch.sigmoid(gate) * up)


def loop_moe(x_TD, weights, config):
    """Return y, z_loss and balance_loss."""
    T, E, K = len(x_TD), config.num_experts, config.top_k
    ys, tokens_per_expert = [], torch.zeros(E, dtype=torch.float64)
    z_loss, mean_probability = 0.0, torch.zeros(E, dtype=torch.float64)
    for t, x in enumerate(x_TD):
        logits = weights["router"] @ x
        ids = sorted(range(E), key=lambda e: (-logits[e].item(), e))[:K]
        if config.debug_force_load_balance:
            ids = [(t + k) % E for k in range(K)]
        scores = torch.softmax(logits[ids], dim=0)
        y = swiglu_expert(x, weights["shared.w13"], weights["shared.w2"]) if config.d_ff_shared else 0
        for k, e in enumerate(ids):
            y = y + scores[k] * swiglu_expert(x, weights["w13_E2FD"][e], weights["w2_EDF"][e])
            tokens_per_expert[e] += 1
        ys.append(y)
        z_loss = z_loss + logits.exp().sum().log() ** 2 / T
        mean_probability = mean_probability + torch.softmax(logits, dim=0) / T
    balance_loss = E * ((tokens_per_expert / (K * T)) * mean_probability).sum()
    return torch.stack(ys), z_loss, balance_loss


def unit_scale_moe(config):
    """Weights of scale 1 / sqrt(fan-in) keep outputs and logits at unit scale."""
    torch.manual_seed(0)
    moe = MoE(config).double()
    with torch.no_grad():
        for weight in moe.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return moe


# The objective selects how gradients reach the router: through the scores, or through one of the losses.
@pytest.mark.parametrize("objective", ["output", "z_loss", "balance_loss", "all"])
@pytest.mark.parametrize(
    "fields",
    [
        dict(num_experts=2),
        dict(),
        dict(debug_force_load_balance=True),
        dict(top_k=1, d_ff_shared=0),
        dict(top_k=4, d_ff_shared=0, debug_force_load_balance=True),
    ],
    ids=str,
)
def test_moe_matches_the_loop(fields, objective):
    config = dataclasses.replace(CONFIG, **fields)
    moe = unit_scale_moe(config)
    x = torch.randn(23, 16, dtype=torch.float64).requires_grad_()
    grad = torch.randn(23, 16, dtype=torch.float64)
    scales = {name: float(objective in (name, "all")) for name in ("output", "z_loss", "balance_loss")}

    def gradients(y, z_loss, balance_loss, leaves):
        total = scales["output"] * (y * grad).sum() + scales["z_loss"] * z_loss + scales["balance_loss"] * balance_loss
        return torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)

    weights = dict(moe.named_parameters())
    y, stats = moe(x)
    expected = loop_moe(x, weights, config)
    torch.testing.assert_close((y, stats.z_loss, stats.balance_loss), expected, rtol=1e-10, atol=1e-10)
    names, leaves = ("x", *weights), (x, *weights.values())
    grads = dict(zip(names, gradients(y, stats.z_loss, stats.balance_loss, leaves), strict=True))
    expected_grads = dict(zip(names, gradients(*expected, leaves), strict=True))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-10)
    # Every objective gives the router a gradient. The exceptions: with K = 1, the score is always 1; with K = E, the
    # experts are always balanced.
    constant = {1: "output", config.num_experts: "balance_loss"}.get(config.top_k)
    assert grads["router"].abs().max() > 1e-4 or objective == constant


@pytest.mark.parametrize("fields", [dict(), dict(top_k=1), dict(top_k=4, d_ff_shared=0)], ids=str)
def test_decoding_a_token_equals_forward(fields):
    moe = unit_scale_moe(dataclasses.replace(CONFIG, **fields))
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(moe.decode_token(x), moe(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoding_a_token_with_a_16_bit_router_selects_the_experts_of_forward(router_dtype):
    """Holds even near a tie: all values of x are 1 in 16 bits, and each row of the router has 8 of each sign."""
    moe = unit_scale_moe(CONFIG).float()
    signs = torch.tensor([1.0, -1.0]).repeat(8)[torch.rand(5, 16).argsort()]
    moe.router = torch.nn.Parameter(signs.to(router_dtype))
    tokens = 1 + 1e-4 * torch.randn(20, 1, 1, 16)
    with torch.no_grad():
        decoded = torch.cat([moe.decode_token(x) for x in tokens])
        torch.testing.assert_close(decoded, moe(tokens[:, 0])[0])


@pytest.mark.parametrize(("counts", "expected"), [([16, 16, 0, 0], 1.4), ([0, 0, 16, 16], 0.6), ([8, 8, 8, 8], 1.0)])
def test_balance_loss_of_known_probabilities(counts, expected):
    """Half the assignments go to each of two experts, or a quarter to each of four. The second layer is uniform."""
    probabilities_LE = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25] * 4], dtype=torch.float64)
    losses_L = compute_balance_loss(probabilities_LE, torch.tensor([counts, [1, 2, 3, 4]]))
    torch.testing.assert_close(losses_L, torch.tensor([expected, 1.0], dtype=torch.float64))


def test_forced_balance_applies_only_in_training_mode():
    torch.manual_seed(0)
    x = torch.randn(30, 16)
    routed = MoE(CONFIG)
    forced = MoE(dataclasses.replace(CONFIG, debug_force_load_balance=True))
    forced.load_state_dict(routed.state_dict())
    assert forced(x)[1].tokens_per_expert_E.tolist() == [12] * 5
    assert routed(x)[1].tokens_per_expert_E.tolist() != [12] * 5
    assert torch.equal(forced.eval()(x)[0], routed(x)[0])


def test_moe_trains_as_a_layer_of_a_different_model():
    moe = MoE(CONFIG)
    y, stats = moe(torch.randn(2, 3, 4, 16, dtype=torch.bfloat16))
    assert y.shape == (2, 3, 4, 16)
    assert y.dtype == torch.bfloat16
    assert stats.tokens_per_expert_E.sum() == 2 * 24
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), moe)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    losses = []
    for _ in range(60):
        y, stats = net(x)
        loss = (y - target).square().mean() + 1e-3 * stats.z_loss + 1e-2 * stats.balance_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(weight.grad.abs().max() > 0 for weight in moe.parameters())


def test_router_computes_in_fp32_for_bf16_activations():
    """In bf16 the logits 1 and 1 + 2**-9 tie, and the lower id would win."""
    moe = MoE(CONFIG)
    with torch.no_grad():
        moe.router.zero_()
        moe.router[:3, 0] = torch.tensor([1.0, 1 + 2**-9, 1 + 2**-10])
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 0] = 1
    assert moe(x)[1].tokens_per_expert_E.tolist() == [0, 1, 1, 0, 0]
