"""The router's logits and their gradients against float64, error against the plain op's error."""

import pytest
import torch
from compare import DEVICE, error, randn

from acceleron.kernels import formulas, router, torch_ops
from acceleron.kernels.router import router_logits

FACTOR = 1.5
# Three TF32 products on a GPU stand for one of fp32, to within a few of its last bits.
LOGITS_FACTOR = {"cuda": 8, "cpu": FACTOR}[DEVICE]
NAMES = ("logits", "x.grad", "weight.grad")


def run(op, x, weight, grad):
    """Logits and both gradients."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logits = op(x, weight)
    logits.backward(grad.to(logits.dtype))
    return logits.detach(), x.grad, weight.grad


# One token; tokens, widths and experts that no block divides; several tiles of each; more experts than a tile has.
CASES = [(1, 64, 8), (70, 33, 2), (130, 96, 5), (200, 130, 40)]
if DEVICE == "cuda":
    CASES += [(8192, 512, 4), (8191, 1536, 8), (4096, 1024, 256)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "D", "E"), CASES)
def test_errors_are_those_of_the_plain_op(T, D, E, dtype):
    x, weight, grad = randn(T, D, dtype=dtype), randn(E, D, seed=1), randn(T, E, seed=2)
    truth = run(formulas.router_logits, x.double(), weight.double(), grad.double())
    plain = run(torch_ops.router_logits, x, weight, grad)
    ours = run(router_logits, x, weight, grad)
    # bf16's dx is truncated by the interpreter, and not rounded: twice the error.
    rounding = 2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1
    factors = (LOGITS_FACTOR, FACTOR * rounding, LOGITS_FACTOR)
    for name, a, b, t, factor in zip(NAMES, ours, plain, truth, factors, strict=True):
        assert a.dtype == (dtype if name == "x.grad" else torch.float32), name
        assert error(a, t) <= factor * max(error(b, t), 2e-8), name


def test_many_shares_of_the_tokens_add_up(monkeypatch):
    """A program of the weight's gradient then has two blocks of tokens, the last one none."""
    monkeypatch.setattr(router, "WEIGHT_GRAD_PROGRAMS", 2)
    x, weight, grad = randn(64 * 2 + 5, 20), randn(4, 20, seed=1), randn(64 * 2 + 5, 4, seed=2)
    truth = run(formulas.router_logits, x.double(), weight.double(), grad.double())
    assert error(run(router_logits, x, weight, grad)[2], truth[2]) < 1e-6


def test_same_bits_twice_and_no_tokens():
    x, weight, grad = randn(150, 48), randn(6, 48, seed=1), randn(150, 6, seed=2)
    for first, second in zip(run(router_logits, x, weight, grad), run(router_logits, x, weight, grad), strict=True):
        assert torch.equal(first, second)
    logits, dx, dweight = run(router_logits, x[:0], weight, grad[:0])
    assert logits.shape == (0, 6)
    assert dx.shape == (0, 48)
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_expanded_gradient():
    x, weight = randn(9, 16).requires_grad_(), randn(4, 16, seed=1)
    router_logits(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(9, 16))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (randn(4, 8).double(), randn(2, 8), "x_TD: expected bfloat16 or float16 or float32, but got float64"),
        (randn(4, 8), randn(2, 8).double(), "weight_ED: expected bfloat16 or float16 or float32, but got float64"),
        (randn(4, 8), randn(2, 9), r"weight_ED: expected shape \(any, 8\), but got \(2, 9\)"),
        (randn(2, 4, 8), randn(2, 8), "x_TD: expected shape"),
        (randn(8, 4).t(), randn(2, 8), "x_TD: expected a contiguous tensor"),
    ],
)
def test_bad_input_is_named(x, weight, message):
    with pytest.raises(ValueError, match=f"router_logits: {message}"):
        router_logits(x, weight)


def test_custom_ops_pass_opcheck():
    torch.use_deterministic_algorithms(False)  # opcheck compares runs on memory it does not own
    ops = torch.ops.acceleron_triton
    x, weight, grad = randn(5, 8), randn(3, 8, seed=1), randn(5, 3, seed=2)
    torch.library.opcheck(ops.router_logits, (x, weight))
    torch.library.opcheck(ops.router_input_grad, (grad, x, weight))
    torch.library.opcheck(ops.router_weight_grad, (grad, x))
