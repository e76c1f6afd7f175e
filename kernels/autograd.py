"""What the autograd Functions of both kernel backends share: no second derivative, no autocast, a loss's scale."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of torch.autocast on this device, None where it is off."""
    enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast on this device."""
    return torch.autocast(device.type, enabled=False) if autocast_dtype(device) else nullcontext()


def split_mean(count: Tensor) -> tuple[Tensor, Tensor]:
    """A mantissa in [0.5, 1) and a power of two: 1 / count = power / mantissa. Both are 0 for a count of 0.

    For a loss whose forward pass forms its gradients. Forward divides by the mantissa alone, so that gradients keep
    clear of fp16's smallest values; backward multiplies by the power, which rounds nothing. count: a floating scalar.
    """
    mantissa = torch.frexp(count).mantissa
    return mantissa, mantissa / count.clamp(min=1)


def scale_gradient(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor in grad's dtype, where the scalar factor may be outside its range, as a loss scale is in fp16."""
    # A tensor of one axis keeps its precision, a scalar does not.
    return torch.mul(grad, factor[None], out=torch.empty_like(grad))


def first_order(op: str) -> Callable:
    """Decorator of the backward of an autograd Function that has no second derivative.

    Raises RuntimeError under `create_graph=True`. torch's `once_differentiable` does not: it looks at the gradients of
    the outputs alone, and returns a constant. Autocast, which is on if `backward()` is called in its context, is off.
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
