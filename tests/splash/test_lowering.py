"""The kernels as they are lowered for a TPU that is not there: what is in the modules, and that libtpu takes
them.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir

from tests.splash.samples import CALLS
from tptrain.backends.xla.capture import compile_count
from tptrain.jaxside.splash import splash_backward_hlo, splash_forward_hlo

ROOT = Path(__file__).parents[2]
# The newest form of Mosaic's modules that libtpu 0.0.21 reads, which torch_xla 2.9 runs.
OLDEST_LIBTPUS_MOSAIC = 7


def kernel_operands(hlo: bytes) -> list[list[str]]:
    """The shapes of the operands of every kernel call: "bf16[3,8,512,80]"."""
    text = xla_client.XlaComputation(hlo).as_hlo_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    found = [re.search(r"operand_layout_constraints=\{(.*)\}$", line) for line in calls]
    return [re.findall(r"\w+\[[\d,]*\]", match[1]) for match in found if match]


@pytest.mark.parametrize("name", CALLS)
def test_keys_and_values_are_not_repeated(name: str) -> None:
    """Every kernel takes as many kv heads as there are, and all query heads in one call."""
    call = CALLS[name]
    kind = {"bfloat16": "bf16", "float32": "f32"}[call.dtype]
    query = f"{kind}[{call.batch},{call.heads},{call.tokens},{call.head_dim}]"
    key = f"{kind}[{call.batch},{call.kv_heads},{call.tokens},{call.head_dim}]"
    (forward,) = kernel_operands(splash_forward_hlo(call))
    assert (forward.count(query), forward.count(key)) == (1, 2)
    backward = kernel_operands(splash_backward_hlo(call))
    assert len(backward) == (1 if call.blocks.fused_backward else 2)
    for operands in backward:  # queries and the gradient of the result
        assert (operands.count(query), operands.count(key)) == (2, 2)


def test_the_backward_module_has_no_forward_kernel() -> None:
    hlo = splash_backward_hlo(CALLS["grouped"])
    assert b"splash_mha_dkv" in hlo and b"splash_mha_fwd" not in hlo


def test_lowering_compiles_nothing() -> None:
    call = CALLS["grouped"]
    count = compile_count()
    assert b"tpu_custom_call" in splash_forward_hlo(call)
    assert compile_count() == count
    assert splash_forward_hlo(call) is splash_forward_hlo(call), "one lowering per call"


def mosaic_versions(hlo: bytes) -> list[int]:
    """The versions of the Mosaic modules inside kernel calls."""
    versions = []
    for body in re.findall(rb'"body": ?"([A-Za-z0-9+/=]+)"', hlo):
        with ir.Context() as context:
            context.allow_unregistered_dialects = True
            module = ir.Module.parse(base64.b64decode(body))
            versions.append(module.operation.attributes["stable_mosaic.version"].value)
    return versions


def test_libtpu_of_the_run_reads_the_kernels() -> None:
    call = CALLS["grouped"]
    versions = mosaic_versions(splash_forward_hlo(call)) + mosaic_versions(splash_backward_hlo(call))
    assert len(versions) == 3
    assert max(versions) <= OLDEST_LIBTPUS_MOSAIC


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_compiles_the_kernels() -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "XLA_", "PJRT_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.splash.compile_kernels"],
        env={**kept, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 2 * len(CALLS)


def test_another_default_precision_does_not_leak() -> None:
    splash_forward_hlo(CALLS["float32"])
    assert jax.config.jax_default_matmul_precision is None
