"""The benchmarked ops at their shapes: inputs and FLOPs of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from acceleron import ModelConfig
from acceleron.kernels import torch_ops
from acceleron.kernels.contract import Routing

from .gemms import gemm_cases

# Shapes that peers publish, of expert_mlp: tokens, and widths. Liger's are 32768 tokens with 8 experts each: with two
# each, as many rows are 131072.
PUBLISHED = {
    "sonicmoe-768": (40960, dict(d_model=768, d_ff=1024, num_experts=32)),
    "sonicmoe-1536": (24576, dict(d_model=1536, d_ff=1024, num_experts=32)),
    "liger-2048": (131072, dict(d_model=2048, d_ff=768, num_experts=128)),
}


class Draw:
    """Random tensors of unit scale, the same ones for every provider."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, grad: bool = True) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype).requires_grad_(grad)

    def weight(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A matrix, or one per expert, that keeps unit scale."""
        return self(*shape, dtype=dtype, scale=shape[-1] ** -0.5)

    def routing(self, T: int, E: int) -> Routing:
        return torch_ops.route_top2(self(T, E, dtype=torch.float32, grad=False))

    def labels(self, T: int, V: int) -> Tensor:
        return torch.randint(V, (T,), generator=self.generator, device=self.device)


@dataclass(frozen=True, eq=False)
class Case:
    """An op at a shape.

    precision: the dtype it computes in. make: its inputs, in order; those that have a gradient require it. flops: its
    GEMMs' in the forward pass; backward has two GEMMs for each. scalar_grad: the gradient of outputs that are scalars.
    ours, plain: for a GEMM kernel, Triton's function of the inputs and plain PyTorch's.
    """

    op: str
    shape: str
    precision: torch.dtype
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    make: Callable[[Draw], tuple]
    flops: float = 0
    scalar_grad: float = 1.0
    ours: Callable | None = None
    plain: Callable | None = None


def cases(shape: str, config: ModelConfig, tokens: int, dtype: torch.dtype) -> list[Case]:
    """All ops at the shape of a model, for `tokens` tokens in sequences of at most its max_seq_len.

    Those that take most of a step come first, in case the time of a run is short.
    """
    T, D, E, F, V = tokens, config.d_model, config.num_experts, config.d_ff, config.vocab_size
    W, H, G, C, fp32 = config.d_ff_shared, config.num_heads, config.num_kv_heads, config.head_dim, torch.float32
    S = min(T, config.max_seq_len)
    B = T // S

    def angles(draw: Draw) -> tuple[Tensor, Tensor]:
        angle = draw(S, C // 2, dtype=fp32, grad=False).repeat(1, 2)
        return angle.cos(), angle.sin()

    def experts(draw: Draw, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return draw.weight(E, 2 * F, D, dtype=dtype), draw.weight(E, D, F, dtype=dtype)

    def routed(draw: Draw) -> tuple:
        routing = draw.routing(T, E)
        return draw(T, D), routing.topk_scores_TK.requires_grad_(), routing.topk_ids_TK, *experts(draw)

    def layer(draw: Draw) -> tuple:
        shared = draw.weight(2 * W, D, dtype=fp32), draw.weight(D, W, dtype=fp32)
        return draw(T, D), draw.weight(E, D, dtype=fp32), *experts(draw, fp32), *shared, draw(T, D)

    return [
        Case("expert_mlp", shape, dtype, ("x", "scores", "ids", "w13", "w2"), ("y",), routed, 12 * T * D * F),
        Case(
            "moe", shape, dtype, ("x", "router", "w13", "w2", "shared_w13", "shared_w2", "residual"),
            ("y", "z_loss", "balance_loss", "counts"), layer, 12 * T * D * F + 6 * T * D * W + 2 * T * D * E,
        ),
        Case(
            "linear_cross_entropy", shape, dtype, ("x", "weight", "labels"), ("loss",),
            lambda draw: (draw(T, D), draw.weight(V, D, dtype=fp32), draw.labels(T, V)), 2 * T * D * V,
        ),
        Case(
            "attention", shape, dtype, ("q", "k", "v"), ("y",),
            lambda draw: (draw(B, S, H, C), draw(B, S, G, C), draw(B, S, G, C)),
            2 * B * H * S * S * C,  # half of two GEMMs, as no query sees what comes after it
        ),
        Case(
            "grouped_gemm", shape, dtype, ("x", "w", "plan"), ("y",),
            lambda draw: (draw(2 * T, D), experts(draw)[0], torch_ops.dispatch_plan(draw.routing(T, E).topk_ids_TK, E)),
            8 * T * D * F,
        ),
        Case(
            "router_logits", shape, fp32, ("x", "weight"), ("logits",),
            lambda draw: (draw(T, D), draw.weight(E, D, dtype=fp32)), 2 * T * D * E,
        ),
        Case(
            "route_top2", shape, fp32, ("logits",), ("scores", "ids", "z_loss", "balance_loss", "counts"),
            lambda draw: (draw(T, E, dtype=fp32),),
            scalar_grad=T,  # the losses are means over the tokens: this makes their gradients as large as the scores'
        ),
        Case(
            "dispatch_plan", shape, dtype, ("ids", "num_experts"), ("gather_idx", "scatter_idx", "offsets"),
            lambda draw: (draw.routing(T, E).topk_ids_TK, E),
        ),
        Case("swiglu", shape, dtype, ("gate_up",), ("y",), lambda draw: (draw(T, 2 * W),)),
        Case(
            "rope", shape, dtype, ("q", "k", "cos", "sin"), ("q", "k"),
            lambda draw: (draw(B, S, H, C), draw(B, S, G, C), *angles(draw)),
        ),
        Case(
            "split_rope", shape, dtype, ("qkv", "cos", "sin", "H", "G"), ("q", "k", "v"),
            lambda draw: (draw(B, S, H + 2 * G, C), *angles(draw), H, G),
        ),
        Case(
            "rms_norm", shape, dtype, ("x", "weight", "residual"), ("norm", "sum"),
            lambda draw: (draw(T, D), draw(D, dtype=fp32), draw(T, D)),
        ),
    ]  # fmt: skip


OPS = [case.op for case in cases("", ModelConfig.preset("tiny"), 1, torch.float32)]
# The grouped GEMMs, in the order of gemm_cases, by their results; hidden_grad has an elementwise kernel too.
GEMMS = {
    "up": ("h", "act"), "rows-down": ("y",), "hidden_grad": ("dh", "act", "dscores"), "rows-dx": ("rows",),
    "weight_grad-w13": ("dw13",), "weight_grad-w2": ("dw2",),
}  # fmt: skip


def gemm_kernel(op: str) -> str:
    """The GEMM kernel that a case of GEMMS launches, as ACCELERON_NO_TMA names it."""
    return "rows" if op == "hidden_grad" else op.partition("-")[0]


def gemm_case(op: str, shape: str, config: ModelConfig, tokens: int, dtype: torch.dtype) -> Case:
    """One grouped GEMM. Its tensors are made with its functions, which hold the routing on the tensors' device."""
    made = {}

    def make(draw: Draw) -> tuple:
        made["gemm"] = gemm_cases(config, tokens, draw.dtype, draw.device)[list(GEMMS).index(op)]
        return made["gemm"].tensors

    functions = dict(ours=lambda *x: made["gemm"].ours(*x), plain=lambda *x: made["gemm"].plain(*x))
    wide = op in ("up", "rows-dx", "weight_grad-w13")  # gate and up
    flops = 4 * tokens * config.d_model * config.d_ff * (1 + wide)
    return Case(op, shape, dtype, ("a", "b", "h"), GEMMS[op], make, flops, **functions)


def select_cases(sizes: Iterable[str], ops: Iterable[str], tokens: int, dtype: torch.dtype) -> list[Case]:
    """The cases of these ops at named sizes, and expert_mlp's at published shapes; GEMM kernels first."""
    found = []
    for size in sizes:
        if size in PUBLISHED:
            published_tokens, widths = PUBLISHED[size]
            these = cases(size, ModelConfig(**widths), published_tokens, dtype)
            found += [case for case in these if case.op == "expert_mlp"]
        else:
            config = ModelConfig.preset(size)
            found += [gemm_case(op, size, config, tokens, dtype) for op in GEMMS]
            found += cases(size, config, tokens, dtype)
    return [case for case in found if case.op in ops]
