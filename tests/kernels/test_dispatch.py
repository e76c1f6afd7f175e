"""Dispatch kernels: the plan is a stable sort of the assignments by expert."""

import pytest
import torch
from compare import DEVICE, assert_equal, opcheck, record_launches
from hypothesis import given, settings
from hypothesis import strategies as st

from acceleron.kernels import dispatch, torch_ops
from acceleron.kernels.dispatch import dispatch_plan


def check_plan(ids, num_experts):
    plan = dispatch_plan(ids, num_experts)
    assert_equal(plan, torch_ops.dispatch_plan(ids, num_experts))
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in plan)
    return plan


@st.composite
def assignments(draw):
    """Generate K expert ids for up to 60 tokens. Few experts are used, and a token can have the same expert twice."""
    E = draw(st.sampled_from([2, 3, 8, 64, 255, 256]))
    K = draw(st.sampled_from([k for k in (1, 2, 4, 8, 16) if k <= E]))
    used = draw(st.lists(st.integers(0, E - 1), min_size=1, max_size=8))
    ids = draw(st.lists(st.tuples(*[st.sampled_from(used)] * K), max_size=60))
    return E, K, ids, draw(st.sampled_from([torch.int32, torch.int64])), draw(st.sampled_from([1, 3, 256]))


@settings(max_examples=40)
@given(assignments())
def test_plan_is_a_stable_sort(case):
    num_experts, K, ids, dtype, programs = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MAX_PROGRAMS", programs)
        plan = check_plan(torch.tensor(ids, device=DEVICE, dtype=dtype).view(-1, K), num_experts)
    flat = [expert for choices in ids for expert in choices]
    gather_idx = sorted(range(len(flat)), key=lambda n: flat[n])  # Python's sort is stable
    assert plan.gather_idx.tolist() == gather_idx
    assert [gather_idx[row] for row in plan.scatter_idx_TK.flatten().tolist()] == list(range(len(flat)))
    tokens_per_expert = torch.bincount(torch.tensor(flat, dtype=torch.int64), minlength=num_experts)
    assert plan.offsets.tolist() == [0, *tokens_per_expert.cumsum(0).tolist()]


def random_ids(T, E, K=2, dtype=torch.int32):
    return torch.randint(E, (T, K), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


# T, E and K: no tokens; one token; three programs with a short last one; exactly one block; 17 programs, with counts
# that need two blocks; more blocks than MAX_PROGRAMS. A block has 512 assignments for up to 8 experts, and 16 for 256.
@pytest.mark.parametrize(
    ("T", "E", "K"),
    [(0, 5, 2), (1, 2, 1), (600, 5, 2), (256, 8, 2), (130, 256, 2), pytest.param(300, 256, 16, marks=pytest.mark.slow)]
    + ([(300_000, 8, 2), (262_144, 256, 16)] if DEVICE == "cuda" else []),
)
def test_plan_matches_the_reference(T, E, K):
    check_plan(random_ids(T, E, K), E)


@pytest.mark.parametrize(("T", "E"), [(1500, 5), (100, 256)])  # three programs: two blocks each, at least four each
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_programs_loop_over_several_blocks(T, E, dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_PROGRAMS", 3)
    launches = record_launches(monkeypatch, dispatch, "_count_kernel")
    check_plan(random_ids(T, E, dtype=dtype), E)
    (programs,), sizes = launches[0]
    assert programs > 1
    assert sizes["BLOCKS"] > 1


@pytest.mark.parametrize("expert", [0, 3, 4])
def test_all_assignments_on_one_expert(expert):
    plan = check_plan(torch.full((300, 2), expert, dtype=torch.int32, device=DEVICE), 5)
    assert torch.equal(plan.gather_idx, torch.arange(600, dtype=torch.int32, device=DEVICE))


def test_results_are_deterministic():
    ids = random_ids(300, 5)
    assert_equal(dispatch_plan(ids, 5), dispatch_plan(ids, 5))


def test_custom_op_passes_opcheck():
    for T in (9, 0):
        opcheck(torch.ops.acceleron_triton.dispatch_plan.default, (random_ids(T, 5), 5))


def test_compiles_without_graph_breaks():
    ids = random_ids(9, 5)
    compiled = torch.compile(dispatch_plan, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(ids, 5), dispatch_plan(ids, 5))
