"""The roofline table against counts made by hand."""

import pytest

from acceleron import ModelConfig
from bench import roofline


@pytest.mark.parametrize("size", ["tiny", "small", "medium", "large"])
def test_flops_of_the_experts_are_those_of_two_swiglu_mlps_a_token(size):
    config, tokens = ModelConfig.preset(size), 1000
    forward, backward = roofline.expert_kernels(config, tokens)
    # Three matrices of D x F, two experts a token, two FLOPs a multiplication; backward twice that.
    expected = 2 * 3 * 2 * tokens * config.d_model * config.d_ff
    assert sum(w.flops for w in forward) == expected
    assert sum(w.flops for w in backward) == 2 * expected


def test_twin_and_moe_have_the_same_flops_but_for_the_router():
    config, tokens = ModelConfig.preset("tiny"), 1000
    groups = [*roofline.expert_kernels(config, tokens)]
    groups += roofline.swiglu_mlp_kernels("shared", config, config.d_ff_shared, tokens)
    twin = roofline.swiglu_mlp_kernels("twin", config, config.d_ff_dense, tokens)
    assert sum(w.flops for g in groups for w in g) == sum(w.flops for g in twin for w in g)


def test_a_gemm_is_bound_by_flops_and_a_norm_by_bytes():
    gemm = roofline.Work("gemm", 2 * 8192**3, 3 * 2 * 8192**2, 3 * 2 * 8192**2)
    assert gemm.floor == pytest.approx(2 * 8192**3 / 798e12)
    copy = roofline.Work("copy", 0, 3e9, 6e9)
    assert (copy.floor, copy.design) == (1e-3, 2e-3)


def test_no_kernel_moves_less_than_the_least():
    config = ModelConfig.preset("medium")
    for group in (roofline.expert_kernels, roofline.routing_kernels):
        assert all(w.moved >= w.least and 0 <= (w.idle or 0) < 1 for half in group(config, 65536) for w in half)


def test_table_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["roofline", "--size", "tiny"])
    roofline.main()
    out = capsys.readouterr().out
    assert "dh, SwiGLU'" in out
    assert "twin / MoE" in out
