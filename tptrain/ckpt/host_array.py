"""What Orbax is given to write: arrays in host memory, as the pieces that this process holds.

A jax.Array can be split only where its dims divide, so a vocabulary of 1031 over 4 devices has no jax.Array
of its true size. A HostArray is any set of pieces: padding is left out, each process writes its own pieces,
and weights that do not fit into memory come one block at a time. On disk it is the array that Orbax would
have written from a jax.Array, and Orbax restores it as one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future
from orbax.checkpoint.type_handlers import (
    ArrayHandler,
    ParamInfo,
    SaveArgs,
    TypeHandler,
    create_type_handler_registry,
)

from tptrain.backends.shards import Slices
from tptrain.ckpt.arrays import chunk_file, chunks_of, create_array
from tptrain.ckpt.digests import FileDigest, digest_chunk

# How much may be on its way to the disk at a time. It bounds the memory of weights that are read block by
# block, and of the copies that tensorstore makes; more of it is no faster.
IN_FLIGHT_BYTES = 64 * 2**20

Pieces = Iterable[tuple[Slices, np.ndarray]]


@dataclass(frozen=True)
class HostArray:
    """An array of a checkpoint, and the part of it that this process writes.

    shape:  elements per dim on disk. chunks: shape of a chunk (`chunk_shape`).
    pieces: gives (slices, values) of every piece this process writes; slices start at a chunk's edge and end
            at one or at the end of the array. Called once per save; the values must not change until the save
            is finished.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    pieces: Callable[[], Pieces]


class HostArrayHandler(TypeHandler):
    """Writes HostArrays for Orbax. `digests` holds, after a save, what this process has written.

    digests: path relative to the item's folder -> size and digest of the file, computed from the values in
             memory: bits that the way to the disk has changed are found as well.
    """

    def __init__(self) -> None:
        self.digests: dict[str, FileDigest] = {}
        self._idle = threading.Event()
        self._idle.set()

    def wait_idle(self, timeout_seconds: float) -> bool:
        """Whether nothing is being written, at the latest after that time.

        Orbax reports the first item that fails while others may go on, and writing makes folders anew.
        """
        return self._idle.wait(timeout_seconds)

    def typestr(self) -> str:
        return "jax.Array"

    async def metadata(self, infos: Sequence[ParamInfo]) -> Sequence[Any]:
        return await ArrayHandler().metadata(infos)

    async def serialize(
        self, values: Sequence[HostArray], infos: Sequence[ParamInfo], args: Sequence[SaveArgs] | None = None
    ) -> Sequence[Future]:
        self.digests = {}
        self._idle.clear()
        return [CommitFutureAwaitingContractedSignals(self._write(values, infos), name="host_arrays")]

    async def deserialize(self, infos: Sequence[ParamInfo], args: Any = None) -> Sequence[Any]:
        raise NotImplementedError("weights are read by tptrain.ckpt.reading, or by JAX")

    async def _write(self, values: Sequence[HostArray], infos: Sequence[ParamInfo]) -> None:
        context = ts.Context()
        queue: deque[tuple[Any, int]] = deque()
        try:
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                for started in self._start(value, info.name, Path(info.path), context):
                    queue.append(started)
                    while sum(size for _, size in queue) > IN_FLIGHT_BYTES:
                        queue.popleft()[0].result()
            for future, _ in queue:
                future.result()
        except BaseException:
            # What was started goes on writing; nobody may clear the folder away under it.
            for future, _ in queue:
                future.exception()
            raise
        finally:
            self._idle.set()

    def _start(
        self, value: HostArray, name: str, folder: Path, context: ts.Context
    ) -> Iterator[tuple[Any, int]]:
        """Start the write of every chunk; gives its future and size."""
        store = create_array(folder, value.shape, value.dtype, value.chunks, context)
        for where, data in value.pieces():
            for index, slices in chunks_of(where, value.chunks):
                inside = tuple(
                    slice(s.start - w.start, s.stop - w.start) for s, w in zip(slices, where, strict=True)
                )
                chunk = data[inside]
                self.digests[f"{name}/{chunk_file(index)}"] = digest_chunk(chunk, value.chunks)
                yield store[slices].write(chunk, can_reference_source_data_indefinitely=True), chunk.nbytes


def array_item_handler() -> tuple[ocp.PyTreeCheckpointHandler, HostArrayHandler]:
    """A handler for an item that is a flat dict of HostArrays, and its part that knows what was written."""
    arrays = HostArrayHandler()
    registry = create_type_handler_registry((HostArray, arrays))
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, type_handler_registry=registry, array_metadata_validator=None
    )
    return handler, arrays
