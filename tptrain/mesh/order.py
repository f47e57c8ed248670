"""Orders of devices that XLA's partitioner handles rightly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence


def mixed_replicas(order: Sequence[int], axis_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Axes over which XLA would mix up the replicas of a tensor; empty where the order is sound.

    order: ordinals of the devices in mesh order (row-major over `axis_sizes`, last axis fastest).

    A tensor that some axes do not split has a group of replicas for each of its pieces. XLA lists every group
    by ascending ordinal, whatever the mesh says (`HloSharding::PartialTile`), and its partitioner of matrix
    products takes the i-th members of all groups to have the same place on the axes in question. Where the
    sorted groups have different orders of places, it adds up pieces that do not belong together. A program's
    own `DeviceAssignment` would avoid that, as JAX does it; torch_xla's is always by ordinal.
    """
    return next((axes for axes in _proper_subsets(axis_sizes) if _is_mixed(order, axis_sizes, axes)), ())


def _proper_subsets(axis_sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Sets of axes above 1, smallest first, that leave another such axis to split the tensor."""
    large = [axis for axis, size in axis_sizes.items() if size > 1]
    for count in range(1, len(large)):
        yield from itertools.combinations(large, count)


def _is_mixed(order: Sequence[int], axis_sizes: Mapping[str, int], axes: tuple[str, ...]) -> bool:
    """Whether groups of replicas over `axes`, sorted by ordinal, have their members in different orders."""
    groups: dict[tuple[int, ...], list[int]] = {}
    kept = [i for i, axis in enumerate(axis_sizes) if axis not in axes]
    places = itertools.product(*(range(size) for size in axis_sizes.values()))
    for place, ordinal in zip(places, order, strict=True):
        groups.setdefault(tuple(place[i] for i in kept), []).append(ordinal)
    ranked = (tuple(sorted(range(len(group)), key=group.__getitem__)) for group in groups.values())
    return len(set(ranked)) > 1
