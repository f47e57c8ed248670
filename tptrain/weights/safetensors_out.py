"""Writing a safetensors file as a stream of row blocks; the library writes whole tensors from memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from tptrain.weights.file_space import reserve_space
from tptrain.weights.safetensors_header import FLOAT_DTYPES, Extent, byte_blocks, open_file

# transformers 4 refuses a file without it.
_METADATA = {"format": "pt"}
_DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
# Small enough to be still in the processor's cache when it is hashed.
_HASH_BLOCK_BYTES = 4 * 2**20
_HASH_THREADS = 2
_FLUSH_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FilePlan:
    """A file to be written: its tensors' names and sizes in the order of their data, all of one dtype."""

    name: str
    dtype: torch.dtype
    sizes: Mapping[str, tuple[int, ...]]

    def num_bytes(self, name: str) -> int:
        return math.prod(self.sizes[name]) * self.dtype.itemsize

    def header(self) -> bytes:
        """Length and JSON, padded so that the data starts at a multiple of 8 bytes."""
        entries: dict[str, object] = {"__metadata__": _METADATA}
        start = 0
        for name, size in self.sizes.items():
            offsets = [start, start + self.num_bytes(name)]
            entries[name] = {"dtype": _DTYPE_NAMES[self.dtype], "shape": list(size), "data_offsets": offsets}
            start = offsets[1]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Writes the new file `folder / plan.name`; its tensors are written by row blocks, also side by side.

    A context manager; `finish` ends the file, without it the file is incomplete. Blocks of another dtype, too
    many or too few are bugs of the caller. Raises OSError when the disk does, most often at once: the file
    has its room before its first tensor, where the file system can give it.
    """

    def __init__(self, folder: Path, plan: FilePlan):
        self._plan = plan
        self._file = open(folder / plan.name, "xb", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            header = plan.header()
            start = len(header)
            self._tensors: dict[str, _TensorWriter] = {}
            for name in plan.sizes:
                stop = start + plan.num_bytes(name)
                self._tensors[name] = _TensorWriter(self._file.fileno(), start, stop)
                start = stop
            reserve_space(self._file.fileno(), start)
            _write_at(self._file.fileno(), memoryview(header), 0)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, block: torch.Tensor) -> int:
        """Write the next rows of tensor `name`, a CPU tensor of the plan's dtype; returns their bytes.

        Each tensor is written by one thread, different ones by as many as there are.
        """
        assert name in self._tensors, f"{name} is not in {self._plan.name}"
        assert block.dtype == self._plan.dtype, f"{name}: a block of {block.dtype}, not {self._plan.dtype}"
        writer = self._tensors[name]
        assert block.nbytes <= writer.missing_bytes, (
            f"{name}: {block.nbytes - writer.missing_bytes} bytes too many"
        )
        # A view of the tensor's own memory as bytes: numpy has no bfloat16.
        data = block.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        writer.append(data)
        return data.nbytes

    def finish(self) -> dict[str, str]:
        """Flush the complete file to the disk; returns each tensor's xxh3_128 in hexadecimal digits."""
        for name, writer in self._tensors.items():
            assert not writer.missing_bytes, f"{name}: {writer.missing_bytes} bytes were not written"
        os.fsync(self._file.fileno())
        return {name: writer.hash.hexdigest() for name, writer in self._tensors.items()}


class _TensorWriter:
    """The bytes of one tensor, from `start` to `stop` of a file."""

    def __init__(self, descriptor: int, start: int, stop: int):
        self._descriptor, self._at, self._stop = descriptor, start, stop
        self._flushed = start
        self.hash = xxhash.xxh3_128()

    @property
    def missing_bytes(self) -> int:
        return self._stop - self._at

    def append(self, data: memoryview) -> None:
        self.hash.update(data)
        _write_at(self._descriptor, data, self._at)
        self._at += data.nbytes
        length = self._at - self._flushed
        if length >= _FLUSH_BYTES or self._at == self._stop:
            # Linux starts to write these pages to the disk, so `finish` waits less: 1 GiB of float32 is
            # exported in 0.34 s, without this in 0.43 s (medians of 16; 2 shared cores, ext4, Linux 6.18).
            # Being dirty, the pages stay in the cache, from which they are read back.
            os.posix_fadvise(self._descriptor, self._flushed, length, os.POSIX_FADV_DONTNEED)
            self._flushed = self._at


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data.nbytes:  # one call writes at most 2 GB
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def differences(folder: Path, plan: FilePlan, digests: Mapping[str, str]) -> list[str]:
    """Read a written file back: what in it differs from its plan, or from the bytes with these digests.

    The library reads the header. The data is read to the last byte, from the system's page cache as far as it
    is there. Raises OSError or SafetensorError if the file cannot be read at all.
    """
    path = folder / plan.name
    try:
        handle, extents = open_file(path)
    except ValueError as error:
        return [f"the header of {plan.name}: {error}"]
    different = extents.keys() ^ plan.sizes.keys()
    expected = _DTYPE_NAMES[plan.dtype]
    for name in extents.keys() & plan.sizes.keys():
        if (extents[name].dtype, extents[name].shape) != (expected, plan.sizes[name]):
            different.add(name)
    found = {name: extent for name, extent in extents.items() if name not in different}
    with ThreadPoolExecutor(_HASH_THREADS) as threads:
        hashes = threads.map(lambda extent: _digest(path, extent), found.values())
        different |= {name for name, digest in zip(found, hashes, strict=True) if digest != digests[name]}
    metadata = [] if handle.metadata() == _METADATA else [f"metadata of {plan.name}"]
    return [f"{name} in {plan.name}" for name in sorted(different)] + metadata


def _digest(path: Path, extent: Extent) -> str:
    digest = xxhash.xxh3_128()
    for block in byte_blocks(path, extent.start, extent.stop, _HASH_BLOCK_BYTES):
        digest.update(block.data)
    return digest.hexdigest()
