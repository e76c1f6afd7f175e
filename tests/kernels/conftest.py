import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory holds NaN, and an op without a deterministic implementation raises."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
