"""Which devices take part in a collective, and which mesh axes and links lie between them.

A partition of a module is a place of the mesh (row-major), because the compile assigns devices in mesh order.
In a module for several slices libtpu writes one slice's program, whose ids count the places in that slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tptrain.program.hlo_text import HloTextError
from tptrain.topology import DeviceCoords, Topology

Group = tuple[int, ...]


@dataclass(frozen=True)
class MeshPlaces:
    """The mesh a module was compiled for.

    axis_sizes: name -> size, outermost first, as in the mesh.
    order:      position in `topology.devices()` of each place of the mesh, row-major.
    """

    topology: Topology
    axis_sizes: Mapping[str, int]
    order: tuple[int, ...]

    @cached_property
    def devices(self) -> tuple[DeviceCoords, ...]:
        """The device at each place."""
        all_devices = self.topology.devices()
        return tuple(all_devices[position] for position in self.order)

    def coordinates(self, place: int) -> tuple[int, ...]:
        """Where a place is along each axis."""
        found = []
        for size in reversed(list(self.axis_sizes.values())):
            place, rest = divmod(place, size)
            found.append(rest)
        return tuple(reversed(found))

    def axes_of(self, group: Sequence[int]) -> tuple[str, ...]:
        """The axes along which the places of a group differ."""
        columns = zip(*(self.coordinates(place) for place in group), strict=True)
        return tuple(
            axis for axis, column in zip(self.axis_sizes, columns, strict=True) if len(set(column)) > 1
        )

    @cached_property
    def slice_axes(self) -> tuple[str, ...]:
        """The axes that cross slices: two places that differ along one alone lie in different slices."""
        strides = [math.prod(list(self.axis_sizes.values())[i + 1 :]) for i in range(len(self.axis_sizes))]
        crossing = []
        for (axis, size), stride in zip(self.axis_sizes.items(), strides, strict=True):
            line = {self.devices[step * stride].slice_index for step in range(size)}
            crossing += [axis] if len(line) > 1 else []
        return tuple(crossing)

    def places(self, groups: Sequence[Group], num_partitions: int) -> tuple[Group, ...]:
        """Groups of a module's partition ids as groups of places."""
        if num_partitions == len(self.order):
            return tuple(groups)
        first_slice = [place for place, device in enumerate(self.devices) if device.slice_index == 0]
        if num_partitions != len(first_slice):
            raise HloTextError(f"a module of {num_partitions} partitions on {len(self.order)} devices")
        return tuple(tuple(first_slice[number] for number in group) for group in groups)

    def ici_links(self, groups: Sequence[Group]) -> int:
        """Links by which each chip of such a group sends, each in one direction; 1 at least.

        A dimension of the network along which the chips differ gives a chip two links where the chips are a
        whole closed ring, else one, because the ends of a line have one. The worst group counts.
        """
        return max(1, min(self._links(group) for group in groups))

    def _links(self, group: Group) -> int:
        columns = zip(*(self.devices[place].coords for place in group), strict=True)
        links = 0
        for column, side, wraps in zip(columns, self.topology.shape, self.topology.wraps, strict=True):
            chips = len(set(column))
            links += 0 if chips == 1 else 2 if wraps and chips == side else 1
        return links


def parse_groups(text: str, num_partitions: int) -> tuple[Group, ...]:
    """Groups in any of XLA's forms: `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,4]<=[4,2]T(1,0)`; `{}` is everyone."""
    text = text.strip()
    if text in ("", "{}"):
        return (tuple(range(num_partitions)),)
    if text.startswith("{"):
        return tuple(_numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", text))
    found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise HloTextError(f"device groups in an unknown form: {text[:80]}")
    (count, size), dims = _numbers(found[1]), _numbers(found[2])
    axes = _numbers(found[3]) if found[3] else tuple(range(len(dims)))
    ids = _transposed(dims, axes)
    return tuple(tuple(ids[start : start + size]) for start in range(0, count * size, size))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _transposed(dims: Sequence[int], axes: Sequence[int]) -> list[int]:
    """The numbers 0, 1, ... of an array of `dims`, read after its axes are put in the order `axes`."""
    strides = [math.prod(dims[axis + 1 :]) for axis in axes]
    ids = [0]
    for axis, stride in zip(axes, strides, strict=True):
        ids = [base + step * stride for base in ids for step in range(dims[axis])]
    return ids
