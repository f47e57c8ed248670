"""Compiles the kernels' modules with libtpu for one chip of a v5e slice; no TPU is needed.

A process of its own, because libtpu may abort it. Prints "compiled" for every module.
"""

from __future__ import annotations

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    # libtpu asks the metadata server of a TPU VM what it runs on unless it is told.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Another process may hold libtpu's lock file; nothing here touches a device.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import numpy as np
from jax._src.lib import xla_client
from jax.experimental import topologies

from tests.splash.samples import CALLS
from tptrain.jaxside.device_order import topology_desc_arguments
from tptrain.jaxside.splash import splash_backward_hlo, splash_forward_hlo
from tptrain.topology import parse_topology


def compile_for(device: object, hlo: bytes) -> None:
    module = xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(hlo))
    options = xla_client.CompileOptions()
    assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))  # type: ignore[attr-defined]
    options.executable_build_options.device_assignment = assignment
    devices = xla_client._xla.DeviceList((device,))
    device.client.compile(module.encode(), devices, options)  # type: ignore[attr-defined]


if __name__ == "__main__":
    slice_of_chips = topologies.get_topology_desc(**topology_desc_arguments(parse_topology("v5e-4")))
    for name, call in CALLS.items():
        for lower in (splash_forward_hlo, splash_backward_hlo):
            compile_for(slice_of_chips.devices[0], lower(call))
            print("compiled", name, lower.__name__, flush=True)
