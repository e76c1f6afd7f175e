"""The providers of an op: Triton, the reference, torch's own ops as they are usually combined, and installed peers.

All providers of an op take its inputs in the same order (bench/op_cases.py) and return its outputs in the same order.
`layout` converts the inputs to a peer's own layout. It is not timed, as the peer's users keep their tensors that way.
"""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from acceleron import kernels
from acceleron.attention import FLASH_PACKAGES, best_sdpa, causal_attention, find_flash_packages
from acceleron.device import missing_compiler
from acceleron.kernels import reference

from .op_cases import GEMMS, Case

EPS = 1e-6
# A provider's error may be this many times the reference's own in the same dtype.
FACTOR = 1.5


class Provider(NamedTuple):
    """An implementation of an op, or the reason why it is `absent`.

    layout: from the op's inputs to those of `run`, differentiable, not timed. factor: how many times the reference's
    error it may have; above FACTOR with a reason where it is made.
    """

    name: str
    run: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    absent: str | None = None
    layout: Callable[..., tuple] | None = None
    factor: float = FACTOR


def ours(op: str, functions: dict[str, Callable]) -> Callable:
    """Our op as a function of the case's inputs; `functions` has Triton's or the reference's, by name."""
    if op == "expert_mlp":
        # From the top-k ids on: the peers build their dispatch plans in here, too.
        def run(x_TD, weights_TK, experts_TK, w13_E2FD, w2_EDF):
            plan = functions["dispatch_plan"](experts_TK, w13_E2FD.shape[0])
            return functions["expert_mlp"](x_TD, weights_TK, plan, w13_E2FD, w2_EDF)

        return run
    if op == "rms_norm":
        return lambda x_TD, weight_D, residual_TD: functions["rms_norm"](x_TD, weight_D, EPS, residual_TD)
    return functions[op]


def plain(case: Case) -> Callable:
    """The op in plain PyTorch, which gives the truth: the reference's; for attention matmuls and a softmax."""
    if case.op in GEMMS:
        return case.plain
    return plain_attention if case.op == "attention" else ours(case.op, vars(reference))


def plain_attention(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor) -> Tensor:
    """One sequence at a time and recomputed for backward: the scores of all don't fit a GPU in fp32."""
    sequences = zip(*(x.split(1) for x in (q_BSHC, k_BSGC, v_BSGC)), strict=True)
    return torch.cat([checkpoint(matmul_attention, *qkv, use_reentrant=False) for qkv in sequences])


def matmul_attention(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHC, k_BSGC, v_BSGC))
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).masked_fill(later, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


# torch's own ops, as they are usually combined.


def torch_router_logits(x_TD, weight_ED):
    return F.linear(x_TD.to(weight_ED.dtype), weight_ED)


def torch_route_top2(logits_TE):
    T, E = logits_TE.shape
    chosen, experts_TK = logits_TE.topk(2, dim=-1)
    counts_E = F.one_hot(experts_TK, E).sum(dim=(0, 1))
    z_loss = logits_TE.logsumexp(dim=-1).pow(2).mean()
    balance_loss = E * torch.dot(counts_E.to(logits_TE.dtype) / (2 * T), logits_TE.softmax(dim=-1).mean(dim=0))
    return chosen.softmax(dim=-1), experts_TK, z_loss, balance_loss, counts_E


def torch_dispatch_plan(experts_TK, num_experts):
    experts_N = experts_TK.flatten()
    order = experts_N.argsort(stable=True)
    counts_E = F.one_hot(experts_N.long(), num_experts).sum(dim=0)
    offsets = F.pad(counts_E.cumsum(0), (1, 0))
    return order.int(), order.argsort().int().view_as(experts_TK), offsets.int()


def torch_expert_mlp(x_TD, weights_TK, experts_TK, w13_E2FD, w2_EDF):
    order, inverse_TK, offsets = torch_dispatch_plan(experts_TK, w13_E2FD.shape[0])
    h_N2F = F.grouped_mm(x_TD[order // 2], w13_E2FD.transpose(1, 2), offs=offsets[1:])
    y_ND = F.grouped_mm(torch_swiglu(h_N2F), w2_EDF.transpose(1, 2), offs=offsets[1:])
    return (y_ND[inverse_TK] * weights_TK[..., None]).sum(dim=1).to(x_TD.dtype)


def torch_moe(x_TD, router_ED, w13, w2, shared_w13, shared_w2, residual_TD):
    w13, w2, shared_w13, shared_w2 = (w.to(x_TD.dtype) for w in (w13, w2, shared_w13, shared_w2))
    weights_TK, experts_TK, *losses = torch_route_top2(torch_router_logits(x_TD, router_ED))
    routed = torch_expert_mlp(x_TD, weights_TK, experts_TK, w13, w2)
    return residual_TD + routed + F.linear(torch_swiglu(F.linear(x_TD, shared_w13)), shared_w2), *losses


def torch_grouped_gemm(x_ND, w_EFD, plan):
    return F.grouped_mm(x_ND, w_EFD.transpose(1, 2), offs=plan.offsets[1:])


def torch_swiglu(gate_up_N2F):
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    return F.silu(gate) * up


def torch_rope(q_BSHC, k_BSGC, cos_SC, sin_SC):
    half = q_BSHC.shape[-1] // 2
    cos, sin = cos_SC[:, None, :half], sin_SC[:, None, :half]

    def rotate(x):
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return rotate(q_BSHC), rotate(k_BSGC)


def torch_split_rope(qkv_BSNC, cos_SC, sin_SC, H, G):
    q, k, v = qkv_BSNC.split([H, G, G], dim=2)
    return *torch_rope(q, k, cos_SC, sin_SC), v


def torch_rms_norm(x_TD, weight_D, residual_TD):
    total = x_TD + residual_TD
    return F.rms_norm(total, total.shape[-1:], weight_D.to(total.dtype), EPS), total


def torch_linear_cross_entropy(x_TD, weight_VD, labels_T):
    logits_TV = F.linear(x_TD, weight_VD.to(x_TD.dtype))
    return F.cross_entropy(logits_TV.float(), labels_T)


TORCH = {
    "router_logits": torch_router_logits,
    "route_top2": torch_route_top2,
    "dispatch_plan": torch_dispatch_plan,
    "expert_mlp": torch_expert_mlp,
    "moe": torch_moe,
    "grouped_gemm": torch_grouped_gemm,
    "swiglu": torch_swiglu,
    "rope": torch_rope,
    "split_rope": torch_split_rope,
    "rms_norm": torch_rms_norm,
    "linear_cross_entropy": torch_linear_cross_entropy,
    "attention": matmul_attention,
}


# Peers. Each maker imports its package, and returns the provider.


def liger_expert_mlp(name: str) -> Provider:
    apply = importlib.import_module("liger_kernel.ops").LigerFusedMoEFunction.apply
    # The routing weights' gradients are added up tile by tile in the compute dtype, by atomics.
    return Provider(name, lambda x, weights, experts, w13, w2: apply(x, w13, w2, experts, weights), factor=3)


def liger_swiglu(name: str) -> Provider:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_swiglu

    # Its users have gate and up from two GEMMs. Backward writes their gradients over them: the times are of values
    # that change from call to call.
    def halves(gate_up_N2F):
        return tuple(half.contiguous() for half in gate_up_N2F.chunk(2, dim=-1))

    return Provider(name, function, layout=halves)


def liger_rope(name: str) -> Provider:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_rope

    def run(q_BSHC, k_BSGC, cos_SC, sin_SC):
        q, k = function(q_BSHC.transpose(1, 2), k_BSGC.transpose(1, 2), cos_SC, sin_SC)
        return q.transpose(1, 2), k.transpose(1, 2)

    def layout(q, k, cos, sin):  # its tables have a batch axis, of 1 where all sequences share them
        return q.clone(), k.clone(), cos[None], sin[None]

    return Provider(name, run, layout=layout)


def liger_rms_norm(name: str) -> Provider:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_add_rms_norm
    # Not in place, as the output's gradient is others' too; it moves the same bytes.
    return Provider(name, lambda x, weight, residual: function(x, residual, weight.to(x.dtype), EPS, in_place=False))


def liger_linear_cross_entropy(name: str) -> Provider:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    # By default the weight's gradient is summed over the chunks in the compute dtype.
    def run(x_TD, weight_VD, labels_T):
        return function(x_TD, weight_VD.to(x_TD.dtype), labels_T, accum_dtype=torch.float32)

    return Provider(name, run)


def cut_cross_entropy(name: str) -> Provider:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    # Unfiltered: the default drops gradients below eps / 32, which on random data is all but the labels' own. Gradients
    # are added up in the compute dtype, block by block.
    def run(x_TD, weight_VD, labels_T):
        return function(x_TD, weight_VD.to(x_TD.dtype), labels_T, filter_eps=None)

    return Provider(name, run, factor=10)


def moe_ops_expert_mlp(name: str) -> Provider:
    moe_ops = importlib.import_module("moe_ops")

    def run(x, weights, experts, w13, w2):
        rows, row_map, offsets = moe_ops.permute(x, experts, E=w13.shape[0])
        act = torch_swiglu(moe_ops.grouped_gemm(rows, w13, offsets))
        return moe_ops.unpermute(moe_ops.grouped_gemm(act, w2, offsets), row_map, weights, *experts.shape)

    return Provider(name, run)


def sonic_moe(name: str) -> Provider:
    function = importlib.import_module("sonicmoe.functional").moe_general_routing_inputs
    activation = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU

    def interleaved(x, weights, experts, w13, w2):
        gate, up = w13.chunk(2, dim=1)
        return x, weights, experts, torch.stack([gate, up], dim=2).flatten(1, 2), w2

    def run(x, weights, experts, w13, w2):
        tokens = torch.arange(len(x), dtype=torch.int32, device=x.device).repeat_interleave(2)
        stream = torch.cuda.current_stream().cuda_stream
        w1, w2 = w13.permute(1, 2, 0), w2.permute(1, 2, 0)
        choices = (weights.flatten(), tokens, experts.flatten())
        inference = not torch.is_grad_enabled()
        return function(x, *choices, w1, None, w2, None, w13.shape[0], stream, activation, inference)[0]

    return Provider(name, run, layout=interleaved)


def scattermoe(name: str) -> Provider:
    GLUMLP = importlib.import_module("scattermoe.mlp").GLUMLP

    def up_first(x, weights, experts, w13, w2):
        gate, up = w13.chunk(2, dim=1)
        return x, weights, experts.long(), torch.cat([up, gate], dim=1), w2

    def run(x, weights, experts, w13, w2):
        with torch.device("meta"):
            module = GLUMLP(x.shape[1], w2.shape[2], len(w2), 2)
        return functional_call(
            module, {"experts.weight": w13, "output_experts.weight": w2}, (x, weights.to(x.dtype), experts)
        )

    # It multiplies by the routing weights in the compute dtype.
    return Provider(name, run, layout=up_first, factor=3)


# op -> (name, distribution, maker)
PEERS = {
    "expert_mlp": [
        ("liger fused_moe", "liger-kernel", liger_expert_mlp),
        ("moe-ops", "moe-ops", moe_ops_expert_mlp),
        ("sonic-moe", "sonic-moe", sonic_moe),
        ("scattermoe", "scattermoe", scattermoe),
    ],
    "swiglu": [("liger", "liger-kernel", liger_swiglu)],
    "rope": [("liger", "liger-kernel", liger_rope)],
    "rms_norm": [("liger", "liger-kernel", liger_rms_norm)],
    "linear_cross_entropy": [
        ("liger", "liger-kernel", liger_linear_cross_entropy),
        ("cut-cross-entropy", "cut-cross-entropy", cut_cross_entropy),
    ],
}


def peer(name: str, distribution: str, maker: Callable[[str], Provider], device: torch.device) -> Provider:
    """The peer's provider, absent if its package is, or can't be used here."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return Provider(name, absent=f"{distribution} is not installed")
    if device.type != "cuda":
        return Provider(name, absent="needs a GPU")
    try:
        return maker(name)
    except Exception as error:  # whatever another package does while it is imported
        return Provider(name, absent=f"{distribution} can't be imported ({type(error).__name__}: {error})")


# FlashAttention's own tests allow two to three times the error of matmuls and a softmax in the same dtype.
ATTENTION_FACTOR = 3
SDPA = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
ON_CPU = ("SDPA flash", "SDPA math")


def attention_providers(device: torch.device) -> list[Provider]:
    """The model's own attention, each of SDPA's backends, and the flash-attn packages."""

    def sdpa(q_BSHC, k_BSGC, v_BSGC, context):
        q, k, v = (x.transpose(1, 2) for x in (q_BSHC, k_BSGC, v_BSGC))
        with context():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2)

    def flash(q, k, v, function):
        out = function(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    def as_the_model(q, k, v):
        with best_sdpa() if device.type == "cuda" else nullcontext():
            return causal_attention(q, k, v)

    found = [Provider("acceleron", as_the_model, factor=ATTENTION_FACTOR), Provider("torch", matmul_attention)]
    for name, backend in SDPA.items():
        if device.type != "cuda" and name not in ON_CPU:
            found.append(Provider(name, absent="needs a GPU"))
        else:
            context = partial(sdpa_kernel, backend)
            found.append(Provider(name, partial(sdpa, context=context), factor=ATTENTION_FACTOR))
    installed = {name: (function, majors) for name, function, majors in find_flash_packages()}
    for name, module, _ in FLASH_PACKAGES:
        if name not in installed:
            found.append(Provider(name, absent=f"{module} can't be imported"))
        elif device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in installed[name][1]:
            found.append(Provider(name, absent="not made for this device"))
        else:
            found.append(Provider(name, partial(flash, function=installed[name][0]), factor=ATTENTION_FACTOR))
    return found


def providers(case: Case, device: torch.device) -> list[Provider]:
    """All providers of a case's op; the absent ones with the reason."""
    if case.op == "attention":
        return attention_providers(device)
    reason = kernels._missing or kernels.launch.unavailable(device)
    run = case.ours if case.op in GEMMS or reason else ours(case.op, kernels._triton)
    found = [
        Provider("triton", absent=reason) if reason else Provider("triton", run),
        Provider("reference", plain(case)),
    ]
    if case.op in GEMMS:
        return found
    lacking = missing_compiler(device)
    compiled = None if lacking else torch.compile(TORCH[case.op], dynamic=False)
    found += [Provider("torch", TORCH[case.op])]
    found += [Provider("torch compiled", compiled, absent=lacking and f"torch.compile needs {lacking}")]
    return found + [peer(*each, device) for each in PEERS.get(case.op, [])]
