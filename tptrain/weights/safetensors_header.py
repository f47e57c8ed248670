"""Where the tensors of a safetensors file lie, and their bytes read without mapping the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tptrain.untrusted import printable

# The names of floating-point types in a header.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_LENGTH_BYTES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Extent:
    """One tensor of a file: its dtype as the format spells it, and where in the file its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def open_file(path: Path) -> tuple[Any, dict[str, Extent]]:
    """The library's handle of a safetensors file, and tensor name -> extent.

    The library checks the header: its size (100 MB at most), JSON, dtypes and shapes, and that the tensors
    cover the file without overlap or gap. It lets a second entry of the same name replace the first one, and
    takes any name; both are refused here, because a name is shown to people and must mean one tensor.
    Raises OSError, SafetensorError, or ValueError for what the library lets pass and this package does not.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if not path.is_file():
        raise OSError("it is a folder" if path.is_dir() else "it is not a regular file")
    handle: Any = safe_open(str(path), framework="pt")
    return handle, _extents(path)


def _extents(path: Path) -> dict[str, Extent]:
    """Parsed from a header that the library has accepted, so only what it lets pass is checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    start = _LENGTH_BYTES + length
    entries = {name: entry for name, entry in header.items() if name != _METADATA}
    for name in entries:
        if not name or not name.isprintable():
            raise ValueError(f"a tensor is named {name!r}")
    return {
        name: Extent(entry["dtype"], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
        for name, entry in entries.items()
    }


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the header names {printable(name)} twice")
        content[name] = value
    return content


def read_exactly(descriptor: int, view: np.ndarray, start: int) -> None:
    """Fill `view` (uint8) with the bytes at `start` of an open file. Raises OSError if it ends before."""
    done = 0
    while done < view.size:
        count = os.preadv(descriptor, [view[done:].data], start + done)
        if count == 0:
            raise OSError(f"the file ends at byte {start + done}: it was changed while it was read")
        done += count


def byte_blocks(path: Path, start: int, stop: int, block_bytes: int) -> Iterator[np.ndarray]:
    """The bytes `start` to `stop` of a file in blocks, all in one buffer: use each before the next.

    Read, not mapped: the pages of a mapping count as this process's memory until the kernel takes them back.
    """
    buffer = np.empty(min(block_bytes, stop - start), np.uint8)
    with path.open("rb", buffering=0) as file:
        for at in range(start, stop, block_bytes):
            block = buffer[: stop - at]
            read_exactly(file.fileno(), block, at)
            yield block
