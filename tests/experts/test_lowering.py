"""The modules as they are lowered for a TPU that is not there: what is in them; libtpu takes them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jax._src.lib import xla_client

from tests.experts.samples import CALLS
from tests.splash.test_lowering import OLDEST_LIBTPUS_MOSAIC, mosaic_versions
from tptrain.jaxside.experts import experts_backward_hlo, experts_forward_hlo

ROOT = Path(__file__).parents[2]


def test_libtpu_of_the_run_reads_the_kernels() -> None:
    call = CALLS["small experts"]
    versions = mosaic_versions(experts_forward_hlo(call)) + mosaic_versions(experts_backward_hlo(call))
    assert versions and max(versions) <= OLDEST_LIBTPUS_MOSAIC


@pytest.mark.parametrize("name", CALLS)
def test_matrices_are_neither_copied_nor_turned(name: str) -> None:
    """Every kernel reads gate, up and down as they are stored."""
    call = CALLS[name]
    stored = {each.shape for each in call.matrices}
    turned = {(experts, columns, rows) for experts, rows, columns in stored} - stored
    for hlo in (experts_forward_hlo(call), experts_backward_hlo(call)):
        text = xla_client.XlaComputation(hlo).as_hlo_text()
        shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\[(\d+,\d+,\d+)\]", text)}
        assert stored <= shapes | stored and not turned & shapes
        for shape in stored:
            dims = ",".join(map(str, shape))
            assert not re.search(rf"\[{dims}\]\S* (transpose|copy|convert)\(", text)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_compiles_the_modules() -> None:
    """With 16 MiB of scoped vector memory, its own choice: the largest tiles fit."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "XLA_", "PJRT_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.experts.compile_kernels"],
        env={**kept, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 2
