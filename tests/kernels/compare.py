"""What the kernels' tests share: where they run, their data, and the error that is compared."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A kernel may be this many times as far from float64's result as the reference is in the same dtype.
FACTOR = dict.fromkeys(DTYPES, 1.5)
if DEVICE == "cpu":
    FACTOR[torch.bfloat16] *= 2  # the interpreter cuts off where a GPU rounds, and tests the rest of the path


def error(result, truth) -> float:
    """Relative root mean square. A result of zeros has error 1."""
    return ((result.double() - truth).norm() / truth.norm()).item()


def randn(*shape, seed=0, dtype=torch.float32):
    """Unit-scale values, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
