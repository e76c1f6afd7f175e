"""The model: sizes, outputs, parity with transformers, gradient checkpointing, torch.compile."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from acceleron import Acceleron, ModelConfig, ops
from acceleron.errors import InputError

TABLE = {"tiny": (110e6, 75e6), "small": (350e6, 150e6), "medium": (1e9, 400e6), "large": (2e9, 700e6)}


# One dense layer of three; four of eight routed experts and no shared expert.
OTHER_SHAPE = dict(num_layers=3, num_experts=8, top_k=4, d_ff=24, d_ff_shared=0, num_dense_layers=1)


def small_model(dense=False, seed=0, **overrides) -> Acceleron:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=256, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=4, d_ff=48)
    return Acceleron(ModelConfig(**sizes | dict(d_ff_shared=32, dense=dense, max_seq_len=64) | overrides))


def token_ids(*shape, vocab_size=256, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", TABLE)
def test_named_sizes_have_the_documented_parameter_counts(size):
    with torch.device("meta"):
        model, dense_baseline = (Acceleron(ModelConfig.preset(size, dense=dense)) for dense in (False, True))
    total, active = model.num_parameters()
    assert total == sum(p.numel() for p in model.parameters())
    assert (total, active) == pytest.approx(TABLE[size], rel=0.03)
    routers = model.config.num_layers * model.config.num_experts * model.config.d_model
    assert dense_baseline.num_parameters() == (active - routers,) * 2  # the same active matmuls, except for the routers


@pytest.mark.parametrize(("E", "K", "F", "W", "dense_layers"), [(4, 2, 48, 32, 0), (5, 1, 40, 28, 2), (8, 8, 24, 0, 1)])
def test_parameters_and_dense_baseline_of_any_shape(E, K, F, W, dense_layers):
    shape = dict(num_layers=3, num_experts=E, top_k=K, d_ff=F, d_ff_shared=W, num_dense_layers=dense_layers)
    model, baseline = (small_model(dense, **shape) for dense in (False, True))
    V, D, KV, moe_layers = 256, 64, 2 * 16, 3 - dense_layers
    # Embedding and norms, qkv and out, and the widths of dense layers and shared experts.
    common = V * D + 7 * D + 3 * (D * (D + 2 * KV) + D * D) + 3 * D * (dense_layers * K * F + 3 * W)
    routers, expert = moe_layers * E * D, 3 * D * F
    total, active = (common + routers + moe_layers * n * expert for n in (E, K))
    assert model.num_parameters() == (total, active)
    assert baseline.num_parameters() == (active - routers, active - routers)
    assert model.flops_per_token(32) - baseline.flops_per_token(32) == 6 * routers


def test_labels_select_losses_instead_of_logits():
    model, ids = small_model(), token_ids(2, 16)
    unlabeled = model(ids)
    assert unlabeled.logits.shape == (2, 16, 256)
    assert unlabeled.loss is None
    assert unlabeled.cross_entropy is None
    labels = ids.clone()
    labels[:, :5] = -100
    output = model(ids, labels)
    assert output.logits is None
    shifted = F.cross_entropy(unlabeled.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.cross_entropy, shifted)
    objective = output.cross_entropy + 1e-3 * output.z_loss + 1e-2 * output.balance_loss
    torch.testing.assert_close(output.loss, objective)
    assert output.tokens_per_expert_LE.sum(dim=1).tolist() == [64, 64]  # two layers; 32 tokens, 2 experts each
    assert output.balance_loss > 1.9  # a sum over two layers, each 1 if balanced


def test_dense_baseline_has_no_router_losses():
    output = small_model(dense=True)(ids := token_ids(2, 16), labels=ids)
    assert (output.z_loss, output.balance_loss, output.tokens_per_expert_LE) == (0, 0, None)
    assert torch.equal(output.loss, output.cross_entropy)


def test_attention_is_causal():
    model, ids = small_model(), token_ids(1, 16)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    difference = (model(ids).logits - model(changed).logits).abs().amax(dim=-1)[0]
    assert difference[:10].max() == 0
    assert difference[10:].min() > 1e-6


def test_sequences_longer_than_max_seq_len_are_rejected():
    with pytest.raises(ValueError, match="65 tokens is longer than the model's 64"):
        small_model()(token_ids(1, 65))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 100}, "d_model 100"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"num_experts": 1}, "num_experts 1 must be at least 2"),
        ({"num_experts": 257}, "num_experts 257 is above 256"),
        ({"d_ff": 0}, "d_ff"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 5}, "top_k 5 must be at most num_experts 4"),
        ({"num_experts": 32, "top_k": 17}, "top_k 17 is above 16"),
        ({"d_ff_shared": -1}, "d_ff_shared"),
        ({"num_dense_layers": 8}, "num_dense_layers 8 must be below num_layers 8"),
    ],
)
def test_invalid_configs_are_rejected(change, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.preset("tiny", **change)


@pytest.mark.parametrize("dense", [False, True])
def test_bf16_compute_gives_fp32_gradients_and_loss(dense):
    model, ids = small_model(dense), token_ids(2, 16)
    wide = model(ids, labels=ids).loss
    model.compute_dtype = torch.bfloat16
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert model(ids).logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert 0 < (loss - wide).abs() < 0.02


# --- parity with transformers ---


def to_transformers(model: Acceleron, **changes):
    """Convert the model to transformers' GraniteMoeShared with copied weights. changes: overrides for its config."""
    from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

    config = model.config
    fields = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        shared_intermediate_size=config.d_ff_shared,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        num_local_experts=config.num_experts,
        num_experts_per_tok=2,
        attention_multiplier=config.head_dim**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_seq_len,
    )
    other = GraniteMoeSharedForCausalLM(GraniteMoeSharedConfig(**fields | changes)).eval()
    heads = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    state = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm.weight}
    for index, block in enumerate(model.blocks):
        layer = f"model.layers.{index}."
        for name, weight in zip("qkv", block.attention.qkv.weight.split(heads), strict=True):
            state[f"{layer}self_attn.{name}_proj.weight"] = weight
        state |= {
            f"{layer}self_attn.o_proj.weight": block.attention.out.weight,
            f"{layer}input_layernorm.weight": block.attention_norm.weight,
            f"{layer}post_attention_layernorm.weight": block.ffn_norm.weight,
            f"{layer}block_sparse_moe.router.weight": block.moe.router,
            f"{layer}block_sparse_moe.experts.gate_up_proj": block.moe.w13_E2FD,
            f"{layer}block_sparse_moe.experts.down_proj": block.moe.w2_EDF,
            f"{layer}shared_mlp.input_linear.weight": block.moe.shared.w13,
            f"{layer}shared_mlp.output_linear.weight": block.moe.shared.w2,
        }
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}  # tied
    assert not unexpected
    return other


def unit_scale(model: Acceleron) -> Acceleron:
    """Scale the weights by 1 / sqrt(fan-in), because the tiny logits of a new model would hide differences."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def test_logits_match_transformers():
    pytest.importorskip("transformers")
    model, ids = unit_scale(small_model()), token_ids(2, 48)
    logits = model(ids).logits
    assert logits.std() > 0.5
    assert (to_transformers(model)(ids).logits - logits).abs().max() < 1e-3
    # The comparison must detect a wrong config field. 1.0 is the default in transformers.
    assert (to_transformers(model, attention_multiplier=1.0)(ids).logits - logits).abs().max() > 1e-2
    assert (to_transformers(model, rms_norm_eps=1e-1)(ids).logits - logits).abs().max() > 1e-2


# --- gradient checkpointing ---


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("shape", [{}, OTHER_SHAPE], ids=["top-2", "other shape"])
def test_gradient_checkpointing_is_bitwise_equal(shape):
    model, ids = small_model(**shape), token_ids(2, 32)
    loss, gradients = loss_and_gradients(model, ids)
    model.gradient_checkpointing = True
    again, recomputed = loss_and_gradients(model, ids)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))


def test_gradient_checkpointing_saves_memory():
    def saved_bytes(checkpointing):
        """Count the bytes that autograd saves for backward, not including the parameters."""
        model = small_model()
        model.gradient_checkpointing = checkpointing
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            _hidden = model.hidden_states(token_ids(4, 64))  # keeps the graph alive, so no address is reused
        return sum(saved.values())

    assert saved_bytes(True) < saved_bytes(False) / 4


@pytest.mark.parametrize("saved", [True, False], ids=["routing saved", "control: routing recomputed"])
def test_recomputation_keeps_the_routing(monkeypatch, saved):
    """The logits nearly tie. The recomputation perturbs them, like a different summation order would."""
    model, ids = small_model(), token_ids(2, 32)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.normal_(std=1e-7)
    _, expected = loss_and_gradients(model, ids)
    model.gradient_checkpointing = True
    route_topk, calls = ops.torch_ops.route_topk, []

    def perturbed(logits, *options, **more):
        calls.append(1)
        second_pass = len(calls) > model.config.num_layers
        return route_topk(logits - second_pass * 1e-5 * torch.arange(4.0).flip(0), *options, **more)

    monkeypatch.setattr(ops.torch_ops, "route_topk", perturbed)
    if not saved:
        monkeypatch.setattr(ops, "ROUTING_OPS", frozenset())
    _, gradients = loss_and_gradients(model, ids)
    assert len(calls) == 2 * model.config.num_layers
    w2 = [i for i, (name, _) in enumerate(model.named_parameters()) if name.endswith("w2_EDF")]
    worst = max(((gradients[i] - expected[i]).norm() / expected[i].norm()).item() for i in w2)
    assert (worst < 1e-3) if saved else (worst > 0.3), worst


# --- torch.compile, in a separate process, because its caches and counters are global ---

COMPILE_SCRIPT = """
import json, sys, torch
from torch._dynamo.utils import counters
sys.path.insert(0, {tests!r})
from test_model import small_model, token_ids, loss_and_gradients
result = {{}}
for checkpointing in (False, True):
    eager, compiled = small_model(**{shape}), small_model(**{shape})
    eager.gradient_checkpointing = compiled.gradient_checkpointing = checkpointing
    compiled.compile_blocks()
    worst = 0.0
    for seed in range(3):  # each batch is routed differently; the last has one distinct token
        ids = token_ids(2, 32, seed=seed, vocab_size=256 if seed < 2 else 1)
        (a, ga), (b, gb) = loss_and_gradients(eager, ids), loss_and_gradients(compiled, ids)
        worst = max([worst, abs(a - b).item()] + [((x - y).norm() / x.norm()).item() for x, y in zip(ga, gb)])
        result.setdefault("graphs", []).append(counters["stats"]["unique_graphs"])
    result.setdefault("worst", []).append(worst)
result["breaks"] = sum(counters["graph_break"].values())
result["names"] = list(compiled.state_dict()) == list(eager.state_dict())
print(json.dumps(result))
"""


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [pytest.param({}, 1, id="top-2"), pytest.param(OTHER_SHAPE, 2, id="other shape")],
)
@pytest.mark.slow
def test_compile_makes_one_graph_per_kind_of_block(shape, kinds):
    script = COMPILE_SCRIPT.format(tests=str(Path(__file__).parent), shape=shape)
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    result = json.loads(process.stdout.splitlines()[-1])
    # One graph per kind without checkpointing and one with, for three batches each.
    assert result["graphs"] == [kinds] * 3 + [2 * kinds] * 3
    assert result["breaks"] == 0
    assert result["names"]
    assert max(result["worst"]) < 1e-4


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_initial_routed_output_has_the_scale_of_the_dense_baselines(top_k):
    """Independent experts with equal scores have the same output scale as one MLP with their total width."""
    config = ModelConfig.preset("nano", vocab_size=256, top_k=top_k)
    moe, dense = Acceleron(config).blocks[0].moe, Acceleron(replace(config, dense=True)).blocks[0].mlp
    x, width = torch.randn(512, config.d_model), top_k * config.d_ff

    def mlp(w13, w2):
        return F.linear(ops.swiglu(F.linear(x, w13)), w2)

    with torch.no_grad():
        routed = sum(mlp(moe.w13_E2FD[k], moe.w2_EDF[k]) for k in range(top_k)) / top_k
        gate, up = dense.w13.chunk(2)
        joint = mlp(torch.cat([gate[:width], up[:width]]), dense.w2[:, :width])
    assert routed.std() / joint.std() == pytest.approx(1, rel=0.1)
