"""With every plan, the ranks compute what a single process computes on the same global batch."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from runs import SMALL_NANO, options
from torch.profiler import ProfilerActivity, profile

from acceleron import Acceleron
from acceleron.data import Shards
from acceleron.distributed import Ranks, full_tensor
from acceleron.errors import InputError
from acceleron.sharding import _automatic, choose_plan, prepare_backward, shard_model
from acceleron.training.trainer import Trainer

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(SMALL_NANO, vocab_size=64)
LAYERS, EXPERTS = CONFIG.num_layers, CONFIG.num_experts
GLOBAL_BATCH = 12  # sequences per micro-batch, of all ranks: 1, 2, 3 or 4 ranks can share them
SAME = 1e-6  # relative difference of gradients that differ by the order of fp32 sums: 3e-7 is usual
NORM = 2e-4  # get_total_norm in fp32 on a CPU has an error of 1e-4


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference relative to the expected norm, which must not be 0."""
    norm = np.linalg.norm(expected.astype(np.float64))
    assert norm > 0
    return np.linalg.norm(found.astype(np.float64) - expected) / norm


def assert_equal(found: dict, expected: dict, tolerance: float = SAME):
    """Assert that two dicts of arrays, by parameter name, are equal."""
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert difference(found[name], array) <= tolerance, name


def full(tensors) -> dict[str, np.ndarray]:
    """Return copies of named tensors. A collective for DTensors."""
    return {name: full_tensor(tensor.detach()).numpy().copy() for name, tensor in tensors}


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return full((name, weight.grad) for name, weight in model.named_parameters() if weight.grad is not None)


# Whole steps, with Trainer.


def new_trainer(ranks: Ranks, data_dir, **changes) -> Trainer:
    settings = options(data_dir, "unused", batch_size=GLOBAL_BATCH // ranks.size, **changes)
    return Trainer(settings, CONFIG, Shards(data_dir), CPU, torch.float32, ranks=ranks)


def state(trainer: Trainer) -> dict[str, np.ndarray]:
    """Return the full tensors of a checkpoint."""
    contents = trainer.state_dict()
    moments = contents["optimizer"]["state"].items()
    tensors = [(f"{name} {number}", tensor) for number, parts in moments for name, tensor in parts.items()]
    return full([*contents["model"].items(), *tensors])


def first_step(ranks: Ranks, data_dir, changes: dict, compiled: bool = False) -> dict:
    """Return the gradients, the statistics and the state of a step, and the mesh."""
    trainer = new_trainer(ranks, data_dir, **changes)
    if compiled:
        trainer.model.compile_blocks()
    result = {}
    trainer.optimizer.register_step_pre_hook(lambda *_: result.update(gradients=gradients(trainer.model)))
    trainer.train_step(1e-2)
    trainer.loader.close()
    result |= trainer.read_statistics() | dict(state=state(trainer), mesh=trainer.plan and trainer.plan.mesh.shape)
    return result | dict(counts=trainer.statistics.tokens_per_expert_LE.tolist())


def first_steps(ranks: Ranks, data_dir, cases: list[dict], compiled: bool = False) -> list[dict]:
    results = [first_step(ranks, data_dir, case, compiled) for case in cases]
    return results if ranks.is_first else []


STEPS = [
    dict(grad_accum=1, no_gradient_checkpointing=True),
    dict(grad_accum=2, no_gradient_checkpointing=False),
]


def step_cases(plans: list[str], steps: list[dict]) -> list[dict]:
    return [step | dict(data_parallel=plan) for plan in plans for step in steps]


def check_steps(data_dir, size: int, per_node: int, cases: list[dict], results: list[dict], steps: list[dict]):
    expected = first_steps(Ranks(), data_dir, steps) * (len(cases) // len(steps))
    for case, found, truth in zip(cases, results, expected, strict=True):
        plan = case["data_parallel"]
        assert found["mesh"] == {"ddp": (size, 1), "hsdp": (size // per_node, per_node)}.get(plan, (size,))
        assert_equal(found["gradients"], truth["gradients"])
        norm = math.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in truth["gradients"].values()))
        assert found["grad_norm"] == pytest.approx(norm, rel=NORM)
        for name in ("loss", "z_loss", "balance_loss"):
            assert found[name] == pytest.approx(truth[name], rel=SAME), name
        assert found["counts"] == truth["counts"]
        # A checkpoint has the same tensors, and parameters keep their names.
        shapes = [{name: tensor.shape for name, tensor in r["state"].items()} for r in (found, truth)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("size", "per_node", "plans"),
    [
        (2, 2, ["ddp", "zero2", "fsdp"]),
        (3, 3, ["fsdp"]),  # 3 divides no dimension, and the third rank has no row of the routers
        pytest.param(3, 3, ["ddp", "zero2"], marks=pytest.mark.slow),
        (4, 2, ["hsdp"]),
        pytest.param(4, 2, ["ddp", "zero2", "fsdp"], marks=pytest.mark.slow),
    ],
)
def test_a_step_equals_that_of_one_process(data_dir, size, per_node, plans):
    cases = step_cases(plans, STEPS)
    results = on_ranks(size, first_steps, data_dir, cases, per_node=per_node)[0]
    check_steps(data_dir, size, per_node, cases, results, STEPS)


def poison(trainer: Trainer, part: str):
    """Make the next gradient or loss NaN. Of the gradient, only an element that rank 0 owns is NaN."""
    model, forward = trainer.model, trainer.model.forward

    def poisoned(*args, **kwargs):
        model.forward = forward
        output = forward(*args, **kwargs)
        if part == "gradient":
            return output._replace(loss=output.loss + math.nan * model.embedding[0, 0])
        return output._replace(cross_entropy=output.cross_entropy * math.nan)

    model.forward = poisoned


def clipped_and_skipped(ranks: Ranks, data_dir, plan: str) -> dict:
    """Train with clipping, a NaN in two of the steps on the last rank only, and an evaluation after each step."""
    # AdamW does not depend on the scale of gradients, unless they are as small as its eps.
    trainer = new_trainer(ranks, data_dir, grad_clip=1e-6, data_parallel=plan)
    local = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: local.append(all(sharded(w.grad).isfinite().all() for w in trainer.model.parameters()))
    )
    initial, unchanged, losses = full(trainer.model.named_parameters()), [], []
    for part in (None, "gradient", "loss", None, None):
        before = state(trainer)
        if part and ranks.rank == ranks.size - 1:
            poison(trainer, part)
        trainer.train_step(1e-2)
        losses.append(trainer.validate(lambda: False)["val_loss"])
        after = state(trainer)
        unchanged.append(before.keys() == after.keys() and all((before[n] == after[n]).all() for n in before))
    trainer.loader.close()
    updates = {name: weight - initial[name] for name, weight in full(trainer.model.named_parameters()).items()}
    statistics = trainer.read_statistics()
    skips = statistics["skipped_steps"], [anomaly.step for anomaly in trainer.detector.read()]
    return dict(updates=updates, losses=losses, unchanged=unchanged, skips=skips, local=local)


def sharded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize(
    ("size", "per_node", "plan"),
    [
        (2, 2, "zero2"),
        pytest.param(2, 2, "ddp", marks=pytest.mark.slow),
        pytest.param(4, 2, "hsdp", marks=pytest.mark.slow),
    ],
)
def test_clipping_and_skipped_steps(data_dir, size, per_node, plan):
    truth = clipped_and_skipped(Ranks(), data_dir, "ddp")
    results = on_ranks(size, clipped_and_skipped, data_dir, plan, per_node=per_node)
    for result in [truth, *results]:
        assert result["unchanged"] == [False, True, True, False, False]
        assert result["skips"] == (2, [2, 3])
        assert result["losses"] == pytest.approx(truth["losses"], rel=SAME)
        # The gradient is clipped by the norm, which is in doubt by NORM.
        assert_equal(result["updates"], truth["updates"], 2 * NORM)
    # The NaN of the last rank is in a shard of rank 0, and all ranks skip.
    finite = [result["local"] for result in results]
    assert finite[0] == [True, False, True, True, True]
    assert finite[-1] == ([True] * 5 if plan != "ddp" else finite[0])


# What the ranks communicate.


def collectives(work, path) -> list[tuple[str, str, int]]:
    """Return the (name, dtype, number of elements of this rank) of each collective in `work`, as the profiler records.

    Each reduction of a sharded gradient is a reduce_scatter. gloo implements it by an all_reduce, which is left out.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        work()
    profiler.export_chrome_trace(str(path))
    found = Counter()
    for event in json.loads(path.read_text())["traceEvents"]:
        name = event.get("name", "").removeprefix("gloo:").removeprefix("c10d::")
        if name in ("all_gather", "all_reduce"):
            found[name, event["args"]["Input type"][0], math.prod(event["args"]["Input Dims"][0])] += 1
        elif name == "_reduce_scatter_base_":
            key = event["args"]["Input type"][1], math.prod(event["args"]["Input Dims"][1])
            found["reduce_scatter", *key] += 1
            found["all_reduce", *key] -= 1
    return list(found.elements())


def communicated(ranks: Ranks, data_dir, directory, cases: list[dict], compiled: bool = False) -> list[list]:
    """Return the collectives of the second step."""
    results = []
    for number, case in enumerate(cases):
        trainer = new_trainer(ranks, data_dir, **case)
        if compiled:
            trainer.model.compile_blocks()
        trainer.train_step(1e-2)
        trainer.fetch()
        results.append(collectives(lambda: trainer.train_step(1e-2), directory / f"{ranks.rank}_{number}.json"))  # noqa: B023
        trainer.loader.close()
    return results


MICRO_BATCHES = 2


def collective_cases(plans: list[str]) -> list[dict]:
    return [dict(data_parallel=plan, grad_accum=MICRO_BATCHES) for plan in plans]


def check_collectives(plans: list[str], results: list[list[tuple]]):
    counts = ("all_reduce", "long int", LAYERS * EXPERTS + 1)  # tokens per expert, and the number of targets
    for plan, found in zip(plans, results, strict=True):
        assert found.count(counts) == MICRO_BATCHES, plan
        assert found.count(("all_reduce", "double", 3)) == 1, plan  # the losses
        names = Counter(name for name, *_ in found)
        gathers, scatters, reductions = COLLECTIVES[plan]
        assert names["all_gather"] == gathers, plan
        assert names["reduce_scatter"] == scatters, plan
        norm = plan != "ddp"  # reduces the norms of the shards
        assert names["all_reduce"] == reductions + MICRO_BATCHES + 1 + norm, plan


# Per step: all-gathers and reduce-scatters of a block's or the root's weights, and all-reduces of their gradients. FSDP
# gathers each block again in the backward pass, which does not start before the root's weights are used.
MODULES = LAYERS + 1
COLLECTIVES = {
    "ddp": (0, 0, MODULES),
    "zero2": (MODULES, MICRO_BATCHES * MODULES, 0),
    "fsdp": (MICRO_BATCHES * (2 * LAYERS + 1), MICRO_BATCHES * MODULES, 0),
    "hsdp": (MODULES, MICRO_BATCHES * MODULES, MODULES),
}


@pytest.mark.parametrize(
    ("size", "plans"), [(2, ["ddp", "zero2", "fsdp"]), pytest.param(4, ["hsdp"], marks=pytest.mark.slow)]
)
def test_collectives(data_dir, tmp_path, size, plans):
    for found in on_ranks(size, communicated, data_dir, tmp_path, collective_cases(plans), per_node=2):
        check_collectives(plans, found)


def compiled(ranks: Ranks, data_dir, directory, cases: list[dict], plans: list[str]) -> tuple[list, list]:
    steps = first_steps(ranks, data_dir, cases, compiled=True)
    return steps, communicated(ranks, data_dir, directory, collective_cases(plans), compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "plans", "steps"), [(2, ["fsdp", "zero2", "ddp"], STEPS), (4, ["hsdp"], STEPS[1:])])
def test_compiled_blocks(data_dir, tmp_path, size, plans, steps):
    cases = step_cases(plans, steps)
    results = on_ranks(size, compiled, data_dir, tmp_path, cases, plans, per_node=2)
    check_steps(data_dir, size, 2, cases, results[0][0], steps)
    for _, found in results:
        check_collectives(plans, found)


@pytest.mark.slow
def test_gather_dtype_halves_the_traffic(data_dir, tmp_path):
    cases = [dict(data_parallel="fsdp", gather_dtype=dtype) for dtype in ("fp32", "bf16")]
    sizes = {"float": 4, "c10::BFloat16": 2}
    totals = []
    for found in on_ranks(2, communicated, data_dir, tmp_path, cases)[0]:
        total = Counter()
        for name, dtype, elements in found:
            total[name] += sizes.get(dtype, 8) * elements
        totals.append(total)
    in_fp32, in_bf16 = totals
    assert in_fp32["all_gather"] == 2 * in_bf16["all_gather"] > 0
    assert in_fp32["reduce_scatter"] == in_bf16["reduce_scatter"] > 0  # gradients are reduced in fp32


# One forward and backward pass with any labels and weights.


def tokens(low: int = 0, high: int = 64, rows: int = GLOBAL_BATCH) -> torch.Tensor:
    return torch.randint(low, high, (rows, 64), generator=torch.Generator().manual_seed(low))


def split_experts(model: Acceleron):
    """Set weights that send tokens below 32 to the first half of the experts in all layers, and others to the rest."""
    signs_V = torch.where(torch.arange(64) < 32, 1.0, -1.0)
    signs_E = torch.where(torch.arange(EXPERTS) < EXPERTS // 2, 1.0, -1.0)
    with torch.no_grad():
        model.embedding[:, 0] = signs_V
        for block in model.blocks:
            block.moe.router[:, 0] = 0.5 * signs_E


def new_model(ranks: Ranks, plan: str, experts_are_split: bool = False, gather_dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = Acceleron(CONFIG)
    if experts_are_split:
        split_experts(model)
    if ranks.size > 1:
        chosen = choose_plan(plan, ranks, CPU, model.num_parameters()[0])
        shard_model(model, model.blocks, chosen, gather_dtype)
        prepare_backward(model, chosen, last=True)
        model.data_parallel_group = dist.group.WORLD
    return model


def backward(ranks: Ranks, plans: list[str], ids, labels, loss: str = "loss", **settings) -> list[dict]:
    """Return the losses and gradients of this rank's rows of `ids` and `labels`, for each plan."""
    results = []
    for plan in plans:
        model = new_model(ranks, plan, **settings)
        rows = slice(ranks.rank * len(ids) // ranks.size, (ranks.rank + 1) * len(ids) // ranks.size)
        output = model(ids[rows], labels=labels[rows])
        getattr(output, loss).backward()
        losses = {name: getattr(output, name).item() for name in ("loss", "cross_entropy", "z_loss", "balance_loss")}
        counts = output.tokens_per_expert_LE.tolist()
        results.append(losses | dict(gradients=gradients(model), counts=counts))
    return results


def mean(results: list[dict], name: str) -> float:
    return sum(result[name] for result in results) / len(results)


def test_unevenly_masked_labels():
    """Rank 0 has few labels and rank 1 has none. A mean of the ranks' means would differ, or be NaN."""
    ids = tokens()
    labels = ids.clone()
    share = GLOBAL_BATCH // 3
    labels[:share, 7:] = -100
    labels[share : 2 * share] = -100
    (truth,) = backward(Ranks(), ["ddp"], ids, labels)
    plans = ["ddp", "fsdp"]
    for results in zip(*on_ranks(3, backward, plans, ids, labels), strict=True):
        for name in ("loss", "cross_entropy"):
            assert mean(results, name) == pytest.approx(truth[name], rel=SAME)
        assert_equal(results[0]["gradients"], truth["gradients"])


def test_ranks_whose_experts_get_no_token():
    ids = torch.cat([tokens(0, 32, GLOBAL_BATCH // 2), tokens(32, 64, GLOBAL_BATCH // 2)])
    for half, unused in zip(ids.chunk(2), (slice(EXPERTS // 2, None), slice(EXPERTS // 2)), strict=True):
        (alone,) = backward(Ranks(), ["ddp"], half, half, experts_are_split=True)
        assert not any(sum(counts_E[unused]) for counts_E in alone["counts"])
    (truth,) = backward(Ranks(), ["ddp"], ids, ids, experts_are_split=True)
    plans = ["ddp", "zero2", "fsdp"]
    for results in zip(*on_ranks(2, split, plans, ids), strict=True):
        assert_equal(results[0]["gradients"], truth["gradients"])


def split(ranks: Ranks, plans: list[str], ids, loss: str = "loss") -> list[dict]:
    return backward(ranks, plans, ids, ids, loss, experts_are_split=True)


def test_balance_loss_is_that_of_the_global_batch():
    """Each rank uses half of the experts, so its own balance loss is twice the global one."""
    ids = torch.cat([tokens(0, 32, GLOBAL_BATCH // 2), tokens(32, 64, GLOBAL_BATCH // 2)])
    (truth,) = split(Ranks(), ["ddp"], ids, "balance_loss")
    alone = [split(Ranks(), ["ddp"], half, "balance_loss")[0] for half in ids.chunk(2)]
    routers = [name for name in truth["gradients"] if name.endswith("router")]
    assert len(routers) == LAYERS
    assert mean(alone, "balance_loss") > 1.5 * truth["balance_loss"]
    for results in zip(*on_ranks(2, split, ["ddp", "fsdp"], ids, "balance_loss"), strict=True):
        assert mean(results, "balance_loss") == pytest.approx(truth["balance_loss"], rel=SAME)
        for name in routers:
            assert difference(results[0]["gradients"][name], truth["gradients"][name]) <= SAME
            per_rank = sum(result["gradients"][name] for result in alone) / 2
            assert difference(per_rank, truth["gradients"][name]) > 0.1


def in_bf16(ranks: Ranks, plans: list[str], ids) -> list[dict]:
    return backward(ranks, plans, ids, ids, gather_dtype=torch.bfloat16)


def rounded(ids) -> dict:
    """Return a pass in fp32, also in the router, of one process whose weights are those of bf16."""
    model = new_model(Ranks(), "ddp")
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    model(ids, labels=ids).loss.backward()
    return gradients(model)


def test_gather_dtype_rounds_only_weights_and_gradients():
    """Rounding a rank's gradient to bf16 changes each element by eps / 2 at most. The embedding's is a sum of two.

    The router computes in fp32: in bf16, tokens would go to other experts.
    """
    ids = tokens()
    (in_fp32,) = backward(Ranks(), ["ddp"], ids, ids)
    truth, parts = rounded(ids), [rounded(share) for share in ids.chunk(2)]
    sharded, replicated = on_ranks(2, in_bf16, ["fsdp", "ddp"], ids)[0]
    for name, found in sharded["gradients"].items():
        norms = sum(np.linalg.norm(part[name]) for part in parts) / 2
        bound = torch.finfo(torch.bfloat16).eps / 2 * norms / np.linalg.norm(truth[name])
        assert difference(found, truth[name]) <= (3 * bound if name == "embedding" else bound), name
        assert difference(found, in_fp32["gradients"][name]) > 1e-3, name
    assert_equal(replicated["gradients"], in_fp32["gradients"])  # ddp gathers nothing, so nothing is rounded


# The choice of the plan, and runs without torchrun.


def test_automatic_plan():
    few, many = 100e6, 2_000_000_000  # many: 7.5 GiB in fp32
    assert _automatic(1, few, 80 << 30)[0] == _automatic(64, few, 80 << 30)[0] == "ddp"
    assert _automatic(1, many, 80 << 30)[0] == "zero2"
    assert _automatic(2, many, 80 << 30)[0] == "hsdp"
    assert _automatic(1, many, 16 << 30)[0] == _automatic(2, many, 16 << 30)[0] == "fsdp"


def test_hsdp_needs_several_nodes():
    with pytest.raises(InputError, match=r"--data_parallel hsdp.*zero2 or fsdp"):
        choose_plan("hsdp", Ranks(), CPU, 1)


def uneven(ranks: Ranks) -> str:
    ranks.per_node = 2 - ranks.rank // 2  # a node with ranks 0 and 1, and one with rank 2
    with pytest.raises(InputError) as caught:
        choose_plan("auto", ranks, CPU, 1)
    return str(caught.value)


def test_nodes_must_have_equally_many_ranks():
    errors = on_ranks(3, uneven)
    assert len(set(errors)) == 1
    assert "1 or 2 ranks" in errors[0]
    assert "--nproc_per_node" in errors[0]


def test_one_process_communicates_nothing(data_dir, tmp_path):
    ranks, value = Ranks(), object()
    assert ranks.is_first
    assert ranks.max(-3) == -3
    assert ranks.gather(value) == [value]
    assert ranks.from_first(lambda: value) is value
    with ranks.agreed() as vote:
        vote.value = 5
    assert vote.value == 5
    with pytest.raises(InputError, match=r"^mine$"), ranks.agreed():
        raise InputError("mine")
    assert ranks.report()
    assert not ranks.stop_announced()
    trainer = new_trainer(ranks, data_dir)
    assert collectives(lambda: trainer.train_step(1e-2), tmp_path / "trace.json") == []
    trainer.loader.close()
    assert trainer.plan is None
    assert not dist.is_initialized()
    assert {type(weight) for weight in trainer.model.parameters()} == {torch.nn.Parameter}
