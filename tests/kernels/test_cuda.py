"""Tests that need a GPU: no op syncs with the host, and a training step runs in a CUDA graph."""

import torch
import torch.nn.functional as F

from acceleron import Acceleron, ModelConfig, ops

DEVICE = torch.device("cuda")


def build(batch: int = 4, seq_len: int = 256):
    torch.manual_seed(0)
    config = ModelConfig.preset("tiny", vocab_size=1024)
    model = Acceleron(config, compute_dtype=torch.bfloat16).to(DEVICE)
    ids = torch.randint(config.vocab_size, (batch, seq_len), device=DEVICE)
    return model, ids


def test_no_op_syncs_with_the_host():
    model, ids = build()
    model(ids, ids).loss.backward()  # the first run compiles the kernels, which may sync
    try:
        torch.cuda.set_sync_debug_mode("error")
        model(ids, ids).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replay_matches_an_eager_step():
    """The graph is captured once and replayed on different tokens."""
    torch.use_deterministic_algorithms(False)  # SDPA's backward has no deterministic kernel for every head_dim
    model, ids = build()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(ids, ids).loss.backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        output = model(ids, ids)
        output.loss.backward()
    for seed in (1, 2):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        ids.copy_(torch.randint(1024, ids.shape, device=DEVICE, generator=generator))
        for weight in model.parameters():
            weight.grad.zero_()
        graph.replay()
        replayed = output.cross_entropy.clone(), model.blocks[0].moe.router.grad.clone()
        expected = model(ids, ids)
        (router_grad,) = torch.autograd.grad(expected.loss, [model.blocks[0].moe.router])
        torch.testing.assert_close(replayed[0], expected.cross_entropy, rtol=1e-5, atol=1e-5)
        assert F.mse_loss(replayed[1], router_grad).sqrt() < 1e-2 * router_grad.square().mean().sqrt()


def test_auto_selects_triton_on_a_gpu():
    for backend in ("triton", "auto"):
        assert ops.set_backend(backend, DEVICE).startswith("Triton 3")
