"""Weights from a random generator, the same whichever device or host asks for which slice."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import torch

from tptrain.family.table import ParamRow

# Part of what a seed means: each block of so many rows along the first dim has a generator of its own.
BLOCK_ROWS = 1024


class RandomSource:
    """A TensorSource of new weights: float32, a pure function of (seed, row name, position in the row).

    A matrix is normal with mean 0 and standard deviation `initializer_range`; norms are ones, biases zeros.
    Only the blocks that a slice touches are generated. The blocks of the row asked for last are kept, up to
    `cache_bytes`, because each device of a host asks for its own slice of the same row.

    The generator is numpy's Philox: its numbers do not depend on the CPU's vector instructions, as torch's
    do, and its 128-bit key leaves no chance that two blocks share a stream.
    """

    def __init__(self, seed: int, initializer_range: float, cache_bytes: int = 512 * 2**20):
        self.seed = seed
        self.initializer_range = initializer_range
        self.blocks_generated = 0
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._cached_row = ""
        self._cache: dict[int, np.ndarray] = {}

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        """The slice `index` (step 1) of a row, as a float32 CPU tensor."""
        assert row.tied_to is None, f"{row.name} is tied to {row.tied_to} and has no data of its own"
        bounds = [part.indices(size) for part, size in zip(index, row.size, strict=True)]
        assert all(step == 1 for _, _, step in bounds), f"{row.name}: slices with a step are not supported"
        shape = [max(stop - start, 0) for start, stop, _ in bounds]
        if row.init != "normal":
            return torch.ones(shape) if row.init == "ones" else torch.zeros(shape)
        values = np.empty(shape, np.float32)
        if values.size:
            self._fill(values, row, bounds[0][0], bounds[0][1], index[1:])
        return torch.from_numpy(values)

    def _fill(self, out: np.ndarray, row: ParamRow, start: int, stop: int, rest: tuple[slice, ...]) -> None:
        """Write the part `start` to `stop` along the first dim, cut to `rest` in the others, into `out`."""
        for block in range(start // BLOCK_ROWS, (stop - 1) // BLOCK_ROWS + 1):
            first = block * BLOCK_ROWS
            low, high = max(start, first), min(stop, first + BLOCK_ROWS)
            within = slice(low - first, high - first)
            out[low - start : high - start] = self._block(row, block)[(within, *rest)]

    def _block(self, row: ParamRow, block: int) -> np.ndarray:
        with self._lock:
            if self._cached_row != row.name:
                self._cache.clear()
                self._cached_row = row.name
            if block in self._cache:
                return self._cache[block]
            values = self._generate(row, block)
            if sum(kept.nbytes for kept in self._cache.values()) + values.nbytes <= self._cache_bytes:
                self._cache[block] = values
            return values

    def _generate(self, row: ParamRow, block: int) -> np.ndarray:
        self.blocks_generated += 1
        digest = hashlib.sha256(f"{self.seed}/{row.name}/{block}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        rows = min(BLOCK_ROWS, row.size[0] - block * BLOCK_ROWS)
        values = generator.standard_normal((rows, *row.size[1:]), dtype=np.float32)
        values *= np.float32(self.initializer_range)
        return values
