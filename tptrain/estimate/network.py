"""Which links of a slice a mesh axis talks over, and how fast.

Devices are laid out as JAX does it (`mesh_utils`): axes take sides of the slice, the innermost axis first,
whole sides where its size allows, and as many as it can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from tptrain.mesh import AXES, MeshShape
from tptrain.topology import Topology


@dataclass(frozen=True)
class Part:
    """What an axis takes of a side of the slice. is_ring: whether its first and last chip are linked."""

    side: int
    chips: int
    is_ring: bool

    @property
    def is_whole(self) -> bool:
        return self.chips == self.side


@dataclass(frozen=True)
class AxisLinks:
    """The links of a mesh axis inside a slice.

    bytes_per_second: that a chip can receive from the others along the axis; None where it is not known.
    """

    parts: tuple[Part, ...]
    bytes_per_second: float | None


def axis_links(topology: Topology, mesh: MeshShape) -> dict[str, AxisLinks]:
    """Links of every axis that has more than one device inside a slice.

    A chip of a ring receives from both sides, the last one of a line from one.
    """
    free = dict(enumerate(topology.shape))
    link = topology.chip.ici_link_bytes_per_second
    found = {}
    for axis, size in reversed(list(zip(AXES, mesh.ici, strict=True))):
        if size > 1:
            taken = _whole_sides(size, free) or _parts_of_sides(size, free)
            free = {i: left // taken.get(i, 1) for i, left in free.items()}
            parts = tuple(_part(topology, i, chips) for i, chips in taken.items())
            speed = sum(2 if part.is_ring else 1 for part in parts)
            found[axis] = AxisLinks(parts, None if link is None else link * speed)
    return found


def _part(topology: Topology, i: int, chips: int) -> Part:
    side = topology.shape[i]
    return Part(side, chips, topology.wraps[i] and chips == side)


def _whole_sides(size: int, free: Mapping[int, int]) -> dict[int, int]:
    """As many of the free sides as have `size` for their product; none where no sides have."""
    sides = [i for i, left in free.items() if left > 1]
    for count in range(len(sides), 0, -1):
        for chosen in combinations(sides, count):
            if math.prod(free[i] for i in chosen) == size:
                return {i: free[i] for i in chosen}
    return {}


def _parts_of_sides(size: int, free: Mapping[int, int]) -> dict[int, int]:
    """Of each free side, one after the other, as much as divides what is still wanted."""
    taken = {}
    for i, left in free.items():
        common = math.gcd(size, left)
        if common > 1:
            taken[i] = common
            size //= common
    assert size == 1, "the axes of a mesh multiply to the devices of a slice"
    return taken
