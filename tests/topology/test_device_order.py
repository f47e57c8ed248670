"""Mesh orders against libtpu's own devices, the golden files made from them, and torch_xla's numbering.

The golden files come from tools/make_device_order_goldens.py. Where libtpu is installed, that tool runs
again in a child process (libtpu can abort its process) and must give the same.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tptrain.errors import ProblemsError
from tptrain.jaxside.device_order import (
    AttachedDevice,
    device_order,
    match_devices,
    topology_desc_arguments,
)
from tptrain.mesh.order import mixed_replicas
from tptrain.topology import Topology, parse_topology

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_DIR = ROOT / "tests" / "golden" / "device_order"
NAMES = sorted(path.stem for path in GOLDEN_DIR.glob("*.json"))


@cache
def golden(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN_DIR / f"{name}.json").read_text(encoding="utf-8"))
    return content


def meshes(name: str) -> list[tuple[tuple[int, ...], tuple[int, ...], bool, list[int]]]:
    orders = golden(name)["orders"]
    return [(tuple(one["ici"]), tuple(one["dcn"]), one["split"], one["order"]) for one in orders]


MESHES = [(name, *mesh) for name in NAMES for mesh in meshes(name)]


def devices_as_golden(topology: Topology) -> list[list[Any]]:
    return [
        [device.slice_index, list(device.coords), device.core, device.process_index, device.id]
        for device in topology.devices()
    ]


def places(devices: list[list[Any]]) -> list[tuple[Any, ...]]:
    """(slice, coordinates, core) of golden devices."""
    return [(slice_index, tuple(coords), core) for slice_index, coords, core, _, _ in devices]


def test_the_goldens_cover_every_chip_and_several_slices() -> None:
    assert {"v4-32", "v5p-32", "v5p-256", "v5e-16", "v6e-256", "2xv5p-32"} <= set(NAMES)
    assert all(len(meshes(name)) >= 3 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_devices_are_libtpus(name: str) -> None:
    topology = parse_topology(name)
    assert devices_as_golden(topology) == golden(name)["devices"]
    assert [topology.chip.device_kind] == golden(name)["device_kind"]
    arguments = json.loads(json.dumps(topology_desc_arguments(topology)))
    assert arguments == golden(name)["get_topology_desc"]


@pytest.mark.parametrize(("name", "ici", "dcn", "split", "order"), MESHES)
def test_order_is_that_of_jax_on_libtpus_devices(
    name: str, ici: tuple[int, ...], dcn: tuple[int, ...], split: bool, order: list[int]
) -> None:
    topology = parse_topology(name)
    ours = device_order(topology, ici, dcn)
    real = places(golden(name)["devices"])
    mine = places(devices_as_golden(topology))
    if name == "v6e-8" and len(ici) > 1:
        order = list(range(8))  # the ring of one tray mixes up replicas
    assert [mine[position] for position in ours] == [real[position] for position in order]


def test_orders_are_real_permutations() -> None:
    """But for a 2x2x2 mesh on 2x2x2 chips. Without this, a stub that keeps the order would pass."""
    identities = [(name, ici) for name, ici, _, _, order in MESHES if order == list(range(len(order)))]
    assert identities == [("v5p-16", (2, 2, 2))]
    assert device_order(parse_topology("v5p-32"), (16,), (1,))[:10] == (0, 4, 8, 12, 2, 6, 10, 14, 1, 5)
    assert device_order(parse_topology("v5e-16"), (4, 4), (1, 1))[:8] == (0, 1, 4, 5, 2, 3, 6, 7)


def test_a_side_is_split_exactly_where_jax_refuses_otherwise() -> None:
    split = {(name, ici) for name, ici, _, is_split, _ in MESHES if is_split}
    assert ("v6e-256", (64, 4)) in split
    assert ("v6e-256", (16, 16)) not in split
    assert ("v5p-32", (16,)) not in split


@pytest.mark.parametrize("name", NAMES)
def test_axes_of_size_one_do_not_change_the_order(name: str) -> None:
    """A run's mesh always has all axes; a JAX program may leave out those of size one."""
    topology = parse_topology(name)
    for ici, dcn, _, _ in meshes(name):
        padded = device_order(topology, (1, *ici[:1], 1, *ici[1:], 1), (1, *dcn[:1], 1, *dcn[1:], 1))
        assert padded == device_order(topology, ici, dcn)


RINGS = {"v5e-4": (0, 1, 3, 2), "v6e-8": (0, 1, 2, 3, 7, 6, 5, 4)}


@pytest.mark.parametrize("name", RINGS)
def test_a_ring_of_one_tray_serves_one_axis_only(name: str) -> None:
    """On several axes, sorted replicas of JAX's ring stand differently in different groups."""
    ring, topology = RINGS[name], parse_topology(name)
    chips, half = len(ring), len(ring) // 2
    assert mixed_replicas(ring, {"fsdp": half, "tensor": 2}) == ("tensor",)
    assert device_order(topology, (chips,), (1,)) == device_order(topology, (1, chips), (1, 1)) == ring
    assert device_order(topology, (half, 2), (1, 1)) == device_order(topology, (2, half), (1, 1))
    assert device_order(topology, (half, 2), (1, 1)) == tuple(range(chips))


def test_trays_of_several_slices_stay_the_outer_part() -> None:
    topology = parse_topology("2xv6e-8")
    assert device_order(topology, (4, 2), (2, 1)) == tuple(range(16))
    across = device_order(topology, (2, 4), (1, 2))
    assert across == (0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15)


SWEPT = "v4-16 v4-64 v5p-8 v5p-32 v5p-64 v5e-4 v5e-8 v5e-64 v6e-4 v6e-8 v6e-32 2xv5e-4 4xv6e-8 2xv5p-16"


@pytest.mark.parametrize("name", SWEPT.split())
def test_no_order_of_a_real_slice_mixes_up_replicas(name: str) -> None:
    """By torch_xla's ordinals, for every mesh of up to three axes."""
    topology = parse_topology(name)
    chips, slices = topology.devices_per_slice, topology.num_slices
    ids = [device.id for device in topology.devices()]
    divisors = [size for size in range(1, chips + 1) if chips % size == 0]
    for data, fsdp in itertools.product(divisors, divisors):
        if chips % (data * fsdp):
            continue
        ici = (data, fsdp, chips // (data * fsdp))
        order = device_order(topology, ici, (slices, 1, 1))
        sizes = {"data": slices * data, "fsdp": fsdp, "tensor": ici[2]}
        assert mixed_replicas([ids[position] for position in order], sizes) == (), ici


def test_slices_are_the_outer_part_of_an_axis() -> None:
    topology = parse_topology("2xv5p-32")
    slice_of = [device.slice_index for device in topology.devices()]
    order = device_order(topology, (4, 4), (1, 2))
    assert [slice_of[position] for position in order[:8]] == [0, 0, 0, 0, 1, 1, 1, 1]
    one = device_order(parse_topology("v5p-32"), (4, 4), (1, 1))
    assert device_order(topology, (4, 4), (2, 1)) == (*one, *(16 + position for position in one))


@pytest.mark.parametrize("ici", [(8,), (4, 2), (2, 1, 4)])
def test_virtual_cpu_devices_keep_their_order(ici: tuple[int, ...]) -> None:
    assert device_order(parse_topology("cpu-8"), ici, (1,) * len(ici)) == tuple(range(8))


def test_large_slices_get_an_order() -> None:
    order = device_order(parse_topology("v5p-12288"), (3, 64, 32), (1, 1, 1))
    assert sorted(order) == list(range(6144))
    assert order != tuple(range(6144))


@pytest.mark.parametrize(
    ("name", "ici", "dcn", "settings"),
    [
        ("v5p-32", (4, 8), (1, 1), ["mesh"]),
        ("v5p-32", (4, 4), (2, 1), ["mesh.dcn"]),
        ("2xv5p-32", (4, 8), (1, 1), ["mesh", "mesh.dcn"]),
        ("v5p-32", (-4, -4), (1, 1), ["mesh"]),
        ("v5p-32", (4, 4), (1,), ["mesh.dcn"]),
    ],
)
def test_sizes_that_do_not_fit_are_all_reported(
    name: str, ici: tuple[int, ...], dcn: tuple[int, ...], settings: list[str]
) -> None:
    with pytest.raises(ProblemsError) as caught:
        device_order(parse_topology(name), ici, dcn)
    assert [problem.setting for problem in caught.value.problems] == settings


def test_a_mesh_that_jax_cannot_lay_out_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import mesh_utils

    def refuse_all(*_: object, **__: object) -> None:
        raise NotImplementedError("no assignment")

    monkeypatch.setattr(mesh_utils, "create_device_mesh", refuse_all)
    with pytest.raises(
        ProblemsError, match=r"mesh=4x4: JAX finds no mesh .* no assignment \(a slice is 2x2x4 chips\)"
    ):
        device_order(parse_topology("v5p-32"), (4, 4), (1, 1))


def test_libtpu_arguments_are_refused_for_cpu() -> None:
    with pytest.raises(ProblemsError, match="must be a TPU topology"):
        topology_desc_arguments(parse_topology("cpu-8"))


def torch_xla_attributes(topology: Topology) -> list[dict[str, Any]]:
    """`xr.global_runtime_device_attributes()` for that topology, shuffled.

    In torch_xla 2.9 (pjrt_computation_client.cpp) an ordinal is the rank of the device's id; the list is in
    the runtime's order; `slice_index` is there only with several slices.
    """
    devices = topology.devices()
    ordinals = {device_id: rank for rank, device_id in enumerate(sorted(device.id for device in devices))}
    attributes: list[dict[str, Any]] = []
    for device in devices:
        one = {"coords": list(device.coords), "core_on_chip": 0, "num_cores": 1}
        slices = {"slice_index": device.slice_index} if topology.num_slices > 1 else {}
        attributes.append({**one, **slices, "name": f"TPU:{ordinals[device.id]}"})
    random.Random(7).shuffle(attributes)
    return attributes


@pytest.mark.parametrize(
    ("name", "ici", "dcn"),
    [("v5e-16", (2, 8), (1, 1)), ("v6e-256", (64, 4), (1, 1)), ("2xv6e-16", (4, 4), (2, 1))],
)
def test_ordinals_lead_to_the_chips_of_the_mesh(
    name: str, ici: tuple[int, ...], dcn: tuple[int, ...]
) -> None:
    topology = parse_topology(name)
    order = device_order(topology, ici, dcn)
    in_mesh_order = [topology.devices()[position] for position in order]
    attributes = torch_xla_attributes(topology)
    ordinals = match_devices(in_mesh_order, attributes)
    by_name = {one["name"]: (one.get("slice_index", 0), tuple(one["coords"])) for one in attributes}
    assert [by_name[f"TPU:{ordinal}"] for ordinal in ordinals] == [
        (device.slice_index, device.coords) for device in in_mesh_order
    ]
    assert ordinals != order, "positions in the topology are not ordinals"


def test_virtual_cpu_devices_are_matched_by_ordinal() -> None:
    devices = parse_topology("cpu-4").devices()
    attributes = [{"name": f"CPU:{ordinal}"} for ordinal in (2, 0, 3, 1)]
    assert match_devices(devices, attributes) == (0, 1, 2, 3)


def test_attached_devices_can_be_given_as_such() -> None:
    devices = parse_topology("v5e-4").devices()
    attached = [
        AttachedDevice(9 - i, device.slice_index, device.coords, 0) for i, device in enumerate(devices)
    ]
    assert match_devices(devices, attached) == (9, 8, 7, 6)


def test_attached_devices_that_are_not_the_topologys_are_named() -> None:
    topology = parse_topology("v5p-32")
    attributes = torch_xla_attributes(parse_topology("v5p-16"))
    with pytest.raises(ProblemsError) as caught:
        match_devices(topology.devices(), attributes)
    (problem,) = caught.value.problems
    assert problem.value == "1 slice of 2x2x4 chips (16 devices)"
    assert "slice 0 chip (0, 0, 2) core 0" in problem.other
    assert "(8 in all); attached but not in it: none" in problem.other
    assert "1 slice of 2x2x2 chips (8 devices), or start again with every host" in problem.fix
    with pytest.raises(ProblemsError, match="missing: none; attached but not in it: slice 0 chip"):
        match_devices(parse_topology("v5p-16").devices(), torch_xla_attributes(topology))
    with pytest.raises(
        ProblemsError, match=r"missing: slice 0 chip .* the topology that is attached, no device"
    ):
        match_devices(topology.devices(), [])


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        (
            [{"name": "TPU:0", "coords": [0, 0, 0]}, {"name": "TPU:1", "coords": [0, 0, 0]}],
            "ordinals 0 and 1",
        ),
        ([{"coords": [0, 0, 0]}], "must say its ordinal"),
        ([{"name": "TPU:0"}], "must have three coordinates"),
    ],
)
def test_attributes_that_cannot_be_matched_are_refused(attributes: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ProblemsError, match=says):
        match_devices(parse_topology("v5e-1").devices(), attributes)


def run_child(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "TPU_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**kept, "PYTHONPATH": path, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_computing_an_order_starts_no_jax_backend_and_loads_no_libtpu() -> None:
    code = (
        "from tptrain.jaxside.device_order import device_order\n"
        "from tptrain.topology import parse_topology\n"
        "device_order(parse_topology('2xv6e-256'), (64, 4), (2, 1))\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert 'libtpu.so' not in open('/proc/self/maps').read()\n"
    )
    done = run_child(["-c", code])
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_itself_gives_the_golden_files() -> None:
    """A fresh run of the tool: same devices and same orders; only the versions may differ."""
    done = run_child([str(ROOT / "tools" / "make_device_order_goldens.py"), "--stdout"])
    assert done.returncode == 0, done.stderr[-4000:]
    fresh = json.loads(done.stdout)
    assert sorted(fresh) == NAMES
    for name, content in fresh.items():
        stored = golden(name)
        assert {**content, "versions": None} == {**stored, "versions": None}, name
