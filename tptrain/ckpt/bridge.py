"""Between a backend's buffers and jax.Arrays in this process, shard by shard and without needless copies.

A jax.Array over host shards shares their memory. JAX shards only dims that divide: a dim that is padded in
memory is whole in its jax.Array, joined and trimmed per device. Checkpoints do not pass through here
(`snapshot`, `host_array`): on disk such a dim stays split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
import torch
from jax.sharding import Mesh

from tptrain.backends.base import Backend, HostShards, Tensors
from tptrain.backends.shards import Slices, host_shards
from tptrain.ckpt.arrays import to_numpy, to_torch
from tptrain.config.plan import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.family import ParamRow
from tptrain.jaxside.specs import jax_mesh, named_sharding
from tptrain.mesh import Spec, shard_slices

AxisSizes = Mapping[str, int]


def live_arrays(plan: Plan, backend: Backend, buffers: Tensors, part: str = PARAMS) -> dict[str, jax.Array]:
    """Buffers of a part of the state, as they are now, as jax.Arrays by row name on JAX's CPU devices.

    The same mesh and specs as in the plan; for a run of one process.
    """
    mesh, sizes = jax_mesh(plan.mesh), plan.mesh.axis_sizes
    rows = {row.name: row for row in plan.parts[part].rows}
    held = host_shards(backend, buffers, part)
    return {name: to_jax(rows[name], shards, mesh, sizes) for name, shards in held.items()}


def disk_spec(row: ParamRow, spec: Spec) -> Spec:
    """How a row is split in its jax.Array: as in memory, but padded dims stay whole."""
    dims = zip(row.size, row.padded_size, spec, strict=True)
    return tuple(axes if size == padded else () for size, padded, axes in dims)


def to_jax(row: ParamRow, held: HostShards, mesh: Mesh, axis_sizes: AxisSizes) -> jax.Array:
    """The row as a jax.Array of its unpadded size over the JAX mesh, over the memory of `held`.

    held: private to this process, complete along padded dims, and not written to while the array lives.
    """
    spec = disk_spec(row, held.spec)
    pieces = held.shards if row.size == row.padded_size else _joined(row, held, spec, axis_sizes)
    devices = mesh.devices.ravel()
    arrays = [jax.device_put(to_numpy(piece), devices[position]) for position, piece in pieces.items()]
    return jax.make_array_from_single_device_arrays(row.size, named_sharding(mesh, spec), arrays)


def _joined(row: ParamRow, held: HostShards, spec: Spec, axis_sizes: AxisSizes) -> Mapping[int, torch.Tensor]:
    """The pieces as `spec` splits the unpadded row: padded dims joined, once for all replicas."""
    memory = shard_slices(row.padded_size, held.spec, axis_sizes)
    wanted = shard_slices(row.size, spec, axis_sizes)
    there = [(memory[position], to_numpy(piece)) for position, piece in held.shards.items()]
    made: dict[tuple, torch.Tensor] = {}
    for position in held.shards:
        key = tuple((s.start, s.stop) for s in wanted[position])
        if key not in made:
            made[key] = to_torch(_assembled(row.name, wanted[position], there))
    return {p: made[tuple((s.start, s.stop) for s in wanted[p])] for p in held.shards}


class JaxSource:
    """A TensorSource over jax.Arrays of this process, for `Backend.place`."""

    def __init__(self, arrays: Mapping[str, jax.Array]):
        """arrays: row name -> array of the row's unpadded size, of any sharding."""
        self._arrays = arrays

    def read(self, row: ParamRow, index: Slices) -> torch.Tensor:
        """The slice `index` of a row, put together from the shards that overlap it; no gather."""
        array = self._arrays[row.name]
        shards = [
            (tuple(slice(*s.indices(n)[:2]) for s, n in zip(shard.index, array.shape, strict=True)), shard)
            for shard in array.addressable_shards
        ]
        return to_torch(
            _assembled(row.name, index, ((where, np.asarray(shard.data)) for where, shard in shards))
        )


def _assembled(name: str, wanted: Slices, parts: Iterable[tuple[Slices, np.ndarray]]) -> np.ndarray:
    """The slice `wanted` of an array, from parts of it: (where, values). Parts that repeat are skipped."""
    out: np.ndarray | None = None
    done: set[tuple] = set()
    missing = int(np.prod([s.stop - s.start for s in wanted]))
    for where, values in parts:
        overlap = [
            slice(max(w.start, h.start), min(w.stop, h.stop)) for w, h in zip(wanted, where, strict=True)
        ]
        key = tuple((s.start, s.stop) for s in overlap)
        if key in done or any(s.start >= s.stop for s in overlap):
            continue
        if out is None:
            out = np.empty([s.stop - s.start for s in wanted], values.dtype)
        out[_relative(overlap, wanted)] = values[_relative(overlap, where)]
        done.add(key)
        missing -= int(np.prod([stop - start for start, stop in key]))
    assert out is not None and missing == 0, f"{name}: this process does not hold {wanted}"
    return out


def _relative(part: Sequence[slice], whole: Sequence[slice]) -> Slices:
    """The slices `part` counted from where `whole` begins."""
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True))
