"""Tests attention against its formula, and the choice between FlashAttention and SDPA."""

import sys
import types

import pytest
import torch

from acceleron import attention
from acceleron.attention import causal_attention
from acceleron.device import deterministic_algorithms


def formula(q, k, v):
    """The queries are the last S of L positions. Each attends to keys up to its position. Query heads share k and v."""
    S, L, repeats = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("bshc,blhc->bhsl", q, k) * q.shape[-1] ** -0.5
    visible = torch.arange(L) <= torch.arange(L - S, L)[:, None]
    return torch.einsum("bhsl,blhc->bshc", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def inputs(S, L, head_dim):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, h, head_dim, generator=g, dtype=torch.float64) for n, h in ((S, 4), (L, 2), (L, 2))]


# Training (S = L), a decoding step (S = 1), and a prompt after cached tokens (1 < S < L).
@pytest.mark.parametrize(("S", "L"), [(17, 17), (1, 9), (5, 12), (1, 1)])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 96])
def test_attention_matches_the_formula(S, L, head_dim):
    q, k, v = (x.requires_grad_() for x in inputs(S, L, head_dim))
    outputs = causal_attention(q, k, v), formula(q, k, v)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(q)
    grads = (torch.autograd.grad(out, (q, k, v), grad) for out in outputs)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


@pytest.fixture
def gpu(monkeypatch):
    """Fakes a GPU of the given compute capability, and installs stubs of the given flash-attn packages."""

    def install(major, *modules):
        calls = []
        for module in modules:

            def flash_attn_func(q, k, v, causal, deterministic=False, module=module):
                calls.append((module, causal, deterministic))
                out = formula(q.double(), k.double(), v.double()).to(q.dtype)
                return (out, None) if module == "flash_attn_interface" else out  # some releases return the logsumexp

            monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(flash_attn_func=flash_attn_func))
        for _, absent, _ in attention.FLASH_PACKAGES:
            if absent not in modules:
                monkeypatch.setitem(sys.modules, absent, None)  # import raises ImportError
        monkeypatch.setattr(attention, "_installed_flash", attention.find_flash_packages())
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(major=major))
        return calls

    return install


CUDA = torch.device("cuda")


@pytest.mark.parametrize("head_dim", [32, 48, 64, 96])
def test_hopper_prefers_flash_attention_3(gpu, head_dim):
    gpu(9, "flash_attn_interface", "flash_attn")
    assert attention.attention_name(CUDA, torch.bfloat16, head_dim) == "FlashAttention-3"


def test_flash_attention_3_builds_without_backward_are_skipped(gpu, monkeypatch):
    flags = {"FLASHATTENTION_DISABLE_BACKWARD": True}
    monkeypatch.setitem(sys.modules, "flash_attn_config", types.SimpleNamespace(CONFIG={"build_flags": flags}))
    gpu(9, "flash_attn_interface", "flash_attn")
    assert attention.attention_name(CUDA, torch.bfloat16, 64) == "FlashAttention-2"
    flags["FLASHATTENTION_DISABLE_BACKWARD"] = False
    gpu(9, "flash_attn_interface", "flash_attn")
    assert attention.attention_name(CUDA, torch.bfloat16, 64) == "FlashAttention-3"


@pytest.mark.parametrize("major", [8, 10])
def test_other_gpus_use_flash_attention_2(gpu, major):
    gpu(major, "flash_attn_interface", "flash_attn")
    assert attention.attention_name(CUDA, torch.float16, 64) == "FlashAttention-2"


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "major", "modules"),
    [
        ("cpu", torch.bfloat16, 64, 9, ["flash_attn"]),
        ("cuda", torch.float32, 64, 9, ["flash_attn"]),
        ("cuda", torch.bfloat16, 20, 9, ["flash_attn"]),  # not a multiple of 8
        ("cuda", torch.bfloat16, 264, 9, ["flash_attn"]),
        ("cuda", torch.bfloat16, 64, 7, ["flash_attn"]),
        ("cuda", torch.bfloat16, 64, 8, ["flash_attn_interface"]),  # FlashAttention-3 needs Hopper
        ("cuda", torch.bfloat16, 64, 9, []),
    ],
)
def test_sdpa_is_used_where_flash_attn_cannot_run(gpu, device, dtype, head_dim, major, modules):
    gpu(major, *modules)
    assert attention.attention_name(torch.device(device), dtype, head_dim) == "SDPA"


@pytest.mark.parametrize("module", ["flash_attn_interface", "flash_attn"])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 96])
def test_flash_attn_gets_its_layout_and_flags(gpu, monkeypatch, module, head_dim):
    """The stub computes the formula. The device check is bypassed, because the tensors are on the CPU."""
    calls = gpu(9, module)
    package = attention.flash_attention(CUDA, torch.bfloat16, head_dim)
    monkeypatch.setattr(attention, "flash_attention", lambda *_: package)
    q, k, v = inputs(5, 12, head_dim)
    torch.testing.assert_close(causal_attention(q, k, v), formula(q, k, v))
    assert calls == [(module, True, False)]
    with deterministic_algorithms():
        causal_attention(q, k, v)
    assert calls[1:] == [(module, True, True)]


def test_compiled_flash_attn_follows_torchs_deterministic_setting(monkeypatch):
    """Changing the setting triggers a recompilation. The stub's result shows its `deterministic` argument."""

    def flash_attn_func(q, k, v, causal, deterministic):
        return q + 1 if deterministic else q

    monkeypatch.setattr(attention, "flash_attention", lambda *_: ("stub", flash_attn_func))
    compiled = torch.compile(causal_attention, fullgraph=True, backend="eager")
    q, k, v = inputs(5, 5, 32)
    assert torch.equal(compiled(q, k, v), q)
    with deterministic_algorithms():
        assert torch.equal(compiled(q, k, v), q + 1)
    assert torch.equal(compiled(q, k, v), q)
