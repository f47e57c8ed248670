"""Between rows of the parameter table and the pieces of a backend's buffers, on the host."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from tptrain.backends.base import Backend, Buffer, HostShards, InPlaceSource, Tensors, TensorSource
from tptrain.config.state_parts import PARAMS
from tptrain.family import ParamRow

Slices = tuple[slice, ...]

# Slices read at a time: enough to keep a disk busy, few enough to be small beside a buffer.
_READERS = 4


def read_row_slice(row: ParamRow, wanted: Slices, source: TensorSource, out: torch.Tensor) -> None:
    """Fill `out` with the slice `wanted` (in padded coordinates) of a row; padding becomes zeros."""
    inside = tuple(slice(min(s.start, n), min(s.stop, n)) for s, n in zip(wanted, row.size, strict=True))
    lengths = [s.stop - s.start for s in inside]
    if list(out.shape) != lengths:
        out.zero_()
    if not all(lengths):
        return
    target = out[tuple(slice(0, n) for n in lengths)]
    if isinstance(source, InPlaceSource):
        source.read_into(row, inside, target)
    else:
        target.copy_(source.read(row, inside))


def read_buffer_shards(
    buffer: Buffer, slices: Mapping[int, Slices], source: TensorSource
) -> dict[int, torch.Tensor]:
    """Read the pieces of one buffer: mesh position -> CPU tensor.

    slices: mesh position -> slice of one row. Positions that hold the same slice share one tensor.
    """
    made: dict[tuple, torch.Tensor] = {}
    shards, reads = {}, []
    for position, wanted in slices.items():
        key = tuple((s.start, s.stop) for s in wanted)
        if key not in made:
            shape = [s.stop - s.start for s in wanted]
            piece = torch.empty([len(buffer.rows), *shape], dtype=buffer.dtype)
            reads += [(row, wanted, source, piece[index]) for index, row in enumerate(buffer.rows)]
            made[key] = piece if buffer.stacked else piece[0]
        shards[position] = made[key]
    with ThreadPoolExecutor(_READERS) as pool:
        for done in [pool.submit(read_row_slice, *read) for read in reads]:
            done.result()
    return shards


def split_rows(buffer: Buffer, shards: Mapping[int, torch.Tensor]) -> dict[str, HostShards]:
    """The pieces of a buffer as pieces of its rows (views)."""
    return {
        row.name: HostShards(
            row.padded_size,
            buffer.row_spec,
            {position: data[index] if buffer.stacked else data for position, data in shards.items()},
        )
        for index, row in enumerate(buffer.rows)
    }


def host_shards(backend: Backend, tensors: Tensors, part: str = PARAMS) -> dict[str, HostShards]:
    """Buffers of a part of the state -> its rows, as host copies of the shards that this process holds."""
    backend.sync()
    buffers = backend.layouts[part].buffers
    rows: dict[str, HostShards] = {}
    for name, shards in backend.fetch_shards(tensors).items():
        rows |= split_rows(buffers[name], {p: piece.clone() for p, piece in shards.items()})
    return rows
