"""Between rows of the parameter table and the pieces of a backend's buffers, on the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tptrain.backends.base import Buffer, HostShards, TensorSource
from tptrain.family import ParamRow

Slices = tuple[slice, ...]


def read_row_slice(row: ParamRow, wanted: Slices, source: TensorSource, out: torch.Tensor) -> None:
    """Fill `out` with the slice `wanted` (in padded coordinates) of a row; padding becomes zeros."""
    inside = tuple(slice(min(s.start, n), min(s.stop, n)) for s, n in zip(wanted, row.size, strict=True))
    lengths = [s.stop - s.start for s in inside]
    if list(out.shape) != lengths:
        out.zero_()
    if all(lengths):
        out[tuple(slice(0, n) for n in lengths)].copy_(source.read(row, inside))


def read_buffer_shards(
    buffer: Buffer, slices: Mapping[int, Slices], source: TensorSource
) -> dict[int, torch.Tensor]:
    """Read the pieces of one buffer: mesh position -> CPU tensor.

    slices: mesh position -> slice of one row. Positions that hold the same slice share one tensor.
    """
    made: dict[tuple, torch.Tensor] = {}
    shards = {}
    for position, wanted in slices.items():
        key = tuple((s.start, s.stop) for s in wanted)
        if key not in made:
            shape = [s.stop - s.start for s in wanted]
            piece = torch.empty([len(buffer.rows), *shape], dtype=buffer.dtype)
            for index, row in enumerate(buffer.rows):
                read_row_slice(row, wanted, source, piece[index])
            made[key] = piece if buffer.stacked else piece[0]
        shards[position] = made[key]
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


def stack_rows(buffer: Buffer, rows: Mapping[str, HostShards]) -> dict[int, torch.Tensor]:
    """The inverse of `split_rows`."""
    parts = [rows[row.name].shards for row in buffer.rows]
    if not buffer.stacked:
        return dict(parts[0])
    return {position: torch.stack([part[position] for part in parts]) for position in parts[0]}
