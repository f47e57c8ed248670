"""One tensor of an open safetensors file, read by slices or streamed by blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tptrain.weights.safetensors_header import FLOAT_DTYPES, Extent, byte_blocks, read_exactly

_COMPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose data stays on disk until a part of it is read.

    file: its file as the checkpoint names it. path: where that is. handle: the file, opened by the library.
    """

    name: str
    file: str
    path: Path
    extent: Extent
    handle: Any

    @property
    def dtype(self) -> str:
        """As the format spells it, such as "BF16"."""
        return self.extent.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.extent.shape

    @property
    def num_bytes(self) -> int:
        return self.extent.stop - self.extent.start

    def read(self, index: tuple[slice, ...]) -> torch.Tensor:
        """A private copy of one slice. Nothing outside the slice is read."""
        view = self.handle.get_slice(self.name)[index]
        # The view holds the whole mapped file; the copy does not, and is safe from later changes of the file.
        tensor: torch.Tensor = view.clone(memory_format=torch.contiguous_format)
        return tensor

    def read_blocks(self, max_bytes: int) -> Iterator[torch.Tensor]:
        """The tensor from its first to its last row, as private blocks of whole rows along dim 0.

        max_bytes: the most bytes of a block; a row that has more is a block of its own. Memory for blocks of
            32 MB and more comes fresh from the system each time: 1 GiB then takes 0.56 s in place of 0.12 s.
        An empty or 0-d tensor is one block. Only the blocks themselves count as memory of this process: see
        `byte_blocks`. Raises OSError if the file has become shorter since it was opened.
        """
        rows = self.shape[0] if self.shape else 1
        row_bytes = self.num_bytes // max(rows, 1)
        step = max(max_bytes // max(row_bytes, 1), 1)
        with self.path.open("rb", buffering=0) as file:
            for first in range(0, max(rows, 1), step):
                shape = (min(step, rows - first), *self.shape[1:]) if self.shape else ()
                block = torch.empty(shape, dtype=FLOAT_DTYPES[self.dtype])
                view = block.reshape(-1).view(torch.uint8).numpy()
                read_exactly(file.fileno(), view, self.extent.start + first * row_bytes)
                yield block
                del block, view  # or they would stay in memory beside the next block

    def same_bits(self, other: StoredTensor) -> bool:
        """Whether both hold the same bits in the same dtype and shape, compared a block at a time."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        pairs = zip(self._byte_blocks(), other._byte_blocks(), strict=True)
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)

    def _byte_blocks(self) -> Iterator[np.ndarray]:
        return byte_blocks(self.path, self.extent.start, self.extent.stop, _COMPARE_BYTES)


@dataclass(frozen=True)
class SlicedTensor:
    """A tensor of which files hold every slice along its first dim by itself; all of one dtype and shape.

    It is read as a `StoredTensor` is.
    """

    name: str
    slices: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> str:
        return self.slices[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.slices), *self.slices[0].shape)

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self.slices)

    def read(self, index: tuple[slice, ...]) -> torch.Tensor:
        """A private copy of one slice of the whole. Nothing outside of it is read."""
        first, *others = index
        wanted = self.slices[first]
        rest = (len(range(*part.indices(n))) for part, n in zip(others, self.shape[1:], strict=True))
        # Filled one by one: stacked, all of them would be in memory twice.
        whole = torch.empty((len(wanted), *rest), dtype=FLOAT_DTYPES[self.dtype])
        for own, stored in zip(whole, wanted, strict=True):
            own.copy_(stored.read(tuple(others)))
        return whole

    def read_blocks(self, max_bytes: int) -> Iterator[torch.Tensor]:
        """The whole as private blocks of whole slices; one larger than `max_bytes` is a block of its own."""
        step = max(max_bytes // max(self.slices[0].num_bytes, 1), 1)
        for first in range(0, len(self.slices), step):
            some = self.slices[first : first + step]
            block = torch.empty((len(some), *self.shape[1:]), dtype=FLOAT_DTYPES[self.dtype])
            for own, stored in zip(block, some, strict=True):
                view = own.reshape(-1).view(torch.uint8).numpy()
                with stored.path.open("rb", buffering=0) as file:
                    read_exactly(file.fileno(), view, stored.extent.start)
                del view
            yield block
            del block, own  # or they would stay in memory beside the next block
