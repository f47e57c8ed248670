"""Which links of a slice a mesh axis talks over, and how fast.

Devices are laid out as JAX does it (`mesh_utils`): axes take whole sides of the slice, the innermost axis
first, each as many sides as its size allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from tptrain.mesh import AXES, MeshShape
from tptrain.topology import Topology


@dataclass(frozen=True)
class AxisLinks:
    """The links of a mesh axis inside a slice.

    sides: sides of the slice that the axis takes whole; empty where it is no product of sides.
    bytes_per_second: that a chip can receive from the others along the axis; None where it is not known.
    """

    sides: tuple[int, ...]
    bytes_per_second: float | None


def axis_links(topology: Topology, mesh: MeshShape) -> dict[str, AxisLinks]:
    """Links of every axis that has more than one device inside a slice.

    A ring receives from both of its ends, a line's last chip from one. An axis that is no product of whole
    sides is taken for a line: the least that it can be.
    """
    sides = {i: side for i, side in enumerate(topology.shape) if side > 1}
    found = {}
    for axis, size in reversed(list(zip(AXES, mesh.ici, strict=True))):
        if size > 1:
            taken = _sides_of(size, sides)
            sides = {i: side for i, side in sides.items() if i not in taken}
            found[axis] = AxisLinks(tuple(topology.shape[i] for i in taken), _speed(topology, taken))
    return found


def _sides_of(size: int, sides: Mapping[int, int]) -> tuple[int, ...]:
    """Indices of the sides whose product is `size`, as many as possible; none where there are no such."""
    for count in range(len(sides), 0, -1):
        for chosen in combinations(sides, count):
            if math.prod(sides[i] for i in chosen) == size:
                return chosen
    return ()


def _speed(topology: Topology, taken: tuple[int, ...]) -> float | None:
    link = topology.chip.ici_link_bytes_per_second
    if link is None:
        return None
    return link * sum(2 if topology.wraps[i] else 1 for i in taken) if taken else link
