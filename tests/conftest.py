"""Every test starts with one intra-op thread and leaves no thread pool setting behind."""

import pytest
import torch

from zerolite import kernels


@pytest.fixture(autouse=True)
def threads():
    torch.set_num_threads(1)
    before = kernels.threads()
    yield
    kernels.set_threads(before)
