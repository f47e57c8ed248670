"""Reading an array's chunk files and checking their digests in one pass, a few MB at a time.

Checkpoints of this package are not compressed: the file of a chunk holds its values as they are. Blocks that
stay in the processor's cache are read, hashed and used about five times faster than whole chunks are, which
pass through memory each time (BUILD.md has the numbers).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from tptrain.backends.shards import Slices
from tptrain.ckpt.arrays import chunk_file
from tptrain.ckpt.digests import Damage, FileDigest
from tptrain.weights.safetensors_header import read_exactly

BLOCK_BYTES = 4 * 2**20
_METADATA_FILE = ".zarray"

_DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "bfloat16": torch.bfloat16}
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class ChunkDamage(Exception):
    """Files that are not what was saved."""

    def __init__(self, damages: list[Damage]):
        super().__init__(", ".join(map(str, damages)))
        self.damages = damages


@dataclass(frozen=True)
class PlainArray:
    """An array of at least one dim whose chunk files hold its values in C order.

    step_folder, path: where it is: `step_folder / path`, path being `ITEM/NAME`.
    """

    step_folder: Path
    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: torch.dtype

    def blocks(self, expected: Mapping[str, FileDigest] | None) -> Iterator[torch.Tensor]:
        """The array from its first to its last row, as private blocks of whole rows of about BLOCK_BYTES.

        expected: size and digest of each file of the step; None for nothing to compare with.
        A file is read once. ChunkDamage for it comes after the blocks that it was read for: they count for
        nothing until the iteration has ended.
        """
        for first in range(0, self.shape[0], self.chunks[0]):
            with ExitStack() as stack:
                chunks = [
                    stack.enter_context(_OpenChunk(self, index, expected)) for index in self._grid(first)
                ]
                yield from self._rows(first, chunks)
                found = [damage for chunk in chunks if (damage := chunk.damage()) is not None]
            if found:
                raise ChunkDamage(found)

    def _grid(self, first: int) -> Iterator[tuple[int, ...]]:
        """Grid indices of the chunks that hold the row `first`, a chunk's first one."""
        counts = [range(-(-n // c)) for n, c in zip(self.shape[1:], self.chunks[1:], strict=True)]
        yield from itertools.product([first // self.chunks[0]], *counts)

    def _rows(self, first: int, chunks: list[_OpenChunk]) -> Iterator[torch.Tensor]:
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(BLOCK_BYTES // max(row_bytes, 1), 1)
        last = min(first + self.chunks[0], self.shape[0])
        for start in range(first, last, step):
            block = torch.empty((min(step, last - start), *self.shape[1:]), dtype=self.dtype)
            words = block.view(_WORDS[self.dtype.itemsize]).numpy()
            for chunk in chunks:
                chunk.read_into(words)
            yield block
            del block, words  # or their memory could not be used for the next block


class _OpenChunk:
    """One chunk's file, read from front to back."""

    def __init__(self, array: PlainArray, index: tuple[int, ...], expected: Mapping[str, FileDigest] | None):
        self._name = f"{array.path}/{chunk_file(index)}"
        self._width = array.chunks[1:]
        self._where: Slices = tuple(
            slice(i * c, min((i + 1) * c, n))
            for i, c, n in zip(index[1:], array.chunks[1:], array.shape[1:], strict=True)
        )
        self._whole_rows = self._width == array.shape[1:]
        self._expected = expected
        self._hash, self._at = xxhash.xxh3_128(), 0
        self._path = array.step_folder / self._name
        self._size = math.prod(array.chunks) * array.dtype.itemsize

    def __enter__(self) -> _OpenChunk:
        try:
            self._file = self._path.open("rb", buffering=0)
        except OSError as error:
            raise ChunkDamage([Damage(self._name, error.strerror or str(error))]) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read_into(self, block: np.ndarray) -> None:
        """Fill this chunk's columns of the next rows. block: [rows, ...] as words, C order."""
        if self._whole_rows:
            self._next(block)
            return
        rows = np.empty((len(block), *self._width), block.dtype)
        self._next(rows)
        inside = tuple(slice(0, s.stop - s.start) for s in self._where)
        block[(slice(None), *self._where)] = rows[(slice(None), *inside)]

    def _next(self, words: np.ndarray) -> None:
        data = words.reshape(-1).view(np.uint8)
        try:
            read_exactly(self._file.fileno(), data, self._at)
        except OSError as error:
            raise ChunkDamage([Damage(self._name, str(error))]) from error
        self._at += data.size
        if self._expected is not None:
            self._hash.update(data.data)

    def damage(self) -> Damage | None:
        """What is wrong with the file. What lies behind the array's last row is read for the digest."""
        if self._expected is None:
            return None
        while self._at < self._size:
            self._next(np.empty(min(BLOCK_BYTES, self._size - self._at), np.uint8))
        if self._name not in self._expected:
            return Damage(self._name, "not in the manifest")
        same = self._expected[self._name] == (self._size, self._hash.hexdigest())
        return None if same else Damage(self._name, "its digest is not that of what was saved")


def plain_array(item: Path, name: str) -> PlainArray | None:
    """An array of an item, or None if its values are not plain: compressed, or in another layout."""
    try:
        metadata = json.loads((item / name / _METADATA_FILE).read_text("utf-8"))
        plain = (metadata["compressor"], metadata.get("filters"), metadata["order"]) == (None, None, "C")
        dtype = _DTYPES.get(metadata["dtype"])
        if not plain or dtype is None or not metadata["shape"]:
            return None
        if metadata.get("dimension_separator", ".") != ".":
            return None
        path = f"{item.name}/{name}"
        return PlainArray(item.parent, path, tuple(metadata["shape"]), tuple(metadata["chunks"]), dtype)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
