"""Which sides of a slice an axis lies on, and how fast its links are."""

from __future__ import annotations

import pytest

from tptrain.estimate.network import axis_links
from tptrain.mesh import AXES, MeshShape
from tptrain.topology import larger_slices, parse_topology


def _links(name: str, **ici: int) -> dict[str, tuple[list[str], float | None]]:
    """Axis -> (what it takes of each side, links in use)."""
    topology = parse_topology(name)
    mesh = MeshShape(tuple(ici.get(axis, 1) for axis in AXES), (1,) * len(AXES))
    link = topology.chip.ici_link_bytes_per_second
    return {
        axis: (
            [f"{part.chips}/{part.side}{' ring' if part.is_ring else ''}" for part in found.parts],
            None if link is None or found.bytes_per_second is None else found.bytes_per_second / link,
        )
        for axis, found in axis_links(topology, mesh).items()
    }


@pytest.mark.parametrize(
    ("name", "ici", "expected"),
    [
        # 2x2x4 has no rings: one link a side.
        ("v5p-32", {"fsdp": 16}, {"fsdp": (["2/2", "2/2", "4/4"], 3)}),
        # The innermost axis takes as many sides as it can.
        ("v5p-32", {"fsdp": 4, "tensor": 4}, {"tensor": (["2/2", "2/2"], 2), "fsdp": (["4/4"], 1)}),
        # From 4x4x4 on every side is a ring: two links.
        (
            "v5p-256",
            {"fsdp": 32, "tensor": 4},
            {"tensor": (["4/4 ring"], 2), "fsdp": (["4/4 ring", "8/8 ring"], 4)},
        ),
        # Of v6e's sides only those of 16 are.
        ("v6e-128", {"data": 8, "fsdp": 16}, {"fsdp": (["16/16 ring"], 2), "data": (["8/8"], 1)}),
        # 4 is a part of a side, so it and what is left of that side are lines.
        (
            "v6e-256",
            {"fsdp": 64, "tensor": 4},
            {"tensor": (["4/16"], 1), "fsdp": (["4/16", "16/16 ring"], 3)},
        ),
        # One axis may take parts of two sides.
        ("v5e-16", {"fsdp": 2, "tensor": 8}, {"tensor": (["4/4", "2/4"], 2), "fsdp": (["2/4"], 1)}),
        ("cpu-8", {"fsdp": 8}, {"fsdp": (["8/8"], None)}),
        ("v6e-1", {}, {}),
    ],
)
def test_sides_and_links(name: str, ici: dict[str, int], expected: dict[str, object]) -> None:
    assert _links(name, **ici) == expected


def test_larger_slices_are_named_by_size_and_rise() -> None:
    assert [each.name for each in larger_slices(parse_topology("2xv6e-16"))] == [
        "2xv6e-32",
        "2xv6e-64",
        "2xv6e-128",
        "2xv6e-256",
    ]
    chips = [each.devices_per_slice for each in larger_slices(parse_topology("v5p-32"))]
    assert chips[:4] == [32, 64, 128, 192]
    assert chips == sorted(chips) and chips[-1] == 6144
    assert list(larger_slices(parse_topology("v5e-256"))) == []
