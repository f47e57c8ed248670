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
from tptrain.heap import trim_heap
from tptrain.mesh import Spec, shard_slices

# Shards are fetched in groups of about this size: larger ones are no faster, and their memory comes on top,
# twice, as a literal of the runtime and as tensors.
GROUP_BYTES = 8 * 2**20

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


class _BufferCopy:
    """Host memory for the pieces of one buffer that this process writes."""

    def __init__(self, buffer: Buffer, axis_sizes: AxisSizes, local_positions: Sequence[int]):
        self.buffer = buffer
        self._pieces = owned_pieces(buffer, axis_sizes, local_positions)
        self._leading = (len(buffer.rows),) if buffer.stacked else ()
        shapes = [[s.stop - s.start for s in piece.where] for piece in self._pieces]
        # One tensor per owned piece: [layers, ...] of a stacked buffer, [...] of another.
        self._tensors = [torch.empty((*self._leading, *shape), dtype=buffer.dtype) for shape in shapes]

    def take(self, shards: Mapping[int, torch.Tensor]) -> None:
        """Copy the pieces from the shards of the devices."""
        leading = (slice(None),) * len(self._leading)
        for piece, tensor in zip(self._pieces, self._tensors, strict=True):
            tensor.copy_(shards[piece.position][(*leading, *piece.inside)])

    def host_array(self, index: int, axis_sizes: AxisSizes) -> HostArray:
        """The row at `index` of the buffer, over this memory."""
        buffer = self.buffer

        def values() -> Pieces:
            for piece, tensor in zip(self._pieces, self._tensors, strict=True):
                yield piece.where, to_numpy(tensor[index] if buffer.stacked else tensor)

        row = buffer.rows[index]
        chunks = row_chunks(row, buffer.row_spec, axis_sizes, buffer.dtype.itemsize)
        return HostArray(row.size, to_numpy(torch.empty(0, dtype=buffer.dtype)).dtype, chunks, values)


class Snapshot:
    """Host copies of the parts of a state, and their HostArrays by part and row name.

    arrays: stay valid for the life of the snapshot; their values are those of the last `take`.
    """

    def __init__(self, plan: Plan, backend: Backend, parts: Sequence[str]):
        """Allocates memory for what this process writes: what is saved, without replicas and padding."""
        trim_heap()  # placing the state has left room for half of it in the heap, where none of this goes
        self._backend = backend
        sizes, local = plan.mesh.axis_sizes, backend.local_positions
        self._copies = {
            part: {
                name: _BufferCopy(buffer, sizes, local)
                for name, buffer in backend.layouts[part].buffers.items()
                if buffer.saved
            }
            for part in parts
        }
        self.arrays = {
            part: {
                row.name: copy.host_array(index, sizes)
                for copy in copies.values()
                for index, row in enumerate(copy.buffer.rows)
            }
            for part, copies in self._copies.items()
        }

    def take(self, parts: Mapping[str, Tensors]) -> None:
        """Copy the parts (buffers by name) from the devices. The steps that make them are waited for."""
        self._backend.sync()
        # Not a group ahead in a thread: memory that another thread has freed is not used again.
        for group in _groups(parts):
            fetched = self._backend.fetch_shards({"/".join(key): parts[key[0]][key[1]] for key in group})
            for part, name in group:
                self._copies[part][name].take(fetched.pop(f"{part}/{name}"))


def _groups(parts: Mapping[str, Tensors]) -> Iterator[list[tuple[str, str]]]:
    """(part, name) in groups of about GROUP_BYTES; a larger tensor is a group of its own.

    The largest come first: what they have freed then has room for every later one.
    """
    sizes = {(part, name): t.nbytes for part, tensors in parts.items() for name, t in tensors.items()}
    group: list[tuple[str, str]] = []
    group_bytes = 0
    for key, size in sorted(sizes.items(), key=lambda item: item[1], reverse=True):
        if group and group_bytes + size > GROUP_BYTES:
            yield group
            group, group_bytes = [], 0
        group.append(key)
        group_bytes += size
    if group:
        yield group
