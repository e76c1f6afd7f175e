"""The MoE layer against a per-token float64 loop written from the formulas of the model's definition."""

import dataclasses

import pytest
import torch

from acceleron import ModelConfig, MoE

CONFIG = ModelConfig(vocab_size=64, d_model=16, num_heads=2, num_kv_heads=1, num_experts=5, d_ff=12, d_ff_shared=10)


def swiglu_expert(x, w13, w2):
    gate, up = (w13 @ x).chunk(2)
    return w2 @ (gate * torch.sigmoid(gate) * up)


def loop_moe(x_TD, weights, in_turn=False):
    """y, z_loss, balance_loss, token by token; `in_turn`: with the experts that a forced balance gives."""
    T, E = len(x_TD), len(weights["router"])
    ys, counts = [], torch.zeros(E, dtype=torch.float64)
    z_loss, mean_probability = 0.0, torch.zeros(E, dtype=torch.float64)
    for t, x in enumerate(x_TD):
        logits = weights["router"] @ x
        chosen = sorted(range(E), key=lambda e: (-logits[e].item(), e))[:2]
        if in_turn:
            chosen = [t % E, (t + 1) % E]
        share = torch.softmax(logits[chosen], dim=0)
        y = swiglu_expert(x, weights["shared.w13"], weights["shared.w2"])
        for k, e in enumerate(chosen):
            y = y + share[k] * swiglu_expert(x, weights["w13_E2FD"][e], weights["w2_EDF"][e])
            counts[e] += 1
        ys.append(y)
        z_loss = z_loss + logits.exp().sum().log() ** 2 / T
        mean_probability = mean_probability + torch.softmax(logits, dim=0) / T
    balance_loss = E * ((counts / (2 * T)) * mean_probability).sum()
    return torch.stack(ys), z_loss, balance_loss


def unit_scale_moe(config):
    """Weights of scale 1/sqrt(fan-in), so that outputs and logits are at unit scale."""
    torch.manual_seed(0)
    moe = MoE(config).double()
    with torch.no_grad():
        for weight in moe.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return moe


# The objective decides which path the router's gradient takes: through the weights, or through either loss alone.
@pytest.mark.parametrize("objective", ["output", "z_loss", "balance_loss", "all"])
@pytest.mark.parametrize(("num_experts", "in_turn"), [(2, False), (5, False), (5, True)])
def test_moe_matches_the_loop(num_experts, in_turn, objective):
    config = dataclasses.replace(CONFIG, num_experts=num_experts, debug_force_load_balance=in_turn)
    moe = unit_scale_moe(config)
    x = torch.randn(23, 16, dtype=torch.float64).requires_grad_()
    grad = torch.randn(23, 16, dtype=torch.float64)
    scales = {name: float(objective in (name, "all")) for name in ("output", "z_loss", "balance_loss")}

    def gradients(y, z_loss, balance_loss, leaves):
        total = scales["output"] * (y * grad).sum() + scales["z_loss"] * z_loss + scales["balance_loss"] * balance_loss
        return torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)

    weights = dict(moe.named_parameters())
    y, stats = moe(x)
    expected = loop_moe(x, weights, in_turn)
    for ours, theirs in zip((y, stats.z_loss, stats.balance_loss), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    leaves = [x, *weights.values()]
    ours = gradients(y, stats.z_loss, stats.balance_loss, leaves)
    theirs = gradients(*expected, leaves)
    for name, a, b in zip(("x", *weights), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    router = ours[1 + list(weights).index("router")]
    # Each path by itself reaches the router; but two experts are always balanced.
    assert router.abs().max() > 1e-4 or (num_experts, objective) == (2, "balance_loss")


def test_forced_balance_is_for_training_alone():
    torch.manual_seed(0)
    x = torch.randn(30, 16)
    learned = MoE(CONFIG)
    forced = MoE(dataclasses.replace(CONFIG, debug_force_load_balance=True))
    forced.load_state_dict(learned.state_dict())
    assert forced(x)[1].tokens_per_expert_E.tolist() == [12] * 5
    assert learned(x)[1].tokens_per_expert_E.tolist() != [12] * 5
    assert torch.equal(forced.eval()(x)[0], learned(x)[0])


def test_moe_stands_alone_in_another_model():
    """Any leading shape, any compute dtype with fp32 weights, and it trains with somebody else's optimizer."""
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


def test_router_computes_in_fp32_whatever_the_activations():
    """In bf16, logits 1 and 1 + 2**-9 would tie and go to the lower expert."""
    moe = MoE(CONFIG)
    with torch.no_grad():
        moe.router.zero_()
        moe.router[:3, 0] = torch.tensor([1.0, 1 + 2**-9, 1 + 2**-10])
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 0] = 1
    assert moe(x)[1].tokens_per_expert_E.tolist() == [0, 1, 1, 0, 0]
