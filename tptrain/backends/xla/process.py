"""Setting up this process for torch_xla: once, explicitly, and before anything touches a device."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping

from tptrain.errors import refuse
from tptrain.topology import Topology


def set_environment(
    topology: Topology, environ: MutableMapping[str, str], tpu_flags: Mapping[str, str] | None = None
) -> None:
    """State in the environment which devices torch_xla is to open, and how the TPU compiler is to compile.

    tpu_flags: by name, without dashes; they stand behind those that are in the environment already.
    torch_xla owns the chips; JAX, which writes the checkpoints, stays on the CPU beside it.
    """
    environ["JAX_PLATFORMS"] = "cpu"
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if topology.chip.platform == "cpu":
        environ["PJRT_DEVICE"] = "CPU"
        environ["CPU_NUM_DEVICES"] = str(topology.num_devices)
        return
    environ.setdefault("PJRT_DEVICE", "TPU")
    flags = [f"--{name}={value}" for name, value in (tpu_flags or {}).items()]
    given = environ.get("LIBTPU_INIT_ARGS", "").split()
    if flags and not set(flags) <= set(given):
        environ["LIBTPU_INIT_ARGS"] = " ".join([*given, *flags])


def setup_process(topology: Topology) -> None:
    """Open the devices of `topology` for SPMD. Raises when the runtime has another number of them."""
    set_environment(topology, os.environ)
    import torch_xla.runtime as xr

    if not xr.is_spmd():
        xr.use_spmd()
    found = xr.global_runtime_device_count()
    if found != topology.num_devices:
        rule = "must have as many devices as the runtime has opened"
        other = f"topology {topology.num_devices} devices, runtime {found}"
        raise refuse("topology", topology.name, rule, other, "the topology that this machine belongs to")


def use_full_float32() -> None:
    """Have float32 matrix products computed in float32; the TPU's own default rounds inputs to bfloat16."""
    import torch_xla.backends

    # It warns about being called at all, since the runtime has set a default before.
    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)
    torch_xla.backends.set_mat_mul_precision("highest")
