"""The copy that a save is written from, and the bridge to jax.Arrays: what is copied, how often, where."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from tests import small
from tptrain.backends.base import Buffer, HostShards
from tptrain.backends.shards import host_shards
from tptrain.backends.xla.backend import XlaBackend
from tptrain.backends.xla.capture import compile_count
from tptrain.ckpt.bridge import JaxSource, live_arrays, to_jax
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.ckpt.snapshot import Snapshot, owned_pieces
from tptrain.config import Plan
from tptrain.family import ParamRow, stored_rows
from tptrain.jaxside.flax_decoder import FlaxDecoder
from tptrain.jaxside.specs import jax_mesh, named_sharding
from tptrain.mesh import Spec

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)
MESHES = [(8, 1, 1), (4, 2, 1), (1, 8, 1), (2, 2, 2), (2, 1, 4), (1, 4, 2)]


def whole_source(plan: Plan, seed: int) -> small.DictSource:
    generator = torch.Generator().manual_seed(seed)
    rows = stored_rows(plan.table)
    return small.DictSource({row.name: torch.randn(row.size, generator=generator) for row in rows})


def made(fsdp: int, tensor: int, data: int = 1) -> tuple[Plan, XlaBackend]:
    plan = small.small_plan(fsdp, tensor, data)
    return plan, XlaBackend(plan, PERMUTED)


@pytest.mark.parametrize(("fsdp", "tensor", "data"), MESHES)
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_every_element_has_one_writer(fsdp: int, tensor: int, data: int, processes: int) -> None:
    """Whatever the mesh and however devices are shared among processes; replicas and padding are left out."""
    plan, backend = made(fsdp, tensor, data)
    for buffer in backend.layout.buffers.values():
        row = buffer.rows[0]
        written = np.zeros(row.size, int)
        for process in range(processes):
            local = tuple(range(process, 8, processes))
            for piece in owned_pieces(buffer, plan.mesh.axis_sizes, local):
                assert piece.position in local
                written[piece.where] += 1
        assert (written == 1).all(), buffer.name


def test_writers_take_turns_over_replicas() -> None:
    """With two replicas of everything, each writes a part of the buffers."""
    plan, backend = made(2, 2, data=2)
    buffers = backend.layout.buffers.values()
    pieces = [piece for b in buffers for piece in owned_pieces(b, plan.mesh.axis_sizes, range(8))]
    assert {piece.position // 4 for piece in pieces} == {0, 1}


def test_a_piece_that_is_all_padding_is_not_written() -> None:
    """9 rows over 8 devices are padded to 16: three devices hold nothing but padding."""
    row = ParamRow("w", ("vocab", "embed"), (9, 4), (16, 4))
    spec: Spec = (("tensor",), ())
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 8}
    pieces = owned_pieces(Buffer("w", (row,), False, spec), sizes, range(8))
    assert [(p.where[0].start, p.where[0].stop) for p in pieces] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]


def test_a_snapshot_uses_its_memory_again() -> None:
    plan, backend = made(4, 2)
    snapshot = Snapshot(plan, backend, ("params",))
    addresses = []
    for seed in (1, 2):
        source = whole_source(plan, seed)
        snapshot.take({"params": backend.place(source)})
        for name, array in snapshot.arrays["params"].items():
            for where, values in array.pieces():
                assert np.array_equal(values, source.tensors[name][where].numpy()), name
        addresses.append([v.ctypes.data for a in snapshot.arrays["params"].values() for _, v in a.pieces()])
    assert addresses[0] == addresses[1]


def test_saving_and_restoring_compile_nothing(tmp_path: Path) -> None:
    """A gather of a tensor is a program; shards are copied without one."""
    plan, backend = made(2, 4)
    params = backend.place(whole_source(plan, 1))
    backend.sync()
    before = compile_count()
    checkpointer = Checkpointer(plan, backend, tmp_path / "checkpoints")
    checkpointer.save(1, {"params": params}, {"step": 1})
    checkpointer.wait()
    checkpointer.restore(1, ("params",), lambda run: None)
    checkpointer.close()
    assert compile_count() == before


@pytest.mark.parametrize(("fsdp", "tensor", "data"), MESHES)
def test_live_buffers_as_jax_arrays_and_back(fsdp: int, tensor: int, data: int) -> None:
    plan, backend = made(fsdp, tensor, data)
    source = whole_source(plan, 3)
    arrays = live_arrays(plan, backend, backend.place(source))
    mesh = jax_mesh(plan.mesh)
    for row in stored_rows(plan.table):
        array = arrays[row.name]
        assert array.shape == row.size
        assert np.array_equal(np.asarray(array), source.tensors[row.name].numpy()), row.name
        if row.size == row.padded_size:
            assert array.sharding == named_sharding(mesh, plan.specs[row.name])
    held = host_shards(backend, backend.place(JaxSource(arrays)))
    for row in stored_rows(plan.table):
        whole = small.whole(held[row.name], plan.mesh.axis_sizes)
        assert torch.equal(whole[: row.size[0]], source.tensors[row.name]), row.name


def test_a_jax_array_shares_the_memory_of_the_shards() -> None:
    """No copy where JAX can use the memory as it is, which it asks to be aligned."""
    plan, backend = made(4, 2)
    row = next(r for r in plan.table if r.name.endswith("layers.0.mlp.up_proj.weight"))
    held = host_shards(backend, backend.place(whole_source(plan, 4)))[row.name]
    aligned = {p: aligned_copy(piece) for p, piece in held.shards.items()}
    array = to_jax(row, HostShards(held.shape, held.spec, aligned), jax_mesh(plan.mesh), plan.mesh.axis_sizes)
    theirs = {shard.device.id: shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
    assert theirs == {position: piece.data_ptr() for position, piece in aligned.items()}


def aligned_copy(piece: torch.Tensor, alignment: int = 64) -> torch.Tensor:
    room = torch.empty(piece.nbytes + alignment, dtype=torch.uint8)
    start = -room.data_ptr() % alignment
    copy = room[start : start + piece.nbytes].view(piece.dtype).view(piece.shape)
    return copy.copy_(piece)


def test_flax_runs_on_the_live_weights() -> None:
    """The buffers that torch_xla holds, sharded alike, through the Flax decoder: transformers' logits."""
    config = small.LLAMA3
    plan, backend = made(4, 2)
    model = small.reference_model(config)
    arrays = live_arrays(plan, backend, backend.place(small.DictSource(small.weights_of(model))))
    rows = small.packed_rows()
    inputs: Any = [jax.numpy.asarray(a) for a in (rows.tokens, rows.positions, rows.segment_ids)]
    ours = torch.from_numpy(np.asarray(FlaxDecoder(plan.facts, arrays)(*inputs)).copy())
    theirs = small.reference_logits(model, rows)
    real = torch.from_numpy(rows.real)
    assert small.difference(ours[real], theirs[real]) <= 1e-5


def test_the_rows_of_all_meshes_are_the_same_files(tmp_path: Path) -> None:
    """Saved from two meshes, restored on a third: the same bits, vocabulary of 1031 over 2, 4 and 8."""
    source = None
    for number, (fsdp, tensor) in enumerate(itertools.permutations((2, 4), 2)):
        plan, backend = made(fsdp, tensor)
        source = source or whole_source(plan, 5)
        checkpointer = Checkpointer(plan, backend, tmp_path / str(number))
        checkpointer.save(1, {"params": backend.place(source)}, {"step": 1})
        checkpointer.close()
        other, other_backend = made(1, 8)
        reader = Checkpointer(other, other_backend, tmp_path / str(number))
        buffers = reader.restore(1, ("params",), lambda run: None).parts["params"]
        whole = small.whole_rows(other_backend, other, buffers)
        for name, expected in source.tensors.items():
            assert torch.equal(whole[name][: expected.shape[0]], expected), name
        assert whole["lm_head.weight"].shape[0] == 1032 and not whole["lm_head.weight"][1031:].any()
