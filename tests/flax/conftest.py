"""JAX on two virtual CPU devices beside plain PyTorch; no device of torch_xla is opened."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.device_process import compile_quickly
from tptrain.jaxside.process import setup_jax

compile_quickly()
setup_jax(2)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors lose more to handing work around than they gain from it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
