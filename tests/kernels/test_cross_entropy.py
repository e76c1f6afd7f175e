"""The head's cross-entropy. Its error against float64 may be FACTOR times that of the reference in the same dtype."""

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, DTYPES, FACTOR, error, randn

from acceleron.kernels import cross_entropy as module
from acceleron.kernels import formulas, torch_ops
from acceleron.kernels.cross_entropy import linear_cross_entropy

# A GPU's exp, log and division are approximate: some roundings of the fp32 that every dtype is computed in.
FLOOR = 4 * torch.finfo(torch.float32).eps
IGNORED = -100


def inputs(T, V, D, dtype=torch.float32, weight_dtype=None):
    # Logits of scale 2: wide enough that a softmax without its maximum, or with a wrong one, shows.
    x, weight = randn(T, D, dtype=dtype), (2 * randn(V, D, seed=1) / D**0.5).to(weight_dtype or dtype)
    return x, weight, torch.randint(V, (T,), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def run(function, x, weight, labels, grad=3.0):
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = function(*leaves, labels)
    return loss, *torch.autograd.grad(loss, leaves, torch.tensor(grad, dtype=loss.dtype, device=DEVICE))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of seven tokens or less, and blocks of 64 logits, two per thread."""
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 7 * 150)
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "WARPS", 1)


# T, V, D: a vocabulary in three blocks, the last of them short, and five chunks, the last short; one token; a
# vocabulary of less than a block, an odd width; V = 1 (a loss of 0) is not among them, as any error would be infinite.
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
    for name, ours, plain, truth in zip(("loss", "x", "weight"), results, plains, truths, strict=True):
        assert ours.dtype == plain.dtype
        assert error(ours, truth) <= FACTOR[dtype] * error(plain, truth) + FLOOR, name
    assert (results[1].abs().amax(1) == 0).tolist() == (labels == IGNORED).tolist()


@pytest.mark.usefixtures("small_chunks")
def test_ignore_index_of_the_users_choice():
    x, weight, labels = inputs(9, 150, 16)
    ours = run(lambda *leaves: linear_cross_entropy(*leaves, ignore_index=int(labels[3])), x, weight, labels)
    expected = run(linear_cross_entropy, x, weight, labels.where(labels != labels[3], IGNORED))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.usefixtures("small_chunks")
def test_all_labels_ignored_is_nan_as_in_torch():
    x, weight, labels = inputs(9, 150, 16)
    loss, *grads = run(linear_cross_entropy, x, weight, torch.full_like(labels, IGNORED))
    theirs = run(lambda x, w, labels: F.cross_entropy(F.linear(x, w), labels), x, weight, torch.full_like(labels, -100))
    assert loss.isnan()
    assert theirs[0].isnan()
    assert all(torch.equal(grad, their_grad) for grad, their_grad in zip(grads, theirs[1:], strict=True))


@pytest.mark.usefixtures("small_chunks")
def test_extreme_logits():
    """1e4 apart: a naive exponential overflows, and the online one meets its maximum first, last and in between."""
    weight = torch.zeros(150, 3, device=DEVICE)
    weight[0, 0] = weight[149, 1] = weight[70, 2] = 1e4
    x, labels = torch.eye(3, device=DEVICE), torch.tensor([0, 149, 3], device=DEVICE)
    loss, grad_x, _ = run(linear_cross_entropy, x, weight, labels, grad=1.0)
    assert loss.item() == pytest.approx(1e4 / 3)
    assert grad_x[:2].abs().max() == 0
    assert grad_x[2].tolist() == pytest.approx([0, 0, 1e4 / 3])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("label", [3, 90])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("where", [[3], [70, 149], range(64), range(150)], ids=["one", "two", "a block", "all"])
def test_logits_that_are_not_finite(value, where, label):
    """-inf is a probability of 0, though not where all are; +inf and NaN make a row NaN."""
    weight = inputs(1, 150, 1)[1]
    weight[list(where)] = value
    x, labels = torch.ones(1, 1, device=DEVICE), torch.tensor([label], device=DEVICE)
    ours, theirs = (run(f, x, weight, labels) for f in (linear_cross_entropy, torch_ops.linear_cross_entropy))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, equal_nan=True)


@pytest.mark.usefixtures("small_chunks")
def test_labels_outside_the_vocabulary_match_no_logit():
    x, weight, labels = inputs(4, 150, 16)
    labels[:3] = torch.tensor([-1, 150, 1 << 60])
    _, grad_x, _ = run(linear_cross_entropy, x, weight, labels, grad=4.0)
    softmax = F.linear(x, weight).softmax(-1)
    torch.testing.assert_close(grad_x[:3], (softmax @ weight)[:3])


def test_fp32_sum_of_the_weights_gradient(monkeypatch):
    """Over 128 chunks of equal share a sum in fp16 would lose bits; the fp32 weight's gradient keeps them."""
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 32)
    x, weight, labels = inputs(128, 32, 8, torch.float16, torch.float32)
    grad = run(linear_cross_entropy, x, weight, labels, grad=1.0)[2]
    truth = run(formulas.linear_cross_entropy, x.double(), weight.half().double(), labels, grad=1.0)[2]
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.half().float())
    assert error(grad, truth) < 2**-10


def test_without_gradients_only_the_loss_is_formed(monkeypatch):
    """One GEMM a chunk and no second sweep; with a frozen weight or input, that one's gradient is left out."""
    gemms, flags, rows, mm, kernel = [], [], [], torch.mm, module._cross_entropy_kernel

    class Recorded:
        def __getitem__(self, grid):
            rows.append(grid[0])
            return lambda *args, **kwargs: flags.append(kwargs["WITH_GRADIENT"]) or kernel[grid](*args, **kwargs)

    monkeypatch.setattr(module, "_cross_entropy_kernel", Recorded())
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: gemms.append(1) or mm(*args, **kwargs))
    x, weight, labels = inputs(9, 150, 16)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), labels)
    assert (len(gemms), flags) == (6, [True] * 2)
    assert rows == [5, 4]  # never the logits of all nine tokens
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, labels), loss)
    assert (len(gemms), flags) == (8, [True] * 2 + [False] * 2)
    x_alone = linear_cross_entropy(x, weight.detach(), labels)
    assert (len(gemms), flags) == (12, [True] * 2 + [False] * 2 + [True] * 2)
    assert torch.equal(torch.autograd.grad(x_alone, x)[0], torch.autograd.grad(loss, x)[0])


@pytest.mark.usefixtures("small_chunks")
def test_no_tensor_of_all_logits_exists():
    """Not the logits of all tokens, nor their gradient: the largest tensors are x's size."""

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                Sizes.largest = max(Sizes.largest, tensor.numel())
            return result

    x, weight, labels = inputs(33, 150, 100)
    with Sizes():
        module._linear_cross_entropy._init_fn(x, weight, labels, IGNORED, True, True)
    assert Sizes.largest == weight.numel()


def test_no_tokens():
    x, weight, labels = inputs(0, 50, 16)
    loss, grad_x, grad_weight = run(linear_cross_entropy, x, weight, labels)
    assert loss.isnan()
    assert grad_x.shape == (0, 16)
    assert torch.equal(grad_weight.nan_to_num(), torch.zeros_like(weight))


@pytest.mark.usefixtures("small_chunks")
def test_same_bits_every_time():
    arguments = inputs(33, 150, 16)
    first, second = (run(linear_cross_entropy, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x_TD", lambda x: x.double(), "expected bfloat16 or float16 or float32"),
        ("x_TD", lambda x: x[None], "expected shape"),
        ("x_TD", lambda x: x.t().contiguous().t(), "a contiguous tensor"),
        ("weight_VD", lambda weight: weight[:, :8].contiguous(), "expected shape"),
        ("weight_VD", lambda weight: weight.int(), "expected bfloat16 or .*, but got int32"),
        ("labels_T", lambda labels: labels[1:], "expected shape"),
        ("labels_T", lambda labels: labels.int(), "expected int64"),
        ("labels_T", lambda labels: labels.to("meta"), "expected a tensor on"),
    ],
)
def test_refusals_name_the_argument(name, change, message):
    arguments = dict(zip(("x_TD", "weight_VD", "labels_T"), inputs(9, 50, 16), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("needs", [(True, True), (False, False)], ids=["training", "evaluation"])
def test_custom_op_passes_opcheck(needs):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs on memory it does not own
    op = torch.ops.acceleron_triton.linear_cross_entropy
    torch.library.opcheck(op, (*inputs(9, 50, 16, torch.float16, torch.float32), IGNORED, *needs))


def test_compiles_without_a_graph_break():
    arguments = inputs(9, 50, 16)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, *arguments), run(linear_cross_entropy, *arguments), strict=True):
        assert torch.equal(ours, eager)
