"""The full MoE layer as one op."""

import pytest
import torch
from compare import DEVICE, DTYPES, FACTOR, assert_accurate, assert_equal, randn, saved_tensors, sum_floor

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.kernels import formulas, torch_ops
from acceleron.kernels import moe as module
from acceleron.moe import compute_balance_loss

moe = module.moe
NAMES = ("x", "router", "w13", "w2", "shared_w13", "shared_w2", "residual")
OUTPUTS = ("y", "z_loss", "balance_loss")


def inputs(T, D, width, E, shared, used=None, dtype=torch.float32, weights=None, residual=True):
    """Return the op's arguments. Weights with scale 1 / sqrt(fan-in) keep every tensor at unit scale.

    shared: the width of the shared expert, or 0. used: the experts that get tokens (default: all). weights: the dtype
    of the expert weights.
    """
    router = randn(E, D, seed=1) / D**0.5
    x = randn(T, D, dtype=dtype)
    if used:
        # A feature that is 1 in every token lowers the logits of the unused experts.
        x[:, 0], router[:, 0] = 1, 0
        router[[e for e in range(E) if e not in used], 0] = -100
    shapes = [(E, 2 * width, D), (E, D, width), (2 * shared, D), (D, shared)]
    experts = [randn(*s, seed=2 + i).div(s[-1] ** 0.5).to(weights or dtype) for i, s in enumerate(shapes)]
    experts[2:] = experts[2:] if shared else (None, None)
    return [x, router, *experts, randn(T, D, seed=6, dtype=dtype) if residual else None]


def run(function, tensors, coefficients=(1.0, 0.3, 0.2), **options):
    """Return a list of y, both losses and the input gradients of their weighted sum, and the tokens per expert."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
    y, z_loss, mean_probabilities_E, tokens_per_expert_E = function(*leaves, **options)
    balance = compute_balance_loss(mean_probabilities_E, tokens_per_expert_E)
    grad = randn(*y.shape, seed=7, dtype=y.dtype)
    losses = zip(coefficients, ((y * grad).sum(), z_loss, balance), strict=True)
    total = sum(c * value * (1 if i == 0 else len(y)) for i, (c, value) in enumerate(losses))
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [y, z_loss, balance, *torch.autograd.grad(total, wanted)], tokens_per_expert_E


def check_errors(tensors, **how):
    dtype, lengths = tensors[0].dtype, [max(t.shape) for t in tensors if t is not None]
    truths, tokens_per_expert_E = run(formulas.moe, [t if t is None else t.double() for t in tensors], **how)
    plains, _ = run(torch_ops.moe, tensors, **how)
    results, ours_per_expert_E = run(moe, tensors, **how)
    assert torch.equal(ours_per_expert_E, tokens_per_expert_E)
    assert [t.dtype for t in results[:3]] == [dtype, torch.float32, torch.float32]
    names = (*OUTPUTS, *(name for name, x in zip(NAMES, tensors, strict=True) if x is not None))
    assert_accurate(names, results, plains, truths, FACTOR[dtype], sum_floor(max(lengths)), torch.finfo(dtype).eps / 2)
    return results


# T, D, F, E, W and the experts that get tokens. The interpreter uses 32 x 32 x 32 blocks.
CASES = {
    "tiny": (60, 16, 44, 4, 22),
    "medium": (20, 32, 52, 8, 48),
    "one token": (1, 32, 64, 4, 32),
    "empty experts": (37, 32, 40, 6, 24, (1, 3, 4)),
    "hot experts": (40, 64, 32, 5, 16, (4, 2)),
    "two experts": (33, 32, 32, 2, 8),
    "many experts": (16, 8, 8, 33, 8),
    "odd widths": (33, 33, 17, 5, 9),
    "wide rows": (9, 264, 8, 3, 8),
}
RUNS = [(case, torch.float16) for case in CASES] + [("odd widths", torch.float32), ("hot experts", torch.float32)]
if DEVICE == "cuda":
    for size in PRESETS:
        config = ModelConfig.preset(size)
        CASES[f"{size}, full size"] = (8192, config.d_model, config.d_ff, config.num_experts, config.d_ff_shared)
    RUNS = [(case, dtype) for case in CASES for dtype in DTYPES]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_outputs_and_every_gradient(case, dtype):
    check_errors(inputs(*CASES[case], dtype=dtype, weights=torch.float32))


# K, normalize, dtype, and the arguments of `inputs` as in CASES. Without a shared expert and a residual: K = 1; K = 4
# with odd widths; K = 8 for one token (in fp32, because rounding errors of a few values vary too much in 16 bits). With
# both: K = 8 of 20 experts.
@pytest.mark.parametrize(
    ("top_k", "normalize", "dtype", "case"),
    [
        (1, False, torch.float16, (37, 32, 40, 6, 0, (1, 3, 4))),
        (4, True, torch.float16, (21, 33, 17, 5, 0)),
        (8, True, torch.float32, (1, 32, 24, 8, 0)),
        (8, False, torch.float16, (20, 16, 16, 20, 8)),
    ],
    ids=str,
)
def test_any_number_of_experts_per_token(top_k, normalize, dtype, case):
    tensors = inputs(*case, dtype=dtype, weights=torch.float32, residual=case[4] > 0)
    check_errors(tensors, top_k=top_k, normalize=normalize)


def test_16_bit_weights_without_a_residual():
    check_errors(inputs(*CASES["two experts"], dtype=torch.float16, residual=False))


def test_bfloat16_is_accurate():
    check_errors(inputs(*CASES["two experts"], dtype=torch.bfloat16, weights=torch.float32))


@pytest.mark.parametrize("only", range(3), ids=OUTPUTS)
def test_gradient_of_one_output(only):
    """The gradient of y reaches the router through the scores; the gradient of a loss reaches it through the logits."""
    results = check_errors(inputs(*CASES["tiny"]), coefficients=[float(i == only) for i in range(3)])
    _, router, *experts, residual = results[3:]
    assert router.abs().max() > 1e-3
    assert bool(residual.any()) == all(bool(grad.any()) for grad in experts) == (only == 0)


def test_gradients_computed_alone_match_joint_gradients():
    tensors = inputs(*CASES["odd widths"], dtype=torch.float16, weights=torch.float32)
    together = run(moe, tensors)[0][3:]
    for index, (name, expected) in enumerate(zip(NAMES, together, strict=True)):
        leaves = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        y, z_loss, *statistics = moe(*leaves)
        grad = randn(*y.shape, seed=7, dtype=y.dtype)
        total = (y * grad).sum() + len(y) * (0.3 * z_loss + 0.2 * compute_balance_loss(*statistics))
        assert torch.equal(torch.autograd.grad(total, leaves[index])[0], expected), name


@pytest.mark.parametrize("case", ["odd widths", "two experts", "many experts"])
def test_forced_load_balance(case):
    """The expert count does not divide the token count. With 64 experts, some get none."""
    tensors = inputs(*CASES[case])
    T, E = len(tensors[0]), len(tensors[1])
    check_errors(tensors, force_load_balance=True)
    expected = torch.bincount(torch.tensor([(t + k) % E for t in range(T) for k in range(2)]), minlength=E)
    assert moe(*tensors, force_load_balance=True).tokens_per_expert_E.tolist() == expected.tolist()
    assert moe(*tensors).tokens_per_expert_E.tolist() != expected.tolist() or E == 2


def test_zero_tokens_are_accepted():
    x, *weights, residual = inputs(*CASES["odd widths"], dtype=torch.float16)
    results, tokens_per_expert_E = run(moe, [x[:0], *weights, residual[:0]], coefficients=(1.0, 0.0, 0.0))
    assert results[0].shape == (0, 33)
    assert not tokens_per_expert_E.any()
    assert not any(grad.any() for grad in results[5:9])


def test_results_are_deterministic_with_and_without_grad():
    tensors = inputs(*CASES["tiny"], dtype=torch.float16)
    first, _ = run(moe, tensors)
    assert_equal(run(moe, tensors)[0], first)
    with torch.no_grad():
        assert torch.equal(moe(*tensors).y_TD, first[0])


@pytest.mark.parametrize(("top_k", "W"), [(1, 0), (2, 24), (4, 24), (8, 0)])
def test_memory_saved_for_backward(top_k, W):
    """A token takes 2 D + 4 F K + 6 W bytes in 16 bits plus 4 E + 16 K for routing. 16-bit weights are also saved."""
    T, D, width, E = 51, 40, 48, 8
    tensors = inputs(T, D, width, E, W, dtype=torch.float16, weights=torch.float32)
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    with saved_tensors() as saved:
        moe(*leaves, top_k=top_k)
    known = {leaf.data_ptr() for leaf in leaves[1:] if leaf is not None}
    kept = sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in known)
    weights = 2 * (3 * E * D * width + 3 * D * W)
    offsets = 4 * (E + 1)
    assert kept == T * (2 * D + 4 * width * top_k + 6 * W + 4 * E + 16 * top_k) + weights + offsets


@pytest.mark.parametrize(("top_k", "shared"), [(2, 8), (4, 0)])
def test_compiles_without_graph_breaks_for_any_token_count(top_k, shared):
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (33, 20):
        tensors = inputs(tokens, 32, 32, 4, shared, dtype=torch.float16, weights=torch.float32)
        assert_equal(run(compiled, tensors, top_k=top_k), run(moe, tensors, top_k=top_k))
