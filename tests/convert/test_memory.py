"""Memory does not grow with the model; measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MIB = 2**20

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def test_a_model_converts_where_it_does_not_fit_into_memory(tmp_path: Path) -> None:
    """640 MB of float32: under a limit of 400 MiB to a folder, and with no more than 450 MiB back."""
    command = [sys.executable, "-m", "tests.convert.memory_limit", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["to_hf"] == 0
    assert "can't allocate memory" in found["whole"], "so the limit is one that a whole load meets"
    assert "large-again/checkpoints/0: 639.7 MB of weights in float32" in done.stdout
    assert 64 * MIB < found["from_hf_growth"] < 450 * MIB
