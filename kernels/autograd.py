"""Autograd helpers for both backends: block second derivatives, disable autocast, and scale the gradient of a mean."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the torch.autocast dtype on this device, or None if autocast is disabled."""
    enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Context manager that disables autocast on this device."""
    return torch.autocast(device.type, enabled=False) if autocast_dtype(device) else nullcontext()


def split_mean(count: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mantissa in [0.5, 1) and a power of two with 1 / count = power / mantissa. Both are 0 if count is 0.

    Used for a mean that computes its gradients in the forward pass. Forward divides by the mantissa only, which avoids
    underflow in fp16. Backward multiplies by the power, which is exact. count: a floating-point scalar. It is below 1
    if data parallelism has fewer tokens than ranks.
    """
    mantissa = torch.frexp(count).mantissa
    return mantissa, mantissa / count.masked_fill(count == 0, 1)


def scale_gradient(grad: Tensor, factor: Tensor) -> Tensor:
    """Return grad * factor in grad's dtype. The scalar factor can exceed its range (a loss scale of 65,536 in fp16)."""
    # torch would round a zero-dimensional factor to grad's dtype first.
    return torch.mul(grad, factor[None], out=torch.empty_like(grad))


def first_order(op: str) -> Callable:
    """Decorator for the backward method of an autograd Function that has no second derivative.

    Backward raises RuntimeError under `create_graph=True`. torch's `once_differentiable` silently returns a constant if
    only the saved tensors require grad. The decorator also disables autocast.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def run(ctx, *grads):
            if torch.is_grad_enabled():
                raise RuntimeError(f"{op} has no second derivative: call backward without create_graph=True")
            device = next((grad.device for grad in grads if grad is not None), torch.device("meta"))
            with no_autocast(device):
                return backward(ctx, *grads)

        return run

    return decorate
