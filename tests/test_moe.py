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


def loop_moe(x_TD, weights, forced_balance=False):
    """Return y, z_loss and balance_loss."""
    T, E = len(x_TD), len(weights["router"])
    ys, tokens_per_expert = [], torch.zeros(E, dtype=torch.float64)
    z_loss, mean_probability = 0.0, torch.zeros(E, dtype=torch.float64)
    for t, x in enumerate(x_TD):
        logits = weights["router"] @ x
        ids = sorted(range(E), key=lambda e: (-logits[e].item(), e))[:2]
        if forced_balance:
            ids = [t % E, (t + 1) % E]
        scores = torch.softmax(logits[ids], dim=0)
        y = swiglu_expert(x, weights["shared.w13"], weights["shared.w2"])
        for k, e in enumerate(ids):
            y = y + scores[k] * swiglu_expert(x, weights["w13_E2FD"][e], weights["w2_EDF"][e])
            tokens_per_expert[e] += 1
        ys.append(y)
        z_loss = z_loss + logits.exp().sum().log() ** 2 / T
        mean_probability = mean_probability + torch.softmax(logits, dim=0) / T
    balance_loss = E * ((tokens_per_expert / (2 * T)) * mean_probability).sum()
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
@pytest.mark.parametrize(("num_experts", "forced_balance"), [(2, False), (5, False), (5, True)])
def test_moe_matches_the_loop(num_experts, forced_balance, objective):
    config = dataclasses.replace(CONFIG, num_experts=num_experts, debug_force_load_balance=forced_balance)
    moe = unit_scale_moe(config)
    x = torch.randn(23, 16, dtype=torch.float64).requires_grad_()
    grad = torch.randn(23, 16, dtype=torch.float64)
    scales = {name: float(objective in (name, "all")) for name in ("output", "z_loss", "balance_loss")}

    def gradients(y, z_loss, balance_loss, leaves):
        total = scales["output"] * (y * grad).sum() + scales["z_loss"] * z_loss + scales["balance_loss"] * balance_loss
        return torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)

    weights = dict(moe.named_parameters())
    y, stats = moe(x)
    expected = loop_moe(x, weights, forced_balance)
    torch.testing.assert_close((y, stats.z_loss, stats.balance_loss), expected, rtol=1e-10, atol=1e-10)
    names, leaves = ("x", *weights), (x, *weights.values())
    grads = dict(zip(names, gradients(y, stats.z_loss, stats.balance_loss, leaves), strict=True))
    expected_grads = dict(zip(names, gradients(*expected, leaves), strict=True))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-10)
    # Every objective gives the router a gradient. The exception: two experts are always balanced.
    assert grads["router"].abs().max() > 1e-4 or (num_experts, objective) == (2, "balance_loss")


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
