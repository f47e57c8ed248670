"""Conversions in this process: JAX on one CPU device, no device of torch_xla, small tensors in one thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.convert.models import Run, write_run
from tptrain.backends.make import quiet_libraries
from tptrain.backends.xla.process import set_environment
from tptrain.jaxside.process import setup_jax
from tptrain.topology import parse_topology

quiet_libraries()
setup_jax(1)
set_environment(parse_topology("cpu-1"), os.environ)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the steps 10 and 20 and their moments, not to be changed."""
    return write_run(tmp_path_factory.mktemp("shared") / "run")


@pytest.fixture
def copied(shared_run: Run, tmp_path: Path) -> Callable[[], Run]:
    """A copy of that run, made when it is called."""
    return lambda: shared_run.copy(tmp_path / "run")
