"""The benchmarked ops: the inputs, outputs and FLOPs of each op at a shape."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from acceleron import ModelConfig
from acceleron.kernels import torch_ops
from acceleron.kernels.contract import Routing

from .gemms import gemm_cases

# expert_mlp shapes from peers' READMEs: tokens and widths.
PUBLISHED = {
    "sonicmoe-768": (40960, dict(d_model=768, d_ff=1024, num_experts=32)),
    "sonicmoe-1536": (24576, dict(d_model=1536, d_ff=1024, num_experts=32)),
    "liger-2048": (32768, dict(d_model=2048, d_ff=768, num_experts=128, top_k=8)),
}


class RandomTensors:
    """Generates random unit-scale tensors from a fixed seed, so every provider gets the same inputs."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, grad: bool = True) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype).requires_grad_(grad)

    def weight(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a matrix, or one per expert, scaled for unit-scale products."""
        return self(*shape, dtype=dtype, scale=shape[-1] ** -0.5)

    def routing(self, T: int, E: int, K: int) -> Routing:
        return torch_ops.route_topk(self(T, E, dtype=torch.float32, grad=False), K)

    def labels(self, T: int, V: int) -> Tensor:
        return torch.randint(V, (T,), generator=self.generator, device=self.device)


@dataclass(frozen=True, eq=False)
class Case:
    """One op at one shape.

    precision: the compute dtype. make: builds the inputs, with requires_grad for those that have gradients. flops:
    FLOPs of the forward GEMMs; backward has two GEMMs for each of them. scalar_grad: the gradient of scalar outputs.
    ours, plain: a GEMM kernel's Triton and plain PyTorch functions of the inputs.
    """

    op: str
    shape: str
    precision: torch.dtype
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    make: Callable[[RandomTensors], tuple]
    flops: float = 0
    scalar_grad: float = 1.0
    ours: Callable | None = None
    plain: Callable | None = None


def cases(shape: str, config: ModelConfig, tokens: int, dtype: torch.dtype) -> list[Case]:
    """Build all ops at a model's shapes, for `tokens` tokens in sequences of at most max_seq_len.

    The most expensive ops come first, in case time runs out.
    """
    T, D, E, K, F, V = tokens, config.d_model, config.num_experts, config.top_k, config.d_ff, config.vocab_size
    W, H, G, C, fp32 = config.d_ff_shared, config.num_heads, config.num_kv_heads, config.head_dim, torch.float32
    S = min(T, config.max_seq_len)
    B = T // S

    def angles(randn: RandomTensors) -> tuple[Tensor, Tensor]:
        angle = randn(S, C // 2, dtype=fp32, grad=False).repeat(1, 2)
        return angle.cos(), angle.sin()

    def experts(randn: RandomTensors, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return randn.weight(E, 2 * F, D, dtype=dtype), randn.weight(E, D, F, dtype=dtype)

    def routed(randn: RandomTensors) -> tuple:
        routing = randn.routing(T, E, K)
        return randn(T, D), routing.topk_scores_TK.requires_grad_(), routing.topk_ids_TK, *experts(randn)

    def layer(randn: RandomTensors) -> tuple:
        shared = randn.weight(2 * W, D, dtype=fp32), randn.weight(D, W, dtype=fp32)
        return randn(T, D), randn.weight(E, D, dtype=fp32), *experts(randn, fp32), *shared, randn(T, D), K

    return [
        Case("expert_mlp", shape, dtype, ("x", "scores", "ids", "w13", "w2"), ("y",), routed, 6 * T * K * D * F),
        Case(
            "moe", shape, dtype, ("x", "router", "w13", "w2", "shared_w13", "shared_w2", "residual", "top_k"),
            ("y", "z_loss", "mean_probabilities", "tokens_per_expert"), layer, 6 * T * D * (K * F + W) + 2 * T * D * E,
        ),
        Case(
            "linear_cross_entropy", shape, dtype, ("x", "weight", "labels"), ("loss",),
            lambda randn: (randn(T, D), randn.weight(V, D, dtype=fp32), randn.labels(T, V)), 2 * T * D * V,
        ),
        Case(
            "attention", shape, dtype, ("q", "k", "v"), ("y",),
            lambda randn: (randn(B, S, H, C), randn(B, S, G, C), randn(B, S, G, C)),
            2 * B * H * S * S * C,  # half of two GEMMs, because attention is causal
        ),
        Case(
            "grouped_gemm", shape, dtype, ("x", "w", "plan"), ("y",),
            lambda randn: (
                randn(K * T, D), randn.weight(E, 2 * F, D),
                torch_ops.dispatch_plan(randn.routing(T, E, K).topk_ids_TK, E),
            ), 4 * T * K * D * F,
        ),
        Case(
            "router_logits", shape, fp32, ("x", "weight"), ("logits",),
            lambda randn: (randn(T, D), randn.weight(E, D, dtype=fp32)), 2 * T * D * E,
        ),
        Case(
            "route_topk", shape, fp32, ("logits", "top_k"),
            ("scores", "ids", "z_loss", "mean_probabilities", "tokens_per_expert"),
            lambda randn: (randn(T, E, dtype=fp32), K),
            scalar_grad=T,  # scales the gradient of the z-loss to that of the scores
        ),
        Case(
            "dispatch_plan", shape, dtype, ("ids", "num_experts"), ("gather_idx", "scatter_idx", "offsets"),
            lambda randn: (randn.routing(T, E, K).topk_ids_TK, E),
        ),
        Case("swiglu", shape, dtype, ("gate_up",), ("y",), lambda randn: (randn(T, 2 * W),)),
        Case(
            "rope", shape, dtype, ("q", "k", "cos", "sin"), ("q", "k"),
            lambda randn: (randn(B, S, H, C), randn(B, S, G, C), *angles(randn)),
        ),
        Case(
            "split_rope", shape, dtype, ("qkv", "cos", "sin", "H", "G"), ("q", "k", "v"),
            lambda randn: (randn(B, S, H + 2 * G, C), *angles(randn), H, G),
        ),
        Case(
            "rms_norm", shape, dtype, ("x", "weight", "residual"), ("norm", "sum"),
            lambda randn: (randn(T, D), randn(D, dtype=fp32), randn(T, D)),
        ),
    ]  # fmt: skip


OPS = [case.op for case in cases("", ModelConfig.preset("tiny"), 1, torch.float32)]
# Outputs of the grouped GEMMs, in the order of gemm_cases.
GEMMS = {
    "up": ("h", "act"), "rows-down": ("y",), "hidden_grad": ("dh", "act", "dscores"), "rows-dx": ("rows",),
    "weight_grad-w13": ("dw13",), "weight_grad-w2": ("dw2",),
}  # fmt: skip


def gemm_kernel(op: str) -> str:
    """Return the GEMM kernel that an op in GEMMS launches, by its name in ACCELERON_NO_TMA."""
    return op.partition("-")[0]


def gemm_case(op: str, shape: str, config: ModelConfig, tokens: int, dtype: torch.dtype) -> Case:
    """Build the case of a grouped GEMM. Call `make` before `ours` or `plain`, which use its routing."""
    made = {}

    def make(randn: RandomTensors) -> tuple:
        made["gemm"] = gemm_cases(config, tokens, randn.dtype, randn.device)[list(GEMMS).index(op)]
        return made["gemm"].tensors

    functions = dict(ours=lambda *x: made["gemm"].ours(*x), plain=lambda *x: made["gemm"].plain(*x))
    wide = op in ("up", "rows-dx", "weight_grad-w13")  # gate and up
    flops = 2 * tokens * config.top_k * config.d_model * config.d_ff * (1 + wide)
    return Case(op, shape, dtype, ("a", "b", "h"), GEMMS[op], make, flops, **functions)


def select_cases(sizes: Iterable[str], ops: Iterable[str], tokens: int, dtype: torch.dtype) -> list[Case]:
    """Build the cases of `ops` at named sizes, GEMM kernels first. Published shapes only add expert_mlp."""
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
