"""Fused output head and cross-entropy loss."""

import pytest
import torch
import torch.nn.functional as F
from compare import (
    DEVICE,
    DTYPES,
    FACTOR,
    LargestTensor,
    assert_accurate,
    assert_equal,
    error,
    opcheck,
    randn,
    record_launches,
)

from acceleron.kernels import cross_entropy as module
from acceleron.kernels import formulas, torch_ops
from acceleron.kernels.cross_entropy import linear_cross_entropy

IGNORED = -100


def inputs(T, V, D, dtype=torch.float32, weight_dtype=None):
    # Logits have scale 2, large enough to expose a softmax that subtracts the wrong maximum or none.
    x, weight = randn(T, D, dtype=dtype), (2 * randn(V, D, seed=1) / D**0.5).to(weight_dtype or dtype)
    return x, weight, torch.randint(V, (T,), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def run(function, x, weight, labels, grad=3.0):
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = function(*leaves, labels)
    return loss, *torch.autograd.grad(loss, leaves, torch.tensor(grad, dtype=loss.dtype, device=DEVICE))


@pytest.fixture
def small_chunks(monkeypatch):
    """Use chunks of at most seven tokens and blocks of 64 logits, two per thread."""
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 7 * 150)
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "WARPS", 1)


# T, V, D: three vocabulary blocks and five chunks, both with a short last one; one token; a vocabulary smaller than a
# block, with an odd width. V = 1 is omitted: its loss is 0, so a relative error is meaningless.
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("case", [(33, 150, 16), (1, 150, 16), (9, 37, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", ["fp32 weight", "same dtype"])
def test_loss_and_gradients(case, dtype, weight_dtype):
    x, weight, labels = inputs(*case, dtype, torch.float32 if weight_dtype == "fp32 weight" else dtype)
    if len(labels) > 1:
        labels[[0, 4, -1]] = IGNORED
    truths = run(formulas.linear_cross_entropy, x.double(), weight.to(dtype).double(), labels)
    plains = run(torch_ops.linear_cross_entropy, x, weight, labels)
    results = run(linear_cross_entropy, x, weight, labels)
    assert_accurate(("loss", "x", "weight"), results, plains, truths, FACTOR[dtype])
    assert (results[1].abs().amax(1) == 0).tolist() == (labels == IGNORED).tolist()


@pytest.mark.usefixtures("small_chunks")
def test_custom_ignore_index():
    x, weight, labels = inputs(9, 150, 16)
    ours = run(lambda *leaves: linear_cross_entropy(*leaves, ignore_index=int(labels[3])), x, weight, labels)
    expected = run(linear_cross_entropy, x, weight, labels.where(labels != labels[3], IGNORED))
    assert_equal(ours, expected)


@pytest.mark.usefixtures("small_chunks")
def test_loss_is_nan_if_all_labels_are_ignored():
    x, weight, labels = inputs(9, 150, 16)
    loss, *grads = run(linear_cross_entropy, x, weight, torch.full_like(labels, IGNORED))
    torch_loss, *torch_grads = run(
        lambda x, w, labels: F.cross_entropy(F.linear(x, w), labels), x, weight, torch.full_like(labels, -100)
    )
    assert loss.isnan()
    assert torch_loss.isnan()
    assert_equal(grads, torch_grads)


@pytest.mark.usefixtures("small_chunks")
def test_extreme_logits():
    """Logits 1e4 apart overflow a naive exponential. The maximum comes first, last and in the middle of a row."""
    weight = torch.zeros(150, 3, device=DEVICE)
    weight[0, 0] = weight[149, 1] = weight[70, 2] = 1e4
    x, labels = torch.eye(3, device=DEVICE), torch.tensor([0, 149, 3], device=DEVICE)
    loss, grad_x, _ = run(linear_cross_entropy, x, weight, labels, grad=1.0)
    assert loss.item() == pytest.approx(1e4 / 3)
    assert grad_x[:2].abs().max() == 0
    assert grad_x[2].tolist() == pytest.approx([0, 0, 1e4 / 3])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy raises it under the interpreter
@pytest.mark.parametrize("label", [3, 90])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("where", [[3], [70, 149], range(64), range(150)], ids=["one", "two", "a block", "all"])
def test_nonfinite_logits_match_the_reference(value, where, label):
    """-inf gives a probability of 0 unless the whole row is -inf. +inf and NaN make the row NaN."""
    weight = inputs(1, 150, 1)[1]
    weight[list(where)] = value
    x, labels = torch.ones(1, 1, device=DEVICE), torch.tensor([label], device=DEVICE)
    ours, expected = (run(f, x, weight, labels) for f in (linear_cross_entropy, torch_ops.linear_cross_entropy))
    torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.usefixtures("small_chunks")
def test_label_outside_the_vocabulary_has_the_gradient_of_the_logsumexp():
    x, weight, labels = inputs(4, 150, 16)
    labels[:3] = torch.tensor([-1, 150, 1 << 60])
    _, grad_x, _ = run(linear_cross_entropy, x, weight, labels, grad=4.0)
    softmax = F.linear(x, weight).softmax(-1)
    torch.testing.assert_close(grad_x[:3], (softmax @ weight)[:3])


def test_weight_gradient_is_summed_over_chunks_in_fp32(monkeypatch):
    """An fp16 sum over these 128 chunks would lose precision."""
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 32)
    x, weight, labels = inputs(128, 32, 8, torch.float16, torch.float32)
    grad = run(linear_cross_entropy, x, weight, labels, grad=1.0)[2]
    truth = run(formulas.linear_cross_entropy, x.double(), weight.half().double(), labels, grad=1.0)[2]
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.half().float())
    assert error(grad, truth) < 2**-10


def test_unneeded_gradients_are_not_computed(monkeypatch):
    """There are two chunks. Each needs one GEMM for the loss and one more for each gradient."""
    gemms, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: gemms.append(1) or mm(*args, **kwargs))
    launches = record_launches(monkeypatch, module, "_cross_entropy_kernel")
    x, weight, labels = inputs(9, 150, 16)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), labels)
    assert len(gemms) == 6
    assert [grid for grid, _ in launches] == [(5,), (4,)]
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, labels), loss)
    assert len(gemms) == 8
    frozen_weight = linear_cross_entropy(x, weight.detach(), labels)
    assert len(gemms) == 12
    assert [kwargs["WITH_GRADIENT"] for _, kwargs in launches] == [True, True, False, False, True, True]
    assert torch.equal(torch.autograd.grad(frozen_weight, x)[0], torch.autograd.grad(loss, x)[0])


@pytest.mark.usefixtures("small_chunks")
def test_full_logits_are_never_materialized():
    """Their gradients are not materialized either. The largest tensor has the size of the weight."""
    x, weight, labels = inputs(33, 150, 30)
    with LargestTensor() as largest:
        module._linear_cross_entropy._init_fn(x, weight, labels, IGNORED, None, True, True)
    assert largest.numel == weight.numel() < 33 * 150


@pytest.mark.usefixtures("small_chunks")
def test_results_are_deterministic():
    arguments = inputs(33, 150, 16)
    assert_equal(run(linear_cross_entropy, *arguments), run(linear_cross_entropy, *arguments))


@pytest.mark.parametrize("num_tokens", [None, 4.5])
@pytest.mark.parametrize("needs", [(True, True), (False, False)], ids=["training", "evaluation"])
def test_custom_op_passes_opcheck(needs, num_tokens):
    op = torch.ops.acceleron_triton.linear_cross_entropy
    num_tokens = None if num_tokens is None else torch.tensor(num_tokens, device=DEVICE)
    opcheck(op, (*inputs(9, 50, 16, torch.float16, torch.float32), IGNORED, num_tokens, *needs))


def test_compiles_without_graph_breaks():
    arguments = inputs(9, 50, 16)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, *arguments), run(linear_cross_entropy, *arguments))
