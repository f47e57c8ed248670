"""The stored rows of a model as one stream of cast pieces, small enough to be written while more is read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle

import numpy as np
import torch

from tptrain.errors import refuse
from tptrain.family.table import ParamRow
from tptrain.weights.read_ahead import read_ahead

# Gives the row blocks of one stored row, in order: see `export_folder`.
ReadBlocks = Callable[[ParamRow], Iterator[torch.Tensor]]

# How far the thread that reads and casts may be in front of the one that writes. More would only take memory.
PIECES_AHEAD = 2
# 2 MB of bfloat16: small enough for processor caches, large enough for a write.
_PIECE_ELEMENTS = 2**20
# Integers of a dtype's size, and the bits of its largest number.
_BITS = {
    torch.bfloat16: (np.int16, np.uint16, 0x7F7F),
    torch.float16: (np.int16, np.uint16, 0x7BFF),
    torch.float32: (np.int32, np.uint32, 0x7F7FFFFF),
}


def blocks_of(read: Callable[[ParamRow], torch.Tensor]) -> ReadBlocks:
    """A reader of blocks from a reader of whole tensors: one block per row."""
    return lambda row: iter([read(row)])


def cast_pieces(
    rows: Iterable[ParamRow], read_blocks: ReadBlocks, dtype: torch.dtype, setting: str
) -> Generator[tuple[ParamRow, torch.Tensor]]:
    """Every row in order as flat pieces in `dtype`, read and cast in one thread, ahead of whoever uses them.

    A piece is valid until the next one is asked for: a few buffers are used again and again, because memory
    that is new to the process costs more to touch than the cast itself. Raises ProblemsError of `setting` for
    a finite value that `dtype` cannot hold; what `read_blocks` raises passes through. Close it to stop the
    thread.
    """
    return read_ahead(_cast_blocks(rows, read_blocks, dtype, setting), PIECES_AHEAD)


def _cast_blocks(
    rows: Iterable[ParamRow], read_blocks: ReadBlocks, dtype: torch.dtype, setting: str
) -> Generator[tuple[ParamRow, torch.Tensor]]:
    # One for the piece in use, one for each that waits, of which the last is just being filled.
    ring = cycle([torch.empty(_PIECE_ELEMENTS, dtype=dtype) for _ in range(PIECES_AHEAD + 1)])
    with _one_torch_thread():
        for row, block in _row_blocks(rows, read_blocks):
            for piece in block.detach().reshape(-1).split(_PIECE_ELEMENTS):
                yield row, piece if piece.dtype == dtype else _cast(row, piece, next(ring), setting)
            del block, piece  # or they would stay in memory while the next block is read


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Have what torch does in the calling thread done by that thread alone; others are left as they are.

    It would wake helpers for a copy and wait until each has had its turn: milliseconds while reading and
    writing keep the processors busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row_blocks(
    rows: Iterable[ParamRow], read_blocks: ReadBlocks
) -> Generator[tuple[ParamRow, torch.Tensor]]:
    for row in rows:
        read = 0
        for block in read_blocks(row):
            assert block.shape[1:] == row.size[1:], (
                f"{row.name}: a block of {list(block.shape)} in {row.size}"
            )
            read += block.numel()
            yield row, block
            del block
        assert read == row.num_elements, f"{row.name}: {read} elements were read, not {row.num_elements}"


def _cast(row: ParamRow, piece: torch.Tensor, buffer: torch.Tensor, setting: str) -> torch.Tensor:
    cast, dtype = buffer[: len(piece)], buffer.dtype
    cast.copy_(piece)
    if torch.finfo(dtype).max < torch.finfo(piece.dtype).max and _may_overflow(cast):
        _refuse_overflow(row, piece, dtype, setting)
    return cast


def _may_overflow(cast: torch.Tensor) -> bool:
    """Whether any value is the largest of its dtype or beyond, infinite or NaN: rare, and looked at closer.

    Among floats of one sign the larger has the larger bits, which numpy compares in this thread and in place.
    """
    signed, unsigned, largest = _BITS[cast.dtype]
    bits, sign = cast.view(torch.uint8).numpy(), 1 << (8 * cast.itemsize - 1)
    if not bits.size:
        return False
    return bool(bits.view(signed).max() >= largest or bits.view(unsigned).max() >= sign + largest)


def _refuse_overflow(row: ParamRow, piece: torch.Tensor, dtype: torch.dtype, setting: str) -> None:
    finite, limit = piece[piece.isfinite()].abs(), torch.finfo(dtype).max
    largest = finite.max().item() if finite.numel() else 0.0
    if largest > limit:
        name = str(dtype).removeprefix("torch.")
        other = f"{row.name} has {largest:.6g}, the largest {name} is {limit:.6g}"
        rule, fix = "must be able to hold every weight", "'bfloat16' or 'float32'"
        raise refuse(setting, name, rule, other, fix)
