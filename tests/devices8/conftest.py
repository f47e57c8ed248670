"""Eight virtual devices in this process, opened before any test module touches torch_xla or JAX."""

from __future__ import annotations

import pytest

from tptrain.backends.make import quiet_libraries
from tptrain.backends.xla.process import setup_process
from tptrain.jaxside.process import setup_jax
from tptrain.topology import parse_topology

# Not in a fixture: test modules import both frameworks, and by then the environment must be set.
quiet_libraries()
setup_jax(8)
setup_process(parse_topology("cpu-8"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Eight devices share the cores already; PyTorch's own threads would only stand in their way."""
    import torch

    torch.set_num_threads(1)
