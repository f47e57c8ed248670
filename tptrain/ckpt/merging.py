"""A step of adapters read as the whole model: each adapted matrix is W + scale * B A, made as it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tptrain.backends.base import TORCH_DTYPES, TensorSource
from tptrain.backends.shards import Slices
from tptrain.ckpt.reading import StepReader
from tptrain.config.trainable import FROZEN_DTYPE
from tptrain.family import ParamRow
from tptrain.family.lora import module_of

# Of a matrix in float32. A few times as much is in memory for each row that is read: what came from the base,
# and the result.
_BLOCK_BYTES = 8 * 2**20


class MergedReader:
    """The weights of the model with its adapters merged, as a TensorSource and by whole rows.

    The base is rounded to the format that it was frozen in, so the merged model is the one that was trained;
    the sum is made in float32, and left in it.
    """

    def __init__(self, base: TensorSource, adapters: StepReader, table: Sequence[ParamRow], scale: float):
        """table: with the rows of the adapters, which `adapters` holds. scale: alpha / rank."""
        self._base, self._adapters, self._scale = base, adapters, scale
        pairs: dict[str, list[ParamRow]] = {}
        for row in table:
            if row.is_adapter:
                pairs.setdefault(module_of(row), []).append(row)
        self._pairs = {f"{module}.weight": (a, b) for module, (a, b) in pairs.items()}

    def read(self, row: ParamRow, index: Slices | None = None) -> torch.Tensor:
        """A row or a slice of it, as a private CPU tensor; in float32 where there is an adapter."""
        index = index or tuple(slice(0, n) for n in row.size)
        weight = self._base.read(row, index).to(TORCH_DTYPES[FROZEN_DTYPE])
        if row.name not in self._pairs:
            return weight
        a, b = self._pairs[row.name]
        rows, columns = index
        whole = slice(0, a.size[0])
        up = self._adapters.read(b, (rows, whole)).float()
        down = self._adapters.read(a, (whole, columns)).float()
        return torch.addmm(weight.float(), up, down, alpha=self._scale)

    def read_blocks(self, row: ParamRow) -> Iterator[torch.Tensor]:
        """A row as consecutive private blocks of whole rows."""
        row_bytes = 4 * row.num_elements // max(row.size[0], 1)
        step = max(_BLOCK_BYTES // max(row_bytes, 1), 1)
        rest = tuple(slice(0, n) for n in row.size[1:])
        for start in range(0, row.size[0], step):
            yield self.read(row, (slice(start, min(start + step, row.size[0])), *rest))
