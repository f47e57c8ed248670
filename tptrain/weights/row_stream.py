"""The stored rows of a model as cast pieces, a few MB at a time, several rows side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np
import torch

from tptrain.errors import refuse
from tptrain.family.table import ParamRow

# Gives the row blocks of one stored row, in order: see `export_folder`.
ReadBlocks = Callable[[ParamRow], Iterator[torch.Tensor]]

# How many rows are worked on at a time. Reading, casting, hashing and writing leave Python to others.
ROW_THREADS = 2
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


def for_each_row(
    rows: Iterable[ParamRow],
    pieces: Callable[[ParamRow], Generator[torch.Tensor]],
    use: Callable[[ParamRow, torch.Tensor], None],
) -> None:
    """Call `use(row, piece)` for every piece of every row; rows begin in order, ROW_THREADS at a time.

    The pieces of one row come in order and in one thread. What is raised ends all the others at their next
    piece, and is raised here when they have ended.
    """
    stop = threading.Event()

    def work(row: ParamRow) -> None:
        if stop.is_set():
            return
        try:
            for piece in pieces(row):
                if stop.is_set():
                    return
                use(row, piece)
        except BaseException:
            stop.set()
            raise

    with _one_torch_thread(), ThreadPoolExecutor(ROW_THREADS) as threads:
        futures = [threads.submit(work, row) for row in rows]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # nothing is left to stop, unless a row has failed or this thread was interrupted
            threads.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


def cast_row(
    row: ParamRow, read_blocks: ReadBlocks, dtype: torch.dtype, setting: str
) -> Generator[torch.Tensor]:
    """A row as flat pieces in `dtype`. A piece is valid until the next one is asked for.

    Raises ProblemsError of `setting` for a finite value that `dtype` cannot hold; what `read_blocks` raises
    passes through.
    """
    # Used again and again: memory that is new to the process costs more to touch than the cast itself.
    buffer = torch.empty(min(_PIECE_ELEMENTS, row.num_elements), dtype=dtype)
    read = 0
    for block in read_blocks(row):
        assert block.shape[1:] == row.size[1:], f"{row.name}: a block of {list(block.shape)} in {row.size}"
        read += block.numel()
        assert read <= row.num_elements, f"{row.name}: {read} elements were read, not {row.num_elements}"
        for piece in block.detach().reshape(-1).split(_PIECE_ELEMENTS):
            yield piece if piece.dtype == dtype else _cast(row, piece, buffer, setting)
        del block, piece  # or they would stay in memory while the next block is read
    assert read == row.num_elements, f"{row.name}: {read} elements were read, not {row.num_elements}"


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Have torch copy in the thread that asks for it, in the whole process.

    It would wake helpers and wait until each has had its turn: milliseconds for every copy while other
    threads keep the processors busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
