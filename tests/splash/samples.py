"""Calls of the kernel as one TPU device makes them; no two sizes are equal."""

from __future__ import annotations

from tptrain.config.kernels import SplashBlocks
from tptrain.jaxside.splash import SplashCall

BLOCKS = SplashBlocks(128, 256, 128)
ONE_KERNEL = SplashBlocks(128, 128, 128, fused_backward=True)

# A head dim that is no multiple of the lanes, and one that is.
CALLS = {
    "grouped": SplashCall(3, 512, 8, 2, 80, "bfloat16", 80**-0.5, None, None, BLOCKS, "tpu"),
    "window, cap, one backward kernel": SplashCall(
        2, 384, 6, 3, 128, "bfloat16", 0.1, 200, 30.0, ONE_KERNEL, "tpu"
    ),
    "float32": SplashCall(5, 256, 5, 1, 64, "float32", 0.125, None, None, BLOCKS, "tpu"),
}
