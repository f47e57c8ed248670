"""Between host shards of a backend and jax.Arrays, shard by shard.

Padding exists in memory only. A dim that is padded there is whole on disk (its pieces are joined and trimmed
per device), because JAX shards only dims that divide.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
import torch
from jax.sharding import Mesh

from tptrain.backends.base import HostShards
from tptrain.backends.shards import Slices
from tptrain.family import ParamRow
from tptrain.jaxside.specs import named_sharding
from tptrain.mesh import Spec, shard_slices

AxisSizes = Mapping[str, int]


def disk_spec(row: ParamRow, spec: Spec) -> Spec:
    """How a row is split in its jax.Array: as in memory, but padded dims stay whole."""
    dims = zip(row.size, row.padded_size, spec, strict=True)
    return tuple(axes if size == padded else () for size, padded, axes in dims)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor as an array over the same memory; bfloat16 through its bits, which numpy lacks."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The inverse of `to_numpy`."""
    writable = np.require(array, requirements=["C", "W"])
    if writable.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(writable)


def to_jax(row: ParamRow, held: HostShards, mesh: Mesh, axis_sizes: AxisSizes) -> jax.Array:
    """The row as a jax.Array of its unpadded size over the JAX mesh."""
    spec = disk_spec(row, held.spec)
    pieces = _trimmed(row, held, spec, axis_sizes)
    devices = mesh.devices.ravel()
    arrays = [jax.device_put(to_numpy(piece), devices[position]) for position, piece in pieces.items()]
    return jax.make_array_from_single_device_arrays(row.size, named_sharding(mesh, spec), arrays)


def _trimmed(
    row: ParamRow, held: HostShards, spec: Spec, axis_sizes: AxisSizes
) -> Mapping[int, torch.Tensor]:
    """The pieces as `spec` splits the unpadded row. A padded dim is joined over the devices that split it."""
    if row.size == row.padded_size:
        return held.shards
    memory = shard_slices(row.padded_size, held.spec, axis_sizes)
    disk = shard_slices(row.size, spec, axis_sizes)
    joined: dict[tuple, torch.Tensor] = {}
    result = {}
    for position in held.shards:
        key = _key(disk[position])
        if key not in joined:
            joined[key] = _join(row, held, memory, disk[position])
        result[position] = joined[key]
    return result


def _join(row: ParamRow, held: HostShards, memory: list[Slices], wanted: Slices) -> torch.Tensor:
    """Copy the parts of every held piece that lie inside `wanted` into one tensor."""
    first = next(iter(held.shards.values()))
    out = torch.empty([s.stop - s.start for s in wanted], dtype=first.dtype)
    filled: set[tuple] = set()
    for position, piece in held.shards.items():
        here = memory[position]
        if _key(here) in filled:
            continue
        overlap = [
            (max(w.start, h.start), min(w.stop, h.stop, n))
            for w, h, n in zip(wanted, here, row.size, strict=True)
        ]
        if all(start < stop for start, stop in overlap):
            target = tuple(slice(a - w.start, b - w.start) for (a, b), w in zip(overlap, wanted, strict=True))
            source = tuple(slice(a - h.start, b - h.start) for (a, b), h in zip(overlap, here, strict=True))
            out[target] = piece[source]
            filled.add(_key(here))
    return out


def _key(slices: Slices) -> tuple:
    return tuple((s.start, s.stop) for s in slices)


def from_jax(row: ParamRow, array: jax.Array, spec: Spec, axis_sizes: AxisSizes) -> HostShards:
    """Host shards, padded for this mesh, from a jax.Array restored with `disk_spec`.

    The mesh position of a shard is the number of its JAX device.
    """
    on_disk = {s.device.id: to_torch(np.asarray(s.data)) for s in array.addressable_shards}
    if row.size == row.padded_size:
        return HostShards(row.padded_size, spec, on_disk)
    memory = shard_slices(row.padded_size, spec, axis_sizes)
    disk = shard_slices(row.size, disk_spec(row, spec), axis_sizes)
    shards = {p: _padded(row, piece, disk[p], memory[p]) for p, piece in on_disk.items()}
    return HostShards(row.padded_size, spec, shards)


def _padded(row: ParamRow, piece: torch.Tensor, disk: Slices, memory: Slices) -> torch.Tensor:
    """The part `memory` (padded coordinates) of a piece that covers `disk` (unpadded), zeros beyond it."""
    out = torch.zeros([s.stop - s.start for s in memory], dtype=piece.dtype)
    inside = [(m.start, min(m.stop, n)) for m, n in zip(memory, row.size, strict=True)]
    if all(start < stop for start, stop in inside):
        target = tuple(slice(0, stop - start) for start, stop in inside)
        source = tuple(slice(a - d.start, b - d.start) for (a, b), d in zip(inside, disk, strict=True))
        out[target] = piece[source]
    return out
