"""Writing weights as a checkpoint step without a run: block by block, whatever the size of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import torch

from tptrain.backends.base import TORCH_DTYPES, TensorSource
from tptrain.ckpt.arrays import chunk_shape, to_numpy
from tptrain.ckpt.host_array import HostArray, Pieces, array_item_handler
from tptrain.ckpt.publishing import publish
from tptrain.ckpt.steps import RUN
from tptrain.config.state_parts import PARAMS
from tptrain.family import ParamRow, stored_rows

# How tensorstore marks an error of the system in its message.
_OS_ERROR = "os_error_code="

OnBytes = Callable[[int], None]


def write_step(
    step_folder: Path,
    table: Sequence[ParamRow],
    source: TensorSource,
    run: Mapping[str, Any],
    dtype: str = "float32",
    progress: OnBytes = lambda num_bytes: None,
    moments: Mapping[str, TensorSource] | None = None,
) -> None:
    """Write a published step with the item `params` read from `source`, and `run`.

    source: read by blocks of whole rows, each row of the table from its first block to its last; a few blocks
            are in memory at a time.
    progress: told the bytes of each block as it is handed on.
    moments: item name, such as "mu" -> where its values are read from, in the same way.
    Raises OSError when the step cannot be written; what `source` raises passes through.
    """
    sources = {PARAMS: source, **(moments or {})}
    made = {item: array_item_handler() for item in sources}
    handlers = {item: handler for item, (handler, _) in made.items()}
    items = ocp.CompositeCheckpointHandler(**{RUN: ocp.JsonCheckpointHandler()}, **handlers)
    arrays = {
        item: ocp.args.PyTreeSave({row.name: _array(row, of, dtype, progress) for row in stored_rows(table)})
        for item, of in sources.items()
    }
    with ocp.Checkpointer(items) as orbax, _os_errors():
        args = ocp.args.Composite(**{RUN: ocp.args.JsonSave(dict(run))}, **arrays)
        orbax.save(step_folder.absolute(), args=args)
    publish(step_folder, int(run["step"]), {}, {item: writer for item, (_, writer) in made.items()})


@contextmanager
def _os_errors() -> Iterator[None]:
    """tensorstore has errors of the system as other kinds; they become OSErrors again."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        if _OS_ERROR not in str(error):
            raise
        raise OSError(str(error).splitlines()[0]) from error


def _array(row: ParamRow, source: TensorSource, dtype: str, progress: OnBytes) -> HostArray:
    numpy_dtype = to_numpy(torch.empty(0, dtype=TORCH_DTYPES[dtype])).dtype
    chunks = chunk_shape(row.size, row.size, numpy_dtype.itemsize)

    def pieces() -> Pieces:
        for start in range(0, row.size[0], chunks[0]):
            rows = slice(start, min(start + chunks[0], row.size[0]))
            where = (rows, *(slice(0, n) for n in row.size[1:]))
            values: np.ndarray = to_numpy(source.read(row, where).to(TORCH_DTYPES[dtype]).contiguous())
            yield where, values
            progress(values.nbytes)

    return HostArray(row.size, numpy_dtype, chunks, pieces)
