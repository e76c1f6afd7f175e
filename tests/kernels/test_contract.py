"""Properties of every op in both kernel backends: second derivatives, autocast, dtypes and ignored labels."""

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, DTYPES, EPS, FACTOR, FLOOR, assert_equal, error, randn

from acceleron import Acceleron, ModelConfig, ops
from acceleron.generation import Sampling, generate
from acceleron.kernels import formulas, torch_ops
from acceleron.moe import MoE

T, D, E, WIDTH = 12, 32, 4, 16
DEVICE_TYPE = torch.device(DEVICE).type


def calls(dtype=torch.float32) -> dict:
    """For each op, return a function of x with a floating-point result, and x. The other operands are constants."""
    routing = torch_ops.route_topk(randn(T, E, seed=1))
    plan = torch_ops.dispatch_plan(routing.topk_ids_TK, E)
    w13, w2 = (randn(E, 2 * WIDTH, D, seed=2) / D**0.5).to(dtype), (randn(E, D, WIDTH, seed=3) / WIDTH**0.5).to(dtype)
    router, angles = randn(E, D, seed=4, dtype=dtype), randn(5, 4, seed=5)
    labels = torch.arange(T, device=DEVICE)

    def x(*shape):
        return randn(*shape, seed=6, dtype=dtype)

    return {
        "expert_mlp": (lambda x: ops.expert_mlp(x, routing.topk_scores_TK, plan, w13, w2), x(T, D)),
        "grouped_gemm": (lambda x: ops.grouped_gemm(x, w13, plan), x(2 * T, D)),
        "linear_cross_entropy": (lambda x: ops.linear_cross_entropy(x, w13.flatten(0, 1), labels), x(T, D)),
        "moe": (lambda x: ops.moe(x, router, w13, w2, w13[0], w2[0]).y_TD, x(T, D)),
        "rms_norm": (lambda x: ops.rms_norm(x, router[0], 1e-6)[0], x(T, D)),
        "rope": (lambda x: ops.rope(x, x[:, :, :1].contiguous(), angles.cos(), angles.sin())[0], x(2, 5, 2, 4)),
        "route_topk": (lambda x: ops.route_topk(x).topk_scores_TK, x(T, E)),
        "router_logits": (lambda x: ops.router_logits(x, router), x(T, D)),
        "split_rope": (lambda x: ops.split_rope(x, angles.cos(), angles.sin(), 2, 1)[0], x(2, 5, 4, 4)),
        "swiglu": (ops.swiglu, x(T, 2 * WIDTH)),
    }


OPS = sorted(set(torch_ops.__all__) - {"dispatch_plan"})  # dispatch_plan has no gradient


def test_every_op_is_covered():
    assert sorted(calls()) == OPS


def second_derivative(op, x):
    """Return the gradient of the squared norm of the gradient of sum(op(tanh(x)).square())."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(op(x.tanh()).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_correct_or_raise(name, backend):
    if backend == "reference" and name in ("rms_norm", "rope", "route_topk", "router_logits", "split_rope"):
        op, x = calls(torch.float64)[name]
        step = 1e-5 * randn(*x.shape, seed=7, dtype=torch.float64)

        def penalty(x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(op(x.tanh()).square().sum(), x)[0].square().sum()

        numeric = (penalty(x + step) - penalty(x - step)) / 2
        torch.testing.assert_close((second_derivative(op, x) * step).sum(), numeric, rtol=1e-5, atol=1e-12)
    else:
        with pytest.raises(RuntimeError, match="has no second derivative"):
            second_derivative(*calls()[name])


def gradient(op, x, inside):
    """Return y and the gradient of x under bf16 autocast. inside: if True, backward also runs under autocast."""
    x = x.detach().requires_grad_()
    with torch.autocast(DEVICE_TYPE, torch.bfloat16):
        y = op(x)
        if inside:
            y.float().square().sum().backward()
    if not inside:
        y.float().square().sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_autocast_casts_only_gemms(name, backend, inside):
    """GEMMs compute in the autocast dtype; the router and the other ops compute in fp32."""
    op, x = calls()[name]
    leaf = x.detach().requires_grad_()
    if name == "grouped_gemm":  # its weight must have x's dtype
        y = calls(torch.bfloat16)[name][0](leaf.bfloat16())
    elif name in ("expert_mlp", "linear_cross_entropy", "moe"):
        y = op(leaf.bfloat16())
    else:
        y = op(leaf)
    y.float().square().sum().backward()
    ours, grad = gradient(op, x, inside)
    assert ours.dtype == y.dtype
    if name == "moe":  # autocast runs it as separate ops, which round at different points
        assert error(ours, y.detach().double()) < 0.01
        assert error(grad, leaf.grad.double()) < 0.02
    else:
        assert torch.equal(ours, y)
        assert torch.equal(grad, leaf.grad)


def test_autocast_does_not_change_the_routing(backend):
    """Holds even near a tie, because the router reads x before it is rounded."""
    layer = MoE(ModelConfig.preset("nano", vocab_size=64)).to(DEVICE)
    x = 1 + 1e-3 * randn(48, 128, seed=8)  # almost all values are 1 in bf16
    with torch.no_grad():
        layer.router.copy_(
            torch.tensor([1.0, -1.0]).repeat(64)[torch.rand(8, 128).argsort()]
        )  # each row has 64 of each sign
        _, expected = layer(x)
        with torch.autocast(DEVICE_TYPE, torch.bfloat16):
            y, stats = layer(x)
        _, rounded = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(stats.tokens_per_expert_E, expected.tokens_per_expert_E)
    assert not torch.equal(rounded.tokens_per_expert_E, expected.tokens_per_expert_E)


def test_moe_options_work_under_autocast(backend):
    x, residual = randn(T, D, seed=6), randn(T, D, seed=7)
    router, w13, w2 = randn(E, D, seed=4), randn(E, 2 * WIDTH, D, seed=2) / 8, randn(E, D, WIDTH, seed=3) / 8
    weights = (router, w13, w2, w13[0], w2[0])
    with torch.autocast(DEVICE_TYPE, torch.bfloat16):
        plain = ops.moe(x, *weights)
        forced = ops.moe(x, *weights, force_load_balance=True)
        added = ops.moe(x, *weights, residual_TD=residual)
        narrow = ops.moe(x.bfloat16(), *weights, residual_TD=residual)  # bf16 from a Linear, plus an fp32 residual
        alone = ops.moe(x, *weights[:3], top_k=3, normalize=False)  # without a shared expert
        wide = ops.moe(x, router.double(), *weights[1:]) if backend == "reference" else plain
    assert torch.equal(wide.tokens_per_expert_E, plain.tokens_per_expert_E)
    assert forced.tokens_per_expert_E.tolist() == [2 * T // E] * E
    assert plain.tokens_per_expert_E.tolist() != forced.tokens_per_expert_E.tolist()
    assert error(alone.y_TD, ops.moe(x, *weights[:3], top_k=3, normalize=False).y_TD.double()) < 0.02
    assert narrow.y_TD.dtype == torch.bfloat16
    torch.testing.assert_close(added.y_TD - plain.y_TD, residual.bfloat16(), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_model_under_autocast_equals_a_bf16_compute_model(dense, compiled, backend):
    config = ModelConfig(64, 32, 2, 2, 1, num_experts=4, d_ff=16, d_ff_shared=16, max_seq_len=16, dense=dense)
    ids, results = torch.arange(24, device=DEVICE).view(2, 12), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Acceleron(config, compute_dtype=dtype).to(DEVICE)
        if compiled:
            for block in model.blocks:
                block.compile(fullgraph=True, backend="aot_eager")
        with torch.autocast(DEVICE_TYPE, torch.bfloat16, enabled=dtype == torch.float32):
            loss = model(ids, labels=ids).loss
            if not compiled:  # autocast would also cast the aten ops of a compiled backward
                loss.backward()
        if compiled:
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert expected.any()
        assert torch.equal(ours, expected)


PATTERNS = {
    "none": [],
    "one": [3],
    "first and last": [0, 10],
    "all but one": [t for t in range(11) if t != 5],
    "all": list(range(11)),
}


@pytest.mark.parametrize("value", [None, torch.inf, torch.nan])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ignored_labels_match_torch(pattern, value, backend):
    """A non-finite ignored row has no effect. torch gets a finite row, because it would return NaN gradients."""
    x, weight, labels = randn(11, 16), randn(20, 16, seed=1), torch.arange(11, device=DEVICE)
    labels[PATTERNS[pattern]] = -100
    ours_x = x.clone()
    if value is not None and PATTERNS[pattern]:
        ours_x[PATTERNS[pattern][0]] = value
    results = []
    for function, rows in (
        (lambda x, w: ops.linear_cross_entropy(x, w, labels), ours_x),
        (lambda x, w: F.cross_entropy((x @ w.t()).double(), labels).float(), x),
    ):
        leaves = [v.detach().requires_grad_() for v in (rows, weight)]
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_loss_of_zero_tokens_is_nan_with_zero_gradients(backend):
    x, weight = randn(0, 16).requires_grad_(), randn(20, 16, seed=1).requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    loss.backward()
    assert loss.isnan()
    assert x.grad.shape == (0, 16)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


RANKS, RANK_TOKENS = 3, 11
# The tokens of each rank that are not ignored. With one token on three ranks, num_tokens is below 1.
KEPT = {"uneven": (8, 3, 11), "one rank without tokens": (10, 0, 1), "one token": (0, 1, 0)}


def rank_inputs(kept, dtype):
    """Return each rank's x and labels, a weight in fp32, and num_tokens: all kept tokens divided by the ranks."""
    x, weight = randn(RANKS, RANK_TOKENS, 16, dtype=dtype), randn(20, 16, seed=1)
    labels = torch.arange(RANKS * RANK_TOKENS, device=DEVICE).remainder(20).view(RANKS, RANK_TOKENS)
    order = torch.arange(RANK_TOKENS, device=DEVICE).flip(0)
    labels = labels.where(order < torch.tensor(kept, device=DEVICE)[:, None], -100)
    return x, weight, labels, torch.tensor(sum(kept) / RANKS, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_mean_over_ranks_is_the_mean_over_all_tokens(kept, dtype, backend):
    x, weight, labels, num_tokens = rank_inputs(kept, dtype)

    def run(function, x, weight, labels):
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = function(*leaves, labels)
        return [result.detach().double() for result in (loss, *torch.autograd.grad(loss, leaves))]

    def op(x, weight, labels):
        return ops.linear_cross_entropy(x, weight, labels, num_tokens=num_tokens)

    everything = x.flatten(0, 1), weight, labels.flatten()
    truth = run(formulas.linear_cross_entropy, everything[0].double(), weight.to(dtype).double(), everything[2])
    plain = run(lambda x, w, labels: F.cross_entropy(F.linear(x, w.to(x.dtype)).float(), labels), *everything)
    ranks = [run(op, x[rank], weight, labels[rank]) for rank in range(RANKS)]
    losses, dx, dweight = (torch.stack(results) for results in zip(*ranks, strict=True))
    # Data parallelism averages the losses and the gradients.
    means = losses.mean(), dx.flatten(0, 1) / RANKS, dweight.mean(dim=0)
    for name, ours, plain_value, true in zip(("loss", "x", "weight"), means, plain, truth, strict=True):
        assert error(ours, true) <= FACTOR[dtype] * error(plain_value, true) + FLOOR, name
    for rank in range(RANKS):
        assert bool(losses[rank]) == bool(dx[rank].any()) == bool(dweight[rank].any()) == bool(kept[rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_num_tokens_gets_no_gradient(dtype, backend):
    x, weight, labels, num_tokens = rank_inputs((8, 3, 11), torch.float32)
    leaf, count = x[0].requires_grad_(), num_tokens.to(dtype).requires_grad_()
    loss = ops.linear_cross_entropy(leaf, weight, labels[0], num_tokens=count)
    loss.backward()
    assert loss.dtype == torch.float32
    assert leaf.grad.any()
    assert count.grad is None


def test_num_tokens_in_a_compiled_graph(backend):
    """Another count does not compile again."""

    def loss_and_grads(function, num_tokens):
        leaves = [x[0].detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = function(*leaves, labels[0], num_tokens=num_tokens)
        return loss, *torch.autograd.grad(loss, leaves)

    x, weight, labels, num_tokens = rank_inputs((8, 3, 11), torch.float32)
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    results = [loss_and_grads(compiled, num_tokens)]
    with torch.compiler.set_stance("fail_on_recompile"):
        results.append(loss_and_grads(compiled, 2 * num_tokens))
    assert_equal(results, [loss_and_grads(ops.linear_cross_entropy, count) for count in (num_tokens, 2 * num_tokens)])
    assert not torch.equal(results[0][0], results[1][0])


# None: the number of tokens. 3e6 tokens on other ranks: a probability divided by them underflows without the scale.
@pytest.mark.parametrize(("scale", "num_tokens"), [(1.0, None), (65536.0, None), (65536.0, 3e6)])
def test_fp16_gradients_under_a_loss_scale(scale, num_tokens, backend):
    """GradScaler's initial scale exceeds fp16's maximum. A probability divided by the token count can underflow."""
    T, V = (8192, 2048) if backend == "reference" or DEVICE == "cuda" else (96, 64)  # the interpreter is slow
    x, weight, labels = randn(T, 16), randn(V, 16, seed=1), torch.arange(T, device=DEVICE) % V
    leaves = [x.half().requires_grad_(), weight.requires_grad_()]
    count = None if num_tokens is None else torch.tensor(num_tokens, device=DEVICE)
    ours = torch.autograd.grad(ops.linear_cross_entropy(*leaves, labels, num_tokens=count) * scale, leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = torch.autograd.grad(formulas.linear_cross_entropy(*wide, labels, num_tokens=count) * scale, wide)
    for gradient, expected in zip(ours, truth, strict=True):
        assert error(gradient, expected) < 1e-3


def test_model_rejects_wrong_shapes(backend):
    model = Acceleron(ModelConfig(64, 32, 1, 2, 1, num_experts=4, d_ff=16, d_ff_shared=16)).to(DEVICE)
    ids = torch.zeros(2, 8, dtype=torch.int64, device=DEVICE)
    for labels in (ids[:, 1:], ids[:1], ids.flatten(), ids[..., None]):
        with pytest.raises(ValueError, match=r"labels: expected the shape of input_ids, \(2, 8\), but got"):
            model(ids, labels=labels)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(batch, sequence\), but got \(2,\)"):
        model(ids[:, 0])
    with pytest.raises(ValueError, match="MoE: expected x of width 32, but got shape"):
        model.blocks[0].moe(randn(3, 16))
    with pytest.raises(ValueError, match=r"MoE: expected a residual of shape \(3, 32\), but got \(2, 32\)"):
        model.blocks[0].moe(randn(3, 32), residual=randn(2, 32))
    with pytest.raises(ValueError, match=r"labels: expected int64, but got torch\.int32"):
        model(ids, labels=ids.int())
    for empty in (ids[:0], ids[:, :0]):
        assert model(empty, labels=empty).cross_entropy.isnan()


def test_16_bit_weights_are_cast_to_the_dtype_of_fp32_activations(backend):
    """The gradients of the weights stay in fp16. (The interpreter truncates to bf16 where a GPU rounds.)"""
    x = randn(T, D)
    shapes = [(E, D), (E, 2 * WIDTH, D), (E, D, WIDTH), (8, D), (D, 4)]
    narrow = [randn(*shape, seed=i, dtype=torch.float16) / 8 for i, shape in enumerate(shapes)]
    results = []
    for weights in (narrow, [w.float() for w in narrow]):
        leaves = [w.requires_grad_() for w in weights]
        y = ops.moe(x, *leaves).y_TD
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), leaves)))
    (y, grads), (expected_y, expected) = results
    assert torch.equal(y, expected_y)
    assert y.any()
    for grad, wide in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float16
        assert wide.any()
        torch.testing.assert_close(grad.float(), wide, rtol=2**-10, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_router_computes_in_fp32_with_a_16_bit_weight(weight_dtype, dtype, backend):
    """The logits and an fp32 gradient have errors of fp32. A 16-bit gradient is rounded once."""
    x, weight = randn(64, D, dtype=dtype), randn(E, D, seed=1, dtype=weight_dtype)
    leaves, grad = [x.requires_grad_(), weight.requires_grad_()], randn(64, E, seed=2)
    logits = ops.router_logits(*leaves)
    dx, dweight = torch.autograd.grad(logits, leaves, grad)
    assert (logits.dtype, dx.dtype, dweight.dtype) == (torch.float32, dtype, weight_dtype)
    assert error(logits, x.double() @ weight.double().t()) < 8 * EPS
    true_dx, true_dweight = grad.double() @ weight.double(), grad.double().t() @ x.double()
    # The interpreter truncates to bf16 where a GPU rounds.
    rounded = {torch.float32: 8 * EPS, torch.float16: 2**-11, torch.bfloat16: 2**-8}
    assert error(dx, true_dx) < rounded[dtype]
    assert error(dweight, true_dweight) < rounded[weight_dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_moe_with_a_16_bit_router_equals_its_fp32_copy(router_dtype, dtype, backend):
    x, narrow = randn(T, D, dtype=dtype), randn(E, D, seed=4, dtype=router_dtype)
    w13, w2 = randn(E, 2 * WIDTH, D, seed=2) / 8, randn(E, D, WIDTH, seed=3) / 8
    results = []
    for router in (narrow, narrow.float()):
        leaves = [x.detach().requires_grad_(), router.requires_grad_()]
        y, z_loss, *statistics = ops.moe(leaves[0], leaves[1], w13, w2)
        dx, drouter = torch.autograd.grad(y.float().square().sum() + z_loss, leaves)
        assert drouter.dtype == router.dtype
        results.append((y, z_loss, *statistics, dx, drouter.to(router_dtype)))
    torch.testing.assert_close(*results)
    assert results[0][-1].any()


def test_sequences_of_one_token_have_no_loss(backend):
    """Each token's target is the next token, so a single token has no target."""
    model = Acceleron(ModelConfig(64, 32, 1, 2, 1, num_experts=4, d_ff=16, d_ff_shared=16)).to(DEVICE)
    ids = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    assert model(ids, labels=ids).cross_entropy.isnan()


def test_rms_norm_backward_accepts_missing_gradients():
    """A custom Function can return None as the gradient of its input."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x = randn(3, 8).requires_grad_()
    with ops.using_backend("triton", torch.device(DEVICE)):
        norm, _ = ops.rms_norm(x, torch.ones(8, device=DEVICE), 1e-6)
    (Stop.apply(norm).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_autocast_does_not_change_generation():
    torch.manual_seed(0)
    model = Acceleron(ModelConfig(64, 32, 1, 2, 1, num_experts=4, d_ff=16, d_ff_shared=16, max_seq_len=32)).to(DEVICE)
    greedy = Sampling(temperature=0.0)
    expected = list(generate(model, [1, 2, 3], 8, greedy))
    with torch.autocast(DEVICE_TYPE, torch.bfloat16):
        assert list(generate(model, [1, 2, 3], 8, greedy)) == expected
