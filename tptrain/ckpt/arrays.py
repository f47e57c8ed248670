"""Arrays of a checkpoint on disk: zarr without compression, one file per chunk, through tensorstore.

Orbax reads and writes the same layout. Weights do not compress, so compressing them would only cost time;
plain files can be written from the memory that holds the values, and checked one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
import torch

from tptrain.backends.shards import Slices

# Chunks are at most this large where the split of the array allows it: what is read or written at a time.
CHUNK_BYTES = 64 * 2**20
# Arrays are converted by blocks of whole rows, at most this large.
BLOCK_BYTES = 128 * 2**20

_OCDBT_MARK = "manifest.ocdbt"


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor as an array over the same memory; bfloat16 through its bits, which numpy lacks."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The inverse of `to_numpy`."""
    writable = np.require(array, requirements=["C", "W"])
    if writable.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(writable)


def chunk_shape(piece: Sequence[int], shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """How an array that is split into equal pieces is cut into chunks: a piece, or equal parts of its rows.

    Every chunk belongs to one piece, so two processes never write the same file; and the rows that one row of
    chunks covers stay below BLOCK_BYTES, so an array of any size is read by blocks, each file once. Pieces
    whose rows have no good divisor stay whole.
    """
    if not piece:
        return ()
    most = min(
        CHUNK_BYTES // max(math.prod(piece[1:]) * itemsize, 1),
        BLOCK_BYTES // max(math.prod(shape[1:]) * itemsize, 1),
    )
    whole, most = max(piece[0], 1), max(most, 1)
    if whole <= most:
        return tuple(max(n, 1) for n in piece)
    if piece[0] == shape[0]:
        return (most, *piece[1:])
    rows = max(n for n in range(1, most + 1) if whole % n == 0)
    return (rows if 4 * rows >= most else whole, *piece[1:])


def chunks_of(wanted: Slices, chunks: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Slices]]:
    """The chunks that cover the slices `wanted`, which start at a chunk's edge: (grid index, slices)."""
    ranges = [range(s.start, s.stop, c) for s, c in zip(wanted, chunks, strict=True)]
    for corner in itertools.product(*ranges):
        slices = tuple(slice(a, min(a + c, s.stop)) for a, c, s in zip(corner, chunks, wanted, strict=True))
        yield tuple(a // c for a, c in zip(corner, chunks, strict=True)), slices


def chunk_file(grid_index: Sequence[int]) -> str:
    """The name of a chunk's file inside the folder of its array."""
    return ".".join(str(i) for i in grid_index) or "0"


def is_chunk(path: str) -> bool:
    """Whether a file of a step holds values, by its name; the others are small."""
    return path.rsplit("/", 1)[-1].replace(".", "").isdecimal()


def create_array(
    folder: Path, shape: Sequence[int], dtype: np.dtype, chunks: Sequence[int], context: ts.Context
) -> ts.TensorStore:
    """Make the array `folder`, or open it when another process has just made it."""
    metadata = {
        "shape": list(shape),
        "chunks": list(chunks),
        "dtype": "bfloat16" if dtype == ml_dtypes.bfloat16 else dtype.str,
        "compressor": None,
    }
    spec = {"driver": "zarr", "kvstore": _files(folder), "metadata": metadata}
    return ts.open(ts.Spec(spec), create=True, open=True, context=context).result()


def open_array(item: Path, name: str, context: ts.Context | None = None) -> ts.TensorStore:
    """An array of an Orbax item for reading, whichever of Orbax's layouts it was written in."""
    store: dict[str, Any] = _files(item / name)
    if (item / _OCDBT_MARK).exists():
        store = {"driver": "ocdbt", "base": f"file://{item.absolute()}/", "path": name}
    spec = {"driver": "auto", "kvstore": store}
    return ts.open(ts.Spec(spec), read=True, context=context).result()


def _files(folder: Path) -> dict[str, Any]:
    return {"driver": "file", "path": f"{folder.absolute()}/"}
