"""A copy of the training state in host memory, taken between two steps and written while training goes on.

The memory is allocated once and used by every save: fresh memory would cost more to touch than to fill.
Shards leave the devices in small groups, so what is held beside the snapshot stays small.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tptrain.backends.base import Backend, Buffer, Tensors
from tptrain.backends.shards import Slices
from tptrain.ckpt.arrays import chunk_shape, to_numpy
from tptrain.ckpt.host_array import HostArray, Pieces
from tptrain.config.plan import Plan
from tptrain.family import ParamRow
from tptrain.mesh import Spec, shard_slices

# Shards are fetched in groups of about this size: larger ones are no faster, and their memory comes on top.
GROUP_BYTES = 32 * 2**20

AxisSizes = Mapping[str, int]


@dataclass(frozen=True)
class Piece:
    """A part of a row of the table that this process writes.

    position: the mesh position whose shard it is copied from.
    where:    slices of the row on disk; `inside`: of the shard, without its padding.
    """

    position: int
    where: Slices
    inside: Slices


def owned_pieces(buffer: Buffer, axis_sizes: AxisSizes, local_positions: Sequence[int]) -> list[Piece]:
    """The pieces of a buffer's rows that this process writes; over all processes, each exactly once.

    Devices that hold the same piece are replicas. Which of them writes it follows from the buffer's name, so
    that the processes share the work.
    """
    row = buffer.rows[0]
    holders: dict[tuple, list[int]] = {}
    memory = shard_slices(row.padded_size, buffer.row_spec, axis_sizes)
    for position, slices in enumerate(memory):
        holders.setdefault(tuple((s.start, s.stop) for s in slices), []).append(position)
    local, turn = set(local_positions), zlib.crc32(buffer.name.encode())
    pieces = []
    for positions in holders.values():
        writer = positions[turn % len(positions)]
        slices = memory[writer]
        lengths = [max(min(s.stop, n) - s.start, 0) for s, n in zip(slices, row.size, strict=True)]
        if writer in local and all(lengths):
            where = tuple(slice(s.start, s.start + n) for s, n in zip(slices, lengths, strict=True))
            pieces.append(Piece(writer, where, tuple(slice(0, n) for n in lengths)))
    return pieces


def row_chunks(row: ParamRow, spec: Spec, axis_sizes: AxisSizes, itemsize: int) -> tuple[int, ...]:
    """The chunks of a row on disk: those of the piece that a device holds."""
    first = shard_slices(row.padded_size, spec, axis_sizes)[0]
    return chunk_shape([s.stop - s.start for s in first], row.padded_size, itemsize)


class Snapshot:
    """Host copies of the parts of a state, and their HostArrays by part and row name.

    arrays: stay valid for the life of the snapshot; their values are those of the last `take`.
    """

    def __init__(self, plan: Plan, backend: Backend, parts: Sequence[str]):
        """Allocates memory for what this process writes: the state, without replicas and padding."""
        self._backend = backend
        sizes = plan.mesh.axis_sizes
        buffers = backend.layout.buffers
        self._pieces = {name: owned_pieces(b, sizes, backend.local_positions) for name, b in buffers.items()}
        self._copies = {part: {name: self._allocate(b) for name, b in buffers.items()} for part in parts}
        self.arrays = {
            part: {
                row.name: self._host_array(buffer, index, self._copies[part][buffer.name], sizes)
                for buffer in buffers.values()
                for index, row in enumerate(buffer.rows)
            }
            for part in parts
        }

    def _allocate(self, buffer: Buffer) -> list[torch.Tensor]:
        """One tensor per owned piece: [layers, ...] of a stacked buffer, [...] of another."""
        leading = (len(buffer.rows),) if buffer.stacked else ()
        shapes = [[s.stop - s.start for s in piece.where] for piece in self._pieces[buffer.name]]
        return [torch.empty((*leading, *shape), dtype=buffer.dtype) for shape in shapes]

    def _host_array(
        self, buffer: Buffer, index: int, copies: list[torch.Tensor], axis_sizes: AxisSizes
    ) -> HostArray:
        row, pieces = buffer.rows[index], self._pieces[buffer.name]

        def values() -> Pieces:
            for piece, copy in zip(pieces, copies, strict=True):
                yield piece.where, to_numpy(copy[index] if buffer.stacked else copy)

        chunks = row_chunks(row, buffer.row_spec, axis_sizes, buffer.dtype.itemsize)
        return HostArray(row.size, to_numpy(torch.empty(0, dtype=buffer.dtype)).dtype, chunks, values)

    def take(self, parts: Mapping[str, Tensors]) -> None:
        """Copy the parts (buffers by name) from the devices. The steps that make them are waited for."""
        self._backend.sync()
        for part, tensors in parts.items():
            # Not a group ahead in a thread: memory that another thread has freed is not used again.
            for group in _groups(tensors):
                fetched = self._backend.fetch_shards({name: tensors[name] for name in group})
                for name in group:
                    self._copy(name, fetched.pop(name), self._copies[part][name])

    def _copy(self, name: str, shards: Mapping[int, torch.Tensor], copies: list[torch.Tensor]) -> None:
        stacked = self._backend.layout.buffers[name].stacked
        leading = (slice(None),) if stacked else ()
        for piece, copy in zip(self._pieces[name], copies, strict=True):
            copy.copy_(shards[piece.position][(*leading, *piece.inside)])


def _groups(tensors: Tensors) -> Iterator[list[str]]:
    """Names in groups of about GROUP_BYTES; a larger tensor is a group of its own."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.nbytes
    if group:
        yield group
