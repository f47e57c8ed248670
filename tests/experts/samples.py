"""Calls as one TPU device makes them: tiles of every kind, and the most that vector memory must hold."""

from __future__ import annotations

from tptrain.jaxside.experts import ExpertsCall

CALLS = {
    # An expert's matrix stays while its rows go by; some experts are held elsewhere.
    "small experts": ExpertsCall(600, 4, 6, 12, 2048, 1024, "bfloat16", "silu", "tpu"),
    # Matrices in tiles along both dims, large tiles of rows, and a width without whole registers.
    "large experts": ExpertsCall(4096, 2, 3, 3, 4096, 2200, "bfloat16", "gelu_pytorch_tanh", "tpu"),
    "float32": ExpertsCall(1024, 2, 2, 2, 1024, 512, "float32", "silu", "tpu"),
}
