"""Compiles modules of experts with libtpu for one chip of a v5e slice; no TPU is needed.

A process of its own, because libtpu may abort it. Prints "compiled" for each.
"""

from __future__ import annotations

# First: it states the environment that libtpu wants.
from tests.splash.compile_kernels import compile_for  # isort: skip

from jax.experimental import topologies

from tests.experts.samples import CALLS
from tptrain.jaxside.device_order import topology_desc_arguments
from tptrain.jaxside.experts import experts_backward_hlo, experts_forward_hlo
from tptrain.topology import parse_topology

if __name__ == "__main__":
    slice_of_chips = topologies.get_topology_desc(**topology_desc_arguments(parse_topology("v5e-4")))
    # Half a minute each: all kinds of products, and those whose tiles are the largest.
    for name, lower in (("float32", experts_forward_hlo), ("large experts", experts_backward_hlo)):
        compile_for(slice_of_chips.devices[0], lower(CALLS[name]))
        print("compiled", name, lower.__name__, flush=True)
