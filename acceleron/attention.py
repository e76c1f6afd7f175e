"""Grouped-query attention with RoPE and a KV cache: flash-attn if it is installed and supports the call, else SDPA."""

import importlib
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import ops
from .config import ModelConfig

# FlashAttention-3 first (Hopper only), then FlashAttention-2 (Ampere and later): name, module, compute capabilities.
FLASH_PACKAGES = (
    ("FlashAttention-3", "flash_attn_interface", (9,)),
    ("FlashAttention-2", "flash_attn", (8, 9, 10, 12)),
)


def find_flash_packages() -> list[tuple[str, Callable, tuple[int, ...]]]:
    """List the installed flash-attn packages with a backward pass, best first: name, function, compute capabilities."""
    found = []
    for name, module, capabilities in FLASH_PACKAGES:
        try:
            function = importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError):
            continue
        if name == "FlashAttention-2" or not _forward_only():
            found.append((name, function, capabilities))
    return found


def _forward_only() -> bool:
    """Return whether FlashAttention-3 is an inference-only build. Its backward pass would raise."""
    try:
        flags = importlib.import_module("flash_attn_config").CONFIG["build_flags"]
    except (ImportError, AttributeError, KeyError):
        return False
    return bool(flags.get("FLASHATTENTION_DISABLE_BACKWARD"))


_installed_flash = find_flash_packages()
# Fastest first on Hopper: cuDNN is 1.7 to 2.3 times as fast as flash (transformers #48163). SDPA skips backends that
# do not support a call.
SDPA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, Callable] | None:
    """Return name and function of the flash-attn package that supports this device, dtype and head_dim, or None.

    The function takes q (B, S, H, C), k and v (B, S, G, C), `causal` (aligned to the last position), and
    `deterministic` for its backward pass.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return None
    for name, function, capabilities in _installed_flash:
        if torch.cuda.get_device_properties(device).major in capabilities:
            return name, function
    return None


def attention_name(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the name of the attention implementation for the log."""
    flash = flash_attention(device, dtype, head_dim)
    return flash[0] if flash else "SDPA"


def causal_attention(q_BSHC: Tensor, k_BLGC: Tensor, v_BLGC: Tensor) -> Tensor:
    """softmax(q k^T * C**-0.5) v. The S queries are the last of the L positions; each attends up to its own."""
    flash = flash_attention(q_BSHC.device, q_BSHC.dtype, q_BSHC.shape[-1])
    if flash:
        deterministic = torch.are_deterministic_algorithms_enabled()
        out = flash[1](q_BSHC, k_BLGC, v_BLGC, causal=True, deterministic=deterministic)
        return out[0] if isinstance(out, tuple) else out  # some releases return the logsumexp too
    (B, S, H, C), (L, G) = q_BSHC.shape, k_BLGC.shape[1:3]
    if S == 1:
        # Decoding: the H / G query heads that share a key head become its queries. All of them attend to all L.
        q, k, v = q_BSHC.view(B, G, H // G, C), k_BLGC.transpose(1, 2), v_BLGC.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).view(B, 1, H, C)
    mask = None
    if 1 < S < L:
        mask = torch.ones(S, L, dtype=torch.bool, device=q_BSHC.device).tril(L - S)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHC, k_BLGC, v_BLGC))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=S == L, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def best_sdpa(device: torch.device):
    """Context manager that makes SDPA try its fastest backend first on a GPU.

    torch.use_deterministic_algorithms(True) excludes cuDNN and makes the other backends deterministic.
    """
    return sdpa_kernel(SDPA_BACKENDS, set_priority=True) if device.type == "cuda" else nullcontext()


class Linear(nn.Linear):
    """A linear layer without bias. It computes in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class KVCache:
    """Keys and values of the positions so far: one pair of (B, max_len, G, C) buffers per layer."""

    def __init__(self, config: ModelConfig, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_layers, 2, batch_size, max_len, config.num_kv_heads, config.head_dim)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k_BSGC: Tensor, v_BSGC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new positions and return all its keys and values. The model advances `length`."""
        end = self.length + k_BSGC.shape[1]
        self.kv[layer, 0, :, self.length : end] = k_BSGC
        self.kv[layer, 1, :, self.length : end] = v_BSGC
        return self.kv[layer, 0, :, :end], self.kv[layer, 1, :, :end]


class Attention(nn.Module):
    """One GEMM computes q, k and v: `qkv.weight` has the query rows first, then the key rows, then the value rows."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.splits = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.qkv = Linear(config.d_model, sum(self.splits) * self.head_dim)
        self.out = Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cos_SC: Tensor, sin_SC: Tensor, cache: KVCache | None = None, layer: int = 0):
        """x (B, S, D) -> (B, S, D). cos and sin are for the S positions of x."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = ops.split_rope(qkv, cos_SC, sin_SC, *self.splits[:2])
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.out(causal_attention(q, k, v).flatten(-2))
