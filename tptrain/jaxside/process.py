"""Setting up JAX beside torch_xla: on the CPU, with one host device per device of the mesh."""

from __future__ import annotations

import os


def setup_jax(num_devices: int) -> None:
    """Give JAX `num_devices` CPU devices; call it before anything uses JAX.

    On a TPU host torch_xla owns the chips and only one client may; JAX holds host copies alone.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")
    # jax's stubs do not know the option; setting it again after JAX has started would raise.
    if getattr(jax.config, "jax_num_cpu_devices") != num_devices:  # noqa: B009
        jax.config.update("jax_num_cpu_devices", num_devices)
