"""A checkpoint's weights for a model whose vocabulary has grown: its rows, then the mean of them.

The mean is what transformers begins new rows with, but for the noise that it adds: here the same checkpoint
gives the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tptrain.backends.base import TensorSource
from tptrain.family import ParamRow
from tptrain.family.lora import model_rows

_BLOCK_BYTES = 64 * 2**20


class GrownVocab:
    """A TensorSource over another that holds `new_rows` fewer rows of the vocabulary.

    open_held: makes the other one, given the table that it holds. table: of the model.
    """

    def __init__(
        self,
        open_held: Callable[[Sequence[ParamRow]], TensorSource],
        table: Sequence[ParamRow],
        new_rows: int,
    ):
        self._held = {row.name: _shrunk(row, new_rows) for row in model_rows(table)}
        self._source = open_held(tuple(self._held.values()))
        self._means: dict[str, torch.Tensor] = {}

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        """The slice `index` of a row; in float32 or more where new rows are in it, else as it is held."""
        held = self._held[row.name]
        wanted, *columns = index
        count = held.size[0]
        if held.size == row.size or wanted.stop <= count:
            return self._source.read(held, index)
        (column,) = columns
        new = wanted.stop - max(wanted.start, count)
        mean = self._mean(held)[column].expand(new, -1)
        if wanted.start >= count:
            return mean.clone()
        known = self._source.read(held, (slice(wanted.start, count), column))
        return torch.cat([known.to(mean.dtype), mean])

    def _mean(self, held: ParamRow) -> torch.Tensor:
        """The mean of the rows, added up in float64 by blocks; every shard with new rows asks for it."""
        if held.name not in self._means:
            count, width = held.size
            step = max(_BLOCK_BYTES // (8 * width), 1)
            total, dtype = torch.zeros(width, dtype=torch.float64), torch.float32
            for start in range(0, count, step):
                rows = slice(start, min(start + step, count))
                block = self._source.read(held, (rows, slice(0, width)))
                dtype = torch.promote_types(dtype, block.dtype)
                total += block.double().sum(dim=0)
            self._means[held.name] = (total / count).to(dtype)
        return self._means[held.name]


def _shrunk(row: ParamRow, new_rows: int) -> ParamRow:
    """The row as the checkpoint holds it."""
    if "vocab" not in row.dims:
        return row
    assert row.dims[0] == "vocab", f"{row.name}: {row.dims}"
    return replace(row, size=(row.size[0] - new_rows, *row.size[1:]))
