"""JAX on one virtual CPU device; no device of torch_xla is opened."""

from tptrain.jaxside.process import setup_jax

setup_jax(1)
