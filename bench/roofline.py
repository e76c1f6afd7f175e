"""The least time each op of a training step can take on an H100, and the bytes that its design really moves.

floor: the larger of FLOPs / 798 TFLOP/s and least bytes / 3.0 TB/s, both rates measured on an H100 SXM. The least bytes
are every input read once and every output written once, where an op's intermediate results (act, the rows before they
are combined) stay on the chip. design: the same with the bytes that the kernels as they are move through HBM, kernel
by kernel. tile loads: what the tiles of the chosen configuration read, most of it from L2. idle: the share of the
processors' time that is lost because the last wave of tiles is not full.

These are bounds and not predictions: no kernel reaches both rates at once.
"""

import argparse
from typing import NamedTuple

import torch

from acceleron import ModelConfig
from acceleron.config import PRESETS
from acceleron.kernels.configs import Config, find_config
from acceleron.kernels.launch import Device

from .compile import SIZES

FLOPS_PER_SECOND = 798e12
BYTES_PER_SECOND = 3.0e12
H100 = Device("any", "sm_90", 132)
BF16, FP32 = 2, 4


class Work(NamedTuple):
    """What a kernel does, or several: FLOPs, least and moved bytes of HBM, tile loads from L2, idle share."""

    name: str
    flops: float
    least: float
    moved: float
    tile_loads: float | None = None
    idle: float | None = None

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.flops / FLOPS_PER_SECOND, self.least / BYTES_PER_SECOND)

    @property
    def design(self) -> float:
        """Seconds."""
        return max(self.flops / FLOPS_PER_SECOND, self.moved / BYTES_PER_SECOND)


def _tiles(config: Config, tiles: float, inner: float, width: int = 1) -> dict:
    """Tile loads and idle share of `tiles` tiles over `inner` values each; `width` block_n columns are loaded."""
    waves = tiles / (H100.processors * config.programs)
    loads = tiles * (config.block_m + width * config.block_n) * inner * BF16
    return dict(tile_loads=loads, idle=1 - waves / -(-waves // 1))


def expert_kernels(config: ModelConfig, tokens: int) -> tuple[list[Work], list[Work]]:
    """The kernels of the routed experts with the combine, forward and backward."""
    T, D, E, F = tokens, config.d_model, config.num_experts, config.d_ff
    N = 2 * T
    x, x_rows, act, w2 = BF16 * T * D, BF16 * N * D, BF16 * N * F, BF16 * E * D * F
    h, w13, index = 2 * act, 2 * w2, FP32 * N
    gemm = 2 * N * D * F

    def rows(op: str, sizes: tuple, inner: int, columns: int, width: int = 1) -> dict:
        c = find_config(op, H100, torch.bfloat16, sizes)
        # An expert's last row tile is half full on average.
        return _tiles(c, (N / c.block_m + E / 2) * -(-columns // c.block_n), inner, width)

    def weight_grad(M: int, columns: int, gathered: int) -> tuple[dict, float]:
        c = find_config("weight_grad", H100, torch.bfloat16, (E, M, columns, gathered))
        tiles = E * c.split * -(-M // c.block_m) * -(-columns // c.block_n)
        # Split shares are written and read in fp32, then cast.
        extra = 0 if c.split == 1 else E * M * columns * (2 * FP32 * c.split + 2 * FP32)
        return _tiles(c, tiles, N / E / c.split), extra

    dw13, dw13_extra = weight_grad(2 * F, D, 2)
    dw2, dw2_extra = weight_grad(D, F, 1)
    up = Work("up, SwiGLU", 2 * gemm, x + w13 + h, x_rows + w13 + h + act + index, **rows("up", (E, D, F), D, F, 2))
    down = Work("down", gemm, w2, act + w2 + x_rows, **rows("rows", (E, F, D, 1), F, D))
    combine = Work("combine", 0, 2 * x, x_rows + 2 * x + 2 * index)
    hidden = Work("dh, SwiGLU'", gemm, x + w2 + h, x_rows + w2 + 2 * h + act, **rows("hidden_grad", (E, D, F), D, F))
    dx = Work("dx rows", 2 * gemm, w13, h + w13 + x_rows, **rows("rows", (E, 2 * F, D, 0), 2 * F, D))
    token = Work("dx, dweights", 0, x, x_rows + x + 2 * index)
    grads = [
        Work("dw13", 2 * gemm, x + w13, h + x_rows + w13 + dw13_extra, **dw13),
        Work("dw2", gemm, w2, x_rows + act + w2 + dw2_extra, **dw2),
    ]
    return [up, down, combine], [hidden, dx, *grads, token]


def routing_kernels(config: ModelConfig, tokens: int) -> tuple[list[Work], list[Work]]:
    """The router's GEMM, routing and plan, forward and backward."""
    T, D, E = tokens, config.d_model, config.num_experts
    logits, choices, x = FP32 * T * E, 2 * FP32 * T, BF16 * T * D
    router = Work("router logits", 2 * T * D * E, x + logits, x + logits)
    route = Work("route", 0, logits + 2 * choices, logits + 2 * choices)
    plan = Work("plan", 0, 3 * choices, 4 * choices)
    backward = Work("route backward", 0, 2 * logits + 2 * choices, 2 * logits + 2 * choices)
    gradients = Work("router gradients", 4 * T * D * E, 2 * x + logits, 2 * x + 2 * logits)
    # x's gradients through the router, the routed and the shared experts are added, by one kernel where compiled.
    return [router, route, plan], [backward, gradients, Work("sum of the dx", 0, 0, 4 * x)]


def swiglu_mlp_kernels(name: str, config: ModelConfig, width: int, tokens: int) -> tuple[list[Work], list[Work]]:
    """A SwiGLU MLP of torch GEMMs and our elementwise kernel: the shared expert, or the dense twin's."""
    T, D = tokens, config.d_model
    x, act, w2 = BF16 * T * D, BF16 * T * width, BF16 * D * width
    h, w13, gemm = 2 * act, 2 * w2, 2 * T * D * width
    forward = [
        Work(f"{name} up", 2 * gemm, x + w13 + h, x + w13 + h),
        Work(f"{name} SwiGLU", 0, 0, h + act),
        Work(f"{name} down", gemm, w2 + x, act + w2 + x),
    ]
    backward = [
        Work(f"{name} dact", gemm, x + w2, x + w2 + act),
        Work(f"{name} SwiGLU'", 0, h, act + 2 * h),
        Work(f"{name} dx", 2 * gemm, w13 + x, h + w13 + x),
        Work(f"{name} dw13", 2 * gemm, x + w13, h + x + w13),
        Work(f"{name} dw2", gemm, w2, x + act + w2),
    ]
    return forward, backward


def other_kernels(config: ModelConfig, tokens: int) -> list[Work]:
    """RoPE, RMSNorm (both norms of a layer, one with the residual) forward + backward, and the whole cross-entropy."""
    T, D, V = tokens, config.d_model, config.vocab_size
    x, head = BF16 * T * D, BF16 * V * D
    rotated = BF16 * T * (config.num_heads + config.num_kv_heads) * config.head_dim
    logits = BF16 * T * V
    return [
        Work("RoPE, both passes", 0, 4 * rotated, 4 * rotated),
        Work("RMSNorm, both passes", 0, 12 * x, 12 * x),
        # Logits are written, read twice, overwritten by their gradient, and that is read by two GEMMs.
        Work("cross-entropy", 6 * T * D * V, 2 * x + 2 * head, 2 * x + 2 * head + 6 * logits),
    ]


def total(name: str, kernels: list[Work]) -> tuple[str, float, float]:
    """Name, floor of the whole as one op, and the sum of its kernels' designs, in seconds."""
    whole = Work(name, sum(w.flops for w in kernels), sum(w.least for w in kernels), 0)
    return name, whole.floor, sum(w.design for w in kernels)


def print_size(size: str, tokens: int):
    config = ModelConfig.preset(size)
    routing, routing_backward = routing_kernels(config, tokens)
    experts, experts_backward = expert_kernels(config, tokens)
    shared, shared_backward = swiglu_mlp_kernels("shared", config, config.d_ff_shared, tokens)
    dense, dense_backward = swiglu_mlp_kernels("twin", config, config.d_ff_dense, tokens)
    print(f"\n{size}: {tokens} tokens, D {config.d_model}, E {config.num_experts}, F {config.d_ff}; a layer, bf16")
    form = "{:22} {:>8} {:>9} {:>9} {:>10} {:>5} {:>9} {:>9}"
    print(form.format("kernel", "GFLOP", "least MB", "moved MB", "tiles MB", "idle", "floor us", "design us"))
    groups = (routing, experts, shared, routing_backward, experts_backward, shared_backward, dense, dense_backward)
    for work in (w for group in (*groups, other_kernels(config, tokens)) for w in group):
        tiles = "" if work.tile_loads is None else f"{work.tile_loads / 1e6:.0f}"
        idle = "" if work.idle is None else f"{work.idle:.0%}"
        figures = (work.flops / 1e9, work.least / 1e6, work.moved / 1e6)
        figures = [f"{value:.0f}" if value >= 10 or not value else f"{value:.1f}" for value in figures]
        print(form.format(work.name, *figures, tiles, idle, f"{work.floor * 1e6:.0f}", f"{work.design * 1e6:.0f}"))
    moe = routing + experts + shared + routing_backward + experts_backward + shared_backward
    totals = [
        total("expert MLP forward", experts),
        total("expert MLP backward", experts_backward),
        total("MoE layer, both passes", moe),
        total("twin's MLP, both passes", dense + dense_backward),
    ]
    for name, floor, design in totals:
        print(f"{name:24} floor {floor * 1e6:6.0f} us, design {design * 1e6:6.0f} us")
    (_, moe_floor, moe_design), (_, twin_floor, twin_design) = totals[2:]
    print(f"twin / MoE: {twin_floor / moe_floor:.2f} by the floors, {twin_design / moe_design:.2f} by the designs")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*PRESETS], default=list(SIZES))
    parser.add_argument("--tokens", type=int, default=65536, help="of a micro-batch; 65536 is 32 x 2048")
    arguments = parser.parse_args()
    if arguments.tokens < 1:
        parser.error(f"--tokens {arguments.tokens}: expected at least 1")
    for size in arguments.size:
        print_size(size, arguments.tokens)


if __name__ == "__main__":
    main()
