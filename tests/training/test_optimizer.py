"""Tests gradient clipping and skipped steps in the fused AdamW against torch's separate clipping."""

import copy

import pytest
import torch

from acceleron.training.optimizer import build_optimizer, update


# Norms above and below the limit; 0 means no limit. The gradient scale varies, because AdamW ignores a constant scale.
@pytest.mark.parametrize("clip", [0.5, 1e3, 0.0])
def test_clipping_matches_torchs(clip):
    torch.manual_seed(0)
    ours = torch.nn.Linear(8, 5)
    theirs = copy.deepcopy(ours)
    optimizer, plain = build_optimizer(ours, 0.1), build_optimizer(theirs, 0.1)
    for group in (*optimizer.param_groups, *plain.param_groups):
        group["lr"] = 0.1
    for scale in (1.0, 30.0, 0.01, 3.0):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a) * scale
            b.grad = a.grad.clone()
        norm = torch.nn.utils.get_total_norm([a.grad for a in ours.parameters()])
        update(optimizer, norm, clip, torch.tensor(False))
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or float("inf"))
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        pairs = [(a, b), *((optimizer.state[a][name], plain.state[b][name]) for name in ("exp_avg", "exp_avg_sq"))]
        for mine, expected in pairs:
            assert (mine - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skipped_step_keeps_weights_and_moments(value):
    model = torch.nn.Linear(8, 5)
    optimizer = build_optimizer(model, 0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    model(torch.randn(3, 8)).sum().backward()
    update(optimizer, torch.tensor(1.0), 1.0, torch.tensor(False))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    model.weight.grad.fill_(value)
    update(optimizer, torch.tensor(value), 1.0, torch.tensor(True))
    after = [model.state_dict(), optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
