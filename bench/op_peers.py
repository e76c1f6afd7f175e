"""The providers of an op: Triton, the reference in plain PyTorch (eager and compiled), and installed peers.

All providers of an op take the same inputs and return the same outputs, in the order of bench/op_cases.py.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from acceleron import ops
from acceleron.attention import FLASH_PACKAGES, best_sdpa, causal_attention, find_flash_packages
from acceleron.device import missing_compiler
from acceleron.kernels import torch_ops

from .op_cases import Case
from .rows import describe

EPS = 1e-6
# A provider's error can be up to FACTOR times the reference's error in the same dtype.
FACTOR = 1.5


class Provider(NamedTuple):
    """An implementation of an op, or the reason it is `absent`.

    factor: the largest allowed error, as a multiple of the reference's error. Comments explain values above FACTOR.
    """

    name: str
    run: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    absent: str | None = None
    factor: float = FACTOR


def ours(op: str, functions: dict[str, Callable]) -> Callable:
    """Return our op as a function of the case's inputs. functions: a backend's ops, by name."""
    if op == "expert_mlp":
        # The call includes the dispatch plan, because the peers build theirs inside the op.
        def run(x_TD, topk_scores_TK, topk_ids_TK, w13_E2FD, w2_EDF):
            plan = functions["dispatch_plan"](topk_ids_TK, w13_E2FD.shape[0])
            return functions["expert_mlp"](x_TD, topk_scores_TK, plan, w13_E2FD, w2_EDF)

        return run
    if op == "moe":
        # With learned routing, tokens near a tie can select different experts, which would fail the check.
        return lambda *inputs: functions["moe"](*inputs, force_load_balance=True)
    if op == "rms_norm":
        return lambda x_TD, weight_D, residual_TD: functions["rms_norm"](x_TD, weight_D, EPS, residual_TD)
    return functions[op]


def plain(case: Case) -> Callable:
    """Return the op in plain PyTorch, the ground truth."""
    if case.op == "attention":
        return partial(sdpa, backend=SDPBackend.MATH)
    return case.plain or ours(case.op, vars(torch_ops))


def sdpa(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, backend: SDPBackend) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHC, k_BSGC, v_BSGC))
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


# Peers: each function imports its package and returns the provider's function and factor.


def liger_expert_mlp():
    from liger_kernel.ops import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    # Atomics accumulate the gradients of the top-k scores in the compute dtype, tile by tile.
    return lambda x, scores, ids, w13, w2: LigerFusedMoEFunction.apply(x, w13, w2, ids, scores), 3


def moe_ops_expert_mlp():
    import moe_ops  # pyright: ignore[reportMissingImports]

    def run(x, scores, ids, w13, w2):
        rows, row_map, offsets = moe_ops.permute(x, ids, E=w13.shape[0])
        act = torch_ops.swiglu(moe_ops.grouped_gemm(rows, w13, offsets))
        return moe_ops.unpermute(moe_ops.grouped_gemm(act, w2, offsets), row_map, scores, *ids.shape)

    return run, FACTOR


def liger_cross_entropy():
    from liger_kernel.transformers import functional  # pyright: ignore[reportMissingImports]

    cross_entropy = functional.liger_fused_linear_cross_entropy
    # The default accumulates the weight gradient over chunks in the compute dtype.
    return lambda x, weight, labels: cross_entropy(x, weight.to(x.dtype), labels, accum_dtype=torch.float32), FACTOR


def cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    # The default filter drops gradients below eps / 32: on random data, all but those of the labels. Gradients are
    # accumulated in the compute dtype, block by block.
    return lambda x, weight, labels: linear_cross_entropy(x, weight.to(x.dtype), labels, filter_eps=None), 10


PEERS = {
    "expert_mlp": {"liger-kernel": liger_expert_mlp, "moe-ops": moe_ops_expert_mlp},
    "linear_cross_entropy": {"liger-kernel": liger_cross_entropy, "cut-cross-entropy": cut_cross_entropy},
}


def peer(distribution: str, maker: Callable, device: torch.device) -> Provider:
    """Return a peer's provider, or one with the reason its package is absent or unusable."""
    try:
        version(distribution)
        if device.type != "cuda":
            return Provider(distribution, absent="needs a GPU")
        run, factor = maker()
    except PackageNotFoundError:
        return Provider(distribution, absent="not installed")
    except Exception as error:  # a third-party package can raise anything on import
        return Provider(distribution, absent=f"cannot be imported ({describe(error)})")
    return Provider(distribution, run, factor=factor)


# FlashAttention's tests allow 2 to 3 times the error of matmul and softmax in the same dtype.
ATTENTION_FACTOR = 3
SDPA = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
ON_CPU = ("SDPA flash", "SDPA math")


def flash(q: Tensor, k: Tensor, v: Tensor, function: Callable) -> Tensor:
    out = function(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out


def attention_providers(device: torch.device) -> list[Provider]:
    """Return the model's attention, each SDPA backend, and the flash-attn packages."""
    on_gpu = device.type == "cuda"

    def model_attention(q, k, v):
        with best_sdpa(device):
            return causal_attention(q, k, v)

    found = {"acceleron": (model_attention, None)}
    for name, backend in SDPA.items():
        found[name] = partial(sdpa, backend=backend), None if on_gpu or name in ON_CPU else "needs a GPU"
    installed = {name: (function, majors) for name, function, majors in find_flash_packages()}
    for name, module, _ in FLASH_PACKAGES:
        function, majors = installed.get(name, (None, ()))
        usable = on_gpu and torch.cuda.get_device_capability(device)[0] in majors
        absent = None if usable else "does not support this device" if function else f"{module} cannot be imported"
        found[name] = partial(flash, function=function), absent
    return [Provider(name, *each, factor=ATTENTION_FACTOR) for name, each in found.items()]


def providers(case: Case, device: torch.device) -> list[Provider]:
    """Return all providers of a case's op, including absent ones."""
    if case.op == "attention":
        return attention_providers(device)
    absent = ops.triton_unavailable(device)
    run = case.ours or (None if absent else ours(case.op, vars(ops.triton_ops)))
    found = [Provider("triton", run, absent), Provider("reference", plain(case))]
    if case.ours:
        return found
    compiler = missing_compiler(device)
    absent = f"torch.compile needs {compiler}" if compiler else None
    compiled = cache(lambda: torch.compile(plain(case), dynamic=False))  # torch.compile imports slowly
    found.append(Provider("reference compiled", lambda *inputs: compiled()(*inputs), absent))
    return found + [peer(name, maker, device) for name, maker in PEERS.get(case.op, {}).items()]
