"""The backend of a plan. The frameworks are imported here and not before, so planning stays light."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from tptrain.backends.base import Backend
from tptrain.backends.xla.process import set_environment
from tptrain.chips import CPU
from tptrain.config.plan import Plan
from tptrain.topology import Topology

if TYPE_CHECKING:
    from tptrain.backends.xla.placeholders import PlaceholderBackend


def prepare_process(plan: Plan) -> None:
    """State in this process's environment which devices the plan uses; nothing is opened yet.

    Call it before transformers is imported, which asks torch_xla for a device where that is installed.
    """
    quiet_libraries()
    if plan.recipe.backend == "xla":
        set_environment(plan.topology, os.environ, plan.tpu_flags)


def make_backend(plan: Plan) -> Backend:
    """Open the devices of the plan and return the backend on them; once per process.

    Raises ProblemsError when the devices are not those of the plan's topology.
    """
    prepare_process(plan)
    from tptrain.jaxside.process import setup_jax

    setup_jax(plan.num_devices)
    if plan.recipe.backend == "torch":
        from tptrain.backends.torch_backend import TorchBackend

        return TorchBackend(plan)
    from tptrain.backends.xla.process import setup_process, use_full_float32

    setup_process(plan.topology)
    if plan.recipe.precision.compute == "float32":
        use_full_float32()
    from tptrain.backends.xla.backend import XlaBackend

    return XlaBackend(plan, runtime_order(plan))


def make_placeholder_backend(plan: Plan) -> PlaceholderBackend:
    """The backend that traces a plan of any slice on virtual CPU devices; once per process.

    Needs the XLA backend. The devices hold no data, so hundreds of them cost little.
    """
    from tptrain.jaxside.process import setup_jax

    quiet_libraries()
    devices = Topology(CPU, (countable(plan.num_devices), 1, 1))
    set_environment(devices, os.environ)
    setup_jax(1)  # kernels are lowered for one device
    from tptrain.backends.xla.process import setup_process, use_full_float32

    setup_process(devices)
    if plan.recipe.precision.compute == "float32":
        use_full_float32()
    from tptrain.backends.xla.placeholders import PlaceholderBackend, count_devices_as

    count_devices_as(plan.num_devices)
    return PlaceholderBackend(plan)


def countable(devices: int) -> int:
    """The least number of virtual devices, at least `devices`, that PyTorch's autograd can count.

    It keeps the count in 8 bits with a sign: 128 to 256 devices look like none, 257 like one: enough.
    """
    while not 1 <= devices % 256 <= 127:
        devices += 1
    return devices


def quiet_libraries() -> None:
    """Silence messages that a user can do nothing about; call it before the libraries are imported.

    XLA announces the end of GSPMD at every compile, and JAX would set the level that lets it.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") < "2":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    logging.getLogger("absl").setLevel(logging.ERROR)


def runtime_order(plan: Plan) -> tuple[int, ...]:
    """The runtime's ordinals in mesh order: JAX's order of the topology, found again by coordinates."""
    import torch_xla.runtime as xr

    from tptrain.jaxside.device_order import device_order, match_devices

    devices = plan.topology.devices()
    ordered = [devices[i] for i in device_order(plan.topology, plan.mesh.ici, plan.mesh.dcn)]
    return match_devices(ordered, xr.global_runtime_device_attributes())
