"""The decoder: x += attention(norm(x)); x += moe(norm(x)); a final norm; tied embedding and head."""

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import ops
from .attention import Attention, KVCache
from .checkpoint import assign_weights, load_checkpoint
from .config import ModelConfig
from .kernels.autograd import autocast_dtype, no_autocast
from .moe import MoE, MoEStats, SwiGLU, compute_balance_loss


class ModelOutput(NamedTuple):
    """`loss` is the objective: cross_entropy + z_loss_coef * z_loss + balance_loss_coef * balance_loss.

    With labels, `logits` is None: logits are never materialized. Without labels, `loss` and `cross_entropy` are None.
    The router losses are unweighted sums over the layers, and 0 for the dense baseline. `tokens_per_expert_LE` has one
    row per MoE layer. It is None for the dense baseline.
    """

    loss: Tensor | None
    logits: Tensor | None
    cross_entropy: Tensor | None
    z_loss: Tensor
    balance_loss: Tensor
    tokens_per_expert_LE: Tensor | None


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the norm of x + residual, and the sum itself. Without a residual, the sum is x."""
        return ops.rms_norm(x, self.weight, self.eps, residual)


def _save_routing(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ops.ROUTING_OPS else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """One layer. torch.compile compiles its forward once for all MoE layers, and once for all dense layers."""

    def __init__(self, config: ModelConfig, dense: bool):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        if dense:
            self.mlp = SwiGLU(config.d_model, config.d_ff_dense)
        else:
            self.moe = MoE(config)

    def forward(self, x: Tensor, cos_SC: Tensor, sin_SC: Tensor, recompute: bool = False):
        """x (B, S, D) -> (x, MoEStats or None). With `recompute`, only x and the routing are saved for backward."""
        if not recompute:
            return self.layer(x, cos_SC, sin_SC)
        contexts = partial(create_selective_checkpoint_contexts, _save_routing)
        return checkpoint(
            self.layer, x, cos_SC, sin_SC, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
        )

    def layer(self, x: Tensor, cos_SC: Tensor, sin_SC: Tensor, cache: KVCache | None = None, index: int = 0):
        normed, x = self.attention_norm(x)
        attended = self.attention(normed, cos_SC, sin_SC, cache, index)
        normed, x = self.ffn_norm(attended, residual=x)
        if hasattr(self, "mlp"):
            return x + self.mlp(normed), None
        if cache is not None and x.device.type == "cpu" and normed.shape[:2] == (1, 1):
            return x + self.moe.decode_token(normed), None
        return self.moe(normed, residual=x)


class Acceleron(nn.Module):
    """The language model. Parameters are fp32. Activations and GEMMs use `compute_dtype`, or the autocast dtype under
    `torch.autocast`. The router, the norms' statistics and the losses are always fp32.

    `gradient_checkpointing` (default False) recomputes each block in the backward pass, except its routing.
    `data_parallel_group` (default None) has the ranks that process the other parts of a batch: the balance loss uses
    their tokens per expert too, and the mean over the ranks of each loss and gradient is that of the whole batch.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.gradient_checkpointing = False
        self.data_parallel_group: ProcessGroup | None = None
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        num_dense = config.num_layers if config.dense else config.num_dense_layers
        self.blocks = nn.ModuleList(Block(config, layer < num_dense) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.build_rope()
        self.reset_parameters()

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32
    ) -> "Acceleron":
        """Load the model of a checkpoint, with fp32 parameters, to train or evaluate it.

        Raises InputError if the file is missing, damaged, or from another version.
        """
        contents = load_checkpoint(path)
        with torch.device("meta"):
            model = cls(contents["config"], compute_dtype)
        model.to_empty(device=device)
        assign_weights(model, contents, path, assign=False)  # copies, because the file is memory-mapped
        model.build_rope()
        return model.to(device)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32
    ) -> "Acceleron":
        """Load a Hugging Face model, with fp32 parameters. Reads safetensors only, and runs no code.

        Args:
            name: a directory with config.json, from `save_pretrained` or transformers, or the name of a Hub model,
                "user/name". GraniteMoeShared, GraniteMoe and Llama models open. Granite's multipliers are folded into
                the weights: the logits stay the same.

        Raises InputError if the model is missing or damaged, or differs from ours, with the field's name.
        """
        from .pretrained import load_pretrained  # needs safetensors, huggingface_hub and tokenizers

        return load_pretrained(name, device, compute_dtype)

    def save_pretrained(
        self, directory: str | Path, tokenizer=None, dtype: torch.dtype = torch.float32, hybrid: bool = False
    ):
        """Write a directory that transformers, vLLM and `from_pretrained` load.

        Args:
            directory: new or empty.
            tokenizer: a tokenizers.Tokenizer to write beside the weights, with <|endoftext|> as bos and eos token.
            dtype: of the file. Engines that follow config.json compute in fp32 whatever it is.
            hybrid: write a GraniteMoeHybrid model, which mlx-lm also opens.

        Raises InputError if the directory is not empty, or if no architecture of transformers equals the model.
        """
        from .pretrained import save_pretrained

        save_pretrained(self, directory, tokenizer, dtype, hybrid)

    def build_rope(self):
        """cos and sin of position * theta**(-2i / head_dim), (max_seq_len, head_dim) in fp32 with two equal halves."""
        config = self.config
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), config.rope_theta**-exponents)
        angles_SC = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos_SC", angles_SC.cos(), persistent=False)
        self.register_buffer("sin_SC", angles_SC.sin(), persistent=False)

    def reset_parameters(self, generator: torch.Generator | None = None):
        """Normal with std 0.02, divided by sqrt(2 layers) for weights that write to the residual stream (GPT-2).

        w2 of the routed experts is multiplied by top_k: the scores of a token's K experts add up to 1, so otherwise the
        experts would start with 1/K of the contribution of the same widths in the dense baseline.
        """
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                into_residual = name.endswith(("attention.out.weight", "w2", "w2_EDF"))
                std = 0.02 / (2 * self.config.num_layers) ** (0.5 * into_residual)
                scale = self.config.top_k if name.endswith("w2_EDF") else 1
                nn.init.normal_(weight, std=scale * std, generator=generator)

    def num_parameters(self) -> tuple[int, int]:
        """(total, active). Active counts the embedding once, and top_k of the routed experts."""
        total = sum(weight.numel() for weight in self.parameters())
        routed = sum(w.numel() for name, w in self.named_parameters() if name.endswith(("w13_E2FD", "w2_EDF")))
        return total, total - routed + routed * self.config.top_k // self.config.num_experts

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward FLOPs: 6 · active matmul parameters + 6 · L · H·C · S for causal attention.

        The embedding counts once, as the output head. Recomputation does not count.
        """
        config = self.config
        norms = (2 * config.num_layers + 1) * config.d_model
        return 6 * (self.num_parameters()[1] - norms) + 6 * config.num_layers * config.d_model * seq_len

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> ModelOutput:
        """input_ids: int64 (B, S), S <= max_seq_len. labels: the same shape, usually input_ids itself.

        The model shifts the labels: position s predicts labels[:, s + 1]. Do not shift them yourself. -100 is ignored.
        Raises ValueError for any other shape and for a sequence longer than max_seq_len.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels: expected the shape of input_ids, {tuple(input_ids.shape)}, but got {tuple(labels.shape)}"
            )
        if labels is not None and labels.dtype != torch.int64:
            raise ValueError(f"labels: expected int64, but got {labels.dtype}; call .long()")
        x, layers = self.hidden_states(input_ids)
        tokens_per_expert_LE = None
        targets = None if labels is None else F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous().flatten()
        if not self.config.dense:
            z_loss_L, probabilities_LE, tokens_per_expert_LE = (torch.stack(x) for x in zip(*layers, strict=True))
        tokens_per_expert_LE, num_tokens = self._count_globally(tokens_per_expert_LE, targets)
        if self.config.dense:
            z_loss, balance_loss = x.new_zeros(2, dtype=torch.float32)
        else:
            z_loss, balance_loss = z_loss_L.sum(), compute_balance_loss(probabilities_LE, tokens_per_expert_LE).sum()
        if targets is None:
            return ModelOutput(None, self.head(x), None, z_loss, balance_loss, tokens_per_expert_LE)
        cross_entropy = ops.linear_cross_entropy(x.flatten(0, 1), self.embedding, targets, num_tokens=num_tokens)
        loss = cross_entropy + self.config.z_loss_coef * z_loss + self.config.balance_loss_coef * balance_loss
        return ModelOutput(loss, None, cross_entropy, z_loss, balance_loss, tokens_per_expert_LE)

    def _count_globally(self, tokens_per_expert_LE: Tensor | None, targets: Tensor | None):
        """Return the tokens per expert of all ranks, and the mean number of targets per rank (None: this rank's)."""
        if self.data_parallel_group is None:
            return tokens_per_expert_LE, None
        num_targets = (
            self.embedding.new_zeros(1, dtype=torch.int64) if targets is None else (targets != -100).sum()[None]
        )
        parts = [num_targets] if tokens_per_expert_LE is None else [num_targets, tokens_per_expert_LE.flatten()]
        counts = torch.cat(parts)
        dist.all_reduce(counts, group=self.data_parallel_group)
        num_tokens = counts[0] / self.data_parallel_group.size()
        return None if tokens_per_expert_LE is None else counts[1:].view_as(tokens_per_expert_LE), num_tokens

    def hidden_states(self, input_ids: Tensor, cache: KVCache | None = None) -> tuple[Tensor, list[MoEStats]]:
        """Return the final norm's output (B, S, D) and the router statistics of each MoE layer.

        With a cache, input_ids are the positions that follow the cached ones, and are added to the cache.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected shape (batch, sequence), but got {tuple(input_ids.shape)}")
        start = cache.length if cache else 0
        end = start + input_ids.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(f"a sequence of {end} tokens is longer than the model's {self.config.max_seq_len}")
        cos_SC, sin_SC = self.cos_SC[start:end], self.sin_SC[start:end]
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        dtype, layers = self.compute_dtype, []
        if cache is None:  # a cache has the compute dtype
            dtype = autocast_dtype(input_ids.device) or dtype
        with no_autocast(input_ids.device):
            x = F.embedding(input_ids, self.embedding).to(dtype)
            for index, block in enumerate(self.blocks):
                if cache:
                    x, stats = block.layer(x, cos_SC, sin_SC, cache, index)
                else:
                    x, stats = block(x, cos_SC, sin_SC, recompute)
                if stats is not None:
                    layers.append(stats)
            x, _ = self.norm(x)
        if cache:
            cache.length = end
        return x, layers

    @contextmanager
    def accumulate_gradients(self):
        """Context manager for the micro-batches of a step, forward and backward.

        On Triton kernels without data parallelism, it saves a cast of the routed experts' weights and two passes over
        their gradients per micro-batch. Run each micro-batch's backward pass once, before the next forward pass. Inside
        the context, do not change the weights, call zero_grad or set .grad. Gradient hooks of the experts' weights do
        not run. Layers with frozen or 16-bit expert weights are unaffected.
        """
        moes = []
        # FSDP2 reduces gradients after the backward pass, so they cannot be added to .grad in it.
        if self.data_parallel_group is None and ops.uses_triton(self.embedding.device, self.compute_dtype, "moe"):
            layers = [block.moe for block in self.blocks if hasattr(block, "moe")]
            moes = [moe for moe in layers if moe.can_add_gradients()]
        try:
            for moe in moes:
                moe.allocate_buffers(self.compute_dtype)
            yield
        finally:
            for moe in moes:
                moe.expert_buffers = None

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) in the compute dtype of hidden states (..., D)."""
        if x.dim() == 1:
            # In a decoding step in bf16 on a CPU, mv is 1.4 times as fast as linear.
            return torch.mv(self.embedding.to(x.dtype), x)
        return F.linear(x, self.embedding.to(x.dtype))

    def compile_blocks(self):
        """Compile the blocks with torch.compile. MoE layers share a static graph, as do dense layers.

        Parameter names do not change.
        """
        for block in self.blocks:
            block.compile(dynamic=False, fullgraph=True)
