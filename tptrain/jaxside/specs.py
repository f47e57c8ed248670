"""A plan's mesh and specs, rendered for JAX."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tptrain.mesh import AXES, MeshShape, Spec


def jax_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` in mesh order (default: JAX's own devices as they come)."""
    chosen = list(devices) if devices is not None else jax.devices()
    assert len(chosen) == shape.num_devices, f"{len(chosen)} JAX devices for a mesh of {shape.num_devices}"
    return Mesh(np.array(chosen).reshape(shape.sizes), AXES)


def partition_spec(spec: Spec) -> PartitionSpec:
    """JAX's form of a spec."""
    return PartitionSpec(*(axes or None for axes in spec))


def named_sharding(mesh: Mesh, spec: Spec) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(spec))
