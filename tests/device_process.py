"""Opening virtual devices for a test process; a process has one number of devices for its whole life."""

from __future__ import annotations

import os

from tptrain.backends.make import quiet_libraries
from tptrain.topology import parse_topology


def compile_quickly() -> None:
    """Have XLA leave out LLVM's optimizations for CPUs, here and in child processes.

    It comes before a device is opened. Programs of small tensors run for milliseconds: most of a test's time
    would go into optimizing them.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()


def open_devices(count: int) -> None:
    """Open `count` virtual CPU devices for torch_xla and JAX.

    It comes before anything else: PyTorch's autograd counts the kinds of devices at its first backward pass.
    """
    quiet_libraries()
    from tptrain.backends.xla.process import setup_process, use_full_float32
    from tptrain.jaxside.process import setup_jax

    setup_jax(count)
    setup_process(parse_topology(f"cpu-{count}"))
    use_full_float32()
