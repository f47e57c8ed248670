"""Weights in: every device gets its own slice of the files, bit for bit, and nothing is read twice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch_xla.distributed.spmd as xs

from tests import small
from tptrain.backends.base import Tensors
from tptrain.backends.xla.backend import XlaBackend
from tptrain.family import ParamRow, stored_rows
from tptrain.mesh import shard_slices
from tptrain.weights import SafetensorsSource

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)
MESHES = {"8x1": (8, 1, 1), "4x2": (4, 2, 1), "2x4": (2, 4, 1), "1x8": (1, 8, 1), "2x2x2": (2, 2, 2)}


class CountingSource:
    """Passes reads on and notes the slice of each."""

    def __init__(self, source: SafetensorsSource):
        self.source = source
        self.reads: dict[str, list[tuple[tuple[int, int], ...]]] = {}

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        bounds = tuple((part.start, part.stop) for part in index)
        self.reads.setdefault(row.name, []).append(bounds)
        return self.source.read(row, index)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """A folder that transformers saved, in several files, and whether its model is tied."""
    folder = tmp_path_factory.mktemp("saved")
    small.reference(request.param).save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder, request.param


def device_shards(tensor: torch.Tensor) -> dict[int, torch.Tensor]:
    """Mesh position -> what its device holds, as the runtime tells it."""
    shards = xs.XLAShardedTensor(tensor).local_shards
    return {PERMUTED.index(int(s.shard_device.split(":")[1])): s.data for s in shards}


def padded(row: ParamRow, weights: Tensors) -> torch.Tensor:
    """A row as it is in memory: zeros beyond its own size."""
    full = torch.zeros(row.padded_size)
    full[tuple(slice(0, size) for size in row.size)] = weights[row.name]
    return full


@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_gets_its_slices_and_each_slice_is_read_once(mesh: str, saved: tuple[Path, bool]) -> None:
    folder, tied = saved
    fsdp, tensor, data = MESHES[mesh]
    plan = small.small_plan(fsdp, tensor, data, config=small.LLAMA3_TIED if tied else small.LLAMA3)
    backend = XlaBackend(plan, PERMUTED)
    source = CountingSource(SafetensorsSource(folder, plan.table))
    placed = backend.place(source)
    weights = small.weights_of(small.reference(tied))
    sizes = plan.mesh.axis_sizes
    rows = {row.name: row for row in stored_rows(plan.table)}
    assert set(backend.layout.index) == set(rows) == set(source.reads)
    for buffer in backend.layout.buffers.values():
        held = device_shards(placed[buffer.name])
        assert sorted(held) == list(range(8))
        for index, row in enumerate(buffer.rows):
            full = padded(row, weights)
            slices = shard_slices(row.padded_size, plan.specs[row.name], sizes)
            for position, shard in held.items():
                mine = shard[index] if buffer.stacked else shard
                assert mine.dtype == torch.float32
                assert torch.equal(mine, full[slices[position]]), (row.name, position)
    for name, reads in source.reads.items():
        pieces = math.prod(sizes[axis] for axes in plan.specs[name] for axis in axes)
        read = sum(math.prod(stop - start for start, stop in bounds) for bounds in reads)
        assert len(set(reads)) == len(reads) <= pieces, f"{name}: a slice was read twice"
        assert read == rows[name].num_elements, f"{name}: read {read} of {rows[name].num_elements} elements"
        largest = max(math.prod(stop - start for start, stop in bounds) for bounds in reads)
        assert largest == math.prod(rows[name].padded_size) // pieces, f"{name}: more than a device's slice"


def test_zeros_lie_like_the_weights(saved: tuple[Path, bool]) -> None:
    """The optimizer's moments start at zero, split as the weights are: no whole copy on any device."""
    _, tied = saved
    plan = small.small_plan(2, 4, config=small.LLAMA3_TIED if tied else small.LLAMA3)
    backend = XlaBackend(plan, PERMUTED)
    created = backend.create(["nu"])["nu"]
    backend.sync()
    for name, tensor in created.items():
        buffer = backend.layout.buffers[name]
        pieces = math.prod(plan.mesh.axis_sizes[axis] for axes in buffer.spec for axis in axes)
        for shard in device_shards(tensor).values():
            assert shard.numel() == math.prod(buffer.shape) // pieces
            assert not shard.any()
