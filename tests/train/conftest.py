"""Whole runs on the plain-PyTorch backend."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors this small lose more time in handing work over than they gain from a second core."""
    torch.set_num_threads(1)
