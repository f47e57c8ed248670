"""Opening virtual devices for a test process; a process has one number of devices for its whole life."""

from __future__ import annotations

from tptrain.backends.make import quiet_libraries
from tptrain.topology import parse_topology


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
