"""Router GEMM kernels: logits and both gradients."""

import pytest
import torch
from compare import DEVICE, DTYPES, FACTOR, assert_accurate, assert_equal, error, opcheck, randn

from acceleron.kernels import formulas, router, torch_ops
from acceleron.kernels.router import router_logits

# On a GPU, three TF32 products replace an fp32 product. The last few bits differ.
FP32_FACTOR = {"cuda": 8, "cpu": 1.5}[DEVICE]


def run(op, x, weight, grad):
    """Return the logits and both gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = op(x, weight)
    return logits, *torch.autograd.grad(logits, (x, weight), grad.to(logits.dtype))


# One token; partial blocks of tokens, widths and experts; several blocks of each; more experts than a tile has.
CASES = [(1, 64, 8), (70, 33, 2), (130, 96, 5), (200, 130, 40)]
if DEVICE == "cuda":
    CASES += [(8192, 512, 4), (8191, 1536, 8), (4096, 1024, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "D", "E"), CASES)
def test_logits_and_gradients(T, D, E, dtype):
    x, weight, grad = randn(T, D, dtype=dtype), randn(E, D, seed=1), randn(T, E, seed=2)
    logits, grad_x, grad_weight = zip(
        run(router_logits, x, weight, grad),
        run(torch_ops.router_logits, x, weight, grad),
        run(formulas.router_logits, x.double(), weight.double(), grad.double()),
        strict=True,
    )
    for name, values, factor in (
        ("logits", logits, FP32_FACTOR),
        ("grad of x", grad_x, FACTOR[dtype]),
        ("grad of weight", grad_weight, FP32_FACTOR),
    ):
        assert_accurate([name], *([value] for value in values), factor, floor=factor * 2e-8)
    assert logits[0].dtype == torch.float32


def test_weight_gradient_sums_the_shares_of_all_programs(monkeypatch):
    """Two programs have two token blocks each, and the last block is empty."""
    monkeypatch.setattr(router, "WEIGHT_GRAD_PROGRAMS", 2)
    x, weight, grad = randn(64 * 2 + 5, 20), randn(4, 20, seed=1), randn(64 * 2 + 5, 4, seed=2)
    truth = run(formulas.router_logits, x.double(), weight.double(), grad.double())
    assert error(run(router_logits, x, weight, grad)[2], truth[2]) < 1e-6


def test_results_are_deterministic():
    arguments = randn(150, 48), randn(6, 48, seed=1), randn(150, 6, seed=2)
    assert_equal(run(router_logits, *arguments), run(router_logits, *arguments))


def test_zero_tokens_are_accepted():
    weight = randn(6, 48)
    logits, dx, dweight = run(router_logits, randn(0, 48), weight, randn(0, 6))
    assert logits.shape == (0, 6)
    assert dx.shape == (0, 48)
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_backward_accepts_an_expanded_gradient():
    x, weight = randn(9, 16).requires_grad_(), randn(4, 16, seed=1)
    router_logits(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(9, 16))


def test_custom_ops_pass_opcheck():
    ops = torch.ops.acceleron_triton
    x, weight, grad = randn(5, 8), randn(3, 8, seed=1), randn(5, 3, seed=2)
    opcheck(ops.router_logits, (x, weight))
    opcheck(ops.router_input_grad, (grad, x, weight))
    opcheck(ops.router_weight_grad, (grad, x))
