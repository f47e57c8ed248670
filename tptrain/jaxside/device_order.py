"""The order of a mesh's devices, as JAX lays meshes out on TPUs.

On a TPU slice the i-th place of a mesh is not the i-th device: JAX assigns mesh axes to the dimensions of
the chips' network. tptrain computes that order with JAX's own `mesh_utils` on stand-in devices built from
the topology's coordinates, so it needs no TPU, no libtpu and no JAX backend, and gives torch_xla the same
mesh that a JAX program would have. Devices are told apart by (slice, coordinates, core), never by id: ids,
list positions and torch_xla's ordinals are three different numberings.

One exception: the ring in which JAX lays out a single tray of v5e or v6e (4 or 8 chips). On a mesh of several
axes it is an order that torch_xla cannot use (`tptrain.mesh.order`), and ascending ids take its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jax.experimental import mesh_utils

from tptrain.errors import Problem, ProblemsError, raise_if_any, refuse
from tptrain.mesh.order import mixed_replicas
from tptrain.topology import DeviceCoords, Shape, Topology

Place = tuple[int, Shape, int]


@dataclass(frozen=True)
class AttachedDevice:
    """A device of the running job.

    ordinal: torch_xla's global ordinal, the number its meshes and shardings are made of.
    """

    ordinal: int
    slice_index: int
    coords: Shape
    core: int


@dataclass(frozen=True)
class _StandIn:
    """What `mesh_utils` reads of a JAX device, and the device's position in the topology."""

    position: int
    id: int
    platform: str
    device_kind: str
    coords: Shape
    core_on_chip: int
    process_index: int
    slice_index: int


def device_order(topology: Topology, ici_sizes: Sequence[int], dcn_sizes: Sequence[int]) -> tuple[int, ...]:
    """Positions in `topology.devices()` in mesh order (row-major, last axis fastest).

    ici_sizes: size of each mesh axis within a slice; the product is the number of devices per slice. As in
               JAX, later axes are taken to communicate more and get the better part of the network.
    dcn_sizes: size of each mesh axis over slices; the product is the number of slices. The mesh's size
               along an axis is ici * dcn, slices being the outer part.

    The rule: `create_device_mesh` (or `create_hybrid_device_mesh` for several slices) with its default
    arguments; where it refuses because an axis would have to share a dimension of the network with another
    one (v6e 16x16 as 64 x 4), the same call with allow_split_physical_axes=True. An order in which XLA would
    mix up replicas for torch_xla gives way to ascending ids within each slice. A JAX program has to follow
    the same rule to get the same mesh. Virtual CPU devices keep their order.
    """
    _check_sizes(topology, ici_sizes, dcn_sizes)
    devices = _stand_ins(topology)
    try:
        mesh = _create_mesh(ici_sizes, dcn_sizes, devices, split=False)
    except NotImplementedError:
        mesh = _create_split_mesh(topology, ici_sizes, dcn_sizes, devices)
    # torch_xla's ordinals are ranks of the ids.
    if mixed_replicas([device.id for device in mesh.flat], _numbered(mesh.shape)):
        mesh = _ascending_mesh(ici_sizes, dcn_sizes, devices)
    return tuple(device.position for device in mesh.flat)


def match_devices(
    order_devices: Sequence[DeviceCoords], attached: Sequence[Mapping[str, Any] | AttachedDevice]
) -> tuple[int, ...]:
    """Ordinals of the attached devices in mesh order, for torch_xla's `Mesh`.

    order_devices: the topology's devices in mesh order: `devices = topology.devices()`, then
                   `[devices[i] for i in device_order(topology, ...)]`.
    attached:      `xr.global_runtime_device_attributes()` of torch_xla, in any order, or the same as
                   AttachedDevice. Raises ProblemsError if these are not exactly the topology's devices.
    """
    by_place: dict[Place, int] = {}
    for device in (_attached_device(item) for item in attached):
        place = (device.slice_index, device.coords, device.core)
        if place in by_place:
            other = f"ordinals {by_place[place]} and {device.ordinal}"
            rule = "is the place of two attached devices"
            raise refuse(
                "topology", _place_text(place), rule, other, "a runtime that has one device per chip"
            )
        by_place[place] = device.ordinal
    places = [(device.slice_index, device.coords, device.core) for device in order_devices]
    if set(places) != set(by_place):
        raise _mismatch(places, list(by_place))
    return tuple(by_place[place] for place in places)


def topology_desc_arguments(topology: Topology) -> dict[str, Any]:
    """Arguments of `jax.experimental.topologies.get_topology_desc` that describe this topology to libtpu.

    The devices it then returns are `topology.devices()`, in that order. Refuses virtual CPU devices.
    """
    chip = topology.chip
    if chip.platform != "tpu":
        rule = "must be a TPU topology to be compiled for by libtpu"
        raise refuse("topology", topology.name, rule, f"platform={chip.platform}", "a TPU's, as v5p-32")
    arguments: dict[str, Any] = {
        "platform": "tpu",
        "topology_name": f"{chip.name}:{topology.shape_text}",
        "num_slices": topology.num_slices,
        "chips_per_host_bounds": topology.host_shape,
    }
    if chip.name == "v4":
        # By default libtpu makes each of a v4 chip's two TensorCores a device.
        arguments["chip_config_name"] = "megacore"
    return arguments


_SHOWN_PLACES = 4


def _check_sizes(topology: Topology, ici_sizes: Sequence[int], dcn_sizes: Sequence[int]) -> None:
    problems = []
    for name, sizes, total, what in (
        ("mesh", ici_sizes, topology.devices_per_slice, "devices per slice"),
        ("mesh.dcn", dcn_sizes, topology.num_slices, "slices"),
    ):
        if any(size < 1 for size in sizes) or math.prod(sizes) != total:
            text = "x".join(str(size) for size in sizes)
            rule = f"sizes must be above 0 and multiply to the number of {what}"
            fix = f"sizes whose product is {total}"
            problems.append(Problem(name, text, rule, f"{what}={total} in {topology.name}", fix))
    if len(ici_sizes) != len(dcn_sizes):
        rule = "must give every axis a size within a slice and a size over slices"
        other = f"{len(ici_sizes)} and {len(dcn_sizes)} axes"
        fix = f"{len(ici_sizes)} sizes, 1 where an axis stays within slices"
        problems.append(Problem("mesh.dcn", tuple(dcn_sizes), rule, other, fix))
    raise_if_any(problems)


def _stand_ins(topology: Topology) -> list[_StandIn]:
    return [
        _StandIn(
            position=position,
            id=device.id,
            platform=topology.chip.platform,
            device_kind=topology.chip.device_kind,
            coords=device.coords,
            core_on_chip=device.core,
            process_index=device.process_index,
            slice_index=device.slice_index,
        )
        for position, device in enumerate(topology.devices())
    ]


def _create_mesh(ici: Sequence[int], dcn: Sequence[int], devices: list[_StandIn], split: bool) -> Any:
    """JAX's array of devices for that mesh; sizes over slices are all 1 where there is one slice."""
    if math.prod(dcn) == 1:
        return mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=split)
    return mesh_utils.create_hybrid_device_mesh(ici, dcn, devices, allow_split_physical_axes=split)


def _create_split_mesh(
    topology: Topology, ici_sizes: Sequence[int], dcn_sizes: Sequence[int], devices: list[_StandIn]
) -> Any:
    try:
        return _create_mesh(ici_sizes, dcn_sizes, devices, split=True)
    except (NotImplementedError, ValueError, AssertionError) as error:
        value = "x".join(str(size) for size in ici_sizes)
        rule = f"JAX finds no mesh of that shape on the network of a slice: {error}"
        other = f"a slice is {topology.shape_text} chips"
        fix = "axis sizes that are products of whole sides of the slice"
        raise refuse("mesh", value, rule, other, fix) from error


def _numbered(sizes: Sequence[int]) -> dict[str, int]:
    """Axis sizes by name, where axes have no names."""
    return {str(axis): size for axis, size in enumerate(sizes)}


def _ascending_mesh(ici: Sequence[int], dcn: Sequence[int], devices: list[_StandIn]) -> Any:
    """The mesh in which ids ascend within each slice, slices being the outer part of every axis."""
    flat = np.array(sorted(devices, key=lambda device: (device.slice_index, device.id)), dtype=object)
    interleaved = [axis for i in range(len(ici)) for axis in (i, len(ici) + i)]
    sizes = [inner * outer for inner, outer in zip(ici, dcn, strict=True)]
    return flat.reshape(*dcn, *ici).transpose(interleaved).reshape(sizes)


def _attached_device(item: Mapping[str, Any] | AttachedDevice) -> AttachedDevice:
    """One device from torch_xla's attributes.

    The ordinal is the number in `name` ("TPU:5"); the position in torch_xla's list is another numbering.
    torch_xla leaves `slice_index` out when there is one slice, and gives CPU devices nothing but a name:
    they have no coordinates, so their ordinal stands in.
    """
    if isinstance(item, AttachedDevice):
        return item
    kind, _, number = str(item.get("name", "")).partition(":")
    if not number.isdecimal():
        rule = "must say its ordinal in its name"
        raise refuse("topology", dict(item), rule, f"name={item.get('name')!r}", "a name such as TPU:0")
    ordinal = int(number)
    if kind == "CPU" and "coords" not in item:
        return AttachedDevice(ordinal, 0, (ordinal, 0, 0), 0)
    coords = tuple(item.get("coords", ()))
    if len(coords) != 3:
        rule = "must have three coordinates to be matched with a topology"
        raise refuse("topology", item["name"], rule, f"coords={coords}", "a TPU runtime, or cpu-8 on CPU")
    slice_index, core = item.get("slice_index", 0), item.get("core_on_chip", 0)
    return AttachedDevice(ordinal, slice_index, cast(Shape, coords), core)


def _mismatch(places: Sequence[Place], attached: Sequence[Place]) -> ProblemsError:
    """The error for attached devices that are not the topology's."""
    missing = sorted(set(places) - set(attached))
    extra = sorted(set(attached) - set(places))
    value = f"{_extent(places)} ({len(places)} devices)"
    rule = "must be exactly the devices that are attached"
    other = f"missing: {_places_text(missing)}; attached but not in it: {_places_text(extra)}"
    fix = f"the topology that is attached, {_extent(attached)} ({len(attached)} devices)"
    if missing and not extra:
        fix += ", or start again with every host of the job up"
    return refuse("topology", value, rule, other, fix)


def _extent(places: Sequence[Place]) -> str:
    """How many slices of which shape these places span."""
    if not places:
        return "no device"
    slices = len({place[0] for place in places})
    shape = "x".join(str(1 + max(place[1][axis] for place in places)) for axis in range(3))
    return f"{slices} slice{'s' if slices > 1 else ''} of {shape} chips"


def _places_text(places: Sequence[Place]) -> str:
    shown = ", ".join(_place_text(place) for place in places[:_SHOWN_PLACES])
    return f"{shown}, ... ({len(places)} in all)" if len(places) > _SHOWN_PLACES else shown or "none"


def _place_text(place: Place) -> str:
    slice_index, (x, y, z), core = place
    return f"slice {slice_index} chip ({x}, {y}, {z}) core {core}"
