"""Checks a kernel backend on this device: compares a model's loss and gradients with the fp32 reference."""

import gc
import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .attention import best_sdpa
from .config import ModelConfig
from .device import reset_peak_memory
from .errors import InputError, is_out_of_memory
from .model import Acceleron

logger = logging.getLogger(__name__)

# A backend's error can be at most FACTOR times the reference's error in the same dtype, plus FLOOR. In bf16, the
# reference's error is about 0.01 for gradients, and 0 to 2e-5 for the loss, which is a single value.
FACTOR, FLOOR = 2.0, 1e-4
# Tokens for `require_correct_kernels`: enough for several tiles per persistent program of a grouped GEMM.
MAX_TOKENS = 16384


class GradientCheck(NamedTuple):
    """The tensor with the largest error relative to its tolerance: "loss", or a parameter name for its gradient.

    error: relative root mean square error; NaN if the tensor contains NaN.
    """

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def check_gradients(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    *,
    batch_size: int,
    seq_len: int,
    compiled: bool = False,
    checkpointing: bool = False,
    accumulate: bool = False,
) -> GradientCheck:
    """Compare loss and gradients of a random model and batch on `backend` with the fp32 reference.

    backend: as in `ops.set_backend`. accumulate: use `model.accumulate_gradients`. `compiled`, `checkpointing` and
    `accumulate` apply only to `backend`. Tokens are routed round-robin: in 16 bits, tokens near a tie would choose
    different experts, and that difference would hide a wrong kernel. Uses no global random generator and restores the
    backend. Needs memory for a second model with gradients, and for a set of gradients on the CPU. Kernel errors
    propagate.
    """
    generator = torch.Generator(device).manual_seed(0)
    model = _random_model(replace(config, debug_force_load_balance=True), device, generator)
    ids = torch.randint(config.vocab_size, (batch_size, seq_len), device=device, generator=generator)
    with best_sdpa(device):
        with ops.using_backend("reference", device):
            model.gradient_checkpointing = True
            truth = {name: value.cpu() for name, value in _loss_and_gradients(model, ids, torch.float32).items()}
            allowed = dict.fromkeys(truth, FLOOR)
            if dtype != torch.float32:
                plain = _errors(_loss_and_gradients(model, ids, dtype), truth)
                allowed = {name: FACTOR * error + FLOOR for name, error in plain.items()}
        with ops.using_backend(backend, device):
            model.gradient_checkpointing = checkpointing
            if compiled:
                model.compile_blocks()
            errors = _errors(_loss_and_gradients(model, ids, dtype, accumulate), truth)
    model.zero_grad(set_to_none=True)
    del model
    gc.collect()  # compiled blocks form a reference cycle
    ratios = {name: errors[name] / allowed[name] for name in truth}
    worst = max(ratios, key=lambda name: ratios[name] if ratios[name] >= 0 else float("inf"))  # NaN is the worst
    return GradientCheck(worst, errors[worst], allowed[worst])


def _random_model(config: ModelConfig, device: torch.device, generator: torch.Generator) -> Acceleron:
    """A freshly initialized model, but with random norm weights."""
    with torch.device("meta"):
        model = Acceleron(config)
    model.to_empty(device=device)
    model.build_rope()
    model.reset_parameters(generator)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.normal_(1, 0.1, generator=generator)
    return model.to(device)


def _loss_and_gradients(
    model: Acceleron, ids: Tensor, dtype: torch.dtype, accumulate: bool = False
) -> dict[str, Tensor]:
    model.compute_dtype = dtype
    model.zero_grad(set_to_none=True)
    with model.accumulate_gradients() if accumulate else nullcontext():
        loss = model(ids, labels=ids).loss
        loss.backward()
    return {"loss": loss.detach()} | {name: weight.grad for name, weight in model.named_parameters()}


def _errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative root mean square errors."""

    def error(result: Tensor, true: Tensor) -> float:
        true = true.to(result.device).double()
        return ((result.double() - true).norm() / true.norm()).item()

    return {name: error(results[name], truth[name]) for name in truth}


def require_correct_kernels(model: Acceleron, batch_size: int, seq_len: int, accumulate: bool):
    """Check `--kernels auto` before training, on one layer of each kind and at most MAX_TOKENS tokens.

    accumulate: whether a step has several micro-batches. Logs the result; does nothing if "auto" selects the reference.
    Raises InputError if an error exceeds its tolerance or a kernel fails; the message has a command that finds the
    failing op.
    """
    device, dtype = model.embedding.device, model.compute_dtype
    if not ops.uses_triton(device, dtype):
        return
    began = time.perf_counter()
    dense = min(1, model.config.num_dense_layers)
    config = replace(model.config, num_layers=1 + dense, num_dense_layers=dense)
    batch_size = max(1, min(batch_size, MAX_TOKENS // seq_len))
    try:
        shape = dict(batch_size=batch_size, seq_len=seq_len)
        check = check_gradients(config, device, dtype, "auto", **shape, accumulate=accumulate)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        result = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    else:
        name = check.name if check.name == "loss" else f"the gradient of {check.name}"
        result = f"{name} has an error of {check.error:.2g} (at most {check.allowed:.2g} is allowed)"
        if check.passed:
            logger.info(f"checked the kernels in {time.perf_counter() - began:.1f} s: worst case: {result}")
            reset_peak_memory(device)
            return
    raise InputError(
        f"the Triton kernels fail their self-check on this device: {result}; use --kernels reference; find the op with "
        "`python -m bench ops --check_only`"
    )
