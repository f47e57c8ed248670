"""Collectives of a module by axis, bytes and links."""

from __future__ import annotations

import pytest

from tests.program.snippets import STEP
from tptrain.program.analysis import hidden_seconds
from tptrain.program.collectives import Transfer, transfers
from tptrain.program.device_groups import MeshPlaces, parse_groups
from tptrain.program.hlo_text import HloTextError, parse_module
from tptrain.topology import parse_topology

V5E_4 = MeshPlaces(parse_topology("v5e-4"), {"fsdp": 2, "tensor": 2}, (0, 1, 2, 3))


def identity(name: str, **axes: int) -> MeshPlaces:
    topology = parse_topology(name)
    return MeshPlaces(topology, axes, tuple(range(topology.num_devices)))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[2,6]<=[3,2,2]T(1,0,2)", ((0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11))),
        ("{}", (tuple(range(8)),)),
    ],
)
def test_groups_in_every_form(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert parse_groups(text, 8) == groups


def test_groups_in_an_unknown_form_are_told() -> None:
    with pytest.raises(HloTextError, match="unknown form"):
        parse_groups("@mesh<['a'=2]>", 8)


def test_the_collectives_of_a_loop() -> None:
    module = parse_module(STEP)
    found = transfers(module, module.computations["wide.body"], V5E_4)
    summary = [(one.kind, one.axes, one.dtype, one.num_bytes) for one in found]
    assert summary == [
        ("all-gather", ("fsdp",), "bf16", 327_680),
        ("all-gather", ("fsdp",), "bf16", 327_680),
        ("all-reduce", ("tensor",), "bf16", 12_288),
        ("reduce-scatter", ("fsdp",), "bf16", 327_680),
    ]
    # Of v5e-4's 2 x 2 chips no side is a ring: one link of 50 GB/s.
    assert [one.seconds for one in found] == [n / 50e9 for n in (327_680, 327_680, 12_288, 327_680)]
    names = [one.name for one in module.computations["wide.body"].instructions]
    overlapped = [(names[one.start], names[one.end]) for one in found if one.end > one.start]
    assert overlapped == [("async-collective-start", "async-collective-done")]


def transfer_of(line: str, mesh: MeshPlaces, partitions: int) -> Transfer:
    """The one transfer of a module with this instruction, whose operand is 3000 bytes of s8."""
    text = (
        f"HloModule m, num_partitions={partitions}\n\nENTRY %main () -> s8[] {{\n"
        f"  %x = s8[3000]{{0}} parameter(0)\n{line}\n}}\n"
    )
    module = parse_module(text)
    (found,) = transfers(module, module.entry, mesh)
    return found


@pytest.mark.parametrize(
    ("line", "axes", "num_bytes", "links"),
    [
        # v6e 4 x 4 has no rings. Places 0 to 3 lie along x: one link.
        ("%c = s8[12000]{0} all-gather(%x), replica_groups=[4,4]<=[16]", ("tensor",), 9000, 1),
        ("%c = s8[3000]{0} all-reduce(%x), replica_groups=[4,4]<=[4,4]T(1,0)", ("fsdp",), 4500, 1),
        ("%c = s8[3000]{0} all-reduce(%x), replica_groups=[1,16]<=[16]", ("fsdp", "tensor"), 5625, 2),
        ("%c = s8[750]{0} reduce-scatter(%x), replica_groups=[4,4]<=[16]", ("tensor",), 2250, 1),
        ("%c = s8[3000]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", ("tensor",), 3000, 1),
    ],
)
def test_bytes_and_links(line: str, axes: tuple[str, ...], num_bytes: float, links: int) -> None:
    # libtpu lists devices host by host; this order is by coordinates, x fastest.
    topology = parse_topology("v6e-16")
    by_id = sorted(range(16), key=lambda position: topology.devices()[position].id)
    mesh = MeshPlaces(topology, {"fsdp": 4, "tensor": 4}, tuple(by_id))
    found = transfer_of(line, mesh, 16)
    assert (found.axes, found.num_bytes) == (axes, num_bytes)
    assert found.seconds == pytest.approx(num_bytes / (links * 100e9))


def test_a_ring_has_two_links_and_an_all_to_all_the_load_of_its_middle() -> None:
    ring = identity("v5p:4x4x4", tensor=64)
    gather = transfer_of("%c = s8[192000]{0} all-gather(%x), replica_groups=[1,64]<=[64]", ring, 64)
    assert gather.seconds == pytest.approx(3000 * 63 / (6 * 100e9))
    line = transfer_of(
        "%c = s8[3000]{0} all-to-all(%x), replica_groups=[16,4]<=[64]",
        identity("v5p:4x4x4", fsdp=16, tensor=4),
        64,
    )
    # Hosts of 2x2x1 come first, so four neighbours in the order are a square, not a ring.
    assert line.seconds == pytest.approx(3000 * 4 / 4 / (2 * 100e9))


def test_axes_follow_the_mesh_and_not_the_devices() -> None:
    """Partition ids are places of the mesh: the order of the devices changes links, not axes."""
    line = "%c = s8[3000]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}"
    for order in [(0, 1, 2, 3), (3, 0, 2, 1)]:
        mesh = MeshPlaces(parse_topology("v5e-4"), {"fsdp": 2, "tensor": 2}, order)
        assert transfer_of(line, mesh, 4).axes == ("tensor",)


def test_several_slices() -> None:
    """One slice's program: its ids count the places of that slice, and hosts carry the rest."""
    mesh = identity("2xv5e-4", data=2, fsdp=2, tensor=2)
    assert mesh.slice_axes == ("data",)
    inside = transfer_of("%c = s8[3000]{0} all-reduce(%x), replica_groups={{0,2},{1,3}}", mesh, 4)
    assert (inside.axes, inside.network) == (("fsdp",), "ICI")
    between = transfer_of(
        "  %t = token[] after-all()\n  %s = (s8[3000]{0}, u32[]{:S(2)}, token[]) send(%x, %t), channel_id=1\n"
        "  %r = (s8[3000]{0}, u32[]{:S(2)}, token[]) recv(%t), channel_id=2, is_host_transfer=true,"
        ' frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %c = (s8[3000]{0}, token[]) recv-done(%r), channel_id=2, is_host_transfer=true",
        mesh,
        4,
    )
    assert (between.kind, between.network, between.axes) == ("all-reduce", "DCN", ("data",))
    assert between.num_bytes == 3000 and between.end == between.start + 1
    assert between.seconds == pytest.approx(3000 / 3.125e9)


def test_slices_in_the_inner_part_of_a_mesh() -> None:
    """A mesh whose slices are not its outermost axis: places 0, 2, 4, 6 form the first slice."""
    mesh = MeshPlaces(parse_topology("2xv5e-4"), {"fsdp": 4, "data": 2}, (0, 4, 1, 5, 2, 6, 3, 7))
    assert mesh.slice_axes == ("data",)
    found = transfer_of("%c = s8[3000]{0} all-reduce(%x), replica_groups={{0,1,2,3}}", mesh, 4)
    assert found.axes == ("fsdp",)


def test_compute_is_shared_by_transfers_of_one_route() -> None:
    def transfer(start: int, end: int, route: str) -> Transfer:
        return Transfer("all-gather", "ICI", ("fsdp",), 4, "bf16", 1.0, 1.0, start, end, "", route)

    found = [transfer(0, 4, "x"), transfer(1, 3, "x"), transfer(0, 4, "y"), transfer(2, 2, "x")]
    # Positions 1 to 3 lie beside the first, 2 beside the second, whose share of it is half.
    assert hidden_seconds(found, [100.0, 1.0, 10.0, 2.0, 100.0]) == [1 + 5 + 2, 5, 13, 0]
