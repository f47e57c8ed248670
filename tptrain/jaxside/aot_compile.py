"""A process that compiles one program for a TPU slice that is not there.

`python -m tptrain.jaxside.aot_compile DIR` reads DIR/request.json and DIR/program.pb (a serialized
HloModuleProto) and writes DIR/result.json. libtpu can abort its process, so this is always a child;
`tptrain.dryrun.compiling` starts it, with the environment that libtpu wants and an XLA dump in DIR/dump.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax._src.interpreters import mlir as jax_mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies

from tptrain.jaxside.device_order import topology_desc_arguments
from tptrain.topology import Topology, parse_topology

# Of linux/prctl.h: the signal that a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1

REQUEST, PROGRAM, RESULT, DUMP = "request.json", "program.pb", "result.json", "dump"

# What MLIR calls the attributes of a function's arguments, one dictionary for each.
_ARGUMENTS = "arg_attrs"

# XLA's own Python bindings have no type stubs for what is used here.
_xla: Any = xla_client


class TopologyUnknownError(Exception):
    """libtpu cannot describe the slice; the message is its own."""


def compile_in(folder: Path) -> dict[str, Any]:
    """Compile what the folder asks for. Returns the result: memory statistics, or an error and its kind."""
    request = json.loads((folder / REQUEST).read_text())
    topology = parse_topology(request["topology"])
    try:
        devices = mesh_devices(topology, request["order"])
    except TopologyUnknownError as error:
        return {"error": "topology", "message": str(error)}
    client = devices[0].client
    result = {"build": client.platform_version}
    module = mlir_module((folder / PROGRAM).read_bytes(), request["donated"])
    started = time.monotonic()
    try:
        executable = client.compile(
            module, _xla._xla.DeviceList(tuple(devices)), _compile_options(devices, request["flags"])
        )
    except _xla.XlaRuntimeError as error:
        result |= {"error": "compile", "message": str(error)}
    else:
        result["memory"] = _memory(executable.get_compiled_memory_stats())
    result["compile_seconds"] = time.monotonic() - started
    # Linux gives it in KiB.
    result["peak_host_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result


def mesh_devices(topology: Topology, order: Sequence[int]) -> list[Any]:
    """libtpu's devices in mesh order, told apart by slice, coordinates and core."""
    # Without `wrap` libtpu compiles for a network that is open on all sides.
    arguments = {**topology_desc_arguments(topology), "wrap": topology.wraps}
    try:
        # jax's stubs know less of a device than libtpu's have.
        described: list[Any] = list(topologies.get_topology_desc(**arguments).devices)
    except _xla.XlaRuntimeError as error:
        raise TopologyUnknownError(str(error)) from error
    by_place = {
        (getattr(device, "slice_index", 0), tuple(device.coords), device.core_on_chip): device
        for device in described
    }
    expected = topology.devices()
    places = [
        (device.slice_index, device.coords, device.core)
        for device in (expected[position] for position in order)
    ]
    if len(described) != len(places) or set(places) != set(by_place):
        raise TopologyUnknownError(f"it describes {len(described)} devices where {len(places)} are expected")
    return [by_place[place] for place in places]


def mlir_module(proto: bytes, donated: Sequence[int]) -> bytes:
    """The module as libtpu is handed it. XLA's conversion drops donors, so they are stated again."""
    text: str = _xla._xla.mlir.xla_computation_to_mlir_module(_xla.XlaComputation(proto))
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(text)
        main: Any = ir.SymbolTable(module.operation)["main"]
        stated = main.attributes[_ARGUMENTS] if _ARGUMENTS in main.attributes else [{}] * len(main.arguments)
        attributes = [{item.name: item.attr for item in argument} for argument in stated]
        for number in donated:
            attributes[number]["jax.buffer_donor"] = ir.BoolAttr.get(True)
        main.attributes[_ARGUMENTS] = ir.ArrayAttr.get([ir.DictAttr.get(each) for each in attributes])
        # With locations, which hold the names of operations and kernels.
        return module.operation.get_asm(enable_debug_info=True).encode()


def _compile_options(devices: Sequence[Any], flags: Mapping[str, str]) -> Any:
    """Options of an SPMD program on these devices, whose layout of results the compiler may choose."""
    options = _xla.CompileOptions()
    options.num_replicas, options.num_partitions = 1, len(devices)
    options.env_option_overrides = list(flags.items())
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, len(devices)
    build.use_spmd_partitioning = True
    ids = np.array([[device.id for device in devices]])
    build.device_assignment = _xla.DeviceAssignment.create(ids)
    build.allow_spmd_sharding_propagation_to_parameters = [True]
    build.allow_spmd_sharding_propagation_to_output = [True]
    return options


def _memory(stats: Any) -> dict[str, int]:
    host = ("host_argument", "host_output", "host_temp")
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "aliased_bytes": stats.alias_size_in_bytes,
        "temporary_bytes": stats.temp_size_in_bytes,
        "generated_code_bytes": stats.generated_code_size_in_bytes,
        "host_bytes": sum(getattr(stats, f"{name}_size_in_bytes") for name in host)
        - stats.host_alias_size_in_bytes,
    }


def die_first() -> None:
    """Where the host runs out of memory, Linux is to end this process and not the one that waits for it."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")


def die_with_parent() -> None:
    """A compilation that nobody waits for any more is to end: the parent may be killed by any signal."""
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # on Linux
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            os._exit(1)


def main() -> None:
    die_first()
    die_with_parent()
    folder = Path(sys.argv[1])
    (folder / RESULT).write_text(json.dumps(compile_in(folder)))


if __name__ == "__main__":
    main()
