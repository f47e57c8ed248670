"""One spec, three renderings: our slices, JAX's and torch_xla's are equal device by device."""

from __future__ import annotations

from functools import cache

import jax
import pytest
import torch
import torch_xla
import torch_xla.distributed.spmd as xs

from tests import families, small
from tptrain.backends.xla.sharding import DeviceMesh
from tptrain.config import Plan
from tptrain.jaxside.specs import jax_mesh, named_sharding
from tptrain.mesh import Spec, shard_slices

# data, fsdp, tensor, expert
MESHES = {
    **{"8x1": (1, 8, 1, 1), "4x2": (1, 4, 2, 1), "2x4": (1, 2, 4, 1), "1x8": (1, 1, 8, 1)},
    **{"2x2x2": (2, 2, 2, 1), "experts": (1, 2, 2, 2)},
}
ORDERS = {"as they come": (0, 1, 2, 3, 4, 5, 6, 7), "permuted": (6, 2, 7, 3, 4, 0, 5, 1)}

# Ordinal of a device -> start and stop in every dim of what it holds.
Held = dict[int, tuple[tuple[int, int], ...]]


@cache
def plan_of(mesh: str) -> Plan:
    data, fsdp, tensor, expert = MESHES[mesh]
    config = small.small_config(attention_bias=True, mlp_bias=True)
    if expert > 1:
        config = families.CONFIGS["mixtral"]
    return small.small_plan(fsdp, tensor, data, config=config, expert=expert)


def bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def by_rules(plan: Plan, order: tuple[int, ...], shape: tuple[int, ...], spec: Spec) -> Held:
    slices = shard_slices(shape, spec, plan.mesh.axis_sizes)
    return {order[position]: bounds(held, shape) for position, held in enumerate(slices)}


def by_jax(plan: Plan, order: tuple[int, ...], shape: tuple[int, ...], spec: Spec) -> Held:
    mesh = jax_mesh(plan.mesh, [jax.devices()[ordinal] for ordinal in order])
    found = named_sharding(mesh, spec).devices_indices_map(shape)
    return {device.id: bounds(index, shape) for device, index in found.items()}


def by_torch_xla(plan: Plan, order: tuple[int, ...], shape: tuple[int, ...], spec: Spec) -> Held:
    """What the runtime says it put where; each shard's data must be what that place asks for."""
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    tensor = full.to("xla")
    DeviceMesh(plan.mesh, order).mark(tensor, spec)
    torch_xla.sync()
    held: Held = {}
    for shard in xs.XLAShardedTensor(tensor).local_shards:
        whole = [slice(0, size) for size in shape]
        index = tuple(whole if shard.indices is Ellipsis else shard.indices)
        assert torch.equal(shard.data, full[index])
        held[int(shard.shard_device.split(":")[1])] = bounds(index, shape)
    return held


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_row_lies_alike_in_all_renderings(mesh: str, order: str) -> None:
    plan, ordinals = plan_of(mesh), ORDERS[order]
    in_runtime: dict[tuple[tuple[int, ...], Spec], Held] = {}
    for row in plan.table:
        spec = plan.specs[row.name]
        ours = by_rules(plan, ordinals, row.padded_size, spec)
        assert len(ours) == 8
        assert ours == by_jax(plan, ordinals, row.padded_size, spec), row.name
        key = (row.padded_size, spec)
        if key not in in_runtime:
            in_runtime[key] = by_torch_xla(plan, ordinals, row.padded_size, spec)
        assert ours == in_runtime[key], row.name


@pytest.mark.parametrize("mesh", MESHES)
def test_the_mesh_splits_what_it_should(mesh: str) -> None:
    """The specs are not all "replicated": every axis above 1 splits some row (`data`: the batch)."""
    plan = plan_of(mesh)
    sizes = plan.mesh.axis_sizes
    used = {axis for spec in plan.specs.values() for axes in spec for axis in axes}
    for axis in ("fsdp", "tensor"):
        assert axis in used
    assert ("expert" in used) == (sizes["expert"] > 1)
    assert plan.batch_shards == sizes["data"] * sizes["fsdp"] * sizes["expert"]
    embedding = next(row for row in plan.table if row.name == "model.embed_tokens.weight")
    assert embedding.size[0] == small.VOCAB
    assert embedding.padded_size[0] == -(-small.VOCAB // sizes["tensor"]) * sizes["tensor"]
    kept = by_rules(plan, ORDERS["permuted"], embedding.padded_size, plan.specs[embedding.name])
    assert len(set(kept.values())) == sizes["fsdp"] * sizes["expert"] * sizes["tensor"]


@pytest.mark.parametrize("mesh", MESHES)
def test_placed_and_fetched_shards_keep_their_places(mesh: str) -> None:
    """`place_full` and `fetch` on a permuted mesh: position p holds slice p on device and host."""
    plan, order = plan_of(mesh), ORDERS["permuted"]
    devices = DeviceMesh(plan.mesh, order)
    row = next(row for row in plan.table if row.name == "lm_head.weight")
    spec = plan.specs[row.name]
    full = torch.randn(row.padded_size)
    placed = devices.place_full(full, spec)
    slices = shard_slices(row.padded_size, spec, plan.mesh.axis_sizes)
    for shard in xs.XLAShardedTensor(placed).local_shards:
        ordinal = int(shard.shard_device.split(":")[1])
        assert torch.equal(shard.data, full[slices[order.index(ordinal)]])
    (fetched,) = devices.fetch([placed])
    assert sorted(fetched) == list(range(8))
    assert all(torch.equal(piece, full[slices[position]]) for position, piece in fetched.items())
    assert torch.equal(devices.gather(placed), full)
