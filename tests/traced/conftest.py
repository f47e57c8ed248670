"""Eight virtual devices whose compiler writes down every program before it optimizes it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.device_process import open_devices

_DUMP = tempfile.TemporaryDirectory(prefix="tptrain-dump-")
# Read once, when the first device is opened.
os.environ["XLA_FLAGS"] = (
    f"--xla_dump_to={_DUMP.name} --xla_dump_hlo_as_proto=true --xla_dump_hlo_pass_re=none"
    " --xla_dump_hlo_module_re=SyncTensorsGraph.*"
)
open_devices(8)


@pytest.fixture(scope="session")
def dump() -> Path:
    """The folder that compiled programs are written to."""
    return Path(_DUMP.name)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Eight devices share the cores already."""
    import torch

    torch.set_num_threads(1)
