"""Writing weights as a checkpoint step without a run: block by block, whatever the size of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import torch

from tptrain.backends.base import TORCH_DTYPES, TensorSource
from tptrain.ckpt.arrays import chunk_shape, to_numpy
from tptrain.ckpt.host_array import HostArray, Pieces, array_item_handler
from tptrain.ckpt.publishing import publish
from tptrain.ckpt.steps import PARAMS, RUN
from tptrain.family import ParamRow, stored_rows


def write_step(
    step_folder: Path,
    table: Sequence[ParamRow],
    source: TensorSource,
    run: Mapping[str, Any],
    dtype: str = "float32",
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write a published step with the item `params` read from `source`, and `run`.

    source: read by blocks of rows in table order; a few blocks are in memory at a time.
    progress: told the bytes of each block as it is handed on.
    """

    def array(row: ParamRow) -> HostArray:
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

    handler, writer = array_item_handler()
    items = ocp.CompositeCheckpointHandler(**{PARAMS: handler, RUN: ocp.JsonCheckpointHandler()})
    arrays = {row.name: array(row) for row in stored_rows(table)}
    with ocp.Checkpointer(items) as orbax:
        orbax.save(
            step_folder.absolute(),
            args=ocp.args.Composite(
                **{PARAMS: ocp.args.PyTreeSave(arrays), RUN: ocp.args.JsonSave(dict(run))}
            ),
        )
    publish(step_folder, int(run["step"]), {}, {PARAMS: writer})
