"""Eight virtual devices in this process, opened before any test module touches torch_xla, JAX or autograd."""

from __future__ import annotations

import pytest

from tests.device_process import compile_quickly, open_devices

# The Pallas interpreter turns a kernel into a large program that runs for milliseconds here: most of the time
# would go into optimizing it.
compile_quickly()
open_devices(8)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Eight devices share the cores already; PyTorch's own threads would only stand in their way."""
    import torch

    torch.set_num_threads(1)
