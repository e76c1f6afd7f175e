import pytest
import torch
from compare import DEVICE

from acceleron import ops


@pytest.fixture(autouse=True)
def poison_uninitialized_memory():
    """Fill uninitialized memory with NaN, and make ops without a deterministic implementation raise."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    with ops.using_backend(request.param, torch.device(DEVICE)):
        yield request.param
