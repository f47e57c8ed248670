"""A plan's mesh and specs, rendered for torch_xla.

Devices have two numberings. A mesh position counts row-major over the mesh axes; an ordinal is the number by
which the runtime knows a device. `order[position]` is the ordinal, a real permutation on TPU slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs

from tptrain.errors import refuse
from tptrain.mesh import AXES, MeshShape, Spec, shard_slices
from tptrain.mesh.order import mixed_replicas
from tptrain.mesh.rules import split_count

_XLAC = torch_xla._XLAC

_SHOWN_ORDINALS = 16


def partition_spec(spec: Spec) -> tuple[tuple[str, ...] | None, ...]:
    """torch_xla's form of a spec: a tuple of axis names per dim, None where the dim is kept whole."""
    return tuple(axes or None for axes in spec)


class DeviceMesh:
    """The mesh of a plan over the runtime's devices.

    order: runtime ordinals in mesh order; every device of the runtime occurs once. Raises ProblemsError for
           an order in which XLA would mix up replicas.
    """

    def __init__(self, shape: MeshShape, order: Sequence[int]):
        assert sorted(order) == list(range(shape.num_devices)), "order must be a permutation of the ordinals"
        _check_order(shape, order)
        self.axis_sizes = shape.axis_sizes
        self.order = tuple(order)
        self.xla = xs.Mesh(np.array(order), shape.sizes, AXES)
        self.position_of = {ordinal: position for position, ordinal in enumerate(order)}
        self.local_ordinals = tuple(o for o in _local_ordinals(self.xla) if o in self.position_of)

    @property
    def local_positions(self) -> tuple[int, ...]:
        """Mesh positions of this process's devices, in the runtime's order of devices."""
        return tuple(self.position_of[ordinal] for ordinal in self.local_ordinals)

    def mark(self, x: torch.Tensor, spec: Spec) -> torch.Tensor:
        """State the sharding of a traced tensor."""
        if math.prod(self.axis_sizes.values()) == 1:
            return x
        xs.mark_sharding(x, self.xla, partition_spec(spec))
        return x

    def mark_with_gradient(self, x: torch.Tensor, spec: Spec) -> torch.Tensor:
        """State the sharding of a traced tensor and of the gradient that flows back to it."""
        if math.prod(self.axis_sizes.values()) == 1:
            return x
        return xs.mark_sharding_with_gradients(x, self.xla, partition_spec(spec))

    def piece(self, x: torch.Tensor, spec: Spec) -> torch.Tensor:
        """Each device's piece of a traced tensor; what is computed from it, the device computes by itself.

        Nothing is partitioned automatically until `whole` ends it: the two are JAX's `shard_map`.
        """
        if math.prod(self.axis_sizes.values()) == 1:
            return x
        # Another tensor, because marking changes a tensor in place, and this one may be marked otherwise and
        # read elsewhere. A clone of a step's argument would still be the argument.
        return _XLAC._spmd_full_to_shard_shape(self.mark(x.unsqueeze(0).squeeze(0), spec))

    def whole(self, piece: torch.Tensor, spec: Spec) -> torch.Tensor:
        """The traced tensor whose pieces, split by `spec`, the devices have computed by themselves."""
        if math.prod(self.axis_sizes.values()) == 1:
            return piece
        sizes = zip(piece.shape, spec, strict=True)
        shape = [size * split_count(axes, self.axis_sizes) for size, axes in sizes]
        _XLAC._mark_manual_sharding(piece, _XLAC.OpSharding([], [], [], xs.ShardingType.MANUAL))
        sharding = self.xla.get_op_sharding(partition_spec(spec))
        return _XLAC._spmd_shard_to_full_shape(piece, sharding, shape, piece.dtype)

    def place(self, shards: Mapping[int, torch.Tensor], shape: Sequence[int], spec: Spec) -> torch.Tensor:
        """A device tensor from its pieces: shards by mesh position, for every local device."""
        ordered = [shards[position].contiguous() for position in self.local_positions]
        sharding = self.xla.get_op_sharding(partition_spec(spec))
        return _XLAC._global_tensor_from_cpu_shards(ordered, sharding, list(shape))

    def place_full(self, full: torch.Tensor, spec: Spec) -> torch.Tensor:
        """A device tensor from a host tensor; only the slices of local devices are copied."""
        slices = shard_slices(full.shape, spec, self.axis_sizes)
        return self.place({p: full[slices[p]] for p in self.local_positions}, full.shape, spec)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[dict[int, torch.Tensor]]:
        """Host copies of this process's shards of device tensors, by mesh position; no gather."""
        fetched = _XLAC._get_local_shards(list(tensors))
        return [{self.position_of[_ordinal(name)]: data for data, name in shards} for shards in fetched]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A device tensor as a whole on the host.

        Put together from its shards where this process holds them all: `cpu()` on a split tensor compiles a
        program that collects it, and compiles it again at every call.
        """
        if len(self.order) == 1 or len(self.local_ordinals) < len(self.order):
            return tensor.cpu()
        torch_xla.sync(wait=True)
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for shard in xs.XLAShardedTensor(tensor).local_shards:
            index = ... if shard.indices is Ellipsis else tuple(shard.indices)
            whole[index] = shard.data
        return whole


def _check_order(shape: MeshShape, order: Sequence[int]) -> None:
    mixed = mixed_replicas(order, shape.axis_sizes)
    if mixed:
        shown = ", ".join(str(ordinal) for ordinal in order[:_SHOWN_ORDINALS])
        more = ", ..." if len(order) > _SHOWN_ORDINALS else ""
        rule = f"replicas over {' and '.join(mixed)}, by ascending ordinal, must stand alike in every group"
        other = f"ordinals in mesh order: {shown}{more}"
        raise refuse("mesh", shape.describe(), rule, other, "one axis above 1, or ordinals that ascend")


def _local_ordinals(mesh: xs.Mesh) -> tuple[int, ...]:
    """Ordinals of this process's devices in the order in which the runtime hands out shards."""
    probe = torch.zeros(()).to("xla")
    xs.mark_sharding(probe, mesh, ())
    torch_xla.sync(wait=True)
    (shards,) = _XLAC._get_local_shards([probe])
    return tuple(_ordinal(name) for _, name in shards)


def _ordinal(device_name: str) -> int:
    """The ordinal in a runtime device name such as `CPU:3`."""
    return int(device_name.rsplit(":", 1)[1])
