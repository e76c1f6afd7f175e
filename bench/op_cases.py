"""The benchmarked ops at their shapes: inputs, outputs, FLOPs and least bytes of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.kernels import reference

from .gemms import gemm_cases

FORWARD, BOTH = "forward", "forward + backward"
# Shapes that peers publish, of expert_mlp: label, tokens, and widths. Liger's are 32768 tokens with 8 experts each:
# with two each, as many rows are 131072.
PUBLISHED = {
    "sonicmoe-768": ("SonicMoE 768", 40960, dict(d_model=768, d_ff=1024, num_experts=32)),
    "sonicmoe-1536": ("SonicMoE 1536", 24576, dict(d_model=1536, d_ff=1024, num_experts=32)),
    "liger": ("Liger 2048, top-2", 131072, dict(d_model=2048, d_ff=768, num_experts=128)),
}


class Draw:
    """Random tensors of unit scale, the same ones for every provider."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, grad: bool = True) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype).requires_grad_(grad)

    def routing(self, T: int, E: int) -> reference.Routing:
        return reference.route_top2(self(T, E, dtype=torch.float32, grad=False))

    def labels(self, T: int, V: int) -> Tensor:
        return torch.randint(V, (T,), generator=self.generator, device=self.device)


@dataclass(frozen=True, eq=False)
class Case:
    """An op at a shape.

    precision: the dtype it computes in. make: its inputs, in order; those that have a gradient require it. work: by
    pass, the FLOPs of its GEMMs, and the least bytes: every input read once and every output written once.
    scalar_grad: the gradient of outputs that are scalars. ours, plain: for a GEMM kernel, Triton's function of the
    inputs and plain PyTorch's.
    """

    op: str
    shape: str
    precision: torch.dtype
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    make: Callable[[Draw], tuple]
    work: dict[str, tuple[float, float]]
    scalar_grad: float = 1.0
    ours: Callable | None = None
    plain: Callable | None = None


def cases(shape: str, config: ModelConfig, tokens: int, dtype: torch.dtype) -> list[Case]:
    """All ops at the shape of a model, for `tokens` tokens in sequences of at most its max_seq_len."""
    T, D, E, F, V, b = tokens, config.d_model, config.num_experts, config.d_ff, config.vocab_size, dtype.itemsize
    W, H, G, C, N = config.d_ff_shared, config.num_heads, config.num_kv_heads, config.head_dim, 2 * tokens
    S = min(T, config.max_seq_len)
    B = T // S
    fp32 = torch.float32
    x, router, logits, choices = b * T * D, 4 * E * D, 4 * T * E, 4 * N
    w13, w2, head = 2 * b * E * F * D, b * E * F * D, 4 * V * D
    rotated, angles = b * B * S * (H + G) * C, 8 * S * C
    q, kv = b * B * S * H * C, 2 * b * B * S * G * C
    fp32_weights = 12 * E * F * D + 12 * W * D + router
    rows, wide_rows, gate_up, act = b * N * D, 2 * b * N * F, 2 * b * T * W, b * T * W

    def work(flops: float, forward: float, backward: float) -> dict[str, tuple[float, float]]:
        """Backward has two GEMMs for each of forward's."""
        return {FORWARD: (flops, forward), BOTH: (3 * flops, forward + backward)}

    def angles_of(draw: Draw) -> tuple[Tensor, Tensor]:
        angle = draw(S, C // 2, dtype=fp32, grad=False).repeat(1, 2)
        return angle.cos(), angle.sin()

    def routed(draw: Draw) -> tuple:
        routing = draw.routing(T, E)
        return draw(T, D), routing.weights_TK.requires_grad_(), routing.experts_TK, *weights(draw)

    def weights(draw: Draw, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return draw(E, 2 * F, D, dtype=dtype, scale=D**-0.5), draw(E, D, F, dtype=dtype, scale=F**-0.5)

    return [
        Case(
            "router_logits", shape, fp32, ("x", "weight"), ("logits",),
            lambda draw: (draw(T, D), draw(E, D, dtype=fp32, scale=D**-0.5)),
            work(2 * T * D * E, x + router + logits, 2 * x + 2 * router + logits),
        ),
        Case(
            "route_top2", shape, fp32, ("logits",),
            ("weights", "experts", "z_loss", "balance_loss", "counts"),
            lambda draw: (draw(T, E, dtype=fp32),),
            # The losses are means over the tokens: T makes their gradients as large as the weights'.
            work(0, logits + 2 * choices, 2 * logits + 2 * choices), scalar_grad=T,
        ),
        Case(
            "dispatch_plan", shape, dtype, ("experts", "num_experts"), ("order", "inverse", "offsets"),
            lambda draw: (draw.routing(T, E).experts_TK, E),
            {FORWARD: (0, 3 * choices)},
        ),
        Case(
            "expert_mlp", shape, dtype, ("x", "weights", "experts", "w13", "w2"), ("y",),
            routed,
            work(12 * T * D * F, 2 * x + w13 + w2 + 2 * choices, 3 * x + 2 * (w13 + w2) + 3 * choices),
        ),
        Case(
            "moe", shape, dtype, ("x", "router", "w13", "w2", "shared_w13", "shared_w2", "residual"),
            ("y", "z_loss", "balance_loss", "counts"),
            lambda draw: (
                draw(T, D), draw(E, D, dtype=fp32, scale=D**-0.5), *weights(draw, fp32),
                draw(2 * W, D, dtype=fp32, scale=D**-0.5), draw(D, W, dtype=fp32, scale=W**-0.5), draw(T, D),
            ),
            work(
                12 * T * D * F + 6 * T * D * W + 2 * T * D * E,
                3 * x + fp32_weights, 5 * x + 2 * fp32_weights,
            ),
        ),
        Case(
            "grouped_gemm", shape, dtype, ("x", "w", "plan"), ("y",),
            lambda draw: (draw(N, D), weights(draw)[0], reference.dispatch_plan(draw.routing(T, E).experts_TK, E)),
            work(4 * N * D * F, rows + w13 + wide_rows, 2 * rows + 2 * w13 + wide_rows),
        ),
        Case(
            "swiglu", shape, dtype, ("gate_up",), ("y",),
            lambda draw: (draw(T, 2 * W),),
            work(0, gate_up + act, 2 * gate_up + act),
        ),
        Case(
            "rope", shape, dtype, ("q", "k", "cos", "sin"), ("q", "k"),
            lambda draw: (draw(B, S, H, C), draw(B, S, G, C), *angles_of(draw)),
            work(0, 2 * rotated + angles, 2 * rotated + angles),
        ),
        Case(
            "split_rope", shape, dtype, ("qkv", "cos", "sin", "H", "G"), ("q", "k", "v"),
            lambda draw: (draw(B, S, H + 2 * G, C), *angles_of(draw), H, G),
            # v is a view of qkv forward; its gradient joins that of qkv.
            work(0, 2 * rotated + angles, 2 * rotated + kv + angles),
        ),
        Case(
            "rms_norm", shape, dtype, ("x", "weight", "residual"), ("norm", "sum"),
            lambda draw: (draw(T, D), draw(D, dtype=fp32), draw(T, D)),
            # The gradients of x and of the residual are one tensor.
            work(0, 4 * x, 4 * x),
        ),
        Case(
            "linear_cross_entropy", shape, dtype, ("x", "weight", "labels"), ("loss",),
            lambda draw: (draw(T, D), draw(V, D, dtype=fp32, scale=D**-0.5), draw.labels(T, V)),
            # The loss and its gradients can be formed in one pass over the inputs.
            work(2 * T * D * V, x + head + 8 * T, x + head),
        ),
        Case(
            "attention", shape, dtype, ("q", "k", "v"), ("y",),
            lambda draw: (draw(B, S, H, C), draw(B, S, G, C), draw(B, S, G, C)),
            # Half of two GEMMs, as no query sees what comes after it.
            work(2 * B * H * S * S * C, 2 * q + kv, 3 * q + 2 * kv),
        ),
    ]  # fmt: skip


OPS = [case.op for case in cases("", PRESETS["tiny"], 1, torch.float32)]
# The grouped GEMMs, in the order of gemm_cases, by their results. The name up to the hyphen is the kernel's.
GEMMS = {
    "up": ("h", "act"), "rows-down": ("y",), "hidden_grad": ("dh", "act", "dscores"), "rows-dx": ("rows",),
    "weight_grad-w13": ("dw13",), "weight_grad-w2": ("dw2",),
}  # fmt: skip


def gemm_kernel(op: str) -> str | None:
    """The GEMM kernel that a case of GEMMS launches, as ACCELERON_NO_TMA names it."""
    return op.partition("-")[0] if op in GEMMS else None


def gemm_case(op: str, shape: str, config: ModelConfig, tokens: int, dtype: torch.dtype) -> Case:
    """One grouped GEMM. Its tensors are made with its functions, which hold the routing on the tensors' device."""
    made = {}
    rows, D, F, wide = 2 * tokens, config.d_model, config.d_ff, op in ("up", "rows-dx", "weight_grad-w13")
    flops = 2 * rows * D * F * (1 + wide)
    moved = dtype.itemsize * (rows * (D + F) + config.num_experts * D * F) * (1 + wide)

    def make(draw: Draw) -> tuple:
        made["gemm"] = gemm_cases(config, tokens, draw.dtype, draw.device)[list(GEMMS).index(op)]
        return made["gemm"].tensors

    functions = dict(ours=lambda *x: made["gemm"].ours(*x), plain=lambda *x: made["gemm"].plain(*x))
    inputs = ("dy", "w2", "h") if op == "hidden_grad" else ("a", "b")
    return Case(op, shape, dtype, inputs, GEMMS[op], make, {FORWARD: (flops, moved)}, **functions)


def select_cases(sizes: Iterable[str], ops: Iterable[str], tokens: int, dtype: torch.dtype) -> list[Case]:
    """The cases of these ops at named sizes, and expert_mlp's at published shapes; GEMM kernels first."""
    found = []
    for size in sizes:
        if size in PUBLISHED:
            label, published_tokens, widths = PUBLISHED[size]
            these = cases(label, ModelConfig(**widths), published_tokens, dtype)
            found += [case for case in these if case.op == "expert_mlp"]
        else:
            config = ModelConfig.preset(size)
            found += [gemm_case(op, size, config, tokens, dtype) for op in GEMMS if op in ops]
            found += cases(size, config, tokens, dtype)
    return [case for case in found if case.op in ops]
